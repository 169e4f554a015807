"""Built-in data: rendered scenes of spheres, cubes and cylinders on a floor, in CLEVR's manner, without a download.

The recipe follows the generator of CLEVR (Johnson et al., CVPR 2017): 3 to 6 objects of two sizes, two materials and
eight colours; places at random, with distances between them along both axes of the view; a camera and lamps that move a
little; and a scene in which an object shows too few pixels is drawn again. The pictures are ``raytrace``'s, so these
scenes are not CLEVR, and scores on them are none on CLEVR. Scene i depends on (seed, i) alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from fastslots.data.builtin.base import BuiltinScenes
from fastslots.data.builtin.geometry import Objects, View
from fastslots.data.builtin.raytrace import LAMP_POSITIONS, render
from fastslots.data.holdout import Holdout
from fastslots.data.sampling import random_u64

SHAPES = ("cube", "sphere", "cylinder")
SIZES = ("large", "small")
MATERIALS = ("rubber", "metal")
COLOURS = {
    "gray": (87, 87, 87),
    "red": (173, 35, 35),
    "blue": (42, 75, 215),
    "green": (29, 105, 20),
    "brown": (129, 74, 25),
    "purple": (129, 38, 192),
    "cyan": (41, 208, 208),
    "yellow": (255, 238, 51),
}
"""Each channel over 255 is taken for a share of linear light, as the published generator hands it to its renderer."""
ALBEDO = 0.68
"""Of a channel of 255; fitted, with the lamps' powers, to the means of 300 path-traced scenes."""
HALF_SIZES = (0.7, 0.35)
AREA = 3.0
"""Centres lie in [-3, 3]² of the floor."""
GAP, MARGIN = 0.25, 0.4
"""Least free floor between two objects, and least distance of their centres along each axis of the view."""
EYE, EYE_JITTER, LAMP_JITTER = (7.38, -6.53, 5.34), 0.5, 1.0
MIN_PIXELS = 200 / 288**2
"""Share of the picture that each object must show: 200 pixels of the published 480 x 320, whose crop is 288 wide."""
PLACES = 50
"""Places tried for an object before its scene is drawn again."""
ATTEMPTS = 200
FACTORS = ("x", "y", "rotation", "shape", "size", "material", "color")
_DRAWS = 5  # of an object, besides its places: rotation, shape, size, material, colour
_VIEW = 12  # numbers of the camera (3) and the lamps (9)


class ScenesDataset(BuiltinScenes):
    """Scenes made when they are asked for.

    Args:
        seed: of the whole set; validation uses another.
        size: side R in pixels. objects: least and most objects of a scene.
        count: length of the set.
        avoid: scenes with such an object are drawn again.
    """

    KIND = "generated scenes"
    WORDS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "shape": SHAPES,
        "size": SIZES,
        "material": MATERIALS,
        "color": tuple(COLOURS),
    }

    def __init__(
        self,
        seed: int = 0,
        size: int = 128,
        objects: tuple[int, int] = (3, 6),
        count: int = 10_000,
        avoid: Holdout | None = None,
    ):
        least, most = objects
        if not 16 <= size <= 1024 or count < 1 or not 1 <= least <= most <= 10:
            expected = "16 <= size <= 1024, count >= 1 and 1 <= objects <= 10"
            raise ValueError(f"{expected} expected, got {size}, {count}, {objects}")
        self.seed, self.size, self.objects, self.count, self.avoid = seed, size, (least, most), count, avoid

    def scenes(self, indices: np.ndarray | range) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """images uint8 [n, R, R, 3], masks uint8 [n, R, R], factors [n, max objects]; codes count from 1."""
        n, most = len(indices), self.objects[1]
        images = np.zeros((n, self.size, self.size, 3), np.uint8)
        masks = np.zeros((n, self.size, self.size), np.uint8)
        codes = set(self.WORDS)
        factors = {name: np.zeros((n, most), np.uint8 if name in codes else np.float32) for name in FACTORS}
        for i, index in enumerate(np.asarray(indices)):
            images[i], masks[i], of_objects = self._scene(int(index))
            for name, values in of_objects.items():
                factors[name][i, : len(values)] = values
        return images, masks, factors

    def _scene(self, index: int) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        for attempt in range(ATTEMPTS):
            factors, view = self._draw(index, attempt)
            if factors is None or (self.avoid and self._avoided(factors)):
                continue
            image, mask = render(_objects(factors), view, self.size)
            shown = np.bincount(mask.ravel(), minlength=len(factors["x"]) + 1)[1:]
            if shown.min() >= max(1, MIN_PIXELS * self.size**2):
                return image, mask, factors
        raise ValueError(
            f"scene {index} of seed {self.seed}: {ATTEMPTS} draws of {self.objects[0]} to {self.objects[1]} objects "
            "gave none in which each is seen and allowed: ask for fewer objects, or narrow the holdout"
        )

    def _draw(self, index: int, attempt: int) -> tuple[dict[str, np.ndarray] | None, View]:
        """Factors of a scene's objects, None where one found no place, and its view."""
        least, most = self.objects
        per_object = _DRAWS + 2 * PLACES
        bits = random_u64(self.seed, index, attempt, np.arange(1 + _VIEW + most * per_object))
        u = (bits >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24)  # [0, 1), exact in fp32
        count = least + int(u[0] * (most - least + 1))
        jitter = 2 * u[1 : 1 + _VIEW] - 1
        eye = (np.array(EYE) + EYE_JITTER * jitter[:3]).astype(np.float32)
        lamps = (LAMP_POSITIONS + LAMP_JITTER * jitter[3:].reshape(3, 3)).astype(np.float32)
        view = View(eye, lamps)
        drawn = u[1 + _VIEW :].reshape(most, per_object)[:count]
        size = 1 + np.floor(2 * drawn[:, 2]).astype(np.uint8)
        places = AREA * (2 * drawn[:, _DRAWS:].reshape(count, PLACES, 2) - 1)
        chosen = _place(places, np.array(HALF_SIZES)[size - 1], eye)
        if chosen is None:
            return None, view
        return {
            "x": chosen[:, 0],
            "y": chosen[:, 1],
            "rotation": (2 * np.pi * drawn[:, 0]).astype(np.float32),
            "shape": 1 + np.floor(3 * drawn[:, 1]).astype(np.uint8),
            "size": size,
            "material": 1 + np.floor(2 * drawn[:, 3]).astype(np.uint8),
            "color": 1 + np.floor(len(COLOURS) * drawn[:, 4]).astype(np.uint8),
        }, view

    def _avoided(self, factors: dict[str, np.ndarray]) -> bool:
        assert self.avoid is not None
        present = np.ones((1, len(factors["x"])), bool)
        return bool(self.avoid.matches({name: values[None] for name, values in factors.items()}, present)[0])


def _place(candidates: np.ndarray, half: np.ndarray, eye: np.ndarray) -> np.ndarray | None:
    """The first candidate [n, tries, 2] of each object that keeps its distance from those before it, as [n, 2]."""
    ahead = -eye[:2] / np.sqrt(np.sum(eye[:2] ** 2))
    across = np.array([ahead[1], -ahead[0]], np.float32)
    chosen = np.zeros((0, 2), np.float32)
    for i, tries in enumerate(candidates):
        apart = tries[:, None] - chosen[None]  # [tries, i, 2]
        far = np.sqrt((apart**2).sum(-1)) >= half[:i] + half[i] + GAP
        for axis in (ahead, across):
            far &= np.abs(apart[..., 0] * axis[0] + apart[..., 1] * axis[1]) >= MARGIN
        good = np.flatnonzero(far.all(1))
        if not len(good):
            return None
        chosen = np.concatenate([chosen, tries[good[:1]]])
    return chosen


def _objects(factors: dict[str, np.ndarray]) -> Objects:
    palette = np.array(list(COLOURS.values()), np.float32) * np.float32(ALBEDO / 255)
    return Objects(
        shape=factors["shape"],
        x=factors["x"],
        y=factors["y"],
        half=np.array(HALF_SIZES, np.float32)[factors["size"] - 1],
        angle=factors["rotation"],
        albedo=palette[factors["color"] - 1],
        metal=factors["material"] == 2,
    )
