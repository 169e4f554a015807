"""What a data set is inside the package, and the part of one that a run reads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from fastslots.data.packed.dataset import DatasetInfo
from fastslots.errors import UserError


@runtime_checkable
class SceneDataset(Protocol):
    """Scenes by number, 0 to len - 1. ``map_style.as_scenes`` makes one of whatever Python code hands over."""

    @property
    def info(self) -> DatasetInfo | None:
        """Of a set on disk; None where scenes are made on the fly, or come from Python code."""

    @property
    def by_range(self) -> bool:
        """Whether reading a batch is requests to object storage: then more are read ahead, and no masks in training."""

    @property
    def ignore_label(self) -> int | None:
        """The mask label of pixels that are not scored; None: all are."""

    def __len__(self) -> int: ...

    def batch(self, indices: np.ndarray, masks: bool = True) -> tuple[np.ndarray, np.ndarray | None]:
        """Images uint8 [n, R, R, 3], or floats [n, C, R, R]; masks [n, H, W], 0 = background, or None without any."""

    def factors_of(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Generating factors of these images by name, [n, ...] each; {} where the data tell none."""


@dataclass(frozen=True)
class Split:
    """Some scenes of a data set, in an order: train, val or test, or a part of one (``split[:10]``)."""

    dataset: SceneDataset
    rows: range | np.ndarray  # their numbers in the data set
    unscored: int | None = None  # the mask label of pixels that are not scored; None: as the data set says

    @property
    def ignore_label(self) -> int | None:
        return self.dataset.ignore_label if self.unscored is None else self.unscored

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, part: slice) -> Split:
        return replace(self, rows=self.rows[part])

    def read(self, places: np.ndarray | None = None, masks: bool = True) -> tuple[Tensor, Tensor | None]:
        """Images and masks of all scenes, or of those at ``places`` in this split; see ``SceneDataset.batch``.

        masks: False leaves them out where reading them has a price (``by_range``).
        """
        return read_rows(self.dataset, self._numbers(places), masks)

    def factors(self) -> dict[str, np.ndarray]:
        """Generating factors of all scenes."""
        return self.dataset.factors_of(np.asarray(self.rows))

    def _numbers(self, places: np.ndarray | None) -> np.ndarray:
        if places is None:
            return np.asarray(self.rows)
        if isinstance(self.rows, range):  # of billions of scenes that are made on the fly
            return self.rows.start + self.rows.step * places
        numbers: np.ndarray = self.rows[places]
        return numbers


class MixedScenes:
    """Scenes of two splits, the second's by ``share`` of all: a ``SceneDataset`` to draw training images from.

    Every scene of both is there, those of one of them several times; drawn without an end, the two come as the share
    says. There are no factors, for the two may tell different ones.

    Raises UserError where images of the two differ in shape or type.
    """

    def __init__(self, first: Split, second: Split, share: float):
        self._first, self._second = first, second
        size = math.ceil(max(len(second) / share, len(first) / (1 - share)))
        self._cut = round((1 - share) * size)  # before it is the first's
        self._size = size
        own, other = ((image.shape[1:], image.dtype) for image, _ in (part[:1].read() for part in (first, second)))
        if own != other:
            raise UserError(
                f"mix: its images are {list(other[0])} of {other[1]}, those of data {list(own[0])} of {own[1]}: "
                f"name sets of one kind"
            )

    @property
    def info(self) -> DatasetInfo | None:
        return self._first.dataset.info if self._second.dataset.info else None

    @property
    def by_range(self) -> bool:
        return self._first.dataset.by_range or self._second.dataset.by_range

    @property
    def ignore_label(self) -> int | None:
        return self._first.ignore_label

    def __len__(self) -> int:
        return self._size

    def batch(self, indices: np.ndarray, masks: bool = True) -> tuple[np.ndarray, np.ndarray | None]:
        """As ``SceneDataset.batch``; no masks where one of the two has none."""
        indices = np.asarray(indices)
        firsts = indices < self._cut
        parts = [(self._first, firsts, 0), (self._second, ~firsts, self._cut)]
        read = [(rows, *of.read((indices[rows] - start) % len(of), masks)) for of, rows, start in parts if rows.any()]
        images = _put_together(len(indices), [(rows, part) for rows, part, _ in read])
        labels = _put_together(len(indices), [(rows, part) for rows, _, part in read])
        assert images is not None
        return images, labels

    def factors_of(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        return {}


def _put_together(count: int, parts: list[tuple[np.ndarray, Tensor | None]]) -> np.ndarray | None:
    """One array of parts, each with its rows (bool [count]); None where one has nothing."""
    arrays = [part.numpy() for _, part in parts if part is not None]
    if len(arrays) < len(parts):
        return None
    whole = np.empty((count, *arrays[0].shape[1:]), np.result_type(*arrays))
    for (rows, _), array in zip(parts, arrays, strict=True):
        whole[rows] = array
    return whole


def read_rows(
    dataset: SceneDataset, rows: np.ndarray | Sequence[int], masks: bool = True
) -> tuple[Tensor, Tensor | None]:
    """``SceneDataset.batch`` as tensors."""
    rows = np.asarray(rows)
    images, labels = dataset.batch(rows) if masks or not dataset.by_range else dataset.batch(rows, masks=False)
    return torch.from_numpy(np.ascontiguousarray(images)), None if labels is None else torch.from_numpy(labels)
