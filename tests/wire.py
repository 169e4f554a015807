"""A writer of protobuf messages, for tests of the reader."""

from __future__ import annotations


def varint(n: int) -> bytes:
    """A protobuf number, as TFRecord examples hold them."""
    out = b""
    while n > 127:
        out, n = out + bytes([n & 127 | 128]), n >> 7
    return out + bytes([n])


def message(number: int, body: bytes) -> bytes:
    """A protobuf field of bytes."""
    return varint(number << 3 | 2) + varint(len(body)) + body
