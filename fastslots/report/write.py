"""The report of runs: their pictures for the slot explorer where asked for, then the page (``fastslots.report``)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from fastslots.config.run import TrainConfig, read_config
from fastslots.data import read_batch, to_float
from fastslots.data.packed.urls import check_allowed
from fastslots.data.sources import Source, open_source, same_images
from fastslots.errors import UserError
from fastslots.files import write_atomic
from fastslots.models.weights import load_weights, weights_name, weights_path
from fastslots.report import render, run_facts
from fastslots.report.explorer import ENCODED, explore
from fastslots.runs.curves import MetricsReader
from fastslots.runs.folder import EXPLORER

_readers: dict[Path, MetricsReader] = {}  # a long run's log is read once, not at every evaluation


Progress = Callable[[int, int], None]  # images done, of how many


def write_report(
    runs: Sequence[Path],
    out: Path | None = None,
    explorer: bool = False,
    progress: Progress | None = None,
    allow_remote: bool = False,
) -> Path:
    """Write the report of one run (into its folder), or of several side by side; returns its path.

    explorer: decode the explorer's pictures first, where the weights have changed since. allow_remote: also where a
    configuration names data at a URL that was never opened on this machine.
    """
    facts = []
    for run in runs:
        path = (run / "metrics.jsonl").resolve()
        reader = _readers.setdefault(path, MetricsReader(path)).update()
        if explorer:
            config = read_config(run / "config.json", device="auto")
            check_allowed(config.data, run / "config.json", allow_remote)
            write_explorer(run, config, progress=progress)
        facts.append(run_facts(run, reader))
    path = out or runs[0] / "report.html"
    write_atomic(path, render(facts).encode())
    return path


def write_explorer(
    run: Path, config: TrainConfig, source: Source | None = None, progress: Progress | None = None
) -> str:
    """Store the explorer's pictures of a run's best weights; returns why not, "" where they are there.

    source: the run's data where they are open already.
    """
    if config.input != "pixels" or config.channels != 3:
        return "the explorer shows models of images, and this one decodes features"
    try:
        weights = weights_path(run, "best")
        stamp = f"{weights.name} {weights.stat().st_mtime_ns}"
        stored = run / EXPLORER
        if stored.exists() and stamp in stored.read_text()[:200]:
            return ""
        if source is None:
            source = open_source(config)
            if reason := other_data(run, source):
                return reason
        dataset, rows = source.splits["val"]
        images, masks = read_batch(dataset, rows[:ENCODED])
        model = load_weights(weights).to(config.torch_device())
    except UserError as error:
        return str(error)
    made_of = {"stamp": stamp, "weights": weights_name(run, weights)}
    write_atomic(stored, json.dumps(made_of | explore(model, to_float(images), masks, progress)).encode())
    return ""


def other_data(run: Path, source: Source) -> str:
    """Why ``source`` is not what the run was trained on: then its data came from Python, or have changed since."""
    path = run / "data.txt"
    if path.is_file() and not same_images(path.read_text(), source.description):
        return "its images are not those of config.data (a data set given in Python, or files that have changed since)"
    return ""
