"""The authors' arrays: ``arr_0`` images, ``arr_1`` latents, ``arr_2`` label maps.

Read a row at a time straight from the archive, so memory does not grow with the file, compressed or not; and a header
that claims more than the archive holds allocates nothing. An array in Fortran order, whose rows lie scattered, is read
whole.
"""

from __future__ import annotations

import math
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from fastslots.data.scene import BadRecordError, Scene
from fastslots.errors import UserError

ROWS = 64  # read at once,
MOST_BYTES = 1 << 26  # but no more than this, whatever the header claims
MOST_WHOLE = 1 << 32  # of an array in Fortran order, which is read whole
MEND = "save plain arrays with numpy.savez"
# What zipfile, zlib and NumPy's parser of headers (which falls back to Python's tokenizer) raise on damaged bytes
_DAMAGE: tuple[type[Exception], ...] = (ValueError, TypeError, SyntaxError, tokenize.TokenError, OverflowError)
_DAMAGE += (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)  # RuntimeError: encrypted, unimplemented


class Member:
    """One array of an npz: shape and dtype from its header, verified against the archive; rows in order."""

    def __init__(self, path: Path, name: str):
        self.name = f"{path}: {name}"
        self._path, self._name = path, f"{name}.npy"
        try:
            with zipfile.ZipFile(path) as archive, archive.open(self._name) as file:
                self.shape, self.dtype, self._fortran = self._header(file)
                held = archive.getinfo(self._name).file_size - file.tell()
        except KeyError:
            raise
        except _DAMAGE as error:
            raise UserError(f"{self.name} cannot be read ({error}): {MEND}") from None
        if held != math.prod(self.shape) * self.dtype.itemsize:
            raise UserError(
                f"{self.name} holds {held} bytes, its header says {list(self.shape)} of {self.dtype}: {MEND}"
            )

    def __len__(self) -> int:
        return self.shape[0]

    def _header(self, file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype, bool]:
        """shape, dtype, and whether the first axis varies fastest"""
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
        if dtype.hasobject:
            raise ValueError("it holds pickled objects, which are never loaded")
        if not shape or not shape[0]:
            raise ValueError(f"its shape is {list(shape)}")
        if math.prod(shape[1:]) * dtype.itemsize > MOST_BYTES:
            raise ValueError(f"its shape is {list(shape)} of {dtype}, over {MOST_BYTES:,} bytes a row")
        if (whole := math.prod(shape) * dtype.itemsize) > MOST_WHOLE and fortran:
            raise ValueError(f"it is in Fortran order and of {whole:,} bytes: save numpy.ascontiguousarray of it")
        return shape, dtype, fortran

    def read(self) -> np.ndarray:
        """All rows, [N, ...]."""
        return np.stack(list(self.rows()))

    def rows(self, start: int = 0) -> Iterator[np.ndarray]:
        """Rows from ``start`` on. UserError where the archive is damaged (its CRC-32 is verified at the end)."""
        try:
            with zipfile.ZipFile(self._path) as archive, archive.open(self._name) as file:
                self._header(file)
                for block in self._blocks(file, start):
                    yield from block
                file.read(1)  # the end, where zipfile compares checksums
        except _DAMAGE as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{self.name} is damaged ({error}): download or save the file again") from None

    def _blocks(self, file: IO[bytes], start: int) -> Iterator[np.ndarray]:
        """Rows from ``start`` on, some at once; ``file`` stands at the first row."""
        width = math.prod(self.shape[1:]) * self.dtype.itemsize
        at_once = max(1, min(ROWS, MOST_BYTES // max(width, 1)))
        if self._fortran:
            whole = np.frombuffer(file.read(len(self) * width), self.dtype).reshape(self.shape, order="F")
            for first in range(start, len(self), at_once):
                yield np.ascontiguousarray(whole[first : first + at_once])
            return
        file.seek(start * width, 1)
        for first in range(start, len(self), at_once):
            rows = min(at_once, len(self) - first)
            yield np.frombuffer(file.read(rows * width), self.dtype).reshape(rows, *self.shape[1:])


def member_names(path: Path) -> list[str]:
    """The arrays of an npz. UserError where it is none."""
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} cannot be read as npz ({error}): download or save the file again") from None


class NpzReader:
    kind = "npz in the authors' layout"
    crop = False
    published_split = True

    def __init__(self, path: Path):
        self._path = path
        names = member_names(path)
        if "arr_0" not in names:
            found = ", ".join(names)
            raise UserError(f"{path}: no member arr_0 (it has {found}): expected arr_0 images, arr_2 label maps")
        members = [Member(path, name) if name in names else None for name in ("arr_0", "arr_1", "arr_2")]
        images, self._latents, self._masks = members
        assert images is not None
        shape = images.shape
        if len(shape) != 4 or shape[3] not in (1, 3):
            raise UserError(f"{path}: arr_0 has shape {list(shape)}, expected images [N, R, R, 3]")
        if self._masks is not None:
            if self._masks.shape not in (shape[:3], (*shape[:3], 1)):
                shapes = f"{list(self._masks.shape)}, arr_0 {list(shape)}"
                raise UserError(f"{path}: arr_2 has shape {shapes}: expected label maps [N, R, R] or [N, R, R, 1]")
            if self._masks.dtype.kind not in "iub":
                raise UserError(f"{path}: arr_2 holds {self._masks.dtype}, expected integer labels")
        if self._latents is not None and len(self._latents) != len(images):
            raise UserError(f"{path}: arr_1 has {len(self._latents)} rows for {len(images)} images: leave it out")
        self._images, self.native = images, shape[1:3]

    def share(self, done: int) -> float:
        return done / len(self._images)

    def scenes(self, start: int = 0) -> Iterator[Scene | BadRecordError]:
        latents = self._latents.rows(start) if self._latents else None
        masks = self._masks.rows(start) if self._masks else None
        for i, image in enumerate(self._images.rows(start), start):
            labels = None if masks is None else next(masks).reshape(self.native)
            factors = {} if latents is None else {"latents": next(latents)}
            try:
                yield self._scene(i, image, labels, factors)
            except UserError as error:
                yield BadRecordError(str(error))
        for others in (latents, masks):
            if others is not None:
                next(others, None)  # to the end, where checksums are compared

    def _scene(self, i: int, image: np.ndarray, labels: np.ndarray | None, factors: dict) -> Scene:
        image, mask, objects = to_uint8(image, f"{self._path}: arr_0[{i}]"), None, None
        if labels is not None:
            mask = to_labels(labels, f"{self._path}: arr_2[{i}]")
            objects = len(np.unique(mask[mask > 0]))
        return Scene(image.repeat(3, 2) if image.shape[2] == 1 else image, mask, objects, factors)


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


def to_labels(mask: np.ndarray, name: str) -> np.ndarray:
    """Integer labels as uint8. UserError names the map with labels outside 0..255."""
    if mask.dtype.kind not in "iub":
        raise UserError(f"{name} holds {mask.dtype}: expected integer labels")
    if mask.min() < 0 or mask.max() > 255:
        raise UserError(f"{name} has labels from {mask.min()} to {mask.max()}: expected 0 (background) to 255")
    return mask.astype(np.uint8)
