"""Features of a frozen network in place of images: computed once, kept as raw arrays that training maps into memory.

    meta.json        magic, version, counts, shapes, what they were made from, digest
    features.f16     little-endian float16 (or features.f32) [N, T, C], T = side² tokens row by row
    masks.u8         uint8 [N, R, R], where the source has masks: at the images' size, not the tokens'
    objects.u8       uint8 [N], objects of each scene; 255 = unknown
    factors.npz      generating factors, where the source has them

``fastslots data features`` makes it. Writing goes to NAME.partial, goes on there after a stop, and ends in a rename.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from fastslots.data.packed.dataset import (
    UNKNOWN,
    DatasetInfo,
    check_lengths,
    check_stored_parts,
    digest,
    map_array,
    parts_left,
    read_arrays,
)
from fastslots.data.packed.writer import PartialFolder, locked, write_arrays
from fastslots.data.splits import split_indices
from fastslots.errors import UserError

MAGIC, VERSION = "fastslots features", 1
DTYPES = {"float16": "<f2", "float32": "<f4"}
FLUSH_EVERY = 256  # images
MEND = "remove that folder and run `fastslots data features` again"
_SHAPE = ("count", "side", "channels")
_META_TYPES = {"kind": str, "dtype": str, "digest": str, "published_split": bool, "made_by": dict}


class Features(NamedTuple):
    """Those of some images, in order."""

    tokens: np.ndarray  # float [n, T, C]
    masks: np.ndarray | None  # uint8 [n, R, R]
    objects: np.ndarray  # uint8 [n]


class FeatureDataset:
    """Map-style: ``ds[i]`` is {"image": float [C, side, side], "mask" where there are masks, "factors"}."""

    by_range = False

    def __init__(self, folder: str | Path, max_objects: int | None = None):
        folder = Path(folder)
        meta = read_meta(folder)
        n, self.side, self.channels = (meta[name] for name in _SHAPE)
        self.made_by: dict[str, object] = meta["made_by"]
        self._folder, dtype = folder, DTYPES[meta["dtype"]]
        name = _array_name(meta["dtype"])
        self._tokens = map_array(folder / name, (n, self.side**2, self.channels), dtype)
        arrays = {name: self._tokens}
        self._masks = None
        if meta["mask_size"]:
            arrays["masks.u8"] = self._masks = map_array(folder / "masks.u8", (n, meta["mask_size"], meta["mask_size"]))
        self._open: dict[str, tuple[BinaryIO, int]] = {
            name: (open(folder / name, "rb"), values.nbytes) for name, values in arrays.items()
        }
        self._names = (*arrays, "objects.u8")
        self.objects = np.array(map_array(folder / "objects.u8", (n,)))
        if max_objects and (self.objects == UNKNOWN).any():
            raise UserError(f"{folder}: nothing tells how many objects its scenes have: set --max_objects 0")
        self._rows = np.flatnonzero(self.objects <= max_objects) if max_objects else np.arange(n)
        path = folder / "factors.npz"
        self._factors = read_arrays(path) if path.exists() else {}
        for name, values in self._factors.items():
            if values.shape[:1] != (n,):
                raise UserError(f"{path}: {name} has shape {list(values.shape)} for {n} images: {MEND}")
        self.info = DatasetInfo(
            kind=f"features of {meta['kind']}",
            path=str(folder),
            count=len(self._rows),
            total=n,
            size=meta["mask_size"] or self.side,
            has_masks=self._masks is not None,
            published_split=meta["published_split"],
            max_objects=max_objects or meta["max_objects"],
            digest=meta["digest"],
            parts=parts_left(meta.get("parts"), self._rows, str(folder)),
            ignore_label=meta.get("ignore_label"),
        )

    def __reduce__(self) -> tuple[type[FeatureDataset], tuple[object, ...]]:
        return FeatureDataset, (self._folder, self.info.max_objects)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, object]:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        tokens, masks = self.batch(np.array([index % len(self)]))
        item: dict[str, object] = {"image": tokens[0]}
        if masks is not None:
            item["mask"] = masks[0]
        item["factors"] = self.factors_of(index)
        return item

    def factors_of(self, indices: np.ndarray | int) -> dict[str, np.ndarray]:
        """As ``PackedDataset.factors_of``."""
        return {name: values[self._rows[indices]] for name, values in self._factors.items()}

    @property
    def ignore_label(self) -> int | None:
        return self.info.ignore_label

    def batch(self, indices: np.ndarray, masks: bool = True) -> tuple[np.ndarray, np.ndarray | None]:
        """features float [n, C, side, side], masks uint8 [n, R, R] or None (where there are none, or not wanted)"""
        check_lengths(self._folder, self._open)
        rows = self._rows[np.asarray(indices)]
        tokens = self._tokens[rows].transpose(0, 2, 1)
        features = np.ascontiguousarray(tokens).reshape(len(rows), self.channels, self.side, self.side)
        return features, self._masks[rows] if masks and self._masks is not None else None

    def verify(self) -> None:
        """UserError unless the arrays are those that were written."""
        if digest(self._folder, self._names) != self.info.digest:
            raise UserError(f"{self._folder}: its features are not those that were written (checksum): {MEND}")


def write_features(
    folder: Path,
    source: DatasetInfo,
    made_by: dict[str, object],
    dtype: str,
    compute: Callable[[int, int], Features],
    factors: Callable[[], dict[str, np.ndarray]],
    batch: int,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Write the features of all ``source.count`` images, ``batch`` at once, unless another process has meanwhile.

    Args:
        made_by: what decides the numbers besides the source; ``folder``.partial is continued only where all of it is
            the same.
        compute: (start, stop) -> features of those images. factors: of all images, asked for once, at the end.

    Raises UserError where the folder cannot be written, or features are not finite in ``dtype``.
    """
    partial = folder.with_name(folder.name + ".partial")
    settings = {"source": [source.path, source.digest, source.count], "made_by": made_by, "dtype": dtype}
    try:
        with locked(partial, folder):
            if (folder / "meta.json").exists():
                shutil.rmtree(partial, ignore_errors=True)
                return
            with _Writer(partial, json.loads(json.dumps(settings))) as writer:
                while (start := writer.state["done"]) < source.count:
                    writer.add(compute(start, min(start + batch, source.count)), source.path)
                    progress(writer.state["done"])
                writer.finish(source, factors())
            os.replace(partial, folder)
            for name in ("lock", "progress.json"):
                (folder / name).unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{folder} cannot be written ({reason}): free space or name another place") from None


class _Writer(PartialFolder):
    """Features into the arrays of a folder."""

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self._name, self._dtype = _array_name(settings["dtype"]), np.dtype(DTYPES[settings["dtype"]])
        super().__init__(folder, settings, {"done": 0, "shape": [0, 0, 0]}, self._widths)
        self._flushed = self.state["done"]

    def _widths(self, state: dict[str, Any]) -> dict[str, int]:
        tokens, channels, size = state["shape"]  # size of the masks, 0 where there are none
        return {self._name: tokens * channels * self._dtype.itemsize, "masks.u8": size**2, "objects.u8": 1}

    def add(self, part: Features, source: str) -> None:
        with np.errstate(over="ignore"):
            tokens = np.ascontiguousarray(part.tokens, self._dtype)
        bad = ~np.isfinite(tokens).all((1, 2))
        if bad.any():
            index = self.state["done"] + int(bad.argmax())
            raise UserError(f"{source}: image {index} gives features that are not finite: try --dtype float32")
        self.state["shape"] = [*tokens.shape[1:], 0 if part.masks is None else part.masks.shape[1]]
        self.append(self._name, tokens)
        if part.masks is not None:
            self.append("masks.u8", part.masks)
        self.append("objects.u8", part.objects.astype(np.uint8))
        self.state["done"] += len(tokens)
        if self.state["done"] - self._flushed >= FLUSH_EVERY:
            self.flush()
            self._flushed = self.state["done"]

    def finish(self, source: DatasetInfo, factors: dict[str, np.ndarray]) -> None:
        self.flush()
        tokens, channels, size = self.state["shape"]
        names = [self._name, "masks.u8", "objects.u8"] if size else [self._name, "objects.u8"]
        if not size:
            (self.folder / "masks.u8").unlink()
        if factors:
            write_arrays(self.folder / "factors.npz", factors)
        meta = {"magic": MAGIC, "version": VERSION, "kind": source.kind, "source": source.path}
        meta |= {"count": self.state["done"], "side": round(tokens**0.5), "channels": channels, "mask_size": size}
        meta |= {"dtype": self.settings["dtype"], "made_by": self.settings["made_by"]}
        meta |= {"published_split": source.published_split, "max_objects": source.max_objects, "parts": source.parts}
        meta |= {} if source.ignore_label is None else {"ignore_label": source.ignore_label}
        self.describe(meta, names)


def is_features(path: str | Path) -> bool:
    """Whether a folder says that it holds features of ours."""
    try:
        with open(Path(path) / "meta.json", "rb") as file:
            return MAGIC.encode() in file.read(4096)
    except (OSError, ValueError):
        return False


def read_meta(folder: Path) -> dict[str, Any]:
    """The description of a folder of features. UserError where it is none, or of another version."""
    path = folder / "meta.json"
    try:
        meta: dict[str, Any] = json.loads(path.read_text())
        if meta["magic"] != MAGIC:
            raise ValueError("another magic")
        if meta["version"] != VERSION:
            raise UserError(f"{folder}: written by another version ({meta['version']}): {MEND}")
        if not all(type(meta[name]) is int and 1 <= meta[name] < 1 << 31 for name in _SHAPE):
            raise ValueError("count, side or channels is out of range")
        if type(meta["mask_size"]) is not int or not 0 <= meta["mask_size"] < 1 << 14:
            raise ValueError(f"mask_size is {meta['mask_size']!r}")
        if meta["max_objects"] is not None and type(meta["max_objects"]) is not int:
            raise ValueError(f"max_objects is {meta['max_objects']!r}")
        check_stored_parts(meta)
        for name, kind in _META_TYPES.items():
            if type(meta[name]) is not kind:
                raise ValueError(f"{name} is {meta[name]!r}")
        if meta["dtype"] not in DTYPES:
            raise ValueError(f"dtype is {meta['dtype']!r}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} describes no features ({error!r}): {MEND}") from None
    return meta


@dataclass(frozen=True)
class FeatureReport:
    """What ``fastslots data check`` says of a folder of features; ``str()`` is for people."""

    kind: str
    path: str
    count: int
    total: int
    side: int
    channels: int
    mask_size: int  # 0: no masks
    mean: float
    std: float
    made_by: dict[str, object]
    splits: str
    digest: str

    def __str__(self) -> str:
        masks = f"yes, {self.mask_size} x {self.mask_size}" if self.mask_size else "no: J-ARI, JIS and ARI need them"
        lines = {
            "data set": self.kind,
            "path": self.path,
            "images": f"{self.count:,}" + (f" of {self.total:,}" if self.count < self.total else ""),
            "features": f"{self.channels} x {self.side} x {self.side}, mean {self.mean:.3g}, std {self.std:.3g}",
            "made by": ", ".join(f"{name} {value}" for name, value in self.made_by.items()),
            "masks": masks,
            "split": self.splits,
            "fingerprint": self.digest,
        }
        return "\n".join(f"{name:<12} {value}" for name, value in lines.items())


def check_features(path: str | Path, max_objects: int | None = None, sample: int = 100) -> FeatureReport:
    """Verify a folder of features and look at some. UserError where training would refuse it."""
    dataset = FeatureDataset(path, max_objects)
    if not len(dataset):
        raise UserError(f"{path}: no scene has at most {max_objects} objects: raise --max_objects")
    dataset.verify()
    features, masks = dataset.batch(np.linspace(0, len(dataset) - 1, min(sample, len(dataset))).astype(int))
    info, values = dataset.info, features.astype(np.float64)
    return FeatureReport(
        kind=info.kind,
        path=info.path,
        count=info.count,
        total=info.total,
        side=dataset.side,
        channels=dataset.channels,
        mask_size=0 if masks is None else info.size,
        mean=float(values.mean()),
        std=float(values.std()),
        made_by=dataset.made_by,
        splits=str(split_indices(len(dataset), info.published_split, info.parts)),
        digest=info.digest,
    )


def _array_name(dtype: str) -> str:
    return {"float16": "features.f16", "float32": "features.f32"}[dtype]
