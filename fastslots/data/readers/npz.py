"""The authors' arrays: ``arr_0`` images, ``arr_1`` latents, ``arr_2`` label maps, or these in NAME_mask.npz beside.

Read a row at a time straight from the archive, so memory does not grow with the file, compressed or not; and a header
that claims more than the archive holds allocates nothing. An array in Fortran order, whose rows lie scattered, is read
whole.
"""

from __future__ import annotations

import contextlib
import io
import math
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import IO

import numpy as np

from fastslots.data.items import mask_of, to_uint8, void_label
from fastslots.data.readers.scene import BadRecordError, Scene
from fastslots.errors import UserError

ROWS = 64  # read at once,
MOST_BYTES = 1 << 26  # but no more than this, whatever the header claims
MOST_WHOLE = 1 << 29  # of an array that is read whole: in Fortran order, or a table of factors
MOST_RATIO = 1_100  # bytes that an archive may claim for each of its own: DEFLATE gives at most 1,032
PROBED = 16  # images that tell how floats are scaled
IMAGENET = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
"""Mean and deviation that many store pixels with, as DINO takes them."""
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
            with self._opened() as (file, size):
                self.shape, self.dtype, self._fortran = self._header(file)
                held = size - file.tell()
                if held > (1 << 16) + MOST_RATIO * path.stat().st_size:
                    raise ValueError(f"it claims {held:,} bytes, more than a file of {path.stat().st_size:,} can hold")
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

    @contextlib.contextmanager
    def _opened(self) -> Iterator[tuple[IO[bytes], int]]:
        """What holds the array, and its size in bytes."""
        with zipfile.ZipFile(self._path) as archive, archive.open(self._name) as file:
            yield file, archive.getinfo(self._name).file_size

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
        """All rows, [N, ...]. UserError where they are over ``MOST_WHOLE``."""
        if (size := math.prod(self.shape) * self.dtype.itemsize) > MOST_WHOLE:
            raise UserError(f"{self.name} is of {size:,} bytes, over {MOST_WHOLE:,}: {MEND} of fewer or smaller rows")
        return np.stack(list(self.rows()))

    def rows(self, start: int = 0) -> Iterator[np.ndarray]:
        """Rows from ``start`` on. UserError where the archive is damaged (its CRC-32 is verified at the end)."""
        try:
            with self._opened() as (file, _):
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


class NpyFile(Member):
    """The array of an npy file."""

    def __init__(self, path: Path):
        super().__init__(path, path.stem)
        self.name = str(path)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[tuple[IO[bytes], int]]:
        with open(self._path, "rb") as file:
            yield file, self._path.stat().st_size


def member_names(path: Path) -> list[str]:
    """The arrays of an npz. UserError where it is none."""
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} cannot be read as npz ({error}): download or save the file again") from None


ARRAYS = (".npz", ".npy")


def mask_file(path: Path) -> Path | None:
    """The label maps of an npz or npy in a file of their own: those of clevrtex_val.npz in clevrtex_val_mask.npz, those
    of images.npy in masks.npy."""
    if path.suffix not in ARRAYS:
        return None
    names = [f"{path.stem}_mask{path.suffix}"] + ["masks" + path.suffix] * (path.stem == "images")
    return next((masks for name in names if (masks := path.with_name(name)).is_file()), None)


def images_of(path: Path) -> Path | None:
    """The images that a file of masks belongs to; None where there are none, and for what is no file of masks."""
    if path.suffix not in ARRAYS:
        return None
    stem = "images" if path.stem == "masks" else path.stem.removesuffix("_mask")
    images = path.with_name(stem + path.suffix)
    return images if images != path and images.is_file() else None


class NpzReader:
    FORMAT = "npz in the authors' layout"
    crop = False
    published_split = True

    def __init__(self, path: Path):
        self._path = path
        if owner := images_of(path):
            raise UserError(f"{path} holds the masks of {owner.name}: name that file, or the folder of both")
        images, self._latents, self._masks = self._members(path)
        shape = images.shape
        self._channels_first = len(shape) == 4 and shape[3] not in (1, 3) and shape[1] == 3
        if self._channels_first:
            shape = (shape[0], *shape[2:], shape[1])
        if len(shape) != 4 or shape[3] not in (1, 3):
            mend = ": the images of these masks must lie beside them" if path.stem.endswith("_mask") else ""
            raise UserError(f"{images.name} has shape {list(shape)}, expected images [N, R, R, 3]{mend}")
        if self._masks is None and (beside := mask_file(path)):
            self._masks = _only_array(beside)
        if self._masks is not None:
            n, size, found = shape[0], shape[1:3], self._masks.shape
            if found[0] != n or size not in (found[1:], found[1:3], found[2:4]) or len(found) > 5:
                shapes = f"{list(found)}, the images {list(shape)}"
                raise UserError(f"{self._masks.name} has shape {shapes}: expected label maps [N, R, R] or [N, R, R, 1]")
        if self._latents is not None and len(self._latents) != len(images):
            raise UserError(f"{path}: arr_1 has {len(self._latents)} rows for {len(images)} images: leave it out")
        self._images, self.native = images, shape[1:3]
        self.ignore_label = self._void()
        self.read_as = "" if self.ignore_label is None else f"masks are labels; {self.ignore_label} is not scored"
        self._imagenet = images.dtype.kind == "f" and shape[3] == 3 and self._is_imagenet()
        scaled = ", scaled by ImageNet's mean and deviation" if self._imagenet else ""
        self.kind = f"{self.FORMAT}{scaled}"

    def _members(self, path: Path) -> tuple[Member, Member | None, Member | None]:
        """Images, latents, masks."""
        names = member_names(path)
        if "arr_0" not in names:
            found = ", ".join(names)
            mend = f"numpy.savez({path.name!r}, arr_0=images, arr_2=masks)"
            raise UserError(
                f"{path}: no member arr_0 (it has {found}): save it by {mend}; without masks leave arr_2 out"
            )
        latents, masks = (Member(path, name) if name in names else None for name in ("arr_1", "arr_2"))
        return Member(path, "arr_0"), latents, masks

    def _void(self) -> int | None:
        """The label that the first masks show to be of pixels that are not scored."""
        if self._masks is None:
            return None
        try:
            some = islice(self._masks.rows(0), max(1, min(PROBED, (1 << 22) // math.prod(self.native))))
            return void_label({int(label) for mask in some for label in np.unique(mask_of(mask, self.native, ""))})
        except UserError:  # said where the masks are read
            return None

    def _is_imagenet(self) -> bool:
        """Whether the first images reach beyond [0, 1] and are 8-bit pixels once ImageNet's scaling is undone.

        Their range alone would not tell: [-1, 1], and other statistics, lie within it.
        """
        try:
            some = max(1, min(PROBED, (1 << 22) // math.prod(self._images.shape[1:])))
            images = np.stack(list(islice(self._pictures(0), some))).astype(np.float64)
        except UserError:  # said where the images are read
            return False
        images = images[np.isfinite(images).all((1, 2, 3))]
        if not images.size or (images.min() >= 0 and images.max() <= 1):
            return False
        levels = (images * IMAGENET[1] + IMAGENET[0]) * 255
        near = np.rint(levels).clip(0, 255)
        return bool(np.abs(levels - near).max() < 0.1)  # 16-bit floats are off by up to 0.06

    def _pictures(self, start: int) -> Iterator[np.ndarray]:
        """Rows of the images, channels last."""
        for image in self._images.rows(start):
            yield image.transpose(1, 2, 0) if self._channels_first else image

    def share(self, done: int) -> float:
        return done / len(self._images)

    def scenes(self, start: int = 0) -> Iterator[Scene | BadRecordError]:
        latents = self._latents.rows(start) if self._latents else None
        masks = self._masks.rows(start) if self._masks else None
        for i, image in enumerate(self._pictures(start), start):
            labels = None if masks is None else next(masks)
            factors = {} if latents is None else {"latents": next(latents)}
            try:
                yield self._scene(i, image, labels, factors)
            except UserError as error:
                yield BadRecordError(str(error))
        for others in (latents, masks):
            if others is not None:
                next(others, None)  # to the end, where checksums are compared

    def _scene(self, i: int, image: np.ndarray, labels: np.ndarray | None, factors: dict[str, np.ndarray]) -> Scene:
        name, mask, objects = f"{self._images.name}[{i}]", None, None
        if self._imagenet:
            image = image * IMAGENET[1] + IMAGENET[0]
            near = image.clip(0, 1)
            image = near if (np.abs(image - near) < 1 / 255).all() else image  # no more than rounding
        image = to_uint8(image, name)
        if self._masks is not None and labels is not None:
            mask = mask_of(labels, self.native, f"{self._masks.name}[{i}]")
            objects = len(set(np.unique(mask).tolist()) - {0, self.ignore_label})
        return Scene(image.repeat(3, 2) if image.shape[2] == 1 else image, mask, objects, factors)


class NpyReader(NpzReader):
    """images.npy [N, H, W, 3], with label maps or one-hot entries in masks.npy or NAME_mask.npy beside it."""

    FORMAT = "npy"
    published_split = False

    def _members(self, path: Path) -> tuple[Member, Member | None, Member | None]:
        return NpyFile(path), None, None


def _only_array(path: Path) -> Member:
    """UserError where a file of masks has no member arr_0."""
    if path.suffix == ".npy":
        return NpyFile(path)
    try:
        return Member(path, "arr_0")
    except KeyError:
        raise UserError(f"{path}: no member arr_0: expected the masks of the images beside it") from None


def read_npy(path: Path, data: bytes | None = None) -> np.ndarray:
    """The array of an npy file, mapped, or of its bytes. UserError where it is none, or holds pickled objects."""
    try:
        if data is None:
            mapped: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
            return mapped
        file = io.BytesIO(data)
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
        if dtype.hasobject:
            raise ValueError("it holds pickled objects, which are never loaded")
        return np.frombuffer(data, dtype, offset=file.tell()).reshape(shape, order="F" if fortran else "C")
    except _DAMAGE as error:
        raise UserError(f"{path} cannot be read as npy ({error}): save a plain array with numpy.save") from None
