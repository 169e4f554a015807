"""The steps of a run as its loop asks for them: read at once, or a step late where a GPU works ahead of the host."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import NamedTuple

from torch import Tensor

from fastslots import capture
from fastslots.config.run import TrainConfig
from fastslots.distributed import Group
from fastslots.models import SlotVAE
from fastslots.models.broadcast import BroadcastDecoder
from fastslots.models.decoder import Decoder
from fastslots.models.encoder import Encoder
from fastslots.models.slot_attention import SlotAttentionEncoder
from fastslots.train.device.first import compiles_told, make_products_repeat
from fastslots.train.device.queue import Cuda, Queue
from fastslots.train.device.queued import DeviceStep
from fastslots.train.extras import Loss
from fastslots.train.optim import GUARDED, Optimizers
from fastslots.train.step import Precision, training_step, values_of

OURS = (Encoder, SlotAttentionEncoder, Decoder, BroadcastDecoder)


class Done(NamedTuple):
    """A step whose values are known."""

    step: int
    values: dict[str, float]
    images: Tensor


class Steps:
    """Read at once: ``training_step``."""

    def __init__(
        self,
        model: SlotVAE,
        optimizers: Optimizers,
        precision: Precision,
        config: TrainConfig,
        group: Group,
        losses: Mapping[str, tuple[float, Loss]],
        why: str = "",
        say: Callable[[str], None] = lambda text: None,
    ):
        """why: of a GPU's losses that must not be late. say: told in a line what takes long."""
        self._model, self._optimizers, self._precision, self._config = model, optimizers, precision, config
        self._group, self._losses, self._why, self._say = group, losses, why, say
        self._begun = False

    def how(self) -> str:
        """How a step is done, for people; empty where there is nothing to say."""
        return f"operator by operator, losses read at once ({self._why})" if self._why else ""

    def upload(self, images: Tensor) -> Tensor:
        """A batch as the loader gives it, on the device."""
        return images.to(next(self._model.parameters()).device, non_blocking=True)

    def __call__(self, step: int, images: Tensor) -> list[Done]:
        """Do a step -> those that are done and known, in order: this one, or the one before."""
        parts = (self._model, self._optimizers, self._precision, self._config)
        with self._compiles_told(images):
            return [Done(step, training_step(*parts, step, images, self._group, self._losses), images)]

    def _compiles_told(self, images: Tensor) -> AbstractContextManager[None]:
        """The first step compiles what the later ones call."""
        begun, self._begun = self._begun, True
        return contextlib.nullcontext() if begun else compiles_told(images.device, self._say)

    def settle(self) -> list[Done]:
        """Wait for what is not known yet."""
        return []

    def forget(self) -> None:
        """Leave what is not known yet, after a step that was not finite: it changed nothing."""


class LateSteps(Steps):
    """Read a step late, so that the host prepares a step while the device computes the one before."""

    def __init__(
        self,
        model: SlotVAE,
        optimizers: Optimizers,
        precision: Precision,
        config: TrainConfig,
        queue: Queue,
        say: Callable[[str], None] = lambda text: None,
        not_captured: str | None = None,
    ):
        super().__init__(model, optimizers, precision, config, Group(), {}, say=say)
        self._queue, self._not_captured = queue, not_captured
        self._step = DeviceStep(model, optimizers, precision, config, queue, say, not_captured is None)
        self._pending: tuple[int, Callable[[], list[float]], Tensor] | None = None

    def how(self) -> str:
        form = f"operator by operator ({self._not_captured})" if self._not_captured else "one CUDA graph"
        return f"{form}, losses read a step late"

    def upload(self, images: Tensor) -> Tensor:
        return self._queue.upload(images)

    def __call__(self, step: int, images: Tensor) -> list[Done]:
        with self._compiles_told(images):
            read = self._step(step, images)
        done = self.settle()
        self._pending = step, read, images
        return done

    def settle(self) -> list[Done]:
        if self._pending is None:
            return []
        (step, read, images), self._pending = self._pending, None
        return [Done(step, values_of(self._model, self._config, step, read()), images)]

    def forget(self) -> None:
        self._pending = None


def why_at_once(
    model: SlotVAE, config: TrainConfig, group: Group, losses: Mapping[str, tuple[float, Loss]]
) -> str | None:
    """Why a run's losses must be read before its next step; None where they need not."""
    foreign = [type(part).__name__ for part in (model.encoder, model.decoder) if type(part) not in OURS]
    if losses:
        return f"the losses {', '.join(losses)} may wait for the device"
    if foreign or type(model) is not SlotVAE:
        return f"{', '.join(foreign) or type(model).__name__} may wait for the device"
    if group.size > 1:
        return f"{group.size} processes sum their gradients, and agree when to stop"
    if config.precision == "fp16":
        return "the loss scaler of fp16 reads whether gradients overflow"
    if config.optimizer not in GUARDED:
        return f"{config.optimizer} cannot leave out a step on the device: {', '.join(GUARDED)} can"
    if config.jacobian_weight:
        return "the Jacobian's penalty is differentiated twice"
    if config.generator == "torch":
        return "its noise and pixels are drawn on the CPU, as in runs before 0.2"
    return None


def steps_of(
    model: SlotVAE,
    optimizers: Optimizers,
    precision: Precision,
    config: TrainConfig,
    group: Group,
    losses: Mapping[str, tuple[float, Loss]],
    say: Callable[[str], None],
) -> Steps:
    """How this run does its steps, on the device that its model is on. say: told what it has to say meanwhile."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        make_products_repeat(say)
    reason = why_at_once(model, config, group, losses) if device.type == "cuda" else ""
    if reason is not None:
        return Steps(model, optimizers, precision, config, group, losses, reason, say)
    return LateSteps(model, optimizers, precision, config, Cuda(device), say, capture.why_not(device))
