"""Cross-attention with weights of the heads and statistics of the rows, as a differentiable torch operator.

``autograd.py`` says how operators are registered here. The plain op has an operator of its own: it is the trainer's.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from fastslots.ops import backends
from fastslots.ops.autograd import contiguous_like, map_like, operator, shapes_of
from fastslots.records import Statistics, StatisticsInputs


def _kernels(name: str) -> backends.StatisticsBackend:
    return cast(backends.StatisticsBackend, backends.load(name))


@operator
def attention_statistics(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slot_mask: Tensor | None,
    head_weights: Tensor | None,
    scale: float,
    rows: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> out, slot_map, entropy, lse; the last two are empty unless ``rows``."""
    inputs = StatisticsInputs(q, k, v, slot_mask, head_weights, scale, rows)
    out, slot_map, entropy, lse = _kernels(backend).attention_statistics_fwd(inputs)
    return out, slot_map, entropy, lse


@shapes_of(attention_statistics)
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = StatisticsInputs(*arguments[:-1])
    q = inputs.q
    B, H, L, _ = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    entropy, lse = (q.new_empty((B, H, L) if inputs.rows else (0,), dtype=wide) for _ in range(2))
    return contiguous_like(q), map_like(q, B, L, inputs.k.shape[2]), entropy, lse


@operator
def attention_statistics_backward(
    grads: list[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slot_mask: Tensor | None,
    head_weights: Tensor | None,
    scale: float,
    rows: bool,
    need_head_weights: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """grads: of the four results -> dq, dk, dv, dhead_weights."""
    inputs = StatisticsInputs(q, k, v, slot_mask, head_weights, scale, rows)
    return _kernels(backend).attention_statistics_bwd(Statistics(*grads), inputs, need_head_weights)


@shapes_of(attention_statistics_backward)
def _(grads: list[Tensor], *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *of_inputs, need_head_weights, _backend = arguments
    inputs = StatisticsInputs(*of_inputs)
    q, k, v = inputs.q, inputs.k, inputs.v
    wide = torch.promote_types(q.dtype, torch.float32)
    weights = q.new_empty(q.shape[1] if need_head_weights else 0, dtype=wide)
    return contiguous_like(q), contiguous_like(k), contiguous_like(v), weights


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, v, slot_mask, head_weights, ctx.scale, ctx.rows, ctx.backend = inputs
    if not ctx.rows:
        ctx.mark_non_differentiable(output[2], output[3])
    ctx.save_for_backward(q, k, v, slot_mask, head_weights)


def _vjp(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    q, k, v, slot_mask, head_weights = ctx.saved_tensors
    need = head_weights is not None and ctx.needs_input_grad[4]
    cotangents = list(grads) if ctx.rows else [*grads[:2], q.new_empty(0), q.new_empty(0)]
    *dqkv, dweights = attention_statistics_backward(
        cotangents, q, k, v, slot_mask, head_weights, ctx.scale, ctx.rows, need, ctx.backend
    )
    return *dqkv, None, dweights.to(head_weights.dtype) if need else None, None, None, None


torch.library.register_autograd("fastslots::attention_statistics", _vjp, setup_context=_setup)
