"""Which URLs are opened: those of a short list of protocols, and only where the user named them.

A configuration travels with its run from person to person, and whoever wrote it chose its ``data``. So a URL that comes
from a file is not opened until the user names it (``--data URL``) or allows it (``--allow-remote``) once on this
machine; what has been opened that way is noted in the cache folder, so that a resume of one's own run needs no flag.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from fastslots.data.packed.cache import cache_root
from fastslots.errors import UserError

PROTOCOLS = ("file", "http", "https", "s3", "gs", "gcs", "az", "abfs", "hf")
"""What fsspec may be asked for. Its other protocols include ones that run templates, unpack archives or open shells."""


def is_remote(path: str | Path) -> bool:
    return "://" in str(path)


def check_protocol(url: str) -> None:
    """UserError unless ``url`` is of one of ``PROTOCOLS`` and no chain of them; fsspec is not asked."""
    protocol, _, rest = url.partition("://")
    if "::" in url:
        raise UserError(f"{url} chains file systems (::), which are never opened: name the data's own URL or a folder")
    if protocol not in PROTOCOLS:
        raise UserError(
            f"{url}: data are not read through {protocol!r}: download them, or name a URL of {', '.join(PROTOCOLS)}"
        )
    if not rest or not url.isprintable():
        raise UserError(f"{url!r} names no folder: give {protocol}://BUCKET/FOLDER")


def check_allowed(url: str, named_by: Path, allowed: bool = False) -> None:
    """UserError where a file names a URL as data that the user has neither named nor allowed; nothing is opened.

    url: ``config.data``, any of its values. named_by: the configuration's file. allowed: the user said so.
    """
    if is_remote(url) and not allowed and url.rstrip("/") not in _known():
        check_protocol(url)
        raise UserError(
            f"{named_by} names data at {url}, which were never opened on this machine: "
            f"add --allow-remote where you want them opened"
        )


def remember(url: str) -> None:
    """Note that the user has had ``url`` opened on this machine."""
    url = url.rstrip("/")
    if url not in _known():
        with contextlib.suppress(OSError), open(_list(), "a", encoding="utf-8") as file:  # then a flag is needed again
            file.write(f"{url}\n")


def _known() -> set[str]:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return set(_list().read_text(encoding="utf-8").splitlines())
    return set()


def _list() -> Path:
    return cache_root() / "opened-urls.txt"
