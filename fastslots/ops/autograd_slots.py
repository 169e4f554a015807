"""Slot attention as differentiable torch operators; ``autograd.py`` says how operators are registered here.

``folded_slot_attention`` is the same of tokens that nothing projects, normed by the kernel where ``norm_eps`` is no
None::

    n = norm(tokens)      A[b,t,:] = softmax_k(rows[b,k] · n[b,t] + offsets[b,k])
    gathered[b,k] = Σ_t (A + ε) n[b,t] / Σ_t (A + ε)

It also hands the tokens on, for the iteration that comes next. What later iterations make of their gradient comes back
through those, and the kernel adds its own in place: three iterations have one gradient of all tokens among them, where
autograd's sum would hold three.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastslots.ops import backends
from fastslots.ops.autograd import contiguous_like, map_like, operator, operator_that_writes, shapes_of


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
    """-> updates in fp32 or wider, each slot's sum of weights, and the map (empty where it is not wanted).

    The backward needs the first two. From updates of 16 bits it would take each slot's mean off its gradient with an
    error that the tokens' mean blows up, the same for all of them.
    """
    return _kernels(backend).slot_attention_fwd(q, k, v, scale, eps, slot_mask, return_map)


@shapes_of(slot_attention)
def _(
    q: Tensor, k: Tensor, v: Tensor, scale: float, eps: float, slot_mask: Tensor | None, return_map: bool, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    B, H, K = q.shape[:3]
    wide = torch.promote_types(q.dtype, torch.float32)
    updates = contiguous_like(q).to(wide)
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


# ---- folded_slot_attention -------------------------------------------------------------------------------------------


class FoldedSlotsBackend(backends.Backend, Protocol):
    """A backend that serves ``folded_slot_attention`` as well; tokens are in fp32 or wider."""

    def folded_slot_attention_fwd(
        self,
        rows: Tensor,
        offsets: Tensor,
        tokens: Tensor,
        eps: float,
        norm_eps: float | None,
        slot_mask: Tensor | None,
        return_map: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """-> gathered, totals (each slot's sum of weights) and the map, empty where it is not wanted."""  # fmt: skip

    def folded_slot_attention_bwd(
        self,
        grads: tuple[Tensor, Tensor | None],
        inputs: tuple[Tensor, Tensor, Tensor],
        saved: backends.Pair,
        dtokens: Tensor | None,
        add: bool,
        eps: float,
        norm_eps: float | None,
        slot_mask: Tensor | None,
    ) -> backends.Pair:
        """grads: of gathered and the map; inputs: rows, offsets, tokens; saved: gathered and totals -> drows, doffsets.
        dtokens, unless None, is written, or with ``add`` added to."""  # fmt: skip


def _folded_kernels(name: str) -> FoldedSlotsBackend:
    return cast(FoldedSlotsBackend, backends.load(name))


class FoldedSlotAttention(torch.autograd.Function):  # no operator: those may not hand on what they are handed
    """rows [B,K,S], offsets [B,K], tokens [B,L,S] fp32 or fp64, eps, norm_eps, slot_mask, return_map, backend ->
    gathered [B,K,S], slot_map [B,L,K] (or [0]), and the tokens to go on with (None where they need no gradient)."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        offsets: Tensor,
        tokens: Tensor,
        eps: float,
        norm_eps: float | None,
        slot_mask: Tensor | None,
        return_map: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        numbers = eps, norm_eps, slot_mask
        gathered, totals, slot_map = folded_slot_attention(rows, offsets, tokens, *numbers, return_map, backend)
        ctx.numbers, ctx.backend = numbers[:2], backend
        ctx.set_materialize_grads(False)
        if not return_map:
            ctx.mark_non_differentiable(slot_map)
        ctx.save_for_backward(rows, offsets, tokens, gathered, totals, slot_mask)
        return gathered, slot_map, tokens if ctx.needs_input_grad[2] else None

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dgathered: Tensor | None, dslot_map: Tensor | None, dtokens: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        nothing = (None,) * 5
        if dgathered is None and dslot_map is None:
            return None, None, dtokens, *nothing
        rows, offsets, tokens, gathered, totals, slot_mask = ctx.saved_tensors
        dgathered = torch.zeros_like(gathered) if dgathered is None else dgathered
        add = dtokens is not None  # what the iteration after this one wrote, and nobody else has
        if ctx.needs_input_grad[2]:
            dtokens = contiguous_like(tokens) if dtokens is None else dtokens.contiguous()
        eps, norm_eps = ctx.numbers
        grads = folded_slot_attention_backward(
            dgathered, dslot_map, rows, offsets, tokens, gathered, totals, dtokens, add, eps, norm_eps, slot_mask,
            ctx.backend,
        )  # fmt: skip
        return *grads, dtokens, *nothing


@operator
def folded_slot_attention(
    rows: Tensor,
    offsets: Tensor,
    tokens: Tensor,
    eps: float,
    norm_eps: float | None,
    slot_mask: Tensor | None,
    return_map: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _folded_kernels(backend).folded_slot_attention_fwd(
        rows, offsets, tokens, eps, norm_eps, slot_mask, return_map
    )


@shapes_of(folded_slot_attention)
def _(rows: Tensor, offsets: Tensor, tokens: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    B, K, _ = rows.shape
    return_map = rest[-2]
    slot_map = tokens.new_empty((B, tokens.shape[1], K) if return_map else (0,))
    return contiguous_like(rows), contiguous_like(offsets), slot_map


@operator_that_writes("dtokens")
def folded_slot_attention_backward(
    dgathered: Tensor,
    dslot_map: Tensor | None,
    rows: Tensor,
    offsets: Tensor,
    tokens: Tensor,
    gathered: Tensor,
    totals: Tensor,
    dtokens: Tensor | None,
    add: bool,
    eps: float,
    norm_eps: float | None,
    slot_mask: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """-> drows and doffsets; dtokens, unless None, is written, or with ``add`` added to."""
    return _folded_kernels(backend).folded_slot_attention_bwd(
        (dgathered, dslot_map), (rows, offsets, tokens), (gathered, totals), dtokens, add, eps, norm_eps, slot_mask
    )


@shapes_of(folded_slot_attention_backward)
def _(dgathered: Tensor, dslot_map: Tensor | None, rows: Tensor, offsets: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return contiguous_like(rows), contiguous_like(offsets)
