"""A zip or tar of a data set: unpacked once into the cache, as a folder that is read as any other."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from fastslots.data.packed.cache import cache_root
from fastslots.data.readers.npz import MOST_RATIO
from fastslots.data.readers.sharded.webdataset import is_tar, looks_like_webdataset
from fastslots.data.storage.paths import HIDDEN, stamp
from fastslots.errors import UserError

TAR = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
MOST_FILES = 4_000_000


def is_archive(path: Path) -> bool:
    """A zip that is no npz, or a tar that is not WebDataset's."""
    try:
        with open(path, "rb") as file:
            head = file.read(4)
        if head == b"PK\x03\x04":
            with zipfile.ZipFile(path) as archive:
                return not all(name.endswith(".npy") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError):
        return False
    named = any(path.name.endswith(suffix) for suffix in TAR)
    return named and is_tar(path) and not looks_like_webdataset(path)


def unpacked(path: Path) -> Path:
    """The folder of an archive in the cache, unpacked unless it is there already.

    Names that leave the folder, links and devices are left out. UserError where it is damaged, or claims more than
    its size, or the disk, can hold.
    """
    key = hashlib.blake2b(f"{path.resolve()} {stamp([path], path.parent)}".encode(), digest_size=12).hexdigest()
    folder = cache_root() / "unpacked" / key
    if not folder.is_dir():
        print(f"unpacking {path} once into {folder}", file=sys.stderr)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(dir=folder.parent))
            try:
                _unpack(path, partial)
                os.replace(partial, folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        except (zipfile.BadZipFile, tarfile.TarError, EOFError, ValueError, RuntimeError, NotImplementedError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path} cannot be unpacked ({error}): download it again") from None
        except OSError as error:
            if not folder.is_dir():  # else another process has unpacked it meanwhile
                raise UserError(f"{path} cannot be unpacked ({error.strerror or error}): free space") from None
    inside = [p for p in folder.iterdir() if p.name[0] != "."]
    return inside[0] if len(inside) == 1 and inside[0].is_dir() else folder


def _unpack(path: Path, folder: Path) -> None:
    limit = min((1 << 20) + MOST_RATIO * path.stat().st_size, shutil.disk_usage(folder).free)
    written = count = 0
    for name, size, file in _members(path):
        parts = Path(name).parts
        if not parts or ".." in parts or Path(name).is_absolute() or any(p[0] == "." or p in HIDDEN for p in parts):
            continue
        written, count = written + size, count + 1
        if written > limit or count > MOST_FILES:
            raise UserError(f"{path} claims {written:,} bytes or more, too many for it or the disk: unpack it yourself")
        target = folder.joinpath(*parts)
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target, "wb") as out:
            shutil.copyfileobj(file, out, 1 << 20)


def _members(path: Path) -> Iterator[tuple[str, int, IO[bytes]]]:
    """Name, size and bytes of each file."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if not info.is_dir() and (info.external_attr >> 28) in (0, 8):  # no links
                    with archive.open(info) as file:
                        yield info.filename, info.file_size, file
        return
    with tarfile.open(path, "r|*") as archive:
        for member in archive:
            if member.isfile() and (content := archive.extractfile(member)):
                yield member.name.removeprefix("./"), member.size, content
