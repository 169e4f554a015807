"""What a run writes while it goes: ``metrics.jsonl`` and ``machine.jsonl``, a flushed JSON object a line."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL.Image import Image

from fastslots.errors import UserError, first_line
from fastslots.files import open_log
from fastslots.runs.curves import Line, is_number
from fastslots.runs.folder import RunFolder
from fastslots.runs.repeat import MOST_LINES


class Lines:
    """One flushed JSON object a line. A resume first cuts what lies after its checkpoint.

    Attributes: ``last``, the last line that remains; ``cut``, those that do not (the first ``MOST_LINES``).
    """

    def __init__(self, path: Path, last_step: int = 0):
        self._path, self._file = path, open_log(path)
        try:
            self.last, self.cut = _cut(self._file, last_step)
        except OSError as error:
            raise UserError(
                f"{path} cannot be cut ({error.strerror}): mend the disk, then go on with --resume"
            ) from None
        self._pending = b""
        self._lock = threading.Lock()  # lines come from the loop, ``sync`` from the thread that writes checkpoints

    def write(self, values: dict[str, object]) -> None:
        """OSError where the disk is full; the line is kept and written with the next that succeeds."""
        with self._lock:
            self._pending += json.dumps(without_nan(values)).encode() + b"\n"
            self._flush()

    def sync(self) -> None:
        """Bring to the disk what has been written; where the file was removed or moved meanwhile, as a
        new one."""
        with self._lock:
            if not os.path.lexists(self._path):
                removed, self._file = self._file, open_log(self._path)
                with removed, open(removed.fileno(), "rb", closefd=False) as lines:
                    lines.seek(0)
                    shutil.copyfileobj(lines, self._file)
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

    def __init__(self, folder: RunFolder, last_step: int = 0, trackers: Sequence[Any] = ()):
        self._trackers = [*trackers]
        self._metrics, self._machine = Lines(folder.metrics, last_step), Lines(folder.machine_log, last_step)
        used: Any = self._machine.last.get("energy_wh")
        self.energy_wh = used if is_number(used) else 0.0  # what a run that goes on had used
        self.cut = self._metrics.cut

    def write(self, values: dict[str, object]) -> None:
        """A step's losses, or an evaluation's scores. OSError and UserError: as ``Lines.write`` and ``_tell``."""
        self._metrics.write(values)
        self._track(values)

    def cost(self, values: dict[str, object]) -> None:
        """What the run costs its machine (``runs.machine.Meter``)."""
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
                raise UserError(
                    f"{tracker.name} has failed ({first_line(error)}): the run goes on without it"
                ) from None

    def sync(self) -> None:
        """Bring to the disk what has been written."""
        self._metrics.sync()
        self._machine.sync()

    def close(self, say: Callable[[str], object] = lambda _: None) -> None:
        """say: takes a line for each tracker that fails at its end; the run itself is done."""
        self._metrics.close()
        self._machine.close()
        for tracker in self._trackers:
            try:
                tracker.close()
            except Exception as error:
                reason = first_line(error)
                say(f"warning   {tracker.name} has failed at its end ({reason}): what it got last may be missing")


def without_nan(values: dict[str, object]) -> dict[str, object]:
    """JSON has no NaN: null says the same and every reader takes it."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def _cut(log: BinaryIO, last_step: int) -> tuple[dict[str, Any], list[bytes]]:
    """Remove what follows the lines up to ``last_step``; the last of those, and what was removed.

    In place, so that a kill meanwhile, or a full disk, loses nothing; and a long log is never in memory.
    """
    place = end = 0
    last = b"{}"
    cut: list[bytes] = []
    with open(log.fileno(), "rb", closefd=False) as lines:
        lines.seek(0)
        for line in lines:
            place += len(line)
            if line.endswith(b"\n") and _step_of(line) <= last_step:
                end, last, cut = place, line, []
            elif len(cut) < MOST_LINES:
                cut.append(line)
    log.truncate(end)
    return json.loads(last), cut


def _step_of(line: bytes) -> float:
    """The step of a line; a line cut short by a crash belongs to no step that is kept."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf
    return step if type(step) is int else math.inf


def read_metrics(path: Path) -> tuple[list[Line], list[Line]]:
    """(training lines, evaluation lines) of a metrics.jsonl; a torn last line is left out."""
    lines = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        if _step_of(line) < math.inf:
            lines.append(json.loads(line))
    return [line for line in lines if "eval" not in line], [line for line in lines if "eval" in line]
