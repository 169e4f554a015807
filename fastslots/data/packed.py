"""The project's own format: a folder of raw arrays that training maps into memory.

    meta.json      magic, version, kind, shapes, counts, source, digest
    images.u8      uint8 [N, R, R, 3]
    masks.u8       uint8 [N, R, R], where the source has masks
    objects.u8     uint8 [N], objects of each scene; 255 = unknown
    factors.npz    generating factors, [N, ...] each, where all scenes have the same ones

Writing goes to NAME.partial and is renamed when it is complete and on disk. A partial folder is continued: scenes
already written are read again but not written again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastslots.data.scene import Scene
from fastslots.errors import UserError

MAGIC, VERSION = "fastslots packed", 1
UNKNOWN = 255
FLUSH_EVERY = 256  # scenes
_META_KEYS = ("kind", "source", "count", "size", "has_masks", "published_split", "digest")


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
    max_objects: int | None
    digest: str  # of all images and masks: the fingerprint

    def __str__(self) -> str:
        some = f"{self.count:,} of {self.total:,}" if self.count < self.total else f"{self.total:,}"
        at_most = f" with at most {self.max_objects} objects" if self.max_objects else ""
        masks = "with masks" if self.has_masks else "without masks"
        return f"{self.kind}: {some} images{at_most}, {self.size} x {self.size}, {masks} ({self.path})"


class PackedDataset:
    """Map-style: ``ds[i]`` is {"image", "mask" where there are masks, "factors"}; ``batch`` is the fast way."""

    def __init__(self, folder: Path, max_objects: int | None = None, path: str | None = None):
        meta = read_meta(folder)
        n, size = meta["count"], meta["size"]
        self._folder = folder
        self._images = _map(folder / "images.u8", (n, size, size, 3))
        self._masks = _map(folder / "masks.u8", (n, size, size)) if meta["has_masks"] else None
        self.objects = np.array(_map(folder / "objects.u8", (n,)))
        keep = np.ones(n, bool) if not max_objects else self.objects <= max_objects
        if max_objects and (self.objects == UNKNOWN).any():
            raise UserError(f"{path or folder}: nothing tells how many objects its scenes have: leave out max_objects")
        self._rows = np.flatnonzero(keep)
        self._factors: dict[str, np.ndarray] | None = None
        self.info = DatasetInfo(
            *(meta["kind"], path or str(folder), len(self._rows), n, size, meta["has_masks"], meta["published_split"]),
            *(max_objects or None, meta["digest"]),
        )

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, object]:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        row = self._rows[index]
        item: dict[str, object] = {"image": np.array(self._images[row])}
        if self._masks is not None:
            item["mask"] = np.array(self._masks[row])
        item["factors"] = {name: values[row] for name, values in self.factors().items()}
        return item

    def batch(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """images uint8 [n, R, R, 3], masks uint8 [n, R, R] or None"""
        rows = self._rows[np.asarray(indices)]
        return self._images[rows], None if self._masks is None else self._masks[rows]

    def factors(self) -> dict[str, np.ndarray]:
        """Generating factors by name, a row a scene (before the object filter)."""
        if self._factors is None:
            path = self._folder / "factors.npz"
            self._factors = dict(np.load(path, allow_pickle=False)) if path.exists() else {}
        return self._factors

    def verify(self) -> None:
        """UserError unless the arrays are those that were packed."""
        if _digest(self._folder) != self.info.digest:
            raise UserError(f"{self._folder}: its images are not those that were packed (checksum): pack them again")


def read_meta(folder: Path) -> dict:
    """The description of a packed folder. UserError where it is none, or of another version."""
    path = folder / "meta.json"
    try:
        meta = json.loads(path.read_text())
        if meta["magic"] != MAGIC:
            raise ValueError("another magic")
        if meta["version"] != VERSION:
            raise UserError(f"{folder}: packed by another version ({meta['version']}): pack it again")
        if any(key not in meta for key in _META_KEYS) or not (meta["count"] >= 0 and 1 <= meta["size"] < 1 << 14):
            raise ValueError("a field is missing or out of range")
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} describes no packed data set ({error}): pack it again") from None
    return meta


def is_packed(folder: Path) -> bool:
    return (folder / "meta.json").is_file()


def _map(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    expected, size = int(np.prod(shape)), path.stat().st_size if path.is_file() else -1
    if size != expected:
        raise UserError(f"{path} has {size} bytes, expected {expected}: pack the data again")
    return np.memmap(path, np.uint8, "r", shape=shape) if expected else np.empty(shape, np.uint8)


def write_packed(
    folder: Path,
    scenes: Iterator[Scene],
    kind: str,
    source: str,
    published_split: bool,
    settings: dict[str, object],
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write square scenes of one size; continue ``folder``.partial where it was made with the same settings.

    Raises UserError where the folder cannot be written; then (or after a kill) nothing stands at ``folder``.
    """
    partial = folder.with_name(folder.name + ".partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with _Appender(partial, settings | {"kind": kind, "source": source}) as appender:
            for index, scene in enumerate(scenes):
                appender.add(index, scene)
                if progress:
                    progress(index + 1)
            meta = {"magic": MAGIC, "version": VERSION, "kind": kind, "source": source}
            appender.finish(meta | {"published_split": published_split})
        os.replace(partial, folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}): free space or name another place") from None


class _Appender:
    """Appends scenes to the arrays of a partial folder and knows how many are safely there."""

    def __init__(self, folder: Path, settings: dict[str, object]):
        self._folder, self._state = folder, folder / "progress.json"
        self._settings = json.loads(json.dumps(settings))
        state = self._read_state()
        self.done, self._size, self._has_masks = state["done"], state["size"], state["has_masks"]
        names = {"images.u8": (self._size or 0) ** 2 * 3, "masks.u8": (self._size or 0) ** 2, "objects.u8": 1}
        self._files = {}
        for name, width in names.items():
            path = folder / name
            path.touch()
            os.truncate(path, self.done * width if name != "masks.u8" or self._has_masks else 0)
            self._files[name] = open(path, "ab")
        self._factors: list[dict[str, np.ndarray]] = []

    def _read_state(self) -> dict:
        fresh = {"done": 0, "size": None, "has_masks": None}
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            state = json.loads(self._state.read_text())
            if state.pop("settings") == self._settings and isinstance(state["done"], int):
                return fresh | state
        return fresh

    def __enter__(self) -> _Appender:
        return self

    def __exit__(self, *_) -> None:
        for file in self._files.values():
            file.close()

    def add(self, index: int, scene: Scene) -> None:
        self._factors.append(scene.factors)
        if index < self.done:
            return
        size, has_masks = scene.image.shape[0], scene.mask is not None
        if self._size is None:
            self._size, self._has_masks = size, has_masks
        if (size, has_masks) != (self._size, self._has_masks):
            raise UserError(f"{self._settings['source']}: scene {index} differs in size or masks from those before it")
        self._files["images.u8"].write(np.ascontiguousarray(scene.image).data)
        if scene.mask is not None:
            self._files["masks.u8"].write(np.ascontiguousarray(scene.mask).data)
        self._files["objects.u8"].write(bytes([UNKNOWN if scene.objects is None else min(scene.objects, 254)]))
        if (index + 1) % FLUSH_EVERY == 0:
            self._flush(index + 1)

    def _flush(self, done: int) -> None:
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        self.done = done
        state = {"done": done, "size": self._size, "has_masks": self._has_masks, "settings": self._settings}
        temporary = self._state.with_suffix(".tmp")
        temporary.write_text(json.dumps(state))
        os.replace(temporary, self._state)

    def finish(self, meta: dict[str, object]) -> None:
        count = len(self._factors)
        if not count:
            raise UserError(f"{self._settings['source']}: holds no images: name another file or folder")
        self._flush(count)
        if not self._has_masks:
            (self._folder / "masks.u8").unlink()
        shapes = [{name: np.shape(value) for name, value in factors.items()} for factors in self._factors]
        if shapes[0] and all(shape == shapes[0] for shape in shapes):
            columns = {name: np.stack([factors[name] for factors in self._factors]) for name in shapes[0]}
            np.savez(self._folder / "factors.npz", allow_pickle=False, **columns)
        meta |= {"count": count, "size": self._size, "has_masks": self._has_masks, "digest": _digest(self._folder)}
        (self._folder / "meta.json").write_text(json.dumps(meta, indent=1))
        self._state.unlink()


def _digest(folder: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in ("images.u8", "masks.u8"):
        if (folder / name).exists():
            with open(folder / name, "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()
