"""metrics.jsonl of any length as curves of bounded length, in one pass, and from where the last pass ended."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

POINTS = 512
"""Most stretches that a curve keeps: it ends with POINTS/2 to POINTS of them, whatever the length of the run."""
BLOCK = 4096  # lines between two thinnings: bounds the memory of a pass
LARGEST = 1e300
Line = dict[str, Any]
"""A line of metrics.jsonl: its step, and numbers, texts or tables by their names."""
TAIL = 64  # bytes before the place of the last pass that must be as they were, or the file was rewritten


class Curve:
    """One value by step. Of each stretch of ``size`` points: its first step, and the values' mean, least and largest.

    Where the stretches become more than POINTS, neighbours are joined and ``size`` doubles: no spike is ever lost.
    """

    def __init__(self) -> None:
        self.size = 1
        self._stretches: list[tuple[int, float, float, float]] = []
        self._steps: list[int] = []  # the points of the stretch that is not full yet
        self._values: list[float] = []

    def extend(self, steps: Sequence[int], values: Sequence[float]) -> None:
        self._steps += steps
        self._values += values
        start = 0
        while len(self._values) - start >= self.size:
            stop = start + self.size
            self._stretches.append(_stretch(self._steps[start:stop], self._values[start:stop]))
            start = stop
            if len(self._stretches) == POINTS:
                self._join()
        del self._steps[:start], self._values[:start]

    def _join(self) -> None:
        pairs = zip(self._stretches[::2], self._stretches[1::2], strict=True)
        self._stretches = [(a[0], (a[1] + b[1]) / 2, min(a[2], b[2]), max(a[3], b[3])) for a, b in pairs]
        self.size *= 2

    def means(self) -> list[float]:
        """Of the stretches so far: what ``table`` calls "mean", in full."""
        unfinished = [sum(self._values) / len(self._values)] if self._values else []
        return [stretch[1] for stretch in self._stretches] + unfinished

    def table(self) -> dict[str, list[float]]:
        """{"step", "mean"}, and where a point stands for several also {"low", "high"}: numbers of 5 digits."""
        rows = [*self._stretches, *([_stretch(self._steps, self._values)] if self._values else [])]
        names = ("step", "mean", "low", "high") if self.size > 1 else ("step", "mean")
        table: dict[str, list[float]] = {name: [float(f"{row[i]:.5g}") for row in rows] for i, name in enumerate(names)}
        table["step"] = [row[0] for row in rows]
        return table


def _stretch(steps: Sequence[int], values: Sequence[float]) -> tuple[int, float, float, float]:
    return steps[0], sum(values) / len(values), min(values), max(values)


class MetricsReader:
    """Curves and evaluations of a metrics.jsonl. ``update`` reads what was appended since; a torn line is left out."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reset()

    def _reset(self) -> None:
        self.training: dict[str, Curve] = {}
        self.evaluations: list[Line] = []
        self.last: Line = {}  # the newest training line
        self._place, self._tail = 0, b""

    def update(self) -> MetricsReader:
        if not self.path.exists():
            self._reset()
            return self
        with open(self.path, "rb") as file:
            file.seek(max(self._place - TAIL, 0))
            if file.read(min(TAIL, self._place)) != self._tail:  # a resume cut the file, or another run took its place
                self._reset()
                file.seek(0)
            while lines := [line for line in islice(file, BLOCK) if line.endswith(b"\n")]:
                self._place += sum(map(len, lines))
                self._absorb(_parse(lines))
            file.seek(max(self._place - TAIL, 0))
            self._tail = file.read(min(TAIL, self._place))
        return self

    def _absorb(self, lines: list[Line]) -> None:
        self.evaluations += [line for line in lines if "eval" in line]
        lines = [line for line in lines if "eval" not in line]
        for name in dict.fromkeys(name for line in lines for name in line):
            kept = [line for line in lines if is_number(line.get(name))]
            if name != "step" and kept:
                steps, values = [line["step"] for line in kept], [line[name] for line in kept]
                self.training.setdefault(name, Curve()).extend(steps, values)
        self.last = lines[-1] if lines else self.last


def evaluation_curves(evaluations: Sequence[Line]) -> dict[str, Curve]:
    """The numbers of evaluation lines as curves; counts, seconds and settings are no scores."""
    curves: dict[str, Curve] = {}
    for line in evaluations:
        for name, value in line.items():
            if is_number(value) and name not in ("step", "images", "images_with_masks", "foreground_pixels", "seconds"):
                curves.setdefault(name, Curve()).extend([line["step"]], [value])
    return curves


def is_number(value: object) -> bool:
    """Whether a value of JSON is one that can be drawn: finite, and of a size that a float holds."""
    return (type(value) is float or type(value) is int) and -LARGEST < value < LARGEST  # no subclass but bool


def _parse(lines: list[bytes]) -> list[Line]:
    """The lines' objects that have a step; whatever else a crash or an editor has left is passed over."""
    try:
        values = json.loads(b"[" + b",".join(lines) + b"]")  # at once: a third faster than line by line
    except (ValueError, RecursionError):
        values = []
        for line in lines:
            with contextlib.suppress(ValueError, RecursionError):
                values.append(json.loads(line))
    return [value for value in values if isinstance(value, dict) and is_number(value.get("step"))]
