"""``fit``: a run from Python, or from the command line, which calls it."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from fastslots.config.code import GIVEN
from fastslots.config.run import TrainConfig
from fastslots.distributed import Group
from fastslots.evaluation.evaluate import Metric
from fastslots.models import SlotVAE
from fastslots.models.vae import check_model
from fastslots.runs.folder import RunFolder
from fastslots.train.extras import Extras, Loss
from fastslots.train.loop import FitResult, Trainer
from fastslots.train.own_parts import described


def fit(
    config: TrainConfig,
    dataset: Any = None,
    out: str | Path | None = None,
    resume: bool = False,
    stream: TextIO | None = None,
    restart: bool = False,
    model: SlotVAE | None = None,
    losses: Mapping[str, tuple[float, Loss]] | None = None,
    metrics: Mapping[str, Metric] | None = None,
    callbacks: Sequence[Any] = (),
) -> FitResult:
    """Train a model.

    Args:
        config: e.g. ``TrainConfig.preset("clevr6", data="clevr.tfrecords", steps=1000)``.
        dataset: any map-style data set in place of ``config.data``; ``read_batch`` says what its items may be.
        out: the run's folder; None takes the next free one in runs/.
        resume: go on from the newest good checkpoint in ``out``, bit for bit; start fresh where there is none.
        stream: where progress goes (stderr).
        restart: where there are checkpoints and none can be read, set them and the log aside and begin at step 0; a
            resume is refused there without it.
        model: a ``SlotVAE`` of this configuration, with parts of your own, say; None: what ``config.model`` builds, or
            the configuration's. Its weights are where training starts. ``config.model`` may name what builds it, so
            that commands can load the run; otherwise they ask for --model.
        losses: further losses, {name: (weight, fn)}, fn(result, images) -> 0-d tensor, added to the total and logged
            (unweighted) under its name. ``result`` is as of ``SlotVAE.forward``; what it decodes is decoded when it is
            looked at, besides the loss's own tiles.
        metrics: further scores, {name: fn}, fn(result, images, masks or None) -> the mean over these images, in every
            evaluation.
        callbacks: objects with any of on_step(step, terms), on_evaluation(step, scores), on_end(folder), called in
            every process. Losses, metrics and callbacks are given anew to a run that is resumed.

    Started by torchrun, each process calls this and computes its share of every batch; the first one writes.

    Raises:
        UserError: bad data or configuration; LostProcessError (one of those): another process of the run has ended.
        NonFiniteLossError: the loss was NaN or infinite.
    """
    if dataset is not None:
        config = replace(config, data=f"{GIVEN}a {type(dataset).__name__} that Python code gave to fit")
    if model is not None:
        check_model(model, config, "model")
        if not described(model) and (not config.model or config.model.startswith(GIVEN)):
            config = replace(config, model=f"{GIVEN}a {type(model).__name__} that Python code gave to fit")
    extras = Extras(losses or {}, metrics or {}, tuple(callbacks), model)
    config = config.resolved()
    group = Group.join(config.torch_device(), config.batch_size)
    with contextlib.ExitStack() as stack:
        stack.callback(group.leave)
        chosen = group.on_first(lambda: _chosen(config, out, resume, stream))
        folder = RunFolder(Path(os.fsdecode(chosen)), None if out else config.preset_name)
        stack.callback(folder.release)
        result = Trainer(config, dataset, folder, stack, group, stream, restart, extras).run()
        extras.on_end(result.out)
    group.close()
    return result


def _chosen(config: TrainConfig, out: str | Path | None, resume: bool, stream: TextIO | None) -> bytes:
    """The path of the run's folder. UserError where a run must not be written there. Says where a resume starts a run:
    ``out`` may be mistyped."""
    folder = RunFolder(Path(out)) if out else RunFolder.next_free(config.preset_name)
    folder.claim(resume)
    if out and resume and not os.path.lexists(folder.config):
        with contextlib.suppress(OSError):  # nobody may read it any more
            print(f"note      no run in {folder.path} yet: starting a new one", file=stream or sys.stderr, flush=True)
    return os.fsencode(folder.path)
