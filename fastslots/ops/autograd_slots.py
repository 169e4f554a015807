"""Slot attention as a differentiable torch operator; ``autograd.py`` says how operators are registered here."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from fastslots.ops import backends
from fastslots.ops.autograd import contiguous_like, map_like, operator, shapes_of


def _kernels(name: str) -> backends.SlotAttentionBackend:
    return cast(backends.SlotAttentionBackend, backends.load(name))


@operator
def slot_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    eps: float,
    slot_mask: Tensor | None,
    return_map: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> updates, each slot's sum of weights (which the backward needs), and the map (empty where it is not wanted)."""
    return _kernels(backend).slot_attention_fwd(q, k, v, scale, eps, slot_mask, return_map)


@shapes_of(slot_attention)
def _(
    q: Tensor, k: Tensor, v: Tensor, scale: float, eps: float, slot_mask: Tensor | None, return_map: bool, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    B, H, K = q.shape[:3]
    wide = torch.promote_types(q.dtype, torch.float32)
    updates = contiguous_like(q)
    slot_map = map_like(q, B, k.shape[2], K) if return_map else q.new_empty(0, dtype=wide)
    return updates, q.new_empty(B, H, K, dtype=wide), slot_map


@operator
def slot_attention_backward(
    dupdates: Tensor,
    dslot_map: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    updates: Tensor,
    totals: Tensor,
    scale: float,
    eps: float,
    slot_mask: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _kernels(backend).slot_attention_bwd(
        dupdates, dslot_map, (q, k, v), (updates, totals), scale, eps, slot_mask
    )


@shapes_of(slot_attention_backward)
def _(
    dupdates: Tensor, dslot_map: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    return contiguous_like(q), contiguous_like(k), contiguous_like(v)


def _slot_attention_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, v, ctx.scale, ctx.eps, slot_mask, ctx.return_map, ctx.backend = inputs
    updates, totals, slot_map = output
    ctx.mark_non_differentiable(totals)
    if not ctx.return_map:
        ctx.mark_non_differentiable(slot_map)
    ctx.save_for_backward(q, k, v, updates, totals, slot_mask)


def _slot_attention_vjp(ctx: Any, dupdates: Tensor, _dtotals: Tensor, dslot_map: Tensor) -> tuple[Any, ...]:
    q, k, v, updates, totals, slot_mask = ctx.saved_tensors
    dmap = dslot_map if ctx.return_map else None
    numbers = ctx.scale, ctx.eps
    grads = slot_attention_backward(dupdates, dmap, q, k, v, updates, totals, *numbers, slot_mask, ctx.backend)
    return *grads, None, None, None, None, None


torch.library.register_autograd("fastslots::slot_attention", _slot_attention_vjp, setup_context=_slot_attention_setup)
