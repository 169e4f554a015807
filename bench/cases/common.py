"""What the cases share: providers under torch.compile, a backend that must serve, and gradients by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar, cast

import torch
from torch import Tensor

from fastslots.bench.case import Provider, Run, Tensors
from fastslots.bench.peers import CannotServeError
from fastslots.ops import backends
from fastslots.records import describe

INTERPRETED = 1 << 19
"""Most numbers of an input that Triton's interpreter is given: what --tiny makes."""


Function = TypeVar("Function", bound=Callable[..., object])


def compiled(function: Function, timed: Callable[[Function], Run], device: str) -> dict[str, Provider]:
    """Providers of a function under torch.compile: default mode, and max-autotune where there are kernels to choose.

    timed: the compiled function -> what is timed. The compiler is imported when a provider is made.
    """

    def form(mode: str) -> Provider:
        def make() -> Run:
            return timed(cast(Function, torch.compile(function, dynamic=False, mode=mode)))

        return Provider(make)

    forms = {"published, compiled": form("default")}
    return forms | ({"published, max-autotune": form("max-autotune")} if device == "cuda" else {})


def need(backend: str, op: str, *tensors: Tensor) -> None:
    """CannotServeError with the backend's own reason."""
    reason = backends.why_not(backend, describe(op, tensors))
    if reason is None and backend == "triton" and tensors[0].device.type == "cpu" and tensors[0].numel() > INTERPRETED:
        reason = "Triton's interpreter shows that results are right, not how fast they come"
    if reason is not None:
        raise CannotServeError(reason)


def named_gradients(outputs: Sequence[Tensor], inputs: Tensors, given: Sequence[Tensor] | None = None) -> Tensors:
    """Gradients by name, ``given`` those of the outputs (None: 1 for a scalar); zeros for what no output reaches.

    They are given rather than made by a loss: (out · dout).sum() alone takes as long as the op does.
    """
    grads = torch.autograd.grad(outputs, list(inputs.values()), given, allow_unused=True)
    return {
        f"d{name}": torch.zeros_like(t) if g is None else g for (name, t), g in zip(inputs.items(), grads, strict=True)
    }
