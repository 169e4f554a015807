"""CRC-32C by google-crc32c and, where that is not installed, by NumPy: the same numbers."""

from __future__ import annotations

import numpy as np
import pytest

from fastslots.data.readers import crc32c

CHECK = (b"123456789", 0xE3069283)  # RFC 3720 and the catalogues of CRCs


def test_the_known_value():
    assert crc32c.crc32c(CHECK[0]) == CHECK[1] and crc32c._crc32c_numpy(CHECK[0]) == CHECK[1]


@pytest.mark.parametrize("length", [*range(6), 31, 32, 33, 64, 1000, 65_535, 65_536, 65_537, 1_000_003])
def test_numpy_agrees(length):
    google_crc32c = pytest.importorskip("google_crc32c")
    data = np.random.default_rng(length).bytes(length)
    assert crc32c._crc32c_numpy(data) == google_crc32c.value(data)
    damaged = bytearray(data)
    if length:
        damaged[length // 2] ^= 1
        assert crc32c._crc32c_numpy(bytes(damaged)) != google_crc32c.value(data)
