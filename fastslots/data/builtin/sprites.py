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
        n, most, samples = len(indices), self.objects[1], 2 * self.size
        owner = np.zeros((n, samples, samples), np.uint8)
        factors, present = np.zeros((n, most, _DRAWS), np.float32), np.zeros((n, most), bool)
        pending = np.arange(n)
        attempts = ATTEMPTS * (AVOIDING if self.avoid else 1)
        for attempt in range(attempts):
            drawn, exist = self._draw(indices[pending], attempt)
            painted, visible = self._paint(drawn, exist)
            # The last attempt is taken as it is: reached by fewer than one scene in 10^9 at the default sizes.
            good = visible | (attempt == attempts - 1)
            if self.avoid and attempt < attempts - 1:
                good &= ~self.avoid.matches(_named(drawn, exist), exist)
            place = pending[good]
            owner[place], factors[place], present[place] = painted[good], drawn[good], exist[good]
            pending = pending[~good]
            if not len(pending):
                break
        images, masks = self._render(owner, factors, indices)
        return images, masks, _named(np.where(present[:, :, None], factors, 0), present)

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
        """Owner of each sample [n, 2R, 2R] (0 = background), and whether all shapes of a scene stay visible [n]."""
        samples, window = 2 * self.size, self._window
        scene, number = np.nonzero(present)  # of all shapes at once
        y, x, radius, shape = drawn[scene, number, :4].T
        # Only the samples around a shape: windows of rows and columns, clipped by the picture
        top, left = (np.floor((at - radius) * samples).astype(np.int64) for at in (y, x))
        rows, columns = top[:, None] + window, left[:, None] + window
        dy = ((rows + 0.5) / samples - y[:, None]).astype(np.float32)[:, :, None]
        dx = ((columns + 0.5) / samples - x[:, None]).astype(np.float32)[:, None, :]
        inside = np.empty((len(scene), len(window), len(window)), bool)
        for kind, covers in enumerate((_circle, _square, _triangle)):
            of = np.flatnonzero(shape == kind)
            inside[of] = covers(dy[of], dx[of], radius[of, None, None])
        inside &= (rows < samples)[:, :, None] & (columns < samples)[:, None, :]
        canvas = np.zeros((len(drawn), samples + len(window), samples + len(window)), np.uint8)  # with a margin
        windows = np.lib.stride_tricks.sliding_window_view(canvas, (len(window),) * 2, (1, 2), writeable=True)
        for j in range(drawn.shape[1]):
            of = np.flatnonzero(number == j)
            place = scene[of], top[of], left[of]
            windows[place] = np.where(inside[of], np.uint8(j + 1), windows[place])
        stays = (windows[scene, top, left] == (number + 1)[:, None, None]).sum((1, 2))
        hidden = stays < np.maximum(MIN_VISIBLE * inside.sum((1, 2)), 1)
        return canvas[:, :samples, :samples], np.bincount(scene, hidden, len(drawn)) == 0

    def _render(self, owner: np.ndarray, drawn: np.ndarray, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """uint8 images and masks from the owner of every sample; ``indices`` of these scenes are for other paints."""
        n, most = drawn.shape[:2]
        palette = np.zeros((n, most + 1, 3), np.float32)
        palette[:, 1:] = rgb(drawn[:, :, 4], drawn[:, :, 5], drawn[:, :, 6])
        colours = palette.reshape(-1, 3)
        samples = np.stack([owner[:, y::2, x::2] for y in (0, 1) for x in (0, 1)]).reshape(4, -1)  # of each pixel
        masks = samples[0].copy()
        row = (np.arange(0, len(colours), most + 1)[:, None] + masks.reshape(n, self.size**2)).reshape(-1)  # of colours
        images = np.take(to_uint8(colours), row, axis=0)
        # That is all for pixels with one owner; the others, few and along edges, mix colours and vote.
        mixed = np.flatnonzero((samples[1:] != samples[0]).any(0))
        owners = samples[:, mixed]
        scene = row[mixed] - masks[mixed]
        images[mixed] = to_uint8(sum(colours[scene + part] for part in owners) / 4)
        votes = np.stack([(owners == label).sum(0, dtype=np.uint8) for label in range(most + 1)])
        masks[mixed] = votes.argmax(0)
        return images.reshape(n, self.size, self.size, 3), masks.reshape(n, self.size, self.size)


def _circle(dy: np.ndarray, dx: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Which places, relative to its centre, a shape covers."""
    covered: np.ndarray = dy * dy + dx * dx <= radius * radius
    return covered


def _square(dy: np.ndarray, dx: np.ndarray, radius: np.ndarray) -> np.ndarray:
    half = radius * np.float32(0.9)
    return (abs(dy) <= half) & (abs(dx) <= half)


def _triangle(dy: np.ndarray, dx: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Apex up: its width grows from 0 at the top to 2·radius at the base."""
    covered: np.ndarray = (abs(dy) <= radius) & (2 * abs(dx) <= dy + radius)
    return covered


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
