"""What all built-in data have in common: scenes drawn from (seed, index) alone, map-style, of any length."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import numpy as np


class BuiltinScenes(ABC):
    """A map-style data set of scenes that are made when they are asked for.

    ``size``: side R of the pictures in pixels. ``count``: the length of the set.
    """

    KIND: ClassVar[str]
    """What a packed folder of such scenes says it holds."""
    WORDS: ClassVar[Mapping[str, tuple[str, ...]]]
    """Names of the values of factors that are codes, counted from 1."""

    info = ignore_label = None
    by_range = False
    size: int
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, object]:
        """{"image": uint8 [R,R,3], "mask": uint8 [R,R], "factors": {name: [max objects]}}"""
        if not -self.count <= index < self.count:
            raise IndexError(index)
        images, masks, factors = self.scenes(np.array([index % self.count]))
        return {"image": images[0], "mask": masks[0], "factors": {name: v[0] for name, v in factors.items()}}

    def batch(self, indices: np.ndarray, masks: bool = True) -> tuple[np.ndarray, np.ndarray | None]:
        """images uint8 [n, R, R, 3], masks uint8 [n, R, R]; None where they are not wanted"""
        images, labels, _ = self.scenes(np.asarray(indices))
        return images, labels if masks else None

    def factors_of(self, indices: np.ndarray | range) -> dict[str, np.ndarray]:
        """Generating factors [n, max objects] by name, 0 beyond a scene's count."""
        return self.scenes(indices)[2]

    @abstractmethod
    def scenes(self, indices: np.ndarray | range) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """Images, masks and factors of many scenes at once. Mask label i is entry i - 1 of the factors."""
