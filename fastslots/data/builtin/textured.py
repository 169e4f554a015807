"""Built-in data: the scenes of ``sprites`` before clouds of two colours, their shapes striped or chequered.

Places, shapes and base colours are those of ``SpritesDataset`` of the same seed and index. No pixel has the colour of
its object's or its background's mean, so what groups pixels by colour alone finds patches of pattern and cloud.
"""

from __future__ import annotations

import numpy as np

from fastslots.data.builtin.sprites import SpritesDataset, rgb, to_uint8
from fastslots.data.sampling import random_u64

CELLS = (2, 4, 8)
"""Cells a side of the grids of random numbers whose smooth sum is a cloud (value noise), each half as strong."""
STRIPES = (3.0, 6.0)
"""Least and most periods of a pattern over the picture's side."""
DARKER = 0.45
"""Brightness of a pattern's dark parts."""
_STREAM = 1 << 20  # of these random numbers, apart from the attempts of the shapes


class TexturedSpritesDataset(SpritesDataset):
    """As ``SpritesDataset``, with patterns on shapes and a clouded background."""

    KIND = "generated textured sprites"

    def _render(self, owner: np.ndarray, drawn: np.ndarray, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        most, side = self.objects[1], owner.shape[1]
        at = (np.arange(side, dtype=np.float32) + np.float32(0.5)) / np.float32(side)
        samples = np.empty((*owner.shape, 3), np.float32)
        base = rgb(drawn[:, :, 4], drawn[:, :, 5], drawn[:, :, 6])
        for i, index in enumerate(indices):
            u = self._uniform(int(index), 6 + 3 * most + sum((c + 1) ** 2 for c in CELLS))
            samples[i] = self._background(u[:6], u[6 + 3 * most :], at)
            for j in range(most):
                here = owner[i] == j + 1
                if here.any():
                    bright = _pattern(u[6 + 3 * j : 9 + 3 * j], at)[here]
                    samples[i][here] = base[i, j] * bright[:, None]
        image = samples.reshape(len(owner), side // 2, 2, side // 2, 2, 3).mean((2, 4))
        masks = super()._render(owner, drawn, indices)[1]
        return to_uint8(image), masks

    def _uniform(self, index: int, count: int) -> np.ndarray:
        bits = random_u64(self.seed, index, _STREAM, np.arange(count))
        return (bits >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24)

    def _background(self, u: np.ndarray, noise: np.ndarray, at: np.ndarray) -> np.ndarray:
        """[side, side, 3]: two dim colours mixed by a cloud."""
        cloud, first, strength = np.zeros((len(at), len(at)), np.float32), 0, 0.5
        for cells in CELLS:
            corners = noise[first : first + (cells + 1) ** 2].reshape(cells + 1, cells + 1)
            cloud += np.float32(strength) * _smooth(corners, at * cells)
            first, strength = first + (cells + 1) ** 2, strength / 2
        cloud = np.clip(cloud / np.float32(0.875), 0, 1)[..., None]
        hue, saturation, value = np.array([u[0], u[3]]), 0.2 + 0.5 * u[[1, 4]], 0.1 + 0.4 * u[[2, 5]]
        one, other = rgb(hue, saturation.astype(np.float32), value.astype(np.float32))
        mixed: np.ndarray = one + (other - one) * cloud
        return mixed


def _smooth(corners: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Corners of cells [n+1, n+1] -> their smooth interpolation at every pair of places ``at`` (in cells)."""
    cell = np.minimum(at.astype(np.int64), len(corners) - 2)
    t = at - cell
    t = t * t * (3 - 2 * t)
    rows = corners[cell] * (1 - t)[:, None] + corners[cell + 1] * t[:, None]  # [side, n+1]
    smooth: np.ndarray = rows[:, cell] * (1 - t) + rows[:, cell + 1] * t
    return smooth


def _pattern(u: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Brightness [side, side] of stripes at an angle, or of a chequerboard."""
    periods = STRIPES[0] + (STRIPES[1] - STRIPES[0]) * u[1]
    angle = np.pi * u[0]
    y, x = at[:, None], at[None, :]
    along = np.cos(angle) * x + np.sin(angle) * y
    across = np.cos(angle) * y - np.sin(angle) * x
    dark = np.floor(2 * periods * along) % 2 != 0
    if u[2] < 0.5:
        dark = dark ^ (np.floor(2 * periods * across) % 2 != 0)
    return np.where(dark, np.float32(DARKER), np.float32(1))
