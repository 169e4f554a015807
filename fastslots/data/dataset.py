"""What a data set is inside the package, and the part of one that a run reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from fastslots.data.packed.dataset import DatasetInfo


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


def read_rows(
    dataset: SceneDataset, rows: np.ndarray | Sequence[int], masks: bool = True
) -> tuple[Tensor, Tensor | None]:
    """``SceneDataset.batch`` as tensors."""
    rows = np.asarray(rows)
    images, labels = dataset.batch(rows) if masks or not dataset.by_range else dataset.batch(rows, masks=False)
    return torch.from_numpy(np.ascontiguousarray(images)), None if labels is None else torch.from_numpy(labels)
