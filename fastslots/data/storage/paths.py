"""Which files of a folder belong to a data set, and which paths a pattern means: one rule for all readers."""

from __future__ import annotations

import glob
import hashlib
import os
from pathlib import Path

HIDDEN = ("__MACOSX",)
"""Beside names that begin with a dot: a Mac leaves ._NAME and this folder on other disks and in archives."""


def is_hidden(path: Path, folder: Path) -> bool:
    """Whether a path below ``folder`` is none of the set's, by any of its names from there on."""
    return any(part[0] == "." or part in HIDDEN for part in path.relative_to(folder).parts)


def visible(folder: Path, pattern: str = "*") -> list[Path]:
    """Files below a folder, at every depth, in the order of their names; hidden ones left out."""
    return sorted(p for p in folder.rglob(pattern) if p.is_file() and not is_hidden(p, folder))


def matching(pattern: str) -> list[Path]:
    """What a pattern matches, in the order of names. The longest part of it that is a folder as it stands is taken as
    it stands, so that brackets in a folder's name are no pattern."""
    parts = Path(pattern).parts
    known = max((i for i in range(len(parts)) if Path(*parts[:i]).is_dir()), default=0)
    literal = glob.escape(str(Path(*parts[:known]))) if known else ""
    return sorted(Path(name) for name in glob.glob(os.path.join(literal, *parts[known:])))


def stamp(paths: list[Path], folder: Path) -> str:
    """Changes whenever a file is added, removed, renamed or replaced by one of another size or time."""
    hasher = hashlib.blake2b(digest_size=12)
    for path in paths:
        found = path.stat()
        name = os.fsencode(os.path.relpath(path, folder))
        hasher.update(b"%d %s %d %d\n" % (len(name), name, found.st_size, found.st_mtime_ns))
    return f"{len(paths)} files {hasher.hexdigest()}"
