"""Built-in data: coloured circles, squares and triangles on black, with occlusion, masks and generating factors.

Image i depends on (seed, i) alone. Shapes are painted in order, each over those before it; a scene in which less than
35 % of a shape stays visible is drawn again. Edges are antialiased by 2x2 samples a pixel; a mask label is the shape
that owns most of a pixel's samples, numbered from 1 in painter's order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from fastslots.data.builtin.base import BuiltinScenes
from fastslots.data.holdout import Holdout
from fastslots.data.sampling import random_u64

SHAPES = ("circle", "square", "triangle")
RADIUS = (0.11, 0.19)  # of the picture's side
MIN_VISIBLE = 0.35
ATTEMPTS = 64
AVOIDING = 16  # times as many attempts: leaves one scene in 10^20 of a rule that nine in ten break
_DRAWS = 7  # random numbers a shape: y, x, radius, shape, hue, saturation, value
# Factors of a scene: arrays [n, max objects], 0 beyond the scene's count
FACTORS = ("y", "x", "radius", "shape", "hue", "saturation", "value")


class SpritesDataset(BuiltinScenes):
    """Scenes made on the fly; map-style, of any length.

    Args:
        seed: of the whole set; validation uses another.
        size: side R in pixels. objects: least and most shapes of a scene.
        count: length of the set; scenes beyond the first few thousand cost nothing until asked for.
        avoid: scenes with such an object are drawn again.
    """

    KIND = "generated sprites"
    WORDS: ClassVar[Mapping[str, tuple[str, ...]]] = {"shape": SHAPES}

    def __init__(
        self,
        seed: int = 0,
        size: int = 32,
        objects: tuple[int, int] = (2, 3),
        count: int = 1 << 31,
        avoid: Holdout | None = None,
    ):
        least, most = objects
        if not 4 <= size <= 4096 or count < 1 or not 1 <= least <= most <= 12:
            expected = "4 <= size <= 4096, count >= 1 and 1 <= objects <= 12"
            raise ValueError(f"{expected} expected, got {size}, {count}, {objects}")
        self.seed, self.size, self.objects, self.count, self.avoid = seed, size, (least, most), count, avoid
        self._window = np.arange(int(np.ceil(2 * RADIUS[1] * 2 * size)) + 1)  # samples that any shape fits into

    def scenes(self, indices: np.ndarray | range) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """Images, masks and factors of many scenes at once; those that hide a shape are drawn again together."""
        indices = np.asarray(indices)
        n, most = len(indices), self.objects[1]
        images = np.zeros((n, self.size, self.size, 3), np.uint8)
        masks = np.zeros((n, self.size, self.size), np.uint8)
        factors = np.zeros((n, most, _DRAWS), np.float32)
        pending = np.arange(n)
        attempts = ATTEMPTS * (AVOIDING if self.avoid else 1)
        for attempt in range(attempts):
            drawn, present = self._draw(indices[pending], attempt)
            owner, visible = self._paint(drawn, present)
            # The last attempt is taken as it is: reached by fewer than one scene in 10^9 at the default sizes.
            wanted = (visible | ~present).all(1)
            if self.avoid:
                wanted &= ~self.avoid.matches(_named(drawn, present), present)
            good = wanted | (attempt == attempts - 1)
            place = pending[good]
            images[place], masks[place] = self._render(owner[good], drawn[good], indices[place])
            factors[place] = np.where(present[good, :, None], drawn[good], 0)
            pending = pending[~good]
            if not len(pending):
                break
        return images, masks, _named(factors, factors[:, :, FACTORS.index("radius")] > 0)

    def _draw(self, indices: np.ndarray, attempt: int) -> tuple[np.ndarray, np.ndarray]:
        """Random factors [n, most, 7] in their ranges, and which shapes exist [n, most]."""
        least, most = self.objects
        counters = np.arange(most * _DRAWS + 1)
        bits = random_u64(self.seed, indices[:, None], attempt, counters[None, :])
        u = (bits >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24)  # [0, 1), exact in fp32
        present = np.arange(most)[None, :] < least + np.floor(u[:, -1:] * (most - least + 1))
        y, x, r, shape, hue, saturation, value = np.moveaxis(u[:, :-1].reshape(-1, most, _DRAWS), -1, 0)
        radius = RADIUS[0] + (RADIUS[1] - RADIUS[0]) * r
        y, x = radius + (1 - 2 * radius) * y, radius + (1 - 2 * radius) * x  # wholly inside the picture
        shape = np.floor(shape * len(SHAPES))
        factors = (y, x, radius, shape, hue, 0.4 + 0.6 * saturation, 0.6 + 0.4 * value)
        return np.stack(factors, -1).astype(np.float32), present

    def _paint(self, drawn: np.ndarray, present: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Owner of each sample [n, 2R, 2R] (0 = background), and which shapes stay visible enough [n, most]."""
        n, most, _ = drawn.shape
        samples = 2 * self.size  # of a side
        owner = np.zeros((n, samples, samples), np.uint8)
        area = np.zeros((n, most), np.int64)
        scene = np.arange(n)[:, None, None]
        for j in range(most):
            y, x, radius, shape = (drawn[:, j, i, None] for i in range(4))
            # Only the samples around the shape: [n, window] rows and columns, clipped by the picture
            rows = np.floor((y - radius) * samples).astype(np.int64) + self._window
            columns = np.floor((x - radius) * samples).astype(np.int64) + self._window
            dy = ((rows + 0.5) / samples - y).astype(np.float32)[:, :, None]
            dx = ((columns + 0.5) / samples - x).astype(np.float32)[:, None, :]
            radius, shape = radius[:, :, None], shape[:, :, None]
            inside = np.where(
                shape == 0,
                dy * dy + dx * dx <= radius * radius,
                np.where(
                    shape == 1,
                    np.maximum(abs(dy), abs(dx)) <= radius * np.float32(0.9),
                    # apex up: width grows from 0 at the top to 2·radius at the base
                    (abs(dy) <= radius) & (2 * abs(dx) <= dy + radius),
                ),
            )
            inside &= present[:, j, None, None] & (rows < samples)[:, :, None] & (columns < samples)[:, None, :]
            area[:, j] = inside.sum((1, 2))
            rows, columns = np.minimum(rows, samples - 1)[:, :, None], np.minimum(columns, samples - 1)[:, None, :]
            place = np.broadcast_arrays(scene, rows, columns)
            owner[tuple(axis[inside] for axis in place)] = j + 1
        left = np.stack([(owner == j + 1).sum((1, 2)) for j in range(most)], 1)
        return owner, left >= np.maximum(MIN_VISIBLE * area, 1)

    def _render(self, owner: np.ndarray, drawn: np.ndarray, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """uint8 images and masks from the owner of every sample; ``indices`` of these scenes are for other paints."""
        n, most = drawn.shape[:2]
        palette = np.zeros((n, most + 1, 3), np.float32)
        palette[:, 1:] = rgb(drawn[:, :, 4], drawn[:, :, 5], drawn[:, :, 6])
        first, *others = (owner[:, y::2, x::2] for y in (0, 1) for x in (0, 1))  # [n, R, R] each
        masks = np.ascontiguousarray(first)
        images = to_uint8(palette)[np.arange(n)[:, None, None], masks]
        # That is all for pixels with one owner; the others, few and along edges, mix colours and vote.
        mixed = np.zeros(masks.shape, bool)
        for other in others:
            mixed |= other != first
        place = np.nonzero(mixed)
        samples = np.stack([part[place] for part in (first, *others)])  # [4, pixels]
        images[place] = to_uint8(sum(palette[place[0], part] for part in samples) / 4)
        votes = np.stack([(samples == label).sum(0, dtype=np.uint8) for label in range(most + 1)])
        masks[place] = votes.argmax(0)
        return images, masks


def _named(factors: np.ndarray, present: np.ndarray) -> dict[str, np.ndarray]:
    """[n, most, 7] -> name -> [n, most]; shapes count from 1, 0 = none."""
    named = {name: factors[:, :, i] for i, name in enumerate(FACTORS)}
    return named | {"shape": np.where(present, named["shape"].astype(np.uint8) + 1, 0).astype(np.uint8)}


def to_uint8(colours: np.ndarray) -> np.ndarray:
    return (colours * 255 + 0.5).astype(np.uint8)


def rgb(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    """HSV in [0, 1] to RGB in [0, 1], as ``colorsys.hsv_to_rgb``, for arrays."""
    sector = hue[..., None] * 6 + np.array([5, 3, 1], np.float32)
    k = sector % 6
    colours: np.ndarray = value[..., None] * (1 - saturation[..., None] * np.clip(np.minimum(k, 4 - k), 0, 1))
    return colours
