"""Ops of the ``cpu`` backend for others' models: attention with statistics of each head, and slot attention."""

from __future__ import annotations

import torch
from torch import Tensor

from fastslots.records import Statistics, StatisticsInputs

from .cpu_calls import kernel, mask, plain, unit_rows, wide


def attention_statistics_fwd(inputs: StatisticsInputs) -> Statistics:
    """-> out [B,H,L,d], slot_map [B,L,K], entropy and lse [B,H,L] ([0] where they are not wanted)."""
    q, k = inputs.q, inputs.k
    dtype = wide(q.dtype)
    B, H, L, _ = q.shape
    out, slot_map = q.new_empty(q.shape, dtype=dtype), q.new_empty(B, L, k.shape[2], dtype=dtype)
    entropy, lse = (q.new_empty((B, H, L) if inputs.rows else (0,), dtype=dtype) for _ in range(2))
    kernel("cross_attention_fwd", dtype)(
        **_arrays(inputs, dtype), out=out, slot_map=slot_map, entropy=entropy if inputs.rows else None,
        lse=lse if inputs.rows else None,
    )  # fmt: skip
    return Statistics(out.to(q.dtype), slot_map, entropy, lse)


def attention_statistics_bwd(
    grads: Statistics, inputs: StatisticsInputs, need_head_weights: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> dq, dk, dv, contiguous, and the gradient of the heads' weights ([0] where it is not needed)."""
    q, k, v = inputs.q, inputs.k, inputs.v
    dtype = wide(q.dtype)
    dq, dk, dv = (t.new_empty(t.shape, dtype=dtype) for t in (q, k, v))
    dweights = q.new_empty(q.shape[1] if need_head_weights else 0, dtype=dtype)
    kernel("cross_attention_bwd", dtype)(
        **_arrays(inputs, dtype), out_grad=unit_rows(grads.out, dtype), slot_map_grad=plain(grads.slot_map, dtype),
        entropy_grad=plain(grads.entropy, dtype) if inputs.rows else None,
        lse_grad=plain(grads.lse, dtype) if inputs.rows else None, q_grad=dq, k_grad=dk, v_grad=dv,
        head_weights_grad=dweights if need_head_weights else None,
    )  # fmt: skip
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dweights


def _arrays(inputs: StatisticsInputs, dtype: torch.dtype) -> dict[str, Tensor | float | None]:
    weights = inputs.head_weights
    return {
        "q": unit_rows(inputs.q, dtype),
        "k": unit_rows(inputs.k, dtype),
        "v": unit_rows(inputs.v, dtype),
        "slot_mask": mask(inputs.slot_mask),
        "head_weights": None if weights is None else plain(weights, dtype),
        "scale": inputs.scale,
    }


def slot_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, scale: float, eps: float, slot_mask: Tensor | None, return_map: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """q [B,H,K,d], k, v [B,H,L,d], any strides -> updates [B,H,K,d], totals [B,H,K], map [B,L,K] (or [0])."""
    dtype = wide(q.dtype)
    B, _, K, _ = q.shape
    updates, totals = q.new_empty(q.shape, dtype=dtype), q.new_empty(q.shape[:3], dtype=dtype)
    slot_map = q.new_empty((B, k.shape[2], K) if return_map else (0,), dtype=dtype)
    kernel("slot_attention_fwd", dtype)(
        q=unit_rows(q, dtype), k=unit_rows(k, dtype), v=unit_rows(v, dtype), slot_mask=mask(slot_mask), scale=scale,
        eps=eps, updates=updates, totals=totals, slot_map=slot_map if return_map else None,
    )  # fmt: skip
    return updates, totals, slot_map


def slot_attention_bwd(
    dupdates: Tensor,
    dslot_map: Tensor | None,
    inputs: tuple[Tensor, Tensor, Tensor],
    saved: tuple[Tensor, Tensor],
    scale: float,
    eps: float,
    slot_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """inputs: q, k, v; saved: updates and totals -> dq, dk, dv, contiguous."""
    (q, k, v), (updates, totals) = inputs, saved
    dtype = wide(q.dtype)
    dq, dk, dv = (t.new_empty(t.shape, dtype=dtype) for t in inputs)
    kernel("slot_attention_bwd", dtype)(
        q=unit_rows(q, dtype), k=unit_rows(k, dtype), v=unit_rows(v, dtype), slot_mask=mask(slot_mask), scale=scale,
        eps=eps, updates=plain(updates, dtype), totals=plain(totals, dtype), updates_grad=plain(dupdates, dtype),
        slot_map_grad=None if dslot_map is None else plain(dslot_map, dtype), q_grad=dq, k_grad=dk, v_grad=dv,
    )  # fmt: skip
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def folded_slot_attention_fwd(
    rows: Tensor,
    offsets: Tensor,
    tokens: Tensor,
    eps: float,
    norm_eps: float | None,
    slot_mask: Tensor | None,
    return_map: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """rows [B,K,S], offsets [B,K], tokens [B,L,S] -> gathered [B,K,S], totals [B,K], map [B,L,K] (or [0])."""
    dtype = tokens.dtype
    B, K, _ = rows.shape
    gathered, totals = rows.new_empty(rows.shape, dtype=dtype), rows.new_empty(B, K, dtype=dtype)
    slot_map = rows.new_empty((B, tokens.shape[1], K) if return_map else (0,), dtype=dtype)
    kernel("folded_slot_attention_fwd", dtype)(
        rows=plain(rows, dtype), offsets=plain(offsets, dtype), tokens=plain(tokens, dtype), slot_mask=mask(slot_mask),
        eps=eps, norm_eps=norm_eps, gathered=gathered, totals=totals, slot_map=slot_map if return_map else None,
    )  # fmt: skip
    return gathered, totals, slot_map


def folded_slot_attention_bwd(
    grads: tuple[Tensor, Tensor | None],
    inputs: tuple[Tensor, Tensor, Tensor],
    saved: tuple[Tensor, Tensor],
    dtokens: Tensor | None,
    add: bool,
    eps: float,
    norm_eps: float | None,
    slot_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """grads: of gathered and the map; inputs: rows, offsets, tokens; saved: gathered and totals -> drows, doffsets.

    dtokens, unless None, is written, or with ``add`` added to.
    """
    (dgathered, dslot_map), (rows, offsets, tokens), (gathered, totals) = grads, inputs, saved
    dtype = tokens.dtype
    drows, doffsets = rows.new_empty(rows.shape, dtype=dtype), rows.new_empty(offsets.shape, dtype=dtype)
    kernel("folded_slot_attention_bwd", dtype)(
        rows=plain(rows, dtype), offsets=plain(offsets, dtype), tokens=plain(tokens, dtype), slot_mask=mask(slot_mask),
        eps=eps, norm_eps=norm_eps, gathered=plain(gathered, dtype), totals=plain(totals, dtype),
        gathered_grad=plain(dgathered, dtype), slot_map_grad=None if dslot_map is None else plain(dslot_map, dtype),
        rows_grad=drows, offsets_grad=doffsets, tokens_grad=dtokens, add=add,
    )  # fmt: skip
    return drows, doffsets
