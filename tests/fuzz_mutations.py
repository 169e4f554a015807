"""Mutations of a file's bytes, each a triple that hypothesis can shrink."""

from __future__ import annotations

import random
import re
import struct

NUMBERS = (0, 1, 2, 127, 128, 255, 256, 32767, 65535, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1)
OPERATIONS = 9
Mutation = tuple[int, float, int]  # which operation, where (0 to 1), with what


def mutate(data: bytes, mutations: list[Mutation]) -> bytes:
    out = bytearray(data)
    for operation, place, value in mutations:
        at, number = int(place * len(out)), NUMBERS[value % len(NUMBERS)]
        length = 1 + value % 64
        if operation == 0 and out:
            out[at] ^= 1 << value % 8
        elif operation == 1 and out:
            out[at] = value % 256
        elif operation == 2:
            out[at : at + 4] = struct.pack("<I", number & 0xFFFFFFFF)
        elif operation == 3:
            out[at : at + 8] = struct.pack(">Q" if value % 2 else "<Q", number)
        elif operation == 4:
            del out[at:]
        elif operation == 5:
            del out[at : at + length]
        elif operation == 6:
            out[at:at] = out[at : at + length]
        elif operation == 7:
            out[at:at] = random.Random(value).randbytes(length)
        elif digits := list(re.finditer(rb"\d+|true|false|null|\"[a-z_0-9]*\"", out)):  # text: another value
            found = digits[min(int(place * len(digits)), len(digits) - 1)]
            other = (str(number), f"-{number}", "null", "[]", '"x"', "1e999", "{}", "NaN")[value % 8]
            out[found.start() : found.end()] = other.encode()
    return bytes(out)


def random_mutations(rng: random.Random) -> list[Mutation]:
    return [
        (rng.randrange(OPERATIONS), rng.random(), rng.randrange(1 << 16)) for _ in range(rng.choice((1, 1, 2, 3, 6)))
    ]
