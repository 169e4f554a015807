"""TFRecord files of ``tf.train.Example``, without TensorFlow; every length and payload is verified by its checksum.

Frame: u64 length (little endian), u32 masked CRC-32C of the length, payload, u32 masked CRC-32C of the payload;
masked = rotated right by 15, plus 0xa282ead8. The stream may be GZIP.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from fastslots.data.readers.crc32c import crc32c
from fastslots.data.readers.scene import BadRecordError
from fastslots.errors import UserError

MAX_RECORD = 1 << 23
"""Bytes. A larger record is refused before anything is allocated: the largest known layout has 3.3 MB, and 256 MB of
tiny fields, which fit into 250 kB of GZIP, would take minutes to parse."""

MOST_FIELDS = 4_096
"""Fields of a message, and numbers of a list, that are read one by one, 1 to 3 us each: known layouts have tens."""

MEND = "download the file again"


def masked_crc(data: bytes) -> int:
    crc = crc32c(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def looks_like_tfrecord(head: bytes) -> bool:
    """Whether a file that starts so (unzipped) is a TFRecord: its first length carries its own checksum."""
    return len(head) >= 12 and struct.unpack("<I", head[8:12])[0] == masked_crc(head[:8])


def read_head(path: Path) -> bytes:
    """The first bytes of a file, unzipped where it is GZIP; empty where that fails."""
    try:
        raw, stream = _open(path)
        with raw:
            return stream.read(64)
    except (OSError, EOFError, zlib.error):
        return b""


def _open(path: Path) -> tuple[BinaryIO, BinaryIO]:
    """The file, and the stream of frames in it (the same where it is not GZIP)."""
    raw = open(path, "rb")
    zipped = raw.read(2) == b"\x1f\x8b"
    raw.seek(0)
    return raw, cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if zipped else raw


class Records:
    """Iterates over the payloads of a file in order.

    Raises UserError that names a damaged record and where it starts (in the unzipped stream); ``items`` goes on after
    one whose length is sound.
    """

    def __init__(self, path: Path, most: int = MAX_RECORD):
        self._path, self._most = path, most
        self._raw, self._stream = _open(path)
        self._size = path.stat().st_size

    @property
    def share(self) -> float:
        """How much of the file has been read, 0 to 1."""
        return self._raw.tell() / max(self._size, 1)

    def close(self) -> None:
        self._stream.close()
        self._raw.close()

    def __iter__(self) -> Iterator[bytes]:
        for item in self.items():
            if isinstance(item, BadRecordError):
                raise item
            yield item

    def items(self) -> Iterator[bytes | BadRecordError]:
        """Payloads, and in place of each whose checksum differs an error."""
        offset = index = 0
        with ThreadPoolExecutor(1) as ahead:  # unzips the next record, without the GIL, while the caller parses this
            pending = ahead.submit(self._read, index, offset)
            while (found := pending.result()) is not None:
                item, length = found
                offset, index = offset + 16 + length, index + 1
                pending = ahead.submit(self._read, index, offset)
                yield item

    def _read(self, index: int, offset: int) -> tuple[bytes | BadRecordError, int] | None:
        """The next payload and its length; None at the end of the file."""

        def damaged(what: str) -> UserError:
            return UserError(f"{self._path}: record {index} at byte {offset} is damaged ({what}): {MEND}")

        file = self._stream
        try:
            head = file.read(12)
            if not head:
                return None
            if len(head) < 12:
                raise damaged("the file ends inside its length")
            if not looks_like_tfrecord(head):
                raise damaged("checksum of its length differs")
            (length,) = struct.unpack("<Q", head[:8])
            if length > (self._most if file is not self._raw else min(self._most, self._size - offset)):
                raise damaged(f"its length is {length} bytes, more than there are")
            payload, tail = file.read(length), file.read(4)
        except (OSError, EOFError, zlib.error) as error:
            raise damaged(f"GZIP: {error}") from None
        if len(payload) < length or len(tail) < 4:
            raise damaged("the file ends inside it")
        if struct.unpack("<I", tail)[0] != masked_crc(payload):
            return BadRecordError(str(damaged("checksum of its payload differs"))), length
        return payload, length


# ---- tf.train.Example, a protocol buffer -----------------------------------------------------------------------------


def parse_example(payload: bytes) -> dict[str, np.ndarray]:
    """Features of an Example: byte lists as uint8 (all values joined), floats as float32, integers as int64.

    Raises ValueError for bytes that are no Example.
    """
    features: dict[str, np.ndarray] = {}
    data = memoryview(payload)
    for number, value in _fields(data):
        if number == 1:  # Example.features
            for entry_number, entry in _fields(value):
                if entry_number == 1:  # one entry of the map: key, Feature
                    pair = dict(_fields(entry))
                    features[bytes(pair[1]).decode()] = _feature(pair[2])
    return features


def byte_values(payload: bytes, names: tuple[str, ...]) -> dict[str, list[bytes]]:
    """Those features of an Example that are lists of bytes, value by value. ValueError for what is no Example."""
    found: dict[str, list[bytes]] = {}
    for number, value in _fields(memoryview(payload)):
        for entry_number, entry in _fields(value) if number == 1 else ():
            pair = dict(_fields(entry)) if entry_number == 1 else {}
            if 1 in pair and bytes(pair[1]).decode(errors="replace") in names:
                lists = [part for kind, part in _fields(pair[2]) if kind == 1]
                found[bytes(pair[1]).decode()] = [bytes(item) for part in lists for _, item in _fields(part)]
    return found


def _feature(data: memoryview) -> np.ndarray:
    for number, value in _fields(data):
        if number == 1:
            return _bytes_list(value)
        if number == 2:
            return np.concatenate([np.frombuffer(part, "<f4") for _, part in _fields(value)] or [np.empty(0, "<f4")])
        if number == 3:
            numbers = islice((v for _, part in _fields(value) for v in _varints(part)), MOST_FIELDS + 1)
            return np.array(_few(numbers), np.int64)
    return np.empty(0, np.uint8)


# Three-byte fields (tag 0x0A, length 1, the byte) over three 8-byte words: what is compared, and what it must be
_RUN_MASK, _RUN = (np.frombuffer(field * 8, np.uint64) for field in (b"\xff\xff\x00", b"\x0a\x01\x00"))


def _bytes_list(data: memoryview) -> np.ndarray:
    """CLEVR stores one value a byte, a run of 3-byte fields: verified by words, read as a strided array."""
    raw = np.frombuffer(data, np.uint8)
    whole = len(raw) - len(raw) % 24
    words, tail = raw[:whole].view(np.uint64).reshape(-1, 3), raw[whole:]
    if (
        len(raw) % 3 == 0
        and (words & _RUN_MASK == _RUN).all()
        and (tail[0::3] == 0x0A).all()
        and (tail[1::3] == 1).all()
    ):
        return raw[2::3]
    return np.frombuffer(b"".join(bytes(value) for _, value in _fields(data)), np.uint8)


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """(field number, bytes) of a message; fixed-width and varint fields give their bytes too.

    ValueError for what is no message, or has over ``MOST_FIELDS``.
    """
    position = count = 0
    while position < len(data):
        count += 1
        if count > MOST_FIELDS:
            raise ValueError(f"a message has over {MOST_FIELDS:,} fields")
        tag, position = _varint(data, position)
        wire = tag & 7
        if wire == 2:
            length, position = _varint(data, position)
        elif wire == 5:
            length = 4
        elif wire == 1:
            length = 8
        elif wire == 0:
            _, end = _varint(data, position)
            length = end - position
        else:
            raise ValueError(f"wire type {wire}")
        if position + length > len(data):
            raise ValueError("a field is longer than its message")
        yield tag >> 3, data[position : position + length]
        position += length


def _few(numbers: Iterator[int]) -> list[int]:
    values = list(numbers)
    if len(values) > MOST_FIELDS:
        raise ValueError(f"a list has over {MOST_FIELDS:,} numbers")
    return values


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if position >= len(data) or shift > 63:
            raise ValueError("a number does not end")
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position


def _varints(data: memoryview) -> Iterator[int]:
    position = 0
    while position < len(data):
        value, position = _varint(data, position)
        yield value - (1 << 64) if value >> 63 else value
