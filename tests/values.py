"""Values and gradients of an op, on the C++ kernels' instruction sets and against float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastslots.testing import FLOOR, assert_as_good

try:
    from fastslots.kernels import cpu_backend
except ImportError:  # a checkout that was not built
    cpu_backend = None

ISAS = cpu_backend.ISAS if cpu_backend else ()
SETS = [*((isa, torch.float32) for isa in ISAS), ("portable", torch.float64)]
"""Instruction sets of this machine, and the element types that they are tested in."""


def cast(values: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [v.detach().to(dtype).requires_grad_() for v in values]


def values_and_gradients(call: Callable, inputs: Sequence[Tensor], seed: int = 3) -> list[Tensor]:
    """Outputs of ``call`` and the gradients of all inputs under fixed random cotangents."""
    g = torch.Generator().manual_seed(seed)
    outputs = call(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    cotangents = [torch.randn(o.shape, generator=g, dtype=torch.float64).to(o) for o in outputs]
    return [o.detach() for o in outputs] + list(torch.autograd.grad(outputs, inputs, cotangents))


def compare_sets(run: Callable, cast_inputs: Callable, inputs: object) -> None:
    """``run(backend, inputs in a dtype)`` on every instruction set, as good as eager in its dtype."""
    exact = run("reference", cast_inputs(inputs, torch.float64))
    eager = {dtype: run("reference", cast_inputs(inputs, dtype)) for dtype in FLOOR}
    for isa, dtype in SETS:
        cpu_backend.set_isa(isa)
        found = run("cpu", cast_inputs(inputs, dtype))
        assert_as_good(found, eager[dtype], exact, dtype, f"{isa} {dtype}")


def compare(call: Callable, inputs: Sequence[Tensor]) -> None:
    """``call(backend, *inputs)``: values and gradients of all inputs."""
    compare_sets(lambda backend, a: values_and_gradients(lambda *t: call(backend, *t), a), cast, inputs)
