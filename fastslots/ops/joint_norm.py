"""The encoder's norm over tokens and channels together, as an operator; it has a kernel on GPUs alone."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fastslots.ops import backends
from fastslots.ops.autograd import contiguous_like, operator, shapes_of
from fastslots.records import describe


def joint_norm(x: Tensor, eps: float = 1e-5, backend: str = "auto") -> Tensor:
    """x [B, T, S] -> (x − mean) / σ over T and S together, without affine part, like x: ``layer_norm(x, [T, S])``.

    ValueError where a backend that is named cannot serve.
    """
    name = backends.select(describe("joint_norm", [x]), backend)
    if name == "reference" or not x.numel():
        return F.layer_norm(x, x.shape[1:], eps=eps)
    y, _ = joint_norm_operator(x, eps, name)
    return y


def _backend(name: str) -> backends.NormBackend:
    return cast(backends.NormBackend, backends.load(name))


@operator
def joint_norm_operator(x: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor]:
    return _backend(backend).joint_norm_fwd(x, eps)


@shapes_of(joint_norm_operator)
def _(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return contiguous_like(x), x.new_empty(x.shape[0], dtype=torch.float32)


@operator
def joint_norm_operator_backward(dy: Tensor, y: Tensor, rstd: Tensor, backend: str) -> Tensor:
    return _backend(backend).joint_norm_bwd(dy, y, rstd)


@shapes_of(joint_norm_operator_backward)
def _(dy: Tensor, y: Tensor, *_: object) -> Tensor:
    return contiguous_like(y)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.backend = inputs[2]
    y, rstd = output
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(y, rstd)


def _vjp(ctx: Any, dy: Tensor, _drstd: Tensor) -> tuple[Any, ...]:
    return joint_norm_operator_backward(dy, *ctx.saved_tensors, ctx.backend), None, None


torch.library.register_autograd("fastslots::joint_norm_operator", _vjp, setup_context=_setup)
