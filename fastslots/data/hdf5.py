"""The object-centric-library's HDF5 files: ``image``, ``mask``, ``num_actual_objects``, ``visibility``, factors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fastslots.data.npz import to_uint8
from fastslots.data.scene import Scene
from fastslots.errors import UserError

MAGIC = b"\x89HDF\r\n\x1a\n"
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
            self._file = h5py.File(path, "r")
        except OSError as error:
            raise UserError(f"{path} cannot be read as HDF5 ({error}): download it again") from None
        if "image" not in self._file or self._file["image"].ndim != 4:
            raise UserError(f"{path}: no data set 'image' [N, H, W, 3] (it has {', '.join(self._file)})")
        images = self._file["image"]
        self.count, self.native = len(images), images.shape[1:3]
        height, width = self.native
        self.crop = (height, width) == (240, 320)
        if "mask" in self._file and self._file["mask"].shape[:3] != images.shape[:3]:
            shape = list(self._file["mask"].shape)
            raise UserError(f"{path}: mask has shape {shape}, expected {[*images.shape[:3], 1]}")
        name = "CLEVR" if {"material", "size"} <= set(self._file) and self.crop else "multi-object set"
        self.kind = f"object-centric-library HDF5 ({name}, {height} x {width})"

    def scenes(self) -> Iterator[Scene]:
        file = self._file
        columns = [key for key in file if key not in _NOT_FACTORS and file[key].shape[:1] == (self.count,)]
        for i in range(self.count):
            try:
                image = to_uint8(file["image"][i], f"{self._path}: image[{i}]")
                mask = file["mask"][i].reshape(image.shape[:2]) if "mask" in file else None
                factors = {key: np.asarray(file[key][i]) for key in columns if file[key].dtype.kind in "iufb"}
                actual = int(file["num_actual_objects"][i].item()) if "num_actual_objects" in file else None
            except OSError as error:
                raise UserError(f"{self._path}: row {i} cannot be read ({error}): download the file again") from None
            if mask is not None and (mask.min() < 0 or mask.max() > 255):
                raise UserError(f"{self._path}: mask[{i}] has labels outside 0..255")
            if actual is None and mask is not None:
                actual = len(np.unique(mask[mask > 0]))
            yield Scene(image, None if mask is None else mask.astype(np.uint8), actual, factors)
