"""A resume that proves itself: steps that the log held beyond its checkpoint are repeated, and compared."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

MOST_LINES = 100_000  # of a log beyond a checkpoint that are compared: tens of MB
NOT_OF_THE_SEED = {"images_per_s", "seconds"}
"""What differs between two runs that are the same."""


class Repetition:
    """Compares what a resumed run logs with what the run before had logged of the same steps, and says what came of it.

    Args:
        cut: the lines that the resume has cut from the log, as they were.
        changed: what is known to differ since: "threads 2 -> 1", say.
        say: where the verdict goes, one line: at the first difference, or when all steps have been repeated.
    """

    def __init__(self, cut: Iterable[bytes], changed: Iterable[str], say: Callable[[str], None]):
        self._before = {_key(values): values for line in cut if (values := _sound(line))}
        self._changed, self._say = tuple(changed), say
        self._first = self._last = 0  # steps that were the same

    def see(self, values: dict[str, object]) -> None:
        """A line of the log, as it is written."""
        if not self._before:
            return
        before = self._before.pop(_key(values), None)
        if before is not None:
            differing = [name for name in before.keys() | values.keys() if before.get(name) != values.get(name)]
            if differing := sorted(set(differing) - NOT_OF_THE_SEED):
                name = "loss" if "loss" in differing else differing[0]
                self._differs(values["step"], name, before.get(name), values.get(name))
                return
            step: Any = values["step"]
            self._first, self._last = self._first or step, step
        if not self._before:
            self.end()

    def end(self) -> None:
        """The run ends, or has repeated all: say how far it was the same."""
        if self._first:
            self._say(f"repeated  steps {self._first:,} to {self._last:,} repeat bit for bit what the log held of them")
        self._before, self._first = {}, 0

    def _differs(self, step: object, name: str, then: object, now: object) -> None:
        why = "; ".join(self._changed) or (
            "nothing that is recorded has changed (configuration, versions, processor, threads, processes, data), so "
            "suspect memory, the disk, or an operation without a fixed order"
        )
        self._say(f"warning   step {step:,} differs from before the resume: {name} was {then}, is {now}: {why}")
        self._before, self._first = {}, 0


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Entries of two flat records that differ; those that the older one lacks are no change."""
    return [f"{name} {before[name]!r} -> {now.get(name)!r}" for name in before if before[name] != now.get(name)]


def _key(values: dict[str, Any]) -> tuple[Any, Any]:
    return values.get("step"), values.get("eval")


def _sound(line: bytes) -> dict[str, Any]:
    """The values of a line; {} for one that is torn, or of a step that was stopped at."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) and type(values.get("step")) is int and "stopped" not in values else {}
