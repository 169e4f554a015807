"""The doors to the files of a run: written whole or not at all (temporary file, fsync, rename), and read."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from fastslots.errors import UserError


def write_atomic(path: Path, data: bytes) -> None:
    """Write ``data`` so that ``path`` holds either what it held before or all of it, even after a power cut.

    Raises UserError naming the file where the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        with contextlib.suppress(OSError):  # a disk that has become read-only
            temporary.unlink()
        raise UserError(f"{path} cannot be written ({error.strerror}): free space or name another folder") from None


def read_file(path: Path) -> bytes:
    """The bytes of a file. OSError where it cannot be read."""
    return path.read_bytes()
