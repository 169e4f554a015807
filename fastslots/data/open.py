"""Any known data set, recognised by content, as one that training maps into memory.

What is not packed is decoded once into a cache of packed folders, ``$FASTSLOTS_CACHE`` or ~/.cache/fastslots, keyed by
path, size, time and preprocessing; so every format trains at the same speed, and a file and its packed form give the
same bits in the same order.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from fastslots.data.packed import PackedDataset, is_packed, write_packed
from fastslots.data.scene import Reader, Scene, default_size, preprocess
from fastslots.errors import UserError

KNOWN = (
    "npz in the authors' layout, TFRecord of multi_object_datasets, CLEVR v1.0 folder, object-centric-library HDF5, "
    "folder of images, `fastslots data pack` folder"
)


def open_dataset(path: str | Path, max_objects: int | None = None, size: int | None = None) -> PackedDataset:
    """Open a data set of any format in ``KNOWN``.

    Args:
        path: file or folder. max_objects: keep scenes with at most so many (CLEVR6: 6).
        size: side in pixels; None: 128 for CLEVR (after its centred crop), else the set's own.

    Returns:
        A map-style data set: ``ds[i]`` -> {"image": uint8 [R,R,3], "mask": uint8 [R,R] or absent, "factors": {...}};
        ``ds.batch(indices)``; ``ds.info``.

    Raises:
        UserError: naming file (record, member) and mend.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if path.is_dir() and is_packed(path):
        dataset = PackedDataset(path, max_objects)
        if size not in (None, dataset.info.size):
            raise UserError(
                f"{path} was packed at {dataset.info.size} x {dataset.info.size}, not {size}: "
                f"set --resolution {dataset.info.size}, or pack it again with --size {size}"
            )
        return dataset
    reader = recognise(path)
    side = size or default_size(reader)
    folder = cache_folder(path, side)
    if not is_packed(folder):
        print(f"decoding {path} once into {folder}", file=sys.stderr)
        _pack(reader, path, folder, side, None)
    return PackedDataset(folder, max_objects, str(path))


def pack(path: Path, folder: Path, size: int | None = None, max_objects: int | None = None) -> None:
    """Decode, crop and resize a data set into a packed folder, with progress on stderr."""
    reader = recognise(path)
    _pack(reader, path, folder, size or default_size(reader), max_objects)


def _pack(reader: Reader, path: Path, folder: Path, side: int, max_objects: int | None) -> None:
    def kept() -> Iterator[Scene]:
        for scene in reader.scenes():
            if max_objects:
                if scene.objects is None:
                    raise UserError(f"{path}: nothing tells how many objects its scenes have: leave out --max_objects")
                if scene.objects > max_objects:
                    continue
            yield preprocess(scene, reader.crop, side)

    progress = _Progress(reader.count)
    settings: dict[str, object] = {"size": side, "max_objects": max_objects, "stamp": _stamp(path)}
    write_packed(folder, kept(), reader.kind, str(path), reader.published_split, settings, progress)
    progress.end()


def recognise(path: Path) -> Reader:
    """The reader of a file or folder, chosen by what is in it. UserError where nothing known is."""
    if path.is_dir():
        from fastslots.data.pictures import ClevrReader, FolderReader

        if ClevrReader.recognises(path):
            return ClevrReader(path)
        if any(path.glob("*.mdb")):
            raise UserError(f"{path} is an LMDB of pickles, which are never loaded: convert it to npz or HDF5")
        folder = FolderReader(path)
        if folder.count:
            return folder
        raise UserError(f"{path}: holds no images and no data set that is known ({KNOWN})")
    with open(path, "rb") as file:
        head = file.read(8)
    from fastslots.data.hdf5 import MAGIC, Hdf5Reader
    from fastslots.data.multi_object import MultiObjectReader
    from fastslots.data.npz import NpzReader
    from fastslots.data.tfrecord import looks_like_tfrecord, read_head

    if head[:4] == b"PK\x03\x04":
        return NpzReader(path)
    if head == MAGIC:
        return Hdf5Reader(path)
    if looks_like_tfrecord(read_head(path)) or path.suffix in (".tfrecord", ".tfrecords"):
        return MultiObjectReader(path)
    raise UserError(f"{path}: not recognised; known are: {KNOWN}")


def cache_folder(path: Path, size: int) -> Path:
    root = Path(os.environ.get("FASTSLOTS_CACHE") or Path.home() / ".cache" / "fastslots")
    key = json.dumps([str(path.resolve()), _stamp(path), size])
    return root / hashlib.blake2b(key.encode(), digest_size=12).hexdigest()


def _stamp(path: Path) -> list[int]:
    """Size and time of a file; of a folder, their sums over all files in it."""
    stats = [p.stat() for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path.stat()]
    return [len(stats), sum(s.st_size for s in stats), max((s.st_mtime_ns for s in stats), default=0)]


class _Progress:
    """A bar on a terminal; nothing elsewhere."""

    def __init__(self, total: int | None):
        self._total, self._live = total, sys.stderr.isatty()

    def __call__(self, done: int) -> None:
        if self._live and (done % 16 == 0 or done == self._total):
            share = done / self._total if self._total else 0.0
            bar = f"[{'#' * int(30 * share):<30}] {done}/{self._total}" if self._total else f"{done} scenes"
            print(f"\r{bar}", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self._live:
            print(file=sys.stderr)
