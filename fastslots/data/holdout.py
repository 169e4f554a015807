"""Combinations of factors that training never shows: what compositional generalisation is measured on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fastslots.errors import UserError

EXPECTED = "FACTOR=LOW:HIGH or shape=NAME, joined by commas, e.g. shape=square,hue=0.5:0.75"


@dataclass(frozen=True)
class Holdout:
    """Objects that meet every condition at once: ``ranges`` factor -> [low, high)."""

    ranges: tuple[tuple[str, float, float], ...]

    @classmethod
    def parse(cls, text: str, factors: tuple[str, ...], shapes: tuple[str, ...]) -> Holdout:
        """``shape=square,hue=0.5:0.75``. UserError names a part that is none, or a factor that the data lack."""
        ranges = []
        for part in text.split(","):
            name, _, value = part.strip().partition("=")
            if name not in factors:
                raise UserError(f"holdout {text!r}: no factor {name!r} (there are {', '.join(factors)}): {EXPECTED}")
            try:
                if name == "shape":
                    code = 1.0 + shapes.index(value)  # 0: no object
                    ranges.append((name, code, code + 0.5))
                else:
                    low, high = map(float, value.split(":"))
                    if not low < high:
                        raise ValueError
                    ranges.append((name, low, high))
            except ValueError:
                of_shapes = f" (shapes: {', '.join(shapes)})" if name == "shape" else ""
                raise UserError(f"holdout {text!r}: {part.strip()!r} is no condition{of_shapes}: {EXPECTED}") from None
        return cls(tuple(ranges))

    def matches(self, factors: Mapping[str, np.ndarray]) -> np.ndarray:
        """factors: name -> [n, objects], shape 0 where there is no object -> bool [n]: any object meets all."""
        met: np.ndarray = factors["shape"] > 0
        for name, low, high in self.ranges:
            met = met & (factors[name] >= low) & (factors[name] < high)
        return np.any(met, 1)
