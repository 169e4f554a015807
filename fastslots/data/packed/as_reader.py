"""A packed folder read as a source of scenes, so that it is resized or filtered as any other data set is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fastslots.data.packed.dataset import UNKNOWN, PackedDataset
from fastslots.data.readers.scene import BadRecordError, Scene

ROWS = 64  # read at once


class PackedReader:
    """Raises UserError where the folder is damaged."""

    crop = False

    def __init__(self, path: Path):
        self._path, self._data = path, PackedDataset(path)
        self._data.verify()
        info = self._data.info
        self.kind, self.published_split, self.native = info.kind, info.published_split, (info.size, info.size)
        self.skipped, self.ignore_label, self.read_as = info.skipped, info.ignore_label, info.read_as
        self.parts = info.parts

    def at_most(self, max_objects: int | None) -> int | None:
        """Objects of a scene, with the filter of the folder. UserError where that has dropped what is asked for."""
        return PackedDataset(self._path, max_objects).info.max_objects

    def share(self, done: int) -> float:
        return done / len(self._data)

    def scenes(self, start: int = 0) -> Iterator[Scene | BadRecordError]:
        for first in range(start, len(self._data), ROWS):
            rows = np.arange(first, min(first + ROWS, len(self._data)))
            images, masks = self._data.batch(rows)
            factors = self._data.factors_of(rows)
            for i, row in enumerate(rows):
                objects = int(self._data.objects[row])
                yield Scene(
                    images[i],
                    None if masks is None else masks[i],
                    None if objects == UNKNOWN else objects,
                    {name: values[i] for name, values in factors.items()},
                )
