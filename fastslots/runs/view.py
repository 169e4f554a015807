"""Chooses how a run shows its progress: a live view on a terminal, plain lines elsewhere and without rich."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import TextIO

from fastslots.runs.curves import MetricsReader
from fastslots.runs.progress import Progress, ProgressView


def open_progress(steps: int, log_every: int, first_step: int, stream: TextIO | None, log: Path) -> ProgressView:
    """``LiveProgress`` where the stream (None: stderr) is a terminal that can move its cursor and rich is installed,
    else ``Progress``.

    log: the run's metrics.jsonl, as cut by a resume.
    """
    stream = sys.stderr if stream is None else stream
    movable = stream.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")
    if movable and importlib.util.find_spec("rich"):
        from fastslots.runs.terminal import LiveProgress

        return LiveProgress(steps, first_step, stream, MetricsReader(log).update())
    return Progress(steps, log_every, first_step, stream)
