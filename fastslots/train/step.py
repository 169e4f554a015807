"""One training step: the batch's randomness, the loss in parts, precision, clipping, the update."""

from __future__ import annotations

import contextlib
import math
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from fastslots.config.run import TrainConfig
from fastslots.data.sampling import Purpose, step_seed
from fastslots.distributed import Group
from fastslots.errors import UserError
from fastslots.models import SlotVAE
from fastslots.ops import backends
from fastslots.train.draws import Draws, draw, step_draws
from fastslots.train.extras import FurtherLosses, Loss
from fastslots.train.fused import FusedLoss, fused_loss, fused_update
from fastslots.train.optim import Optimizers, clip
from fastslots.train.schedule import alpha_at, beta_at, jacobian_weight_at, lr_at

LEAST_SCALE = 2.0**-20
"""Of the fp16 loss scaler, which starts at 2^16 and halves where gradients overflow: below, they do so for another
reason, and the run would go on without learning."""

ALONE = Group()


class NonFiniteLossError(RuntimeError):
    """A loss or gradient was NaN or infinite; the message names the step and the saved batch."""


class Precision:
    """Where 16 bits and TF32 are used; losses, folding, norms and softmax stay fp32 in all of them.

    Sets torch's process-wide switches on a GPU: TF32, and convolutions whose sums have one order, which cuDNN's fastest
    backward has not. UserError where the device lacks the precision.
    """

    def __init__(self, name: str, device: torch.device):
        if name == "fp16" and device.type != "cuda":
            raise UserError("precision fp16 needs a GPU: use fp32, or bf16")
        if name == "tf32" and device.type != "cuda":
            raise UserError("precision tf32 needs a GPU: use fp32")
        self._device, self._dtype = device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name)
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")
        if device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = name == "tf32"
            # Not ``benchmark``: which algorithm is fastest differs from run to run, and with it the bits.
            torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False

    @property
    def plain(self) -> bool:
        """Whether everything is computed in fp32."""
        return self._dtype is None and not self.scaler.is_enabled() and not torch.is_autocast_enabled(self._device)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self._device, self._dtype or torch.bfloat16, enabled=self._dtype is not None)


def training_step(
    model: SlotVAE,
    optimizers: Optimizers,
    precision: Precision,
    config: TrainConfig,
    step: int,
    images: Tensor,
    group: Group | None = None,
    losses: Mapping[str, tuple[float, Loss]] | None = None,
) -> dict[str, float]:
    """Update the weights once -> the step's values, of the global batch. One host sync for those; foreground
    or edge sampling, a loss scaler and a group of processes each add one.

    images: [b, C, R, R], this process's share of the batch (``group.share(config.batch_size)``; all of it without).
    losses: further ones, name -> (weight, function); their values are among the step's. A non-finite loss or gradient
    leaves the weights as they were; the caller sees it in ``loss`` or ``grad_norm``. With a loss scaler also
    ``loss_scale``, this step's; a step that it left out has a ``grad_norm`` that is not finite.
    """
    group = group or ALONE
    parts = (model, optimizers, precision, config, step, images, group)
    if losses:
        return _step(*parts, losses)
    if images.device.type == "cpu" and precision.plain and (fused := fused_loss(model, config)) is not None:
        with cast(backends.OptimizerBackend, backends.load("cpu")).torch_on_one_thread():
            return _fused(fused, *parts)
    with _threads_for_kernels(model, precision, config, images):
        return _step(*parts)


@contextlib.contextmanager
def _threads_for_kernels(model: SlotVAE, precision: Precision, config: TrainConfig, images: Tensor) -> Iterator[None]:
    """Where kernels do nearly all of a step, torch's own operators get one thread.

    Nothing waits in hundreds of small parallel regions then, and weights have the same bits for any number of threads.
    """
    with precision.autocast():
        serves = model.serving_backend(images) == "cpu"
    if not serves or config.jacobian_weight:
        yield
        return
    with cast(backends.OptimizerBackend, backends.load("cpu")).torch_on_one_thread():
        yield


def _fused(
    fused: FusedLoss,
    model: SlotVAE,
    optimizers: Optimizers,
    precision: Precision,
    config: TrainConfig,
    step: int,
    images: Tensor,
    group: Group,
) -> dict[str, float]:
    """``_step`` with the loss and all gradients out of one call of a kernel. What can be done before that call is: it
    sweeps the caches, and Python behind it is slow."""
    scheduled = scheduled_at(config, step)
    alpha, beta = scheduled["alpha"], scheduled["beta"]
    ours = group.share(config.batch_size)
    share, expansion = len(images) / config.batch_size, config.resolution**2 / config.pixels_per_step
    draws = step_draws(config, step, images, ours.start)
    weights = (config.sigma * expansion * share, beta * share, alpha * share)
    optimizers.set_lr(scheduled["lr"])
    update = fused_update(optimizers)
    recon, kl, interaction = fused.run(images, draws, weights)
    recon *= expansion
    total = config.sigma * recon + beta * kl + alpha * interaction
    numbers = array("f", [share * value for value in (total, recon, kl, interaction)]).tolist()
    if group.size > 1:
        sums = torch.tensor(numbers)
        group.sum_step(model.parameters(), sums)
        numbers = sums.tolist()
    finite = math.isfinite(numbers[0])
    if update is not None:
        grad_norm = update.run(config.grad_clip, finite)
    else:
        grad_norm = clip(model.parameters(), config.grad_clip).item()
        if finite and math.isfinite(grad_norm):
            for optimizer, _ in optimizers.parts:
                optimizer.step()
    return _named(model, [*numbers, grad_norm], scheduled)


class Weights(NamedTuple):
    """What multiplies the terms of a step's loss: numbers, or 0-d tensors on the device."""

    alpha: float | Tensor
    beta: float | Tensor
    jacobian: float = 0.0
    grad_scale: float = 1.0


def gradients(
    model: SlotVAE,
    precision: Precision,
    config: TrainConfig,
    images: Tensor,
    draws: Draws,
    weights: Weights,
    losses: Mapping[str, tuple[float, Loss]] | None = None,
) -> Tensor:
    """Add a step's gradients to the parameters', part by part of the batch -> fp32 [4 + n]: total, recon, kl,
    interaction and further losses, of this process's share. Nothing of it waits for the device."""
    sums = torch.zeros(4 + len(losses or {}), device=images.device)
    size = -(-len(images) // config.accumulate)
    for rows in (slice(first, first + size) for first in range(0, len(images), size)):
        some = images[rows]
        share = len(some) / config.batch_size
        further = FurtherLosses(losses, some) if losses else None
        part = Draws(*(None if drawn is None else drawn[rows] for drawn in draws))  # type: ignore[arg-type]
        with precision.autocast():
            terms = model.training_loss(
                some,
                part.noise,
                weights.alpha,
                beta=weights.beta,
                query_noise=part.query_noise,
                pixels=part.pixels,
                pixel_weight=part.pixel_weight,
                jacobian_weight=weights.jacobian,
                jacobian_pixels=part.jacobian_pixels,
                grad_scale=weights.grad_scale * share,
                **({"also": further} if further else {}),
            )
        precision.scaler.scale(terms.total * share).backward()
        sums += torch.stack([term.detach().float() for term in [*terms, *(further.values if further else ())]]) * share
    return sums


def values_of(
    model: SlotVAE, config: TrainConfig, step: int, numbers: Sequence[float], losses: Iterable[str] = ()
) -> dict[str, float]:
    """A step's values by name. numbers: those of ``gradients``, then the norm of the gradients."""
    return _named(model, numbers, scheduled_at(config, step), losses)


def scheduled_at(config: TrainConfig, step: int) -> dict[str, float]:
    """What the schedules say of a step, by name."""
    return {"lr": lr_at(config, step), "alpha": alpha_at(config, step), "beta": beta_at(config, step)}


def _named(
    model: SlotVAE, numbers: Sequence[float], scheduled: Mapping[str, float], losses: Iterable[str] = ()
) -> dict[str, float]:
    loss, recon, kl, interaction, *of_losses, grad_norm = numbers
    normalized = interaction / model.slot_decoder.heads**2
    values = {"loss": loss, "recon": recon, "kl": kl, "interaction": interaction, "interaction_normalized": normalized}
    values |= dict(zip(losses, of_losses, strict=True))
    return values | {"grad_norm": grad_norm, **scheduled}


def _step(
    model: SlotVAE,
    optimizers: Optimizers,
    precision: Precision,
    config: TrainConfig,
    step: int,
    images: Tensor,
    group: Group,
    losses: Mapping[str, tuple[float, Loss]] | None = None,
) -> dict[str, float]:
    start, scaler = group.share(config.batch_size).start, precision.scaler
    draws, scale = draw(config, step, images, start), scaler.get_scale()
    optimizers.set_lr(lr_at(config, step))
    optimizers.zero_grad()
    if losses or config.model:  # what the user's own parts draw: the same after a resume
        torch.manual_seed(step_seed(config.seed, step, Purpose.OWN_PARTS) + start)
    weights = Weights(alpha_at(config, step), beta_at(config, step), jacobian_weight_at(config, step), scale)
    sums = gradients(model, precision, config, images, draws, weights, losses)
    group.sum_step(model.parameters(), sums)
    for optimizer, _ in optimizers.parts:
        scaler.unscale_(optimizer)
    norm = clip(model.parameters(), config.grad_clip)
    numbers = torch.cat([sums, norm.reshape(1)]).tolist()
    if math.isfinite(numbers[0]) and math.isfinite(numbers[-1]):  # asked of all: a scaler asks of each optimiser alone
        for optimizer, _ in optimizers.parts:
            scaler.step(optimizer)
    scaler.update()  # lowers the scale where ``unscale_`` saw an overflow
    scaled = {"loss_scale": scale} if scaler.is_enabled() else {}
    return values_of(model, config, step, numbers, losses or ()) | scaled
