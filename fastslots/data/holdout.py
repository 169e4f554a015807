"""Combinations of factors that training never shows: what compositional generalisation is measured on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fastslots.errors import UserError

EXPECTED = "FACTOR=VALUE or FACTOR=LOW:HIGH, joined by commas, e.g. shape=square,hue=0.5:0.75"


@dataclass(frozen=True)
class Holdout:
    """Objects that meet every condition at once: ``ranges`` factor -> [low, high)."""

    ranges: tuple[tuple[str, float, float], ...]

    @classmethod
    def parse(cls, text: str, factors: tuple[str, ...], words: Mapping[str, tuple[str, ...]]) -> Holdout:
        """``shape=square,hue=0.5:0.75``. words: names of the values of factors that are codes, counted from 1.

        UserError names a part that is none, or a factor that the data lack.
        """
        ranges = []
        for part in text.split(","):
            name, _, value = part.strip().partition("=")
            if name not in factors:
                raise UserError(f"holdout {text!r}: no factor {name!r} (there are {', '.join(factors)}): {EXPECTED}")
            of_name = words.get(name, ())
            try:
                ranges.append((name, *_range(value, of_name)))
            except ValueError:
                known = f" ({name} is one of {', '.join(of_name)})" if of_name else ""
                raise UserError(f"holdout {text!r}: {part.strip()!r} is no condition{known}: {EXPECTED}") from None
        return cls(tuple(ranges))

    def matches(self, factors: Mapping[str, np.ndarray], present: np.ndarray) -> np.ndarray:
        """factors: name -> [n, objects]; present: bool [n, objects] -> bool [n]: any object meets all conditions."""
        met = present
        for name, low, high in self.ranges:
            met = met & (factors[name] >= low) & (factors[name] < high)
        matched: np.ndarray = np.any(met, 1)
        return matched


def _range(value: str, words: tuple[str, ...]) -> tuple[float, float]:
    """[low, high) of LOW:HIGH, or of a code by its word or number; ValueError where it is neither."""
    if ":" in value:
        low, high = map(float, value.split(":"))
        if not low < high:
            raise ValueError
        return low, high
    code = float(words.index(value) + 1 if value in words else int(value))
    return code - 0.5, code + 0.5
