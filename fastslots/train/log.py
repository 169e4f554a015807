"""What a run writes and prints while it goes: metrics.jsonl, machine.jsonl, and plain lines.

On a terminal ``train.terminal`` stands for the lines.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np
from PIL.Image import Image

from fastslots.errors import UserError
from fastslots.report.curves import MetricsReader, is_number
from fastslots.report.data import MACHINE_LOG

SILENCE = 10.0  # seconds without a line, after which one is printed whatever the step


class Lines:
    """One flushed JSON object a line. A resume first cuts what lies after its checkpoint; ``last`` is what remains."""

    def __init__(self, path: Path, last_step: int = 0):
        self.last = _cut(path, last_step) if path.exists() else {}
        # Unbuffered: Python's buffers lose what they hold when a write fails half-way on a full disk.
        self._file = open(path, "ab", buffering=0)
        self._pending = b""

    def write(self, values: dict[str, object]) -> None:
        """OSError where the disk is full; the line is kept and written with the next that succeeds."""
        # JSON has no NaN: null says the same and every reader takes it.
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self._pending += json.dumps(clean).encode() + b"\n"
        self._flush()

    def sync(self) -> None:
        """Bring to the disk what has been written."""
        os.fsync(self._file.fileno())

    def _flush(self) -> None:
        while self._pending:
            self._pending = self._pending[self._file.write(self._pending) :]

    def close(self) -> None:
        with contextlib.suppress(OSError):  # a disk still full, of which the run has said so
            self._flush()
        self._file.close()


class MetricsLog:
    """metrics.jsonl, which follows from the seed but for images_per_s; machine.jsonl, which does not; and trackers."""

    def __init__(self, path: Path, last_step: int = 0, trackers: Sequence[Any] = ()):
        self._trackers = [*trackers]
        self._metrics, self._machine = (Lines(file, last_step) for file in (path, path.with_name(MACHINE_LOG)))
        used: Any = self._machine.last.get("energy_wh")
        self.energy_wh = used if is_number(used) else 0.0  # what a run that goes on had used

    def write(self, values: dict[str, object]) -> None:
        """A step's losses, or an evaluation's scores. OSError and UserError: as ``Lines.write`` and ``_tell``."""
        self._metrics.write(values)
        self._track(values)

    def cost(self, values: dict[str, object]) -> None:
        """What the run costs its machine (``train.machine.Meter``)."""
        self._machine.write(values)
        self._track(values)

    def _track(self, values: dict[str, object]) -> None:
        split, step = f"{values.get('eval', 'train')}/", values["step"]
        numbers = {split + name: v for name, v in values.items() if name != "step" and isinstance(v, int | float)}
        self._tell(lambda tracker: tracker.numbers(numbers, step))

    def picture(self, name: str, picture: Image, step: int) -> None:
        """To those who take pictures; a run's own lie in its folder."""
        self._tell(lambda tracker: tracker.picture(name, np.asarray(picture), step))

    def _tell(self, what: Callable[[Any], None]) -> None:
        """UserError where a tracker fails, a service that has gone, say; it is told no more until the next resume."""
        for tracker in [*self._trackers]:
            try:
                what(tracker)
            except Exception as error:  # each package has errors of its own
                self._trackers.remove(tracker)
                name, reason = type(tracker).__name__.lower(), str(error) or type(error).__name__
                raise UserError(f"{name} has failed ({reason}): the run goes on without it") from None

    def sync(self) -> None:
        """Bring to the disk what has been written."""
        self._metrics.sync()
        self._machine.sync()

    def close(self) -> None:
        self._metrics.close()
        self._machine.close()
        for tracker in self._trackers:
            with contextlib.suppress(Exception):  # as above: the run itself is done
                tracker.close()


class ProgressView(Protocol):
    """What a run tells whoever watches it: ``Progress``, ``LiveProgress`` on a terminal, ``Silent``."""

    def update(self, step: int, values: dict[str, float]) -> None:
        """A step is done."""

    def evaluated(self, step: int, scores: dict[str, Any], tiles: Sequence[Sequence[np.ndarray]]) -> None:
        """The scores of an evaluation, and its pictures (``SlotPictures.tiles``)."""

    def say(self, text: str) -> None:
        """A line that is to stay."""

    def note(self, text: str) -> None:
        """What is being done between steps, where there has been silence for long."""

    def close(self) -> None: ...


class Silent:
    """In place of MetricsLog and of a ``ProgressView`` on processes that write nothing."""

    energy_wh = 0.0

    def sync(self) -> None:
        pass

    def write(self, values: dict[str, object]) -> None:
        pass

    def cost(self, values: dict[str, object]) -> None:
        pass

    def update(self, step: int, values: dict[str, float]) -> None:
        pass

    def picture(self, name: str, picture: Image, step: int) -> None:
        pass

    def evaluated(self, step: int, scores: dict[str, Any], tiles: Sequence[Sequence[np.ndarray]]) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


def _cut(path: Path, last_step: int) -> dict[str, Any]:
    """Remove what follows the lines up to ``last_step``; the last of those. In place, so that a kill meanwhile, or a
    full disk, loses nothing; and a long log is never in memory."""
    place = end = 0
    last = b"{}"
    with open(path, "r+b") as file:
        for line in file:
            place += len(line)
            if line.endswith(b"\n") and _step_of(line) <= last_step:
                end, last = place, line
        file.truncate(end)
    return json.loads(last)


def _step_of(line: bytes) -> float:
    """The step of a line; a line cut short by a crash belongs to no step that is kept."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf
    return step if type(step) is int else math.inf


def read_metrics(path: Path) -> tuple[list[dict], list[dict]]:
    """(training lines, evaluation lines) of a metrics.jsonl; a torn last line is left out."""
    lines = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        if _step_of(line) < math.inf:
            lines.append(json.loads(line))
    return [line for line in lines if "eval" not in line], [line for line in lines if "eval" in line]


class Progress:
    """Losses, images/s, time left: a line each ``log_every`` steps. On a terminal ``LiveProgress`` stands for it."""

    def __init__(self, steps: int, log_every: int, first_step: int, stream: TextIO):
        self._stream = stream
        self._steps, self._log_every = steps, log_every
        self._first, self._start, self._shown = first_step, time.monotonic(), time.monotonic()

    def update(self, step: int, values: dict[str, float]) -> None:
        now = time.monotonic()
        if step % self._log_every and step != self._steps and now - self._shown < SILENCE:
            return
        done = step - self._first
        left = (now - self._start) / done * (self._steps - step) if done else 0.0
        losses = "  ".join(f"{name} {values[name]:.4g}" for name in ("loss", "recon", "kl"))
        rate = f"{values['images_per_s']:.0f} images/s  {duration(left)} left"
        self.say(f"step {step}/{self._steps}  {losses}  R/H² {values['interaction_normalized']:.4f}  {rate}")

    def evaluated(self, step: int, scores: dict[str, Any], tiles: Sequence[Sequence[np.ndarray]]) -> None:
        """The scores; pictures are for terminals."""
        self.say(evaluation_line(step, scores))

    def say(self, text: str) -> None:
        self._shown = time.monotonic()
        with contextlib.suppress(OSError):  # a log on a full disk: no reason to stop
            self._stream.write(f"{text}\n")
            self._stream.flush()

    def note(self, text: str) -> None:
        if time.monotonic() - self._shown > SILENCE:
            self.say(text)

    def close(self) -> None:
        pass


def open_progress(steps: int, log_every: int, first_step: int, stream: TextIO | None, log: Path) -> ProgressView:
    """``LiveProgress`` where the stream (None: stderr) is a terminal that can move its cursor, else ``Progress``.

    log: the run's metrics.jsonl, as cut by a resume.
    """
    stream = sys.stderr if stream is None else stream
    if stream.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown"):
        from fastslots.train.terminal import LiveProgress

        return LiveProgress(steps, first_step, stream, MetricsReader(log).update())
    return Progress(steps, log_every, first_step, stream)


def evaluation_line(step: int, scores: dict[str, Any]) -> str:
    names = ("recon", "kl", "j_ari", "jis", "fg_ari", "mbo")
    shown = "  ".join(f"{name} {scores[name]:.4g}" for name in names if name in scores)
    return f"eval at step {step} on {scores['images']} images, {scores['latent']} latent: {shown}"


def duration(seconds: float) -> str:
    """1:02:03 or 4:05."""
    minutes, s = divmod(int(seconds + 0.5), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"
