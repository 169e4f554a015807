"""The object-centric-library's HDF5 files: ``image``, ``mask``, ``num_actual_objects``, ``visibility``, factors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fastslots.data.items import to_labels, to_uint8
from fastslots.data.readers.npz import MOST_BYTES, MOST_RATIO
from fastslots.data.readers.scene import BadRecordError, Scene
from fastslots.errors import UserError

MAGIC = b"\x89HDF\r\n\x1a\n"
ROWS = 64  # read at once: chunks hold several rows, and each read decodes whole chunks
_NOT_FACTORS = ("image", "mask", "num_actual_objects")


class Hdf5Reader:
    published_split = False

    def __init__(self, path: Path):
        try:
            import h5py
        except ImportError:
            raise UserError(f"{path} is HDF5, which needs h5py: pip install 'fastslots[hdf5]'") from None
        self._path = path
        try:
            file = h5py.File(path, "r")
            # Links and storage in other files could name anything on this machine: such data sets count as missing.
            own = [name for name in file if isinstance(file.get(name, getlink=True), h5py.HardLink)]
            self._sets: dict[str, Any] = {name: file[name] for name in own if isinstance(file[name], h5py.Dataset)}
            self._sets = {name: s for name, s in self._sets.items() if not s.external and not s.is_virtual}
            self._numeric = [name for name, s in self._sets.items() if s.dtype.kind in "iufb"]  # some types have none
        except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
            raise UserError(f"{path} cannot be read as HDF5 ({error}): download it again") from None
        images = self._sets.get("image")
        if images is None or images.ndim != 4 or images.shape[3] not in (1, 3) or not len(images):
            raise UserError(f"{path}: no data set 'image' [N, H, W, 3] (it has {', '.join(self._sets)})")
        self._count: int
        self._count, height, width, _ = images.shape
        claimed, size = images.dtype.itemsize * math.prod(images.shape), path.stat().st_size
        if claimed > (1 << 20) + MOST_RATIO * size:
            raise UserError(
                f"{path}: image claims {claimed:,} bytes, more than a file of {size:,} can hold: download it again"
            )
        self.native = (height, width)
        mask = self._sets.get("mask")
        if mask is not None and mask.shape not in (images.shape[:3], (*images.shape[:3], 1)):
            raise UserError(f"{path}: mask has shape {list(mask.shape)}, expected {[*images.shape[:3], 1]}")
        # By what it holds besides: other sets are of this size too, and are cropped as any other.
        self.crop = self.native == (240, 320) and {"material", "size", "shape", "color"} <= set(self._sets)
        name = "CLEVR with masks" if self.crop else "multi-object set"
        self.kind = f"{name} (object-centric-library HDF5)"

    def share(self, done: int) -> float:
        return done / self._count

    def scenes(self, start: int = 0) -> Iterator[Scene | BadRecordError]:
        names = [name for name in self._numeric if self._sets[name].shape[:1] == (self._count,)]
        row_bytes = sum(self._sets[name].dtype.itemsize * math.prod(self._sets[name].shape[1:]) for name in names)
        if row_bytes > MOST_BYTES:
            raise UserError(f"{self._path}: a scene of {row_bytes:,} bytes is too large: make the images smaller")
        for name in names:  # a chunk is decoded whole, and a few kB may hold one of gigabytes
            chunk = self._sets[name].dtype.itemsize * math.prod(self._sets[name].chunks or ())
            if chunk > MOST_BYTES:
                raise UserError(f"{self._path}: {name} has chunks of {chunk:,} bytes, too large: write smaller ones")
        at_once = max(1, min(ROWS, MOST_BYTES // max(row_bytes, 1)))
        for first in range(start, self._count, at_once):
            last = min(first + at_once, self._count)
            try:
                rows = {name: self._sets[name][first:last] for name in names}
            except (OSError, RuntimeError) as error:
                reason = f"rows {first} to {last} cannot be read ({error}): download the file again"
                yield from [BadRecordError(f"{self._path}: {reason}")] * (last - first)
                continue
            for i in range(last - first):
                try:
                    yield self._scene({name: values[i] for name, values in rows.items()}, first + i)
                except UserError as error:
                    yield BadRecordError(str(error))

    def _scene(self, row: dict[str, np.ndarray], index: int) -> Scene:
        image = to_uint8(row["image"], f"{self._path}: image[{index}]")
        mask, objects = None, None
        if "mask" in row:
            mask = to_labels(row["mask"].reshape(self.native), f"{self._path}: mask[{index}]")
            objects = len(np.unique(mask[mask > 0]))
        if "num_actual_objects" in row and row["num_actual_objects"].size == 1:
            objects = int(row["num_actual_objects"].item())
        factors = {name: np.asarray(value) for name, value in row.items() if name not in _NOT_FACTORS}
        return Scene(image.repeat(3, 2) if image.shape[2] == 1 else image, mask, objects, factors)
