"""CRC-32C (Castagnoli), the checksum of TFRecords: google-crc32c, or where that is not installed, NumPy.

CRC is linear over GF(2): the state after A‖B, begun at 0, is that after A, advanced by as many zero bytes as B has, xor
that after B. So NumPy takes many equal lanes of the data side by side, a byte of each at once, then joins neighbours.
"""

from __future__ import annotations

import numpy as np

try:
    import google_crc32c
except ImportError:  # a machine where nothing can be installed
    google_crc32c = None

POLYNOMIAL = 0x82F63B78  # 0x1EDC6F41 with its bits reversed (RFC 3720, section 12.1)
LANES = 4096  # at most, and a power of two: 3 MB, as a CLEVR scene has, take 43 ms
BITS = np.arange(32, dtype=np.uint32)


def crc32c(data: bytes) -> int:
    """Of all the bytes, as an unsigned number of 32 bits."""
    return google_crc32c.value(data) if google_crc32c else _crc32c_numpy(data)


def _byte_table() -> np.ndarray:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = (table >> np.uint32(1)) ^ np.where(table & 1, np.uint32(POLYNOMIAL), np.uint32(0))
    return table


_TABLE = _byte_table()


def _advance(state: np.ndarray, byte: np.ndarray | int) -> np.ndarray:
    """The states after one more byte each."""
    after: np.ndarray = _TABLE[(state ^ byte) & 0xFF] ^ (state >> np.uint32(8))
    return after


def _crc32c_numpy(data: bytes) -> int:
    if len(data) < 4:
        state = np.full(1, 0xFFFFFFFF, np.uint32)
        for byte in data:
            state = _advance(state, byte)
        return int(state[0]) ^ 0xFFFFFFFF
    lanes = min(LANES, 1 << max(len(data) // 16, 1).bit_length() - 1)
    length = -(-len(data) // lanes)
    padded = np.zeros(lanes * length, np.uint8)  # zeros in front leave a state of 0 as it is
    padded[-len(data) :] = np.frombuffer(data, np.uint8)
    first = len(padded) - len(data)
    padded[first : first + 4] ^= 0xFF  # in place of a first state of all ones
    columns = np.ascontiguousarray(padded.reshape(lanes, length).T).astype(np.uint32)
    state, zeros = np.zeros(lanes, np.uint32), np.uint32(1) << BITS  # lanes; images of the 32 unit states
    for column in columns:
        state = _advance(state, column)
    for _ in range(length):
        zeros = _advance(zeros, 0)
    while len(state) > 1:
        state = _apply(zeros, state[::2]) ^ state[1::2]
        zeros = _apply(zeros, zeros)
    return int(state[0]) ^ 0xFFFFFFFF


def _apply(images: np.ndarray, states: np.ndarray) -> np.ndarray:
    """A linear map, given by the images of the unit states, of each state."""
    bits = (states[:, None] >> BITS) & np.uint32(1)
    applied: np.ndarray = np.bitwise_xor.reduce(bits * images, 1)
    return applied
