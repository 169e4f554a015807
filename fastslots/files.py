"""The doors to files that the product writes: whole or not there, never through a symbolic link, never a pipe.

A run's folder may come from somebody else, with links in it that lead to files of this user. So nothing is opened for
writing by a name that was there before: a file is made under a random name (O_EXCL) and renamed; a log, which grows in
place, is opened with O_NOFOLLOW and has to be a regular file.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from pathlib import Path
from typing import BinaryIO

from fastslots.errors import UserError

PARTIAL = ".partial"
"""Ends the name of a file that is being written; begins with a dot and the start of the file's own name."""


def write_atomic(path: Path, data: bytes) -> None:
    """Write ``data`` so that ``path`` holds either what it held before or all of it, even after a power cut.

    Raises UserError naming the file where the disk is full, the folder cannot be written, or ``path`` is a link.
    """
    refuse_special(path)
    temporary = path.with_name(f".{path.name[:50]}.{secrets.token_hex(8)}{PARTIAL}")
    try:
        new = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(temporary, "wb", opener=lambda name, _: os.open(name, new, 0o666)) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):  # a disk that has become read-only
            temporary.unlink()
        raise UserError(f"{path} cannot be written ({error.strerror}): free space or name another folder") from None


def sync_folder(folder: Path) -> None:
    """Bring to the disk which files a folder has. OSError where that fails."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_log(path: Path) -> BinaryIO:
    """Open a file that grows in place, for appending and reading, unbuffered; made where it is missing.

    Unbuffered: Python's buffers lose what they hold when a write fails half-way on a full disk.

    Raises UserError where ``path`` cannot be opened, or is a link, a pipe or a device.
    """
    refuse_special(path)
    # O_NONBLOCK: a pipe with nobody at its other end would be waited for
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        file = open(path, "ab+", buffering=0, opener=lambda name, _: os.open(name, flags, 0o666))
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): mend its permissions or remove it") from None
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise UserError(f"{path} is no regular file: remove it")
    return file


def read_file(path: Path, most: int | None = None) -> bytes:
    """The bytes of a regular file. OSError where it cannot be read, is a pipe or a device, or has over ``most``."""
    with open(path, "rb", opener=lambda name, _: os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        if most is not None and status.st_size > most:
            raise OSError(errno.EFBIG, f"it has {status.st_size:,} bytes, over {most:,}", str(path))
        return file.read()


def refuse_special(path: Path) -> None:
    """UserError where ``path`` is a symbolic link, whether or not it leads anywhere, a pipe, a socket or a device."""
    try:
        mode = path.lstat().st_mode
    except OSError:  # it is not there, or whoever opens it will say why it cannot be
        return
    if stat.S_ISLNK(mode):
        raise UserError(f"{path} is a symbolic link, through which nothing is written: remove it")
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise UserError(f"{path} is no regular file: remove it")


def refuse_links(folder: Path) -> None:
    """``refuse_special`` of a folder that is to be written to, and of all that is in it, at every depth."""
    refuse_special(folder)
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            refuse_special(Path(root, name))


def set_aside(path: Path) -> str:
    """Rename a file that cannot be read, so that neither a resume nor a rotation takes it for good -> its new name.

    Its old name where it cannot be renamed. It is kept: what a disk does not give today it may give tomorrow.
    """
    for number in range(1, 1000):
        aside = path.with_name(f"{path.name}.aside{number if number > 1 else ''}")
        if not os.path.lexists(aside):
            with contextlib.suppress(OSError):
                path.rename(aside)
                return aside.name
            break
    return path.name


def forget_cached(path: Path) -> None:
    """Have the next read of a file come from the disk, where the system can."""
    with contextlib.suppress(OSError, AttributeError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
