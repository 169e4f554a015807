"""Walks one training step without a GPU and notes every operator and every launch of a Triton kernel, in order."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastslots.bench import published
from fastslots.bench.gpu_step.operators import Work, laid_out, work
from fastslots.config.run import TrainConfig
from fastslots.kernels.gpu import launch
from fastslots.models import SlotVAE
from fastslots.ops.autograd import IMPLEMENTATIONS
from fastslots.testing.stand_in import CudaStandIn, cuda_stand_in
from fastslots.train.optim import Optimizers, clip
from fastslots.train.step import Precision

REGIONS = ("encoder", "decoder", "update")


@dataclass(frozen=True)
class Noted:
    """An operator of torch, or a launch."""

    region: str
    name: str
    work: Work | launch.Launch
    shapes: tuple[tuple[int, ...], ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()


@dataclass
class Walked:
    """All that a step does, in order."""

    noted: list[Noted] = field(default_factory=list)

    def nodes(self, region: str | None = None) -> int:
        """Nodes of the graph of the step: kernels launched."""
        wanted = [n for n in self.noted if region in (None, n.region)]
        return sum(1 if isinstance(n.work, launch.Launch) else n.work.launches for n in wanted)


def works(function: Callable[..., Any], *tensors: Tensor) -> list[Work]:
    """Of the operators that a call with tensors on ``meta`` runs; those that launch nothing are left out."""
    found: list[Work] = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = laid_out(func, args, func(*args, **(kwargs or {})))
            found.append(work(func, args, kwargs or {}, out))
            return out

    with Mode():  # type: ignore[no-untyped-call]  # torch's
        function(*tensors)
    return [of for of in found if of.launches]


class _Noting(TorchDispatchMode):
    def __init__(self, walked: Walked, launches: list[launch.Launch], stand_in: CudaStandIn) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.region = "encoder"
        self._walked, self._launches, self._stand_in = walked, launches, stand_in

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "fastslots":  # its launchers, and what torch does around them
            with self, self._stand_in:
                return IMPLEMENTATIONS[func.overloadpacket.__name__](*args, **kwargs)
        self.take_launches()
        out = laid_out(func, args, func(*args, **kwargs))
        cost = work(func, args, kwargs, out)
        tensors = [t for t in args if isinstance(t, Tensor)] + ([out] if isinstance(out, Tensor) else [])
        if cost.launches and all(t.is_meta for t in tensors[:1]):
            self._walked.noted.append(
                Noted(
                    self.region, func.overloadpacket.__name__, cost,
                    tuple(tuple(t.shape) for t in tensors), tuple(t.dtype for t in tensors),
                )
            )  # fmt: skip
        return out

    def forget(self) -> None:
        """What was noted so far."""
        self._walked.noted.clear()
        self._launches.clear()

    def take_launches(self) -> None:
        """Those since the last operator come before it."""
        self._walked.noted += [Noted(self.region, item.name, item) for item in self._launches]
        self._launches.clear()


@contextlib.contextmanager
def _noting(arch: str) -> Iterator[tuple[Walked, _Noting]]:
    number = int(arch.removeprefix("sm_"))
    walked = Walked()
    with cuda_stand_in((number // 10, number % 10)) as stand_in, launch.record(arch) as launches:
        with _Noting(walked, launches, stand_in) as noting:
            yield walked, noting
            noting.take_launches()


def walk_step(config: TrainConfig, arch: str) -> Walked:
    """One step of ``fastslots train`` on this architecture: forward, backward, clipping, update."""

    def step(model: SlotVAE, images: Tensor, noting: _Noting) -> None:
        noise = images.new_empty(len(images), config.num_slots, config.slot_dim)
        encode = model.encode

        def noted_encode(*args: Any, **kwargs: Any) -> Any:
            posterior = encode(*args, **kwargs)
            noting.region = "decoder"
            if posterior.slots.requires_grad:
                posterior.slots.register_hook(lambda grad: setattr(noting, "region", "encoder"))
            return posterior

        model.encode = noted_encode  # type: ignore[method-assign]
        optimizers = Optimizers(model, config.optimizer, config.lr, config.weight_decay)
        _make_state([optimizer for optimizer, _ in optimizers.parts], model, noting)
        with Precision(config.precision, torch.device("cuda")).autocast():
            terms = model.training_loss(images, noise, config.alpha)
        terms.total.backward()
        noting.take_launches()
        noting.region = "update"
        clip(model.parameters(), config.grad_clip)
        for optimizer, _ in optimizers.parts:
            optimizer.step()

    return _walk(config, arch, step)


def walk_published(config: TrainConfig, arch: str) -> Walked:
    """The same step of the published algorithm in eager PyTorch, with torch's fused Adam."""

    def step(model: SlotVAE, images: Tensor, noting: _Noting) -> None:
        noise = images.new_empty(len(images), config.num_slots, config.slot_dim)
        optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, fused=True)
        _make_state([optimizer], model, noting)
        with Precision(config.precision, torch.device("cuda")).autocast():
            total, *_ = published.training_loss(model, images, noise)
        total.backward()
        noting.region = "update"
        optimizer.step()

    return _walk(config, arch, step)


def _make_state(optimizers: list[torch.optim.Optimizer], model: SlotVAE, noting: _Noting) -> None:
    """What an optimiser makes at its first step is none of a later step's work."""
    for p in model.parameters():
        p.grad = torch.empty_like(p)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    noting.forget()


def _walk(config: TrainConfig, arch: str, step: Callable[[SlotVAE, Tensor, _Noting], None]) -> Walked:
    with torch.device("meta"):
        model = SlotVAE(config)
        images = torch.empty(config.batch_size, config.channels, config.resolution, config.resolution)
    with _noting(arch) as (walked, noting):
        step(model, images, noting)
    return walked
