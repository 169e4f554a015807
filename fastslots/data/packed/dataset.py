"""The project's own format: a folder of raw arrays that training maps into memory.

    meta.json      magic, version, kind, shapes, counts, source, digest
    images.u8      uint8 [N, R, R, 3]
    masks.u8       uint8 [N, R, R], where the source has masks
    objects.u8     uint8 [N], objects of each scene; 255 = unknown
    factors.npz    generating factors, [N, ...] each, where all scenes have the same ones

``packing`` writes it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fastslots.data.packed.ranges import RangedArray, gather
from fastslots.data.readers.npz import Member, member_names
from fastslots.errors import UserError

MAGIC, VERSION = "fastslots packed", 1
UNKNOWN = 255
MEND = "remove that folder, so that the data are packed again"
ARRAYS = ("images.u8", "masks.u8", "objects.u8")
_META_TYPES = {"kind": str, "source": str, "count": int, "size": int, "max_objects": int}
_META_TYPES |= {"has_masks": bool, "published_split": bool, "digest": str}


@dataclass(frozen=True)
class DatasetInfo:
    """What a data set is; ``str()`` is one line for people."""

    kind: str
    path: str
    count: int  # scenes that the object filter leaves
    total: int
    size: int  # side in pixels
    has_masks: bool
    published_split: bool
    max_objects: int | None  # the filter, here or when it was packed
    digest: str  # of all images, masks and object counts: the fingerprint
    skipped: int = 0  # damaged records that were left out (``on_bad_record="skip"``)
    parts: tuple[int, int, int] | None = None  # images of train, val and test, where names say so (0: not said)
    ignore_label: int | None = None  # of pixels that are not scored
    read_as: str = ""  # what its reader has understood, where that could be otherwise

    def __str__(self) -> str:
        some = f"{self.count:,} of {self.total:,}" if self.count < self.total else f"{self.total:,}"
        at_most = f" with at most {self.max_objects} objects" if self.max_objects else ""
        masks = "with masks" if self.has_masks else "without masks"
        without = f", {self.skipped:,} damaged records left out" if self.skipped else ""
        return f"{self.kind}: {some} images{at_most}, {self.size} x {self.size}, {masks}{without} ({self.path})"


class PackedDataset:
    """Map-style: ``ds[i]`` is {"image", "mask" where there are masks, "factors"}; ``batch`` is the fast way."""

    def __init__(
        self,
        folder: Path,
        max_objects: int | None = None,
        path: str | None = None,
        ranged: dict[str, RangedArray] | None = None,  # images.u8 and masks.u8, where they are in object storage
    ):
        meta = read_meta(folder)
        n, size, packed_with = meta["count"], meta["size"], meta["max_objects"]
        if packed_with and max_objects and max_objects > packed_with:
            raise UserError(
                f"{path or folder} was packed with at most {packed_with} objects, not {max_objects}: "
                f"set --max_objects {packed_with}, or pack it again with --max_objects {max_objects}"
            )
        self._folder, self.ranged, self.by_range = folder, ranged, bool(ranged)

        def array(name: str, shape: tuple[int, ...]) -> np.ndarray | RangedArray:
            return ranged[name] if ranged else map_array(folder / name, shape)

        self._images = array("images.u8", (n, size, size, 3))
        self._masks = array("masks.u8", (n, size, size)) if meta["has_masks"] else None
        self._open = {
            name: (open(folder / name, "rb"), values.size)
            for name, values in (("images.u8", self._images), ("masks.u8", self._masks))
            if isinstance(values, np.ndarray)
        }
        self.objects = np.array(map_array(folder / "objects.u8", (n,)))
        keep = np.ones(n, bool) if not max_objects else self.objects <= max_objects
        if max_objects and (self.objects == UNKNOWN).any():
            raise UserError(f"{path or folder}: nothing tells how many objects its scenes have: set --max_objects 0")
        self._rows = np.flatnonzero(keep)
        self._factors: dict[str, np.ndarray] | None = None
        self.info = DatasetInfo(
            kind=meta["kind"],
            path=path or str(folder),
            count=len(self._rows),
            total=n,
            size=size,
            has_masks=meta["has_masks"],
            published_split=meta["published_split"],
            max_objects=max_objects or packed_with or None,
            digest=meta["digest"],
            skipped=meta.get("skipped", 0),
            ignore_label=meta.get("ignore_label"),
            read_as=meta.get("read_as", ""),
            parts=parts_left(meta.get("parts"), self._rows, path or str(folder)),
        )

    @property
    def ignore_label(self) -> int | None:
        return self.info.ignore_label

    @property
    def kept_objects(self) -> np.ndarray:
        """uint8 [len], objects of each scene that the filter leaves; ``objects`` are of all."""
        return self.objects[self._rows]

    def __reduce__(self) -> tuple[type[PackedDataset], tuple[object, ...]]:
        """Workers of a torch DataLoader map the files again rather than receive a copy of the arrays."""
        return PackedDataset, (self._folder, self.info.max_objects, self.info.path, self.ranged)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, object]:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        check_lengths(self._folder, self._open)
        row = self._rows[index]
        item: dict[str, object] = {"image": np.array(self._images[row])}
        if self._masks is not None:
            item["mask"] = np.array(self._masks[row])
        item["factors"] = self.factors_of(index)
        return item

    def batch(self, indices: np.ndarray, masks: bool = True) -> tuple[np.ndarray, np.ndarray | None]:
        """images uint8 [n, R, R, 3], masks uint8 [n, R, R] or None (where there are none, or ``masks`` is False)"""
        images, *others = gather(self.asks(indices, masks))
        return images, others[0] if others else None

    def asks(self, indices: np.ndarray, masks: bool = True) -> list[tuple[np.ndarray | RangedArray, np.ndarray]]:
        """What ``batch`` gathers: (array, its rows) of the images, and of the masks where they are wanted."""
        check_lengths(self._folder, self._open)
        rows = self._rows[np.asarray(indices)]
        return [(array, rows) for array in (self._images, self._masks if masks else None) if array is not None]

    def factors_of(self, indices: np.ndarray | int) -> dict[str, np.ndarray]:
        """Generating factors of these images by name, [n, ...] each; of one image without the first axis."""
        return {name: values[self._rows[indices]] for name, values in self.factors().items()}

    def factors(self) -> dict[str, np.ndarray]:
        """Generating factors by name, a row a scene (before the object filter)."""
        if self._factors is None:
            path = self._folder / "factors.npz"
            factors = read_arrays(path) if path.exists() else {}
            for name, values in factors.items():
                if values.shape[:1] != self.objects.shape:
                    shape = f"{list(values.shape)} for {len(self.objects)} scenes"
                    raise UserError(f"{path}: {name} has shape {shape}: {MEND}")
            self._factors = factors
        return self._factors

    def verify(self) -> None:
        """UserError unless the arrays are those that were packed, and the factors fit them."""
        if digest(self._folder, ranged=self.ranged) != self.info.digest:
            where = self.info.path if self.ranged else self._folder
            raise UserError(f"{where}: its images are not those that were packed (checksum): {MEND}")
        self.factors()


def read_meta(folder: Path) -> dict[str, Any]:
    """The description of a packed folder. UserError where it is none, or of another version."""
    path = folder / "meta.json"
    try:
        text = path.read_text()
    except (OSError, ValueError) as error:
        raise UserError(f"{path} describes no packed data set ({error}): {MEND}") from None
    return parse_meta(text, str(path))


def parse_meta(text: str, path: str, mend: str = MEND) -> dict[str, Any]:
    """As ``read_meta``, of the text of the meta.json at ``path``."""
    try:
        meta: dict[str, Any] = json.loads(text)
        if meta["magic"] != MAGIC:
            raise ValueError("another magic")
        if meta["version"] != VERSION:
            raise UserError(f"{path}: packed by another version ({meta['version']}): {mend}")
        for key, kind in _META_TYPES.items():
            if type(meta[key]) is not kind:
                raise ValueError(f"{key} is {meta[key]!r}")
        if type(meta.get("skipped", 0)) is not int:  # older sets do not say
            raise ValueError(f"skipped is {meta['skipped']!r}")
        if type(meta.get("read_as", "")) is not str or type(meta.get("ignore_label")) not in (int, type(None)):
            raise ValueError("read_as or ignore_label is of another type")
        check_stored_parts(meta)
        if not (meta["count"] >= 1 and 1 <= meta["size"] < 1 << 14):
            raise ValueError("count or size is out of range")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} describes no packed data set ({error}): {mend}") from None
    return meta


def check_stored_parts(meta: dict[str, Any]) -> None:
    """ValueError unless a meta.json's ``parts``, which older sets do not have, are three numbers of its images."""
    parts = meta.get("parts")
    if parts is None:
        return
    if not (type(parts) is list and len(parts) == 3 and all(type(n) is int for n in parts)):
        raise ValueError(f"parts is {parts!r}")
    if min(parts) < 0 or sum(parts) != meta["count"]:
        raise ValueError(f"parts is {parts!r}, count {meta['count']}")


def parts_left(parts: list[int] | None, rows: np.ndarray, where: str) -> tuple[int, int, int] | None:
    """Images of train, val and test of which a filter leaves ``rows``. UserError where one of them loses all."""
    if not parts:
        return None
    train, val, test = np.diff(np.searchsorted(rows, np.cumsum([0, *parts]))).tolist()
    check_parts((train, val, test), parts, where)
    return train, val, test


def check_parts(left: Sequence[int], parts: Sequence[int], where: str) -> None:
    """UserError where train, val or test had images and has none left."""
    if any(had and not has for had, has in zip(parts, left, strict=True)):
        raise UserError(f"{where}: train, val or test is left without images: raise --max_objects")


def is_packed(folder: Path) -> bool:
    """Whether a folder says that it is one of ours (other sets have a meta.json too)."""
    try:
        with open(folder / "meta.json", "rb") as file:
            return MAGIC.encode() in file.read(4096)
    except OSError:
        return False


def map_array(path: Path, shape: tuple[int, ...], dtype: str = "u1") -> np.ndarray:
    """A raw array mapped into memory. UserError where the file is of another length."""
    expected, size = math.prod(shape) * np.dtype(dtype).itemsize, path.stat().st_size if path.is_file() else 0
    if size != expected:
        raise UserError(f"{path} has {size} bytes, expected {expected}: {MEND}")
    return np.memmap(path, dtype, "r", shape=shape)


def check_lengths(folder: Path, files: Mapping[str, tuple[BinaryIO, int]]) -> None:
    """UserError where a file was cut since it was mapped: reading beyond its end would kill the process (SIGBUS).

    files: name -> (open file, bytes that are mapped). Costs a microsecond a batch. A file that was removed stays
    readable through its map.
    """
    for name, (file, length) in files.items():
        if os.fstat(file.fileno()).st_size < length:
            raise UserError(f"{folder / name} has become shorter while it was in use: {MEND}")


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Every array of an npz. UserError where it is damaged; sizes are verified before anything is allocated."""
    try:
        return {name: Member(path, name).read() for name in member_names(path)}
    except (UserError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error}): {MEND}") from None


def digest(folder: Path, names: Iterable[str] = ARRAYS, ranged: dict[str, RangedArray] | None = None) -> str:
    """Of the arrays, in the order images, masks, objects; ``ranged``: those that are not in the folder."""
    hasher = hashlib.blake2b(digest_size=16)
    for name in names:
        if ranged and name in ranged:
            for block in ranged[name].blocks():
                hasher.update(block)
        elif (folder / name).exists():
            with open(folder / name, "rb") as file:
                while block := file.read(1 << 20):
                    hasher.update(block)
    return hasher.hexdigest()
