"""Plain web servers as a store: they tell little of their files, may know no ranges, and may send without end.

fsspec reads an answer whole, however long it is; here no more is taken than was asked for, or was listed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from fastslots.errors import UserError, first_line

SILENCE = 60.0
"""Seconds without a byte after which a server counts as lost, and is asked again."""
CHUNK = 1 << 16  # bytes


def is_web(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def options() -> dict[str, Any]:
    """For fsspec: no bound on a whole transfer (its own is five minutes), but one on silence."""
    import aiohttp

    return {"client_kwargs": {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=SILENCE, sock_read=SILENCE)}}


def ranges(fs: Any, paths: Sequence[str], starts: Sequence[int], ends: Sequence[int]) -> list[bytes | Exception]:
    """The bytes of each range, or why they did not come, as ``fs.cat_ranges`` gives them.

    ValueError stands for a server that will not do: it gives another part than the one that was asked for.
    """
    from fsspec.asyn import sync

    async def together() -> list[bytes | Exception]:
        asked = (_range(fs, *one) for one in zip(paths, starts, ends, strict=True))
        return await asyncio.gather(*asked, return_exceptions=True)  # type: ignore[return-value]

    found: list[bytes | Exception] = sync(fs.loop, together)
    return found


async def _range(fs: Any, path: str, start: int, end: int) -> bytes:
    session, data = await fs.set_session(), bytearray()
    wanted = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
    async with session.get(fs.encode_url(path), headers=wanted) as answer:
        if answer.status == 404:
            raise FileNotFoundError(f"{path} is not there")
        if answer.status == 416:
            raise ValueError("the file has become shorter")
        answer.raise_for_status()
        if answer.status != 206:
            raise ValueError("the server gives no part of a file alone: it takes no Range")
        async for chunk in answer.content.iter_chunked(CHUNK):
            data += chunk
            if len(data) > end - start:
                raise ValueError(f"more has come than the {end - start:,} bytes that were asked for")
    return bytes(data)


def check_ranges(fs: Any, url: str, path: str) -> None:
    """UserError where a web server gives a whole file for a range of it: each image drawn would cost all of them."""
    if not is_web(url):
        return
    (found,) = ranges(fs, [path], [1], [2])
    if isinstance(found, bytes) and len(found) == 1:
        return
    why = first_line(found) if isinstance(found, Exception) else f"{len(found)} bytes have come for one"
    raise UserError(
        f"{path} cannot be read by parts ({why}): set FASTSLOTS_CACHE_GB so that the cache takes the whole set, or "
        f"download it"
    )


def at_most(listed: int) -> Any:
    """fsspec's callback of a transfer, which it ends beyond ``listed`` bytes."""
    from fsspec.callbacks import Callback

    class Bounded(Callback):  # type: ignore[misc]
        def relative_update(self, inc: int = 1) -> None:
            super().relative_update(inc)
            if self.value > listed:
                raise ValueError(f"more has come than the {listed:,} bytes that were listed")

    return Bounded()
