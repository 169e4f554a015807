"""Rows of raw arrays in object storage, read by byte range through fsspec: those of a batch all at once."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from fastslots.data.packed import web
from fastslots.data.packed.urls import check_protocol
from fastslots.errors import UserError, first_line

WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds before asking again for what did not come: a run outlives half a minute without a network, beside what the
library itself repeats."""
BLOCK = 8 << 20  # bytes of one range where a whole array is read
AHEAD = 8  # batches that are read at once
PACKAGES = {"http": "'fsspec[http]'", "https": "'fsspec[http]'", "s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"} | {
    "az": "adlfs",
    "abfs": "adlfs",
    "hf": "huggingface_hub",
}
"""What fsspec asks for a protocol of ``urls.PROTOCOLS``."""


class Range(NamedTuple):
    path: str  # in its store
    start: int
    end: int


def filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path in it. UserError where it is of another protocol, or its library is
    missing.

    Asked for at each use: fsspec keeps one for a process, and one made before a fork does not serve after it.
    """
    check_protocol(url)
    try:
        from fsspec.core import url_to_fs

        system, path = url_to_fs(url, **(web.options() if web.is_web(url) else {}))
        return system, str(path)
    except ImportError as error:
        package = PACKAGES.get(url.partition("://")[0], "the one that it names")
        reason = first_line(error)
        raise UserError(f"{url} needs a package that is not there ({reason}): pip install {package}") from None
    except Exception as error:  # each backend has errors of its own
        reason = first_line(error)
        raise UserError(f"{url} cannot be reached ({reason}): check its scheme and your credentials") from None


class RangedArray:
    """uint8 of a known shape in object storage; indexed by one row."""

    def __init__(self, url: str, path: str, shape: tuple[int, ...]):
        self.url, self.path, self.shape = url, path, shape  # url: of the data set
        self.row_bytes = math.prod(shape[1:])

    def __getitem__(self, row: int) -> np.ndarray:
        only: np.ndarray = gather([(self, np.array([row]))])[0][0]
        return only

    def ranges(self, rows: np.ndarray) -> list[Range]:
        return [Range(self.path, row * self.row_bytes, (row + 1) * self.row_bytes) for row in rows.tolist()]

    def blocks(self) -> Iterator[bytes]:
        """All bytes in order."""
        size = math.prod(self.shape)
        for start in range(0, size, BLOCK):
            asked = Range(self.path, start, min(start + BLOCK, size))
            yield fetch(self.url, [asked])[asked]


def gather(asks: Sequence[tuple[np.ndarray | RangedArray, np.ndarray]]) -> list[np.ndarray]:
    """For each (array, rows): those rows, uint8 [n, ...]. What is mapped is indexed, ranges are fetched together."""
    wanted: dict[str, list[Range]] = {array.url: [] for array, _ in asks if isinstance(array, RangedArray)}
    for array, rows in asks:
        if isinstance(array, RangedArray):
            wanted[array.url] += array.ranges(rows)
    got = {url: fetch(url, ranges) for url, ranges in wanted.items()}
    out = []
    for array, rows in asks:
        if not isinstance(array, RangedArray):
            out.append(array[rows])
            continue
        values = np.empty((len(rows), *array.shape[1:]), np.uint8)
        for value, asked in zip(values, array.ranges(rows), strict=True):
            value[...] = np.frombuffer(got[array.url][asked], np.uint8).reshape(value.shape)
        out.append(values)
    return out


def fetch(url: str, ranges: Sequence[Range]) -> dict[Range, bytes]:
    """The bytes of each range (an image drawn twice is fetched once), together. UserError where one does not come."""
    got: dict[Range, bytes] = {}
    for wait in (*WAITS, None):
        missing = [asked for asked in dict.fromkeys(ranges) if asked not in got]
        if not missing:
            break
        fs, _ = filesystem(url)
        paths, starts, ends = (list(column) for column in zip(*missing, strict=True))
        try:
            if web.is_web(url):
                answers = web.ranges(fs, paths, starts, ends)
            else:
                answers = fs.cat_ranges(paths, starts, ends, on_error="return")
        except Exception as error:  # each backend has errors of its own
            answers = [error] * len(missing)
        wrong: Exception | None = None
        place = ""
        for asked, answer in zip(missing, answers, strict=True):
            if isinstance(answer, bytes) and len(answer) == asked.end - asked.start:
                got[asked] = answer
            elif wrong is None:
                wrong = answer if isinstance(answer, Exception) else ValueError(f"{len(answer):,} bytes have come")
                place = f"{asked.path} at byte {asked.start}"
        if wrong is not None:
            if wait is None or isinstance(wrong, FileNotFoundError | PermissionError | ValueError):
                raise UserError(f"{url}: {place} cannot be read ({first_line(wrong)}): go on with --resume when it can")
            time.sleep(wait)
    return got
