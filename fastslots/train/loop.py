"""The training loop: on one screen, ``Trainer.run``."""

from __future__ import annotations

import contextlib
import copy
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
from safetensors.torch import load, save

from fastslots.config.model import SlotVAEConfig
from fastslots.config.run import TrainConfig
from fastslots.data import Batch, Loader, to_float
from fastslots.data.augment import Augmentation
from fastslots.data.sources import training_source
from fastslots.distributed import Group, StoppedError, StopSignals
from fastslots.errors import UserError
from fastslots.evaluation.evaluate import Scoring, evaluate
from fastslots.evaluation.grids import SlotPictures
from fastslots.evaluation.preconditions import try_once
from fastslots.files import set_aside, write_atomic
from fastslots.models import SlotVAE
from fastslots.runs.folder import RunFolder
from fastslots.runs.own_code import OwnCode
from fastslots.threads import usable_processors
from fastslots.train.checkpoint import Checkpoint, checkpoint_to_resume, snapshot
from fastslots.train.device import Done, steps_of
from fastslots.train.extras import Extras
from fastslots.train.optim import Optimizers
from fastslots.train.own_parts import compare, initial_model
from fastslots.train.recorder import Recorder
from fastslots.train.schedule import due
from fastslots.train.step import LEAST_SCALE, NonFiniteLossError, Precision

GRID_IMAGES = 8
"""Rows of an evaluation's picture: enough to see whether slots follow objects, and it still fits on a screen."""
LAST_IMAGES = 2
"""The same where a run is stopped before its first evaluation: clevr6 takes 2 s each on a core, and somebody waits."""


@dataclass
class FitResult:
    """What ``fit`` gives back."""

    model: SlotVAE
    out: Path
    step: int
    scores: dict[str, Any] = field(default_factory=dict)  # of the last evaluation
    stopped_by: int = 0  # signal number, 0 when all steps were done
    first: bool = True  # whether this process wrote the run (of several, one did)


class Trainer:
    """A run from its folder to its last step: builds everything in ``__init__``, so that ``run`` is the loop alone.

    stack: closes what is opened here, whatever ends the run.
    """

    def __init__(
        self,
        config: TrainConfig,
        dataset: Any,
        folder: RunFolder,
        stack: contextlib.ExitStack,
        group: Group | None = None,
        stream: TextIO | None = None,
        restart: bool = False,
        extras: Extras | None = None,
    ):
        self.extras = extras or Extras()
        self.config, self.folder, self.group = config, folder, group or Group()
        self.device = self.group.device(config.torch_device())
        if config.threads:
            torch.set_num_threads(config.threads)
        elif torch.get_num_threads() > usable_processors():
            torch.set_num_threads(usable_processors())  # torch knows nothing of a container's quota
        self.source = training_source(config, dataset)
        self.precision = Precision(config.precision, self.device)
        self._augment = Augmentation.of(config)
        torch.manual_seed(config.seed)
        self.model = initial_model(config, self.extras.model, OwnCode.read(folder).model.folder).to(self.device).train()
        self._own = OwnCode.of(self.model.code, self.extras.losses, self.extras.metrics)
        if config.model or self.extras.metrics:
            image, mask = self.source.splits["val"][:1].read()
            masks = None if mask is None else mask.long().to(self.device)
            try_once(self.model, self.extras.metrics, to_float(image.to(self.device)), masks)
        self.optimizers = Optimizers(self.model, config.optimizer, config.lr, config.weight_decay)
        self.step, self.best = 0, -float("inf")
        self.scores: dict[str, Any] = {}
        damaged: dict[Path, str] = {}
        folder.locate(Path(os.fsdecode(self.group.on_first(folder.create))))
        newest = self.group.on_first(lambda: checkpoint_to_resume(folder, damaged, restart))
        notes: list[str] = []
        if newest:
            self.group.on_first(lambda: self._compare(notes))
            self._load(Checkpoint.from_bytes(newest))
        elif config.model and self.group.size > 1:  # what builds it may draw from generators of its own
            weights = self.group.on_first(lambda: save(snapshot(self.model.state_dict())))
            self.model.load_state_dict(load(weights))
        self._earlier: dict[str, Any] = {}  # configuration
        self.group.on_first(self._store_config)
        self.recorder = Recorder(folder, config, self.step, self.device, stream, self.group.first)
        stack.callback(self.recorder.close)
        for path, reason in damaged.items():
            self.recorder.say(f"{reason}: set aside as {set_aside(path)}, going back to the one before")
        for note in notes:
            self.recorder.say(f"warning   {note}")
        if config.compile:
            self.model.encoder.compile()
        parts = (self.model, self.optimizers, self.precision, config, self.group)
        self._steps = steps_of(*parts, self.extras.losses, self.recorder.say)
        how = self._steps.how()
        self.recorder.announce(self.source, self.model, self.step, self.group.size, self._earlier, how)

    def run(self) -> FitResult:
        config, group = self.config, self.group
        share, train = group.share(config.batch_size), self.source.splits["train"]
        loader = Loader(train, config.seed, len(share), self.step + 1, start=share.start, device=self.device)
        with StopSignals(group) as signals, loader:
            batches, number, stop, done = iter(loader), self.step, 0, False
            self._last = time.perf_counter()
            while number < config.steps and not stop:
                number += 1
                self._train_on(number, self._next(number, batches))
                stop, done = group.stop_signal(), number == config.steps
                evaluates = done or due(number, config.eval_every)
                keeps = done or stop or due(number, config.checkpoint_every)
                if evaluates or keeps or self.extras.callbacks:
                    self._settle()
                if evaluates:
                    self._evaluate_safely(done)
                    self._last = time.perf_counter()
                if keeps:
                    self._checkpoint()
            if not done and self.step >= config.steps:  # a resume of a run whose last files may not have been written
                self._checkpoint()
            stop = stop or group.asked  # by now also during the last evaluation
            stop = self._finish(signals if done and not stop else None, stopped=bool(stop)) or stop
        if stop:
            rest = "all steps are done" if done else "go on with --resume"
            self.recorder.say(f"stopped by signal {stop} at step {self.step}: {rest}")
        return FitResult(self.model, self.folder.path, self.step, self.scores, stop, group.first)

    def _next(self, number: int, batches: Iterator[Batch]) -> torch.Tensor:
        """A step's images on the device; where the data have become unreadable, what was learnt is saved first."""
        try:
            images = to_float(self._steps.upload(next(batches).images))
        except Exception:  # a user's data set may raise anything
            self._save()
            raise
        return self._augment(number, images, start=self.group.share(self.config.batch_size).start)[0]

    def _train_on(self, number: int, images: torch.Tensor) -> None:
        """A step. Where it fails (another process is lost, say) the weights are those of the step before: saved, so
        that nothing is lost with it."""
        try:
            done = self._steps(number, images)
        except Exception:  # a user's model or loss may raise anything
            self._save()
            raise
        for one in done:
            self._tell(one)

    def _settle(self) -> None:
        """Wait until the values of every step are known, and tell them."""
        for one in self._steps.settle():
            self._tell(one)

    def _tell(self, done: Done) -> None:
        """What a step has come to: to the log, to whoever watches, to callbacks."""
        self._stop_if_not_finite(done.values, done.images)
        self.step, now = done.step, time.perf_counter()
        values = done.values | {"images_per_s": self.config.batch_size / (now - self._last)}
        self._last = now
        self.recorder.trained(self.step, values)
        self._told(self.extras.on_step, self.step, values)

    def _save(self) -> None:
        """What was learnt so far, where something was."""
        self._settle()
        if self.step:
            self._checkpoint()

    def _compare(self, notes: list[str]) -> bytes:
        """What is to be said of code that is not what the run had. UserError where a loss is missing."""
        notes.extend(compare(OwnCode.read(self.folder), self._own, self.folder.path))
        return b""

    def _store_config(self) -> bytes:
        """Once it is known to fit what the run goes on from: the next resume reads it."""
        self._earlier = self.folder.read_json(self.folder.config)
        write_atomic(self.folder.config, f"{self.config.to_json()}\n".encode())
        self._own.write(self.folder)
        return b""

    def _evaluate_safely(self, done: bool) -> None:
        """Where an evaluation fails, as a user's data may, what was learnt is saved; after the last step it is said."""
        try:
            self._evaluate()
        except Exception as error:
            self._checkpoint()
            if not done or self.group.size > 1:  # others would wait for this process
                raise
            self.recorder.say(f"warning   no last evaluation ({type(error).__name__}: {error}); the weights are kept")
        else:
            self._told(self.extras.on_evaluation, self.step, self.scores)

    def _evaluate(self) -> None:
        config, val = self.config, self.source.splits["val"]
        pictures = SlotPictures(self.model, GRID_IMAGES if self.group.first and config.input == "pixels" else 0)
        evaluation = evaluate(
            self.model,
            val[: config.eval_images or None],
            config.eval_batch,
            group=self.group,
            progress=lambda images, total: self.recorder.note(f"evaluating: {images} of {total} images"),
            see=pictures.see,
            scoring=Scoring(metrics=self.extras.metrics),
        )
        self.scores = evaluation.scores()
        score = self.scores["j_ari"] + self.scores.get("jis", 0) if "j_ari" in self.scores else -self.scores["recon"]
        if score > self.best:
            self.best = score
            self.recorder.best(self.model.weights_bytes())
        self.recorder.evaluated(self.step, self.scores, evaluation.of_images, pictures)

    def _told(self, tell: Callable[..., None], *given: Any) -> None:
        """A callback; where it fails, what was learnt is saved first."""
        try:
            tell(*given)
        except Exception:  # a user's code may raise anything
            self._checkpoint()
            raise

    def _checkpoint(self) -> None:
        """Copy what a resume needs; the first process writes it while the next steps run."""
        if not self.group.first:
            return
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        state, numbers = self.optimizers.state()
        tensors |= {f"optimizer.{name}": value for name, value in state.items()}
        extra = {"best": self.best, "scaler": self.precision.scaler.state_dict()}
        checkpoint = Checkpoint(self.step, snapshot(tensors), numbers, extra)
        self.recorder.checkpoint(checkpoint, self.model.weights_bytes())

    def _finish(self, explore: StopSignals | None = None, stopped: bool = False) -> int:
        """Leave together, when everything is on the disk: torchrun ends the others once the first has left.

        explore: make the slot explorer too, which these signals cut short. stopped: the run is to go on later.
        Returns the signal that cut the explorer short, 0 for none.
        """
        self.recorder.finish()
        stop = 0
        if stopped and self.group.first:
            self._leave_page()
        if explore and self.group.first:
            try:
                with explore.at_once():
                    self.recorder.explore(self.source, self._copy if self.config.model else None)
            except StoppedError as interruption:
                stop = interruption.number
                self.recorder.unexplored()
        self.group.barrier()
        return stop

    def _copy(self, _: SlotVAEConfig) -> SlotVAE:
        """A model into which weights of this run can be loaded, without asking code for a new one."""
        return copy.deepcopy(self.model).cpu()

    def _leave_page(self) -> None:
        """The page as of a stop, and where no evaluation has left a picture of slots yet, one."""
        val = self.source.splits["val"]
        try:
            if self.config.input == "pixels" and not self.recorder.has_pictures():
                pictures = SlotPictures(self.model, LAST_IMAGES)
                evaluate(self.model, val[:LAST_IMAGES], LAST_IMAGES, see=pictures.see)
                self.recorder.pictures(self.step, pictures)
            self.recorder.page()
        except Exception as error:  # a user's data set may raise anything, and the weights be beyond use
            self.recorder.say(f"warning   {error or type(error).__name__}: the page is not up to date")

    def _load(self, checkpoint: Checkpoint) -> None:
        try:
            self.model.load_state_dict(checkpoint.part("model."))
            self.optimizers.load_state(checkpoint.part("optimizer."), checkpoint.numbers)
            self.step, self.best = checkpoint.step, checkpoint.extra["best"]
            if checkpoint.extra["scaler"]:
                self.precision.scaler.load_state_dict(checkpoint.extra["scaler"])
        except (RuntimeError, ValueError, TypeError, KeyError, IndexError) as error:
            reason = (str(error).splitlines() or [""])[-1].strip()
            raise UserError(
                f"{self.folder.checkpoints}: the checkpoint at step {checkpoint.step} does not fit this configuration "
                f"({reason}): leave out the flags that change the model or the optimiser, or name another --out"
            ) from None

    def _stop_if_not_finite(self, values: dict[str, float], images: torch.Tensor) -> None:
        finite = math.isfinite(values["loss"])
        if finite and math.isfinite(values["grad_norm"]):
            return
        scaler = self.precision.scaler
        if finite and scaler.is_enabled() and LEAST_SCALE < scaler.get_scale() < values["loss_scale"]:
            return  # a step that the scaler has left out, to go on with a lower scale
        self._steps.forget()  # one that was begun meanwhile has changed nothing
        path, step = self.folder.bad_batch(self.group.rank), self.step + 1  # on another machine there may be no folder
        batch = save({"images": images.cpu().contiguous()}, {"step": str(step)})
        why = f"loss {values['loss']}, gradient norm {values['grad_norm']}"
        self.recorder.non_finite(path, batch, {"step": step, **values, "stopped": why})
        self._checkpoint()
        self._finish(stopped=True)
        raise NonFiniteLossError(
            f"step {step}: {why}. The batch is in {path}, the weights before it in "
            f"{self.folder.last_weights}; a lower --lr or --grad_clip 1 often helps"
        )
