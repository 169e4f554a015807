"""The training loop: on one screen, ``Trainer.run``."""

from __future__ import annotations

import signal
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from fastslots.data import Loader, read_batch, to_float
from fastslots.errors import UserError
from fastslots.models import SlotVAE
from fastslots.models.storage import WEIGHTS, load_weights, weights_bytes, weights_path
from fastslots.ops import backends
from fastslots.train.checkpoint import Checkpoint, latest_checkpoint, save_checkpoint
from fastslots.train.config import TrainConfig
from fastslots.train.evaluate import evaluate
from fastslots.train.files import write_atomic
from fastslots.train.grids import slot_grid
from fastslots.train.log import MetricsLog, Progress
from fastslots.train.optim import Optimizer
from fastslots.train.report import write_report
from fastslots.train.run import RunFolder, next_run
from fastslots.train.sources import check_shape, open_source
from fastslots.train.step import Precision, training_step

GRID_IMAGES = 8


class NonFiniteLossError(RuntimeError):
    """A loss or gradient was NaN or infinite; the message names the step and the saved batch."""


@dataclass
class FitResult:
    """What ``fit`` gives back."""

    model: SlotVAE
    out: Path
    step: int
    scores: dict[str, Any] = field(default_factory=dict)  # of the last evaluation
    stopped_by: int = 0  # signal number, 0 when all steps were done


def fit(
    config: TrainConfig, dataset: Any = None, out: str | Path | None = None, resume: bool = False, stream: Any = None
) -> FitResult:
    """Train a model.

    Args:
        config: e.g. ``TrainConfig.preset("clevr6", data="clevr.tfrecords", steps=1000)``.
        dataset: any map-style data set in place of ``config.data``: items are an image, a tuple (image, mask) or a
            dict with "image" and perhaps "mask"; an image is uint8 [R,R,3] or float [C,R,R] in [0, 1].
        out: the run's folder; None takes the next free one in runs/.
        resume: go on from the newest good checkpoint in ``out``, bit for bit; start fresh where there is none.
        stream: where progress goes (stderr).

    Raises:
        UserError: bad data or configuration. NonFiniteLossError: the loss was NaN or infinite.
    """
    folder = RunFolder(Path(out) if out else next_run(config.preset_name), resume)
    trainer = Trainer(config, dataset, folder, stream)
    try:
        return trainer.run()
    finally:
        trainer.close()


class Trainer:
    def __init__(self, config: TrainConfig, dataset: Any, folder: RunFolder, stream: Any = None):
        self.config, self.folder, self.device = config, folder, config.torch_device()
        if config.threads:
            torch.set_num_threads(config.threads)
        self.source = open_source(config, dataset)
        train, rows = self.source.splits["train"]
        check_shape(config, to_float(read_batch(train, rows[:1])[0]))
        self.precision = Precision(config.precision, self.device)
        torch.manual_seed(config.seed)
        self.model = _initial_model(config).to(self.device).train()
        self.optimizer = Optimizer(self.model, config)
        self.step, self.best = 0, -float("inf")
        self.scores: dict[str, Any] = {}
        folder.create(config)
        found, damaged = latest_checkpoint(folder.checkpoints)
        if found:
            self._load(found)
        self.progress = Progress(config.steps, config.log_every, self.step, stream)
        for reason in damaged:
            self.progress.say(f"{reason}: going back to the one before")
        self.log = MetricsLog(folder.metrics, self.step, config.tensorboard)
        if config.compile:
            self.model.encoder.compile()
        self.signal = 0
        self._announce()

    def run(self) -> FitResult:
        config, train, rows = self.config, *self.source.splits["train"]
        with _Signals(self), Loader(train, config.seed, config.batch_size, self.step + 1, rows) as loader:
            batches, last = iter(loader), time.perf_counter()
            while self.step < config.steps and not self.signal:
                images = to_float(next(batches).images.to(self.device, non_blocking=True))
                values = training_step(
                    self.model, self.optimizer, self.precision, config, self.step + 1, images
                )  # the only host sync of a step is inside, where its losses are read
                self._stop_if_not_finite(values, images)
                self.step += 1
                now = time.perf_counter()
                values["images_per_s"], last = config.batch_size / (now - last), now
                self.log.write({"step": self.step, **values})
                self.progress.update(self.step, values)
                done = self.step == config.steps
                if done or _due(self.step, config.eval_every):
                    self._evaluate()
                    last = time.perf_counter()
                if done or _due(self.step, config.checkpoint_every) or self.signal:
                    self._checkpoint()
        if self.signal:
            self.progress.say(f"stopped by signal {self.signal} at step {self.step}; go on with --resume")
        return FitResult(self.model, self.folder.path, self.step, self.scores, self.signal)

    def close(self) -> None:
        self.log.close()

    def _announce(self) -> None:
        """What is about to happen, in a few lines."""
        config, say = self.config, self.progress.say
        (self.folder.path / "data.txt").write_text(self.source.description + "\n")
        count = sum(p.numel() for p in self.model.parameters())
        probe = torch.empty(1, device=self.device)
        say(f"run       {self.folder.path}" + (f" (resumed at step {self.step})" if self.step else ""))
        say(f"data      {self.source.description}")
        for warning in self.source.warnings:
            say(f"warning   {warning}")
        say(f"model     {count:,} parameters, K {config.num_slots}, D {config.slot_dim}, {config.resolution}²")
        how = f"{config.optimizer}, {config.precision}, {self.device}"
        say(f"training  {config.steps:,} steps of {config.batch_size} images, {how}")
        say(str(backends.explain(probe, op="decoder_loss")))

    def _evaluate(self) -> None:
        config, (dataset, rows) = self.config, self.source.splits["val"]
        self.scores = evaluate(self.model, dataset, rows, config.eval_images, config.eval_batch)
        self.log.write({"step": self.step, "eval": "val", **self.scores})
        names = ("recon", "kl", "j_ari", "jis", "fg_ari", "mbo")
        shown = "  ".join(f"{name} {self.scores[name]:.4g}" for name in names if name in self.scores)
        self.progress.say(f"eval at step {self.step} on {self.scores['images']} images: {shown}")
        if config.input == "pixels":
            images = to_float(read_batch(dataset, rows[:GRID_IMAGES])[0].to(self.device))
            slot_grid(self.model, images, self.folder.images / f"step_{self.step:08d}.png")
        score = self.scores["j_ari"] + self.scores["jis"] if "j_ari" in self.scores else -self.scores["recon"]
        if score > self.best:
            self.best = score
            write_atomic(self.folder.path / WEIGHTS["best"], weights_bytes(self.model))
        write_report([self.folder.path])

    def _checkpoint(self) -> None:
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        state, numbers = self.optimizer.state()
        tensors |= {f"optimizer.{name}": value for name, value in state.items()}
        extra = {"best": self.best, "scaler": self.precision.scaler.state_dict()}
        save_checkpoint(
            self.folder.checkpoints, Checkpoint(self.step, tensors, numbers, extra), self.config.keep_checkpoints
        )
        write_atomic(self.folder.path / WEIGHTS["last"], weights_bytes(self.model))

    def _load(self, found: Checkpoint) -> None:
        part = lambda prefix: {n.removeprefix(prefix): t for n, t in found.tensors.items() if n.startswith(prefix)}  # noqa: E731
        self.model.load_state_dict(part("model."))
        self.optimizer.load_state(part("optimizer."), found.numbers)
        self.step, self.best = found.step, found.extra["best"]
        if found.extra["scaler"]:
            self.precision.scaler.load_state_dict(found.extra["scaler"])

    def _stop_if_not_finite(self, values: dict[str, float], images: torch.Tensor) -> None:
        finite = values["loss"] - values["loss"] == 0
        if finite and (values["grad_norm"] - values["grad_norm"] == 0 or self.precision.scaler.is_enabled()):
            return
        path = self.folder.path / "nan_batch.safetensors"
        step = self.step + 1
        write_atomic(path, save({"images": images.cpu().contiguous()}, {"step": str(step)}))
        self._checkpoint()
        raise NonFiniteLossError(
            f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}. The batch is in {path}, the "
            f"weights before it in {self.folder.path / WEIGHTS['last']}; a lower --lr or --grad_clip 1 often helps"
        )


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _initial_model(config: TrainConfig) -> SlotVAE:
    """A fresh model, or the weights of ``init_from`` where they fit."""
    model = SlotVAE(config)
    if config.init_from:
        path = Path(config.init_from)
        given = load_weights(weights_path(path, "best") if path.is_dir() else path)
        try:
            model.load_state_dict(given.state_dict())
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise UserError(f"init_from {path}: its weights do not fit this model ({reason})") from None
    return model


class _Signals:
    """SIGINT and SIGTERM ask the loop to stop after its step; a second one stops at once."""

    def __init__(self, trainer: Trainer):
        self._trainer = trainer
        self._old: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():  # handlers may be set nowhere else
            self._old = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}

    def __exit__(self, *_) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _frame: Any) -> None:
        self._trainer.signal = number
        signal.signal(number, self._old[number])
