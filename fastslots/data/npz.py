"""The authors' arrays: ``arr_0`` images, ``arr_1`` latents, ``arr_2`` label maps."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fastslots.data.scene import Scene
from fastslots.errors import UserError


class NpzReader:
    kind = "npz in the authors' layout"
    crop = False
    published_split = True

    def __init__(self, path: Path):
        self._path = path
        self._images = self._required("arr_0")
        if self._images.ndim != 4 or self._images.shape[3] not in (1, 3) or not len(self._images):
            shape = list(self._images.shape)
            raise UserError(f"{path}: arr_0 has shape {shape}, expected images [N, R, R, 3]")
        self._masks = self._member("arr_2")
        if self._masks is not None:
            if self._masks.ndim == 4 and self._masks.shape[3] == 1:
                self._masks = self._masks[..., 0]
            if self._masks.shape != self._images.shape[:3]:
                shapes = f"{list(self._masks.shape)}, arr_0 {list(self._images.shape)}"
                raise UserError(f"{path}: arr_2 has shape {shapes}: expected label maps [N, R, R] or [N, R, R, 1]")
            if self._masks.dtype.kind not in "iub":
                raise UserError(f"{path}: arr_2 holds {self._masks.dtype}, expected integer labels")
        self._latents = self._member("arr_1")
        if self._latents is not None and len(self._latents) != len(self._images):
            raise UserError(f"{path}: arr_1 has {len(self._latents)} rows for {len(self._images)} images")
        self.count, self.native = len(self._images), self._images.shape[1:3]

    def _member(self, name: str) -> np.ndarray | None:
        try:
            with np.load(self._path, allow_pickle=False) as file:
                self._names = file.files
                return file[name] if name in file else None
        except (ValueError, zipfile.BadZipFile, zlib.error, OSError, EOFError, MemoryError) as error:
            what = "holds pickled objects, which are never loaded" if "pickle" in str(error) else str(error)
            raise UserError(
                f"{self._path}: {name} cannot be read ({what}): save plain arrays with numpy.savez"
            ) from None

    def _required(self, name: str) -> np.ndarray:
        member = self._member(name)
        if member is None:
            names = ", ".join(self._names)
            raise UserError(f"{self._path}: no member {name} (it has {names}): expected arr_0 images, arr_2 label maps")
        return member

    def scenes(self) -> Iterator[Scene]:
        for i in range(self.count):
            image = to_uint8(self._images[i], f"{self._path}: arr_0[{i}]")
            mask, objects = None, None
            if self._masks is not None:
                labels = self._masks[i].astype(np.int64)
                if labels.min() < 0 or labels.max() > 255:
                    raise UserError(f"{self._path}: arr_2[{i}] has labels outside 0..255")
                mask, objects = labels.astype(np.uint8), len(np.unique(labels[labels > 0]))
            factors = {} if self._latents is None else {"latents": self._latents[i]}
            yield Scene(image.repeat(3, 2) if image.shape[2] == 1 else image, mask, objects, factors)


def to_uint8(image: np.ndarray, name: str) -> np.ndarray:
    """uint8 as it is; floats in [0, 1] scaled. UserError names the image with NaN or values outside."""
    if image.dtype == np.uint8:
        return image
    if image.dtype.kind != "f":
        raise UserError(f"{name} holds {image.dtype}: expected uint8, or floats in [0, 1]")
    if not np.isfinite(image).all():
        raise UserError(f"{name} has NaN or infinite pixels: remove or mend that image")
    if image.min() < 0 or image.max() > 1:
        raise UserError(f"{name} has values from {image.min():.3g} to {image.max():.3g}: expected floats in [0, 1]")
    return (image * 255 + 0.5).astype(np.uint8)
