"""Packed sets in object storage (``s3://``, ``gs://`` and what else ``urls.PROTOCOLS`` names).

Training draws images from everywhere at every step, so a cache smaller than the set can save no more than its share of
the reads, whatever it keeps. Therefore as many shards as fit into the cache, in order, are fetched whole, once, and
mapped; images of the others are read by byte range as they are drawn. The same images in the same order either way.

The cache is $FASTSLOTS_CACHE/remote (or ~/.cache/fastslots/remote), at most ``$FASTSLOTS_CACHE_GB`` of 10^9 bytes; the
shards of other sets that were used longest ago make room.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from fastslots.data.packed import web
from fastslots.data.packed.cache import cache_root
from fastslots.data.packed.dataset import ARRAYS, PackedDataset, digest, parse_meta
from fastslots.data.packed.ranges import RangedArray, filesystem
from fastslots.data.packed.urls import check_protocol, remember
from fastslots.errors import UserError, first_line
from fastslots.notices import notice

MEND = "upload the packed folder again"
MOST_META = 1 << 20  # bytes of a meta.json that are read
ALWAYS = ("meta.json", "objects.u8", "factors.npz")  # little, and needed at once


@dataclass(frozen=True)
class Shard:
    """A packed folder in object storage."""

    set_url: str  # of the data set that it belongs to
    url: str
    files: dict[str, tuple[str, int]]  # name -> path in the store, bytes
    text: str  # meta.json
    folder: Path  # its place in the cache

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self.files.values())


def openers(url: str, max_objects: int | None) -> list[Callable[[], PackedDataset]]:
    """What opens each packed folder at or directly in ``url``, in the order of their names.

    Raises UserError where the protocol is none of those, nothing packed is there, or it cannot be reached.
    """
    check_protocol(url)
    root = cache_root() / "remote"
    try:
        root.mkdir(parents=True, exist_ok=True)
        limit = _limit(root)
    except OSError as error:
        raise _unwritable(root, error) from None
    shards = _find(url.rstrip("/"), root)
    remember(url)
    total, whole = 0, set()
    for shard in shards:
        total += shard.bytes
        if total <= limit:
            whole.add(shard.folder)
    if len(whole) < len(shards):
        ranged = len(shards) - len(whole)
        notice(
            f"{url}: {total / 1e9:.3g} GB, the cache takes {limit / 1e9:.3g} GB (FASTSLOTS_CACHE_GB): images of "
            f"{ranged} of {len(shards)} packed folders are read as they are drawn"
        )

    own = {shard.folder for shard in shards}

    def opener(shard: Shard) -> Callable[[], PackedDataset]:
        return lambda: _open(shard, shard.folder in whole, own, limit, max_objects)

    return [opener(shard) for shard in shards]


def _find(url: str, root: Path) -> list[Shard]:
    fs, base = filesystem(url)
    try:
        listed = fs.find(base, detail=True, **({"maxdepth": 2} if web.is_web(url) else {}))
        folders: dict[str, dict[str, tuple[str, int]]] = {}
        ours: dict[str, tuple[str, ...]] = {}
        for path in listed:
            inside = PurePosixPath(path).relative_to(PurePosixPath(base)).parts
            if 1 <= len(inside) <= 2 and inside[-1] in (*ALWAYS, *ARRAYS):
                ours[path] = inside
        for (path, inside), size in zip(ours.items(), _sizes(fs, list(ours), listed), strict=True):
            folders.setdefault("/".join(inside[:-1]), {})[inside[-1]] = (path, size)
        packed = {name: files for name, files in sorted(folders.items()) if "meta.json" in files}
        packed = {"": packed[""]} if "" in packed else {n: f for n, f in packed.items() if not n.endswith(".partial")}
        if any(files["meta.json"][1] > MOST_META for files in packed.values()):
            raise UserError(f"{url}: a meta.json of over {MOST_META:,} bytes describes no packed data set: {MEND}")
        paths = [files["meta.json"][0] for files in packed.values()]
        texts = _texts(fs, paths, root) if web.is_web(url) else fs.cat(paths) if paths else {}
    except UserError:
        raise
    except Exception as error:  # each backend has errors of its own
        raise UserError(f"{url} cannot be read ({first_line(error)}): check its name and your credentials") from None
    if not packed:
        what = "holds no packed data set" if listed else "is not there, or empty"
        raise UserError(f"{url} {what}: `fastslots data pack IN OUT` makes one to upload; check bucket and folder")
    shards = []
    for (name, files), path in zip(packed.items(), paths, strict=True):
        where = f"{url}/{name}".rstrip("/")
        text = texts[path].decode(errors="replace")
        key = hashlib.blake2b(json.dumps([where, text, sorted(files.items())]).encode(), digest_size=12)
        shards.append(Shard(url, where, files, text, root / key.hexdigest()))
    return shards


def _sizes(fs: Any, paths: list[str], listed: dict[str, Any]) -> list[int]:
    """Bytes of each file; a web server's pages do not say, so that it is asked. ValueError where it does not know."""
    sizes = [listed[path]["size"] for path in paths]
    unknown = [path for path, size in zip(paths, sizes, strict=True) if size is None]
    asked = dict(zip(unknown, fs.sizes(unknown), strict=True)) if unknown else {}
    for path, size in asked.items():
        if size is None:
            raise ValueError(f"the server does not say how large {path} is")
    return [int(asked.get(path, size)) for path, size in zip(paths, sizes, strict=True)]


def _texts(fs: Any, paths: list[str], folder: Path) -> dict[str, bytes]:
    """Small files of a web server, of which no more than ``MOST_META`` is taken, whatever it sends."""
    texts = {}
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        for path in paths:
            fs.get_file(path, f"{scratch}/text", callback=web.at_most(MOST_META))
            texts[path] = Path(scratch, "text").read_bytes()
    return texts


def _open(shard: Shard, whole: bool, keep: set[Path], limit: int, max_objects: int | None) -> PackedDataset:
    meta = parse_meta(shard.text, f"{shard.url}/meta.json", MEND)
    n, size = meta["count"], meta["size"]
    shapes = {"images.u8": (n, size, size, 3), "objects.u8": (n,)}
    shapes |= {"masks.u8": (n, size, size)} if meta["has_masks"] else {}
    for name, shape in shapes.items():
        _, held = shard.files.get(name, ("", 0))
        if held != math.prod(shape):
            raise UserError(f"{shard.url}/{name} has {held} bytes, expected {math.prod(shape)}: {MEND}")
    ranged = {
        name: RangedArray(shard.set_url, shard.files[name][0], shapes[name]) for name in shapes if name != ARRAYS[2]
    }
    try:
        with _locked(shard.folder.parent):
            if not whole:  # fetched when the cache was larger
                for name in ("images.u8", "masks.u8"):
                    (shard.folder / name).unlink(missing_ok=True)
            there = (shard.folder / "images.u8").exists()
            if not whole:
                web.check_ranges(filesystem(shard.set_url)[0], shard.set_url, shard.files["images.u8"][0])
            if (whole and not there) or not (shard.folder / "meta.json").exists():
                names = [name for name in shard.files if whole or name in ALWAYS]
                _make_room(shard.folder.parent, limit - sum(shard.files[name][1] for name in names), keep)
                _download(shard, names, meta["digest"] if whole else None)
                there = whole
            os.utime(shard.folder)  # what was used longest ago makes room first
            dataset = PackedDataset(shard.folder, max_objects, shard.url, None if there else ranged)
            dataset.factors()  # held in memory: another run may take the folder to make room
            return dataset
    except OSError as error:
        raise _unwritable(shard.folder, error) from None


def _download(shard: Shard, names: list[str], expected: str | None) -> None:
    """Files of a shard into the cache, all or nothing, verified by checksum where they are all of them."""
    fs, _ = filesystem(shard.set_url)
    partial = shard.folder.with_name(shard.folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    if expected:
        notice(f"fetching {shard.url} once into {shard.folder} ({shard.bytes / 1e9:.3g} GB)")
    for name in names:
        path, size = shard.files[name]
        try:
            fs.get_file(path, str(partial / name), callback=web.at_most(size))
        except OSError as error:
            if error.errno is not None and not isinstance(error, FileNotFoundError | PermissionError):
                raise  # the disk
            raise _lost(shard, name, error) from None
        except Exception as error:  # each backend has errors of its own
            raise _lost(shard, name, error) from None
        if (partial / name).stat().st_size != size:
            raise UserError(f"{shard.url}/{name} came with another length than it was listed with: start again")
        with open(partial / name, "rb") as file:
            os.fsync(file.fileno())
    if expected and digest(partial) != expected:
        shutil.rmtree(partial)
        raise UserError(f"{shard.url}: its images are not those that were packed (checksum): {MEND}")
    shutil.rmtree(shard.folder, ignore_errors=True)  # where only its small files were there
    os.replace(partial, shard.folder)


def _lost(shard: Shard, name: str, error: Exception) -> UserError:
    reason = first_line(error)
    return UserError(f"{shard.url}/{name} cannot be read ({reason}): start again, what has been fetched stays")


def _make_room(root: Path, room: int, keep: set[Path]) -> None:
    """Remove the shards that were used longest ago until the rest takes at most ``room`` bytes, but none of ``keep``.

    A process that has one mapped goes on reading it.
    """
    folders = [path for path in root.iterdir() if path.is_dir()]
    sizes = {path: sum(file.stat().st_size for file in path.iterdir()) for path in folders}
    for path in sorted(folders, key=lambda path: path.stat().st_mtime):
        if sum(sizes.values()) <= room:
            return
        if path not in keep:
            gone = path.with_name(path.name.removesuffix(".partial") + ".partial")  # not taken for a whole one
            if path != gone:
                shutil.rmtree(gone, ignore_errors=True)
                os.replace(path, gone)
            shutil.rmtree(gone)
            del sizes[path]


def _limit(root: Path) -> int:
    """Bytes that the cache may take; where nothing is said, half of what it has or could have on its disk."""
    text = os.environ.get("FASTSLOTS_CACHE_GB", "")
    if not text:
        used = sum(file.stat().st_size for file in root.rglob("*") if file.is_file())
        return (shutil.disk_usage(root).free + used) // 2
    with contextlib.suppress(ValueError):
        if 0 <= float(text) < 1e9:
            return int(float(text) * 1e9)
    raise UserError(f"FASTSLOTS_CACHE_GB must be a number of gigabytes from 0 on, got {text!r}")


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    """One process at a time fetches or makes room; the lock goes with the process that holds it."""
    with open(root / "lock", "ab") as file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _unwritable(path: Path, error: OSError) -> Any:
    reason = error.strerror or error
    return UserError(f"{path} cannot be written ({reason}): free space, or set FASTSLOTS_CACHE_GB or FASTSLOTS_CACHE")
