"""The report of runs: their pictures for the slot explorer where asked for, then the page (``fastslots.report``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from fastslots.config.code import check_trusted
from fastslots.config.run import TrainConfig
from fastslots.data import to_float
from fastslots.data.dataset import Split
from fastslots.data.packed.urls import check_allowed
from fastslots.data.sources import Source, open_source, same_images
from fastslots.errors import UserError
from fastslots.files import write_atomic
from fastslots.models import SlotVAE
from fastslots.models.vae import Build
from fastslots.report import render, run_facts
from fastslots.report.explorer import ENCODED, explore
from fastslots.runs.curves import MetricsReader
from fastslots.runs.folder import RunFolder, write_json

_readers: dict[Path, MetricsReader] = {}  # a long run's log is read once, not at every evaluation


Progress = Callable[[int, int], None]  # images done, of how many


def write_report(
    runs: Sequence[Path],
    out: Path | None = None,
    explorer: bool = False,
    progress: Progress | None = None,
    allow_remote: bool = False,
    model: str = "",
) -> Path:
    """Write the report of one run (into its folder), or of several side by side; returns its path.

    explorer: decode the explorer's pictures first, where the weights have changed since. allow_remote: also where a
    configuration names data at a URL that was never opened on this machine. model: what builds the models of runs that
    have one of their own, in place of what they name.

    Raises UserError where pictures need code that is not trusted (``fastslots.config.code``).
    """
    facts = []
    for run in runs:
        folder = RunFolder(run)
        path = folder.metrics.resolve()
        reader = _readers.setdefault(path, MetricsReader(path)).update()
        if explorer:
            config = folder.read_config(device="auto")
            check_allowed(config.data, folder.config, allow_remote)
            build = (model or config.model) if config.model else ""
            check_trusted(build, folder.config)
            images = partial(held_out_images, folder, config)
            write_explorer(folder, images, config.torch_device(), progress, build or None)
        facts.append(run_facts(run, reader))
    path = out or RunFolder(runs[0]).report
    write_atomic(path, render(facts).encode(errors="backslashreplace"))  # paths may be no text
    return path


def write_explorer(
    folder: RunFolder,
    held_out: Callable[[], Split],
    device: torch.device,
    progress: Progress | None = None,
    build: Build | str | None = None,
) -> str:
    """Store the explorer's pictures of a run's best weights; returns why not, "" where they are there.

    held_out: gives the images to show; called where the pictures are not those of the weights yet. build: what builds
    a model of one's own, or its name.
    """
    try:
        weights = folder.weights("best")
        stamp = f"{weights.name} {weights.stat().st_mtime_ns}"
        if folder.read_json(folder.explorer).get("stamp") == stamp:
            return ""
        model = SlotVAE.from_file(weights, build).to(device)
        if model.config.input != "pixels" or model.config.channels != 3:
            return "the explorer shows models of images, and this one decodes features"
        images, masks = held_out()[:ENCODED].read()
    except UserError as error:
        return str(error)
    made_of = {"stamp": stamp, "weights": folder.which_weights(weights)}
    write_json(folder.explorer, made_of | explore(model, to_float(images), masks, progress))
    return ""


def held_out_images(folder: RunFolder, config: TrainConfig) -> Split:
    """The validation images of a run. UserError where they are not at hand, or others than it was trained on."""
    source = open_source(config, few=not folder.described_data())  # a model that ships has none
    if reason := other_data(folder, source):
        raise UserError(reason)
    return source.splits["val"]


def other_data(folder: RunFolder, source: Source) -> str:
    """Why ``source`` is not what the run was trained on: then its data came from Python, or have changed since."""
    described = folder.described_data().split("\n")[0]  # the next line says what training mixed in
    if not same_images(described or source.description, source.description):
        return "its images are not those of config.data (a data set given in Python, or files that have changed since)"
    return ""
