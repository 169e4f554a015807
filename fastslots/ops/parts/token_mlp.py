"""The token MLP and the norm behind it, of 16-bit rows, as one operator; its definition is the plain PyTorch of
``fastslots/models/encoder.py``. It has kernels on GPUs alone."""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from torch import Tensor

from fastslots.ops import backends
from fastslots.ops.autograd import contiguous_like, operator, shapes_of
from fastslots.records import describe


class MlpBackend(backends.Backend, Protocol):
    """A backend that serves it as well."""

    def token_mlp_fwd(
        self, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, eps: float, keep: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """-> y, and what the backward takes: 1/σ of each row, gelu'(u), and h with a column of ones."""

    def token_mlp_bwd(
        self, dy: Tensor, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, y: Tensor, rstd: Tensor, slope: Tensor,
        h: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]: ...  # fmt: skip


def _backend(name: str) -> MlpBackend:
    return cast(MlpBackend, backends.load(name))


def token_mlp(
    x: Tensor, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], eps: float = 1e-5, backend: str = "auto"
) -> Tensor | None:
    """``layer_norm(second(gelu(first(x))))`` of 16-bit rows x [..., D], maps given as (weight, bias): one kernel.

    None where no kernel serves: fp32 rows, whose products are a library's, and those wider than a tile holds.
    """
    widest = x.new_empty(1, max(x.shape[-1], len(second[0])))
    if x.dtype == torch.float32 or not x.numel():
        return None
    name = backends.select(describe("token_mlp", [widest]), backend)
    if name == "reference":
        return None
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *first, *second))
    return token_mlp_operator(x, *first, *second, eps, keep, name)[0]


@operator
def token_mlp_operator(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, eps: float, keep: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _backend(backend).token_mlp_fwd(x, w1, b1, w2, b2, eps, keep)


@shapes_of(token_mlp_operator)
def _(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, eps: float, keep: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = x[..., 0].numel()
    kept, columns = rows if keep else 0, -(-len(w1) // 64) * 64
    y, rstd = x.new_empty(*x.shape[:-1], len(w2)), x.new_empty(rows, dtype=torch.float32)
    return y, rstd, x.new_empty(kept, columns), x.new_empty(kept, columns + 8)


@operator
def token_mlp_operator_backward(
    dy: Tensor, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, y: Tensor, rstd: Tensor, slope: Tensor, h: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dx, dw1, db1, dw2, db2 = _backend(backend).token_mlp_bwd(dy, x, w1, b1, w2, y, rstd, slope, h)
    return dx, dw1, db1, dw2, db2


@shapes_of(token_mlp_operator_backward)
def _(
    dy: Tensor, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dw1, db1, dw2 = (contiguous_like(t).float() for t in (w1, b1, w2))
    return contiguous_like(x), dw1, db1, dw2, dw2.new_empty(len(w2))


def _token_mlp_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, w1, b1, w2, b2, _, _, ctx.backend = inputs
    y, rstd, slope, h = output
    ctx.mark_non_differentiable(rstd, slope, h)
    ctx.set_materialize_grads(False)
    ctx.b2_dtype = b2.dtype
    ctx.save_for_backward(x, w1, b1, w2, y, rstd, slope, h)


def _token_mlp_vjp(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Any, ...]:
    if dy is None:
        return (None,) * 8
    x, w1, b1, w2, y, rstd, slope, h = ctx.saved_tensors
    dx, dw1, db1, dw2, db2 = token_mlp_operator_backward(dy, x, w1, b1, w2, y, rstd, slope, h, ctx.backend)
    return dx, dw1.to(w1.dtype), db1.to(b1.dtype), dw2.to(w2.dtype), db2.to(ctx.b2_dtype), None, None, None


torch.library.register_autograd("fastslots::token_mlp_operator", _token_mlp_vjp, setup_context=_token_mlp_setup)
