"""Fetching a published file: continued after a stop, compared with its checksum, whole or not there."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import json
import os
import re
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastslots.errors import UserError
from fastslots.files import refuse_special

BLOCK = 1 << 20
TIMEOUT = 60  # seconds without a byte
ATTEMPTS = 5  # of a connection that breaks; each goes on where the one before has ended


def fetch(
    url: str, target: Path, md5: str = "", progress: Callable[[int, int], None] = lambda done, total: None
) -> None:
    """Write what ``url`` holds to ``target``, unless it is there already.

    What has come so far lies in NAME.partial, with a note of the file that it is of; a later call goes on from there,
    where the server still has that file (ETag, length). The checksum is ``md5``, or what the server says (Google's
    x-goog-hash, Content-MD5); without one the length is compared.

    progress: (bytes done, bytes in all, 0 where the server does not say). Raises UserError: no connection, a full
    disk, or a file that is not what was published; then nothing stands at ``target``.
    """
    if not re.match(r"https?://[^/]+/", url):
        raise UserError(f"{url} is no http or https address of a file")
    if target.is_file():
        return
    partial, note = target.with_name(target.name + ".partial"), target.with_name(target.name + ".partial.json")
    for path in (partial, note):
        refuse_special(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for attempt in range(ATTEMPTS):
            try:
                expected = _go_on(url, partial, note, progress)
                break
            except (ConnectionError, TimeoutError, http.client.HTTPException) as error:
                if attempt == ATTEMPTS - 1:
                    raise UserError(f"{url}: the connection has broken ({error}): call again, it goes on") from None
        _compare(url, partial, md5 or expected)
        os.replace(partial, target)
        note.unlink(missing_ok=True)
    except urllib.error.HTTPError as error:
        raise UserError(f"{url} is not to be had ({error.code} {error.reason}): see the page of the set") from None
    except urllib.error.URLError as error:
        raise UserError(f"{url} cannot be reached ({error.reason}): fetch it elsewhere, into {target.parent}") from None
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{target} cannot be written ({reason}): free space or name another --out") from None


def _go_on(url: str, partial: Path, note: Path, progress: Callable[[int, int], None]) -> str:
    """Read what is missing; the checksum that the server says, "" for none."""
    before = _read(note)
    have = partial.stat().st_size if partial.is_file() and before.get("url") == url else 0
    request = urllib.request.Request(url, headers={"User-Agent": "fastslots"})
    if have:
        request.add_header("Range", f"bytes={have}-")
        if before.get("etag"):
            request.add_header("If-Range", before["etag"])
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have and have == before.get("length"):  # it is whole already
            return str(before.get("md5", ""))
        if error.code == 416:
            partial.unlink()
            return _go_on(url, partial, note, progress)
        raise
    with response:
        resumed = response.status == 206
        start = have if resumed else 0
        length = int(response.headers.get("Content-Length") or 0)
        facts = {"url": url, "etag": response.headers.get("ETag"), "length": start + length if length else 0}
        facts["md5"] = _md5_of(response.headers)
        if resumed and before.get("length") and facts["length"] != before["length"]:
            partial.unlink()  # another file now, of a server that has no tags
            return _go_on(url, partial, note, progress)
        if length and shutil.disk_usage(partial.parent).free < length:
            raise UserError(f"{url}: {length:,} bytes are more than {partial.parent} has room for: free space")
        note.write_text(json.dumps(facts))
        with open(partial, "ab" if resumed else "wb") as out:
            done = start
            while block := response.read(BLOCK):
                out.write(block)
                done += len(block)
                progress(done, facts["length"])
        if facts["length"] and done < facts["length"]:
            raise ConnectionError(f"after {done:,} of {facts['length']:,} bytes")
    return str(facts["md5"])


def _md5_of(headers: Any) -> str:
    """In hexadecimal, of the whole file; "" where the server says none."""
    found = re.search(r"md5=([A-Za-z0-9+/=]+)", ",".join(headers.get_all("x-goog-hash") or []))
    encoded = found[1] if found else headers.get("Content-MD5", "")
    with contextlib.suppress(ValueError):
        return base64.b64decode(encoded, validate=True).hex()
    return ""


def _compare(url: str, path: Path, md5: str) -> None:
    if not md5:
        return
    hasher = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            hasher.update(block)
    if hasher.hexdigest() != md5:
        path.unlink()
        raise UserError(f"{url}: what has come is not what was published (MD5): call again, or see the page of the set")


def _read(note: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        values = json.loads(note.read_text())
        return values if isinstance(values, dict) else {}
    return {}
