"""Providers of case ``step`` that are one CUDA graph: our step as ``fastslots train`` does it, and the published one.

Without a GPU, at tiny sizes, the same objects do their work operator by operator, and their rows say so.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fastslots import capture
from fastslots.bench.case import Options, Provider, Run, Tensors
from fastslots.bench.peers import CannotServeError
from fastslots.config.run import TrainConfig
from fastslots.data import to_float
from fastslots.models import SlotVAE
from fastslots.train.device.queue import REHEARSALS, Cuda
from fastslots.train.device.steps import LateSteps
from fastslots.train.optim import Optimizers
from fastslots.train.step import Precision

LossTerms = Callable[[SlotVAE], tuple[Tensor, ...]]


def train_config(options: Options, rate: float) -> TrainConfig:
    """The preset's run as all providers compute it: every pixel, weights of the terms at their full values, Adam."""
    config = options.config()
    sizes = {**options.overrides, "resolution": config.resolution}
    ramps = dict.fromkeys(("alpha_start", "alpha_warmup", "beta_start", "beta_warmup", "warmup"), 0)
    return TrainConfig.preset(
        options.preset,
        **{**sizes, **ramps, "schedule": "constant", "optimizer": "adam", "lr": rate, "weight_decay": 0.0},
        batch_size=options.images(),
        pixels_per_step=0,
        precision=options.precision,
        device=options.device,
    )


class HostQueue:
    """A queue whose work is done when it is asked for."""

    def upload(self, images: Tensor) -> Tensor:
        return images

    def later(self, values: Tensor) -> Callable[[], list[float]]:
        kept = values.clone()
        return kept.tolist

    def capture(self, work: Callable[[], object], rehearse: Callable[[], object]) -> Callable[[], None]:
        raise RuntimeError("there is no graph on a CPU")


def ours(model: SlotVAE, batch: Tensor, config: TrainConfig, tiny: bool) -> Provider:
    """A call is a turn of the training loop: the batch from pinned memory, the step, the values of the step before.

    batch: as the loader gives it, on the host. The first step draws the noise of ``draw(config, 1, ...)``.
    """
    said: list[str] = []
    named: dict[str, Any] = {}

    def make() -> Run:
        device = next(model.parameters()).device
        _need_gpu(device, tiny)
        own = copy.deepcopy(model).train()
        with _switches_kept():
            precision = Precision(config.precision, device)
        optimizers = Optimizers(own, config.optimizer, config.lr, config.weight_decay, on_device=True)
        on_gpu = device.type == "cuda"
        queue = Cuda(device) if on_gpu else HostQueue()
        steps = LateSteps(own, optimizers, precision, config, queue, said.append, capture.why_not(device))
        said.append(steps.how())
        waiting = batch.pin_memory() if on_gpu else batch
        named.update(model=own, steps=steps)
        number = 0

        def run() -> None:
            nonlocal number
            number += 1
            with _switches_kept():
                torch.backends.cudnn.deterministic = True  # as ``Precision`` has it in a run
                steps(number, to_float(steps.upload(waiting)))

        return run

    def view(_: Any) -> Mapping[str, Tensor]:
        (done,) = named["steps"].settle()
        device = next(named["model"].parameters()).device
        values: Tensors = {
            name: torch.tensor(done.values[name], device=device) for name in ("recon", "kl", "interaction")
        }
        shrunk = max(1.0, (done.values["grad_norm"] + 1e-6) / config.grad_clip) if config.grad_clip else 1.0
        for name, p in named["model"].named_parameters():
            values[f"d{name}"] = torch.zeros_like(p) if p.grad is None else shrunk * p.grad
        return values

    return Provider(make, view=view, own_precision=True, how=lambda: "; ".join(said))


def published_graph(model: SlotVAE, loss: LossTerms, options: Options, rate: float) -> Provider:
    """The published step, forward to update, captured by the same means; its images and noise lie on the device.

    loss: total, recon, kl, interaction of a model, of tensors of fixed addresses.
    """
    said: list[str] = []

    def make() -> Run:
        device = next(model.parameters()).device
        _need_gpu(device, options.tiny)
        on_gpu = device.type == "cuda"
        own = copy.deepcopy(model)
        optimizer = torch.optim.Adam(own.parameters(), lr=rate, fused=True, capturable=on_gpu)

        def work() -> list[Tensor]:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(options.device, torch.bfloat16, enabled=options.precision == "bf16"):
                total, *terms = loss(own)
            total.backward()
            optimizer.step()
            return [term.detach() for term in terms]

        before = {name: value.clone() for name, value in own.state_dict().items()}
        if on_gpu:
            replay, terms = capture.captured(work, device, REHEARSALS)
            said.append("one CUDA graph")
            with torch.no_grad():  # the rehearsals were steps
                for name, value in own.state_dict().items():
                    value.copy_(before[name])
                for state in optimizer.state.values():
                    for value in state.values():
                        value.zero_()
        else:
            said.append("operator by operator (the tensors are on cpu)")

        def run() -> tuple[SlotVAE, list[Tensor]]:
            if not on_gpu:
                return own, work()
            replay()
            return own, terms

        return run

    return Provider(make, own_precision=True, how=lambda: "; ".join(said))


def _need_gpu(device: torch.device, tiny: bool) -> None:
    if device.type != "cuda" and not tiny:
        raise CannotServeError(f"a CUDA graph needs a GPU, the tensors are on {device.type}")


@contextlib.contextmanager
def _switches_kept() -> Iterator[None]:
    """What training sets for its whole process is here one provider's."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before
