# ruff: noqa: RUF005  (the Triton front end has no starred tuples)
"""One iteration of slot attention: slots compete for tokens, and each takes their weighted mean.

    A[l,:] = softmax_k(scale · k_l·q_k)    w = A + ε    n_k = Σ_l w[l,k]    u_k = Σ_l w[l,k] v_l / n_k

(Locatello et al. 2020, arXiv 2006.15055, algorithm 1.) Backward, from du and dw = ∂/∂slot_map, A recomputed::

    dA[l,k] = du_k·(v_l − u_k) / n_k + dw[l,k]      dS = A ∘ (dA − Σ_k A dA)
    dq_k = scale · Σ_l dS[l,k] k_l      dk_l = scale · Σ_k dS[l,k] q_k      dv_l = Σ_k w[l,k] du_k / n_k

Saved: the inputs, u and n in fp32. The softmax is over slots, so a token needs no other token: keys and values are
read once each way, and no weight is stored but the map where it is asked for. Tokens are cut into fixed parts; a
program takes one part of one head of one image, and a second kernel adds up the parts in order, so the same call gives
the same bits. Tokens take the long side of every product, the few slots the narrow one; products accumulate in fp32.

Weights and dS are multiplied by a power of two before they are rounded to 16 bits: shares of one token among thousands,
and an ε of 1e-8, are below what fp16 can hold.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from ._pack import next_power, stride_unit, unit_rows
from ._tiles import dot, dot_rows, load_map, load_rows, store_map, store_rows, zero_rows

MAX_SLOTS = 32
COMBINE_D = 16
COMBINE = launch.LaunchConfig(block_l=COMBINE_D, block_c=16, num_warps=4, num_stages=1)
"""Narrow chunks of columns: a program's loop over the parts is a chain of small loads, so many run side by side."""


@triton.jit
def _real_slots(mask_ptr, image, K: tl.constexpr, KP: tl.constexpr, MASKED: tl.constexpr):
    """[KP] bool: neither padding nor masked out."""
    offs_k = tl.arange(0, KP)
    real = offs_k < K
    if MASKED:
        real = real & (tl.load(mask_ptr + image * K + offs_k, mask=real, other=0) != 0)
    return real


@triton.jit
def _attention(keys, queries, real, scale, PRECISION: tl.constexpr, BLOCK_L: tl.constexpr, KP: tl.constexpr):
    """A [BLOCK_L, KP]: softmax over the real slots; zeros where an image has none."""
    scores = dot_rows(keys, queries, PRECISION, BLOCK_L, KP) * scale
    scores = tl.where(real[None, :], scores, float("-inf"))
    top = tl.max(scores, 1)
    top = tl.where(top == float("-inf"), 0.0, top)
    weights = tl.exp(scores - top[:, None])
    # The largest weight is exactly 1, so a sum below 1 is that of no slots, 0. A sum of NaN stays one.
    total = tl.maximum(tl.sum(weights, 1), 1.0, propagate_nan=tl.PropagateNan.ALL)
    return weights / total[:, None]


@triton.jit
def _slot_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, part_sum_ptr, part_total_ptr, map_ptr,
    stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl, L, heads, blocks, scale, eps, spread,
    D: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, MASKED: tl.constexpr, MAP: tl.constexpr, SAME: tl.constexpr,
    UNIT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # Program (part, heads, image): ``blocks`` tiles of tokens of each of ``heads`` heads, one of both being 1, so that
    # a map summed over heads is that of one tile. -> Σ w · v, transposed [d, slots], and Σ w.
    CHUNKS: tl.constexpr = triton.cdiv(D, BLOCK_D)
    part = tl.program_id(0).to(tl.int64)
    image = tl.program_id(2).to(tl.int64)
    offs_k = tl.arange(0, KP)
    real = _real_slots(mask_ptr, image, K, KP, MASKED)
    slot_map = tl.zeros([BLOCK_L, KP], tl.float32)
    for h in range(heads):
        head = tl.program_id(1).to(tl.int64) * heads + h
        of_head = image * (tl.num_programs(1) * heads) + head
        total = tl.zeros([KP], tl.float32)
        sums = zero_rows(BLOCK_D, KP, CHUNKS)
        for block in range(blocks):
            start = (part * blocks + block) * BLOCK_L
            mask_l = start + tl.arange(0, BLOCK_L) < L
            k_rows = k_ptr + (image * stride_kb + head * stride_kh + start * stride_kl) * UNIT
            keys = load_rows(k_rows, stride_kl * UNIT, mask_l, D, BLOCK_L, BLOCK_D)
            values = keys
            if not SAME:
                v_rows = v_ptr + (image * stride_vb + head * stride_vh + start * stride_vl) * UNIT
                values = load_rows(v_rows, stride_vl * UNIT, mask_l, D, BLOCK_L, BLOCK_D)
            queries = load_rows(q_ptr + of_head * K * D, D, offs_k < K, D, KP, BLOCK_D)
            attn = _attention(keys, queries, real, scale, PRECISION, BLOCK_L, KP)
            if MAP:
                slot_map = tl.where(h == 0, attn, slot_map + attn)
                if h == heads - 1:
                    store_map(map_ptr + (image * L + start) * K, slot_map, mask_l, K, KP, BLOCK_L)
            weights = (attn + tl.where(real, eps, 0.0)[None, :]) * spread
            weights = tl.where(mask_l[:, None], weights, 0.0).to(k_ptr.dtype.element_ty)
            total += tl.sum(weights.to(tl.float32), 0)  # of what is multiplied: the mean stays one of the values
            new_sums = ()
            for c in tl.static_range(CHUNKS):
                new_sums = new_sums + (dot(tl.trans(values[c]), weights, sums[c], PRECISION),)
            sums = new_sums
        partial = of_head * tl.num_programs(0) + part
        tl.store(part_total_ptr + partial * KP + offs_k, total)
        for c in tl.static_range(CHUNKS):
            _store_part(part_sum_ptr + partial * D * KP, sums[c], c * BLOCK_D, D, KP, BLOCK_D)


@triton.jit
def _store_part(ptr, sums, column, D: tl.constexpr, KP: tl.constexpr, BLOCK_D: tl.constexpr):
    """A chunk [BLOCK_D, KP] into a dense [D, KP]."""
    offs_d = column + tl.arange(0, BLOCK_D)
    offs = offs_d[:, None] * KP + tl.arange(0, KP)[None, :]
    tl.store(ptr + offs, sums, mask=(offs_d < D)[:, None])


@triton.jit
def _slot_attention_combine_kernel(
    part_sum_ptr, part_total_ptr, updates_ptr, totals_ptr, parts, spread,
    D: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # Program (chunk of columns, head, image): all parts, in order; their loads run ahead of the chain of sums.
    column = tl.program_id(0) * BLOCK_D
    of_head = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    offs_k = tl.arange(0, KP)
    offs_d = column + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    total = tl.zeros([KP], tl.float32)
    sums = tl.zeros([BLOCK_D, KP], tl.float32)
    for part in tl.range(0, parts, num_stages=4):
        partial = of_head * parts + part
        total += tl.load(part_total_ptr + partial * KP + offs_k)
        offs = offs_d[:, None] * KP + offs_k[None, :]
        sums += tl.load(part_sum_ptr + partial * D * KP + offs, mask=mask_d[:, None], other=0.0)
    updates = sums / tl.where(total == 0.0, 1.0, total)[None, :]  # 0 for a slot without weight
    offs = offs_k[None, :] * D + offs_d[:, None]
    tl.store(updates_ptr + of_head * K * D + offs, updates, mask=(offs_k < K)[None, :] & mask_d[:, None])
    if column == 0:
        tl.store(totals_ptr + of_head * K + offs_k, total / spread, mask=offs_k < K)


@triton.jit
def _slot_attention_bwd_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, du_ptr, updates_ptr, totals_ptr, dmap_ptr, dk_ptr, dv_ptr, dq_ptr,
    stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl, L, blocks, scale, eps, spread,
    D: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, MASKED: tl.constexpr, MAP: tl.constexpr, SAME: tl.constexpr,
    UNIT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # Program (part, head, image): dk and dv of its tokens, and their share of dq / scale · spread, transposed.
    CHUNKS: tl.constexpr = triton.cdiv(D, BLOCK_D)
    DTYPE: tl.constexpr = k_ptr.dtype.element_ty
    part = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    image = tl.program_id(2).to(tl.int64)
    of_head = image * tl.num_programs(1) + head
    offs_k = tl.arange(0, KP)
    mask_k = offs_k < K
    real = _real_slots(mask_ptr, image, K, KP, MASKED)
    of_slots = of_head * K * D
    # Of each slot: what its share of the gradient is multiplied by, and the constant that its mean takes off.
    totals = tl.load(totals_ptr + of_head * K + offs_k, mask=mask_k, other=0.0)
    factor = tl.where(totals == 0.0, 0.0, spread / tl.where(totals == 0.0, 1.0, totals))
    du = load_rows(du_ptr + of_slots, D, mask_k, D, KP, BLOCK_D)
    updates = load_rows(updates_ptr + of_slots, D, mask_k, D, KP, BLOCK_D)
    mean = tl.zeros([KP], tl.float32)
    for c in tl.static_range(CHUNKS):
        mean += tl.sum(du[c].to(tl.float32) * updates[c], 1)
    dq = zero_rows(BLOCK_D, KP, CHUNKS)
    for block in range(blocks):
        start = (part * blocks + block) * BLOCK_L
        mask_l = start + tl.arange(0, BLOCK_L) < L
        k_rows = k_ptr + (image * stride_kb + head * stride_kh + start * stride_kl) * UNIT
        keys = load_rows(k_rows, stride_kl * UNIT, mask_l, D, BLOCK_L, BLOCK_D)
        values = keys
        if not SAME:
            v_rows = v_ptr + (image * stride_vb + head * stride_vh + start * stride_vl) * UNIT
            values = load_rows(v_rows, stride_vl * UNIT, mask_l, D, BLOCK_L, BLOCK_D)
        queries = load_rows(q_ptr + of_slots, D, mask_k, D, KP, BLOCK_D)
        du = load_rows(du_ptr + of_slots, D, mask_k, D, KP, BLOCK_D)
        attn = _attention(keys, queries, real, scale, PRECISION, BLOCK_L, KP)
        dattn = (dot_rows(values, du, PRECISION, BLOCK_L, KP) - mean[None, :]) * factor[None, :]
        if MAP:
            dattn += load_map(dmap_ptr + (image * L + start) * K, mask_l, K, KP, BLOCK_L) * spread
        dattn = tl.where(real[None, :], dattn, 0.0)  # weights of 0 may meet what is no number
        dscores = (attn * (dattn - tl.sum(attn * dattn, 1)[:, None])).to(DTYPE)
        weights = ((attn + eps) * factor[None, :]).to(DTYPE)  # 0 for slots that are not real: their total is 0
        dk = ()
        dv = ()
        new_dq = ()
        for c in tl.static_range(CHUNKS):
            none = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
            dk = dk + (dot(dscores, queries[c], none, PRECISION) * (scale / spread),)
            dv = dv + (dot(weights, du[c], none, PRECISION) * (1.0 / spread),)
            new_dq = new_dq + (dot(tl.trans(keys[c]), dscores, dq[c], PRECISION),)  # tokens past L are zeros
        dq = new_dq
        rows = (of_head * L + start) * D
        store_rows(dk_ptr + rows, D, dk, mask_l, D, BLOCK_L, BLOCK_D)
        store_rows(dv_ptr + rows, D, dv, mask_l, D, BLOCK_L, BLOCK_D)
    partial = of_head * tl.num_programs(0) + part
    for c in tl.static_range(CHUNKS):
        _store_part(dq_ptr + partial * D * KP, dq[c], c * BLOCK_D, D, KP, BLOCK_D)


def _operands(
    inputs: tuple[Tensor, Tensor, Tensor], scale: float, slot_mask: Tensor | None, config: launch.LaunchConfig
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments and constexprs that forward and backward have in common."""
    q, k, v = inputs[0].contiguous(), unit_rows(inputs[1]), unit_rows(inputs[2])
    unit = stride_unit(k, v)
    args: dict[str, Any] = {
        "q_ptr": q, "k_ptr": k, "v_ptr": v,
        "mask_ptr": q if slot_mask is None else slot_mask.contiguous().view(torch.uint8),
        "L": k.shape[2], "scale": scale,
    }  # fmt: skip
    for name, t in (("k", k), ("v", v)):
        args |= {f"stride_{name}{axis}": t.stride(i) // unit for i, axis in enumerate("bhl")}
    values = {
        "D": q.shape[3], "K": q.shape[2], "KP": padded_slots(q.shape[2]), "MASKED": slot_mask is not None,
        "SAME": _same_place(k, v), "UNIT": unit, "PRECISION": launch.precision(q.dtype),
        "BLOCK_L": config.block_l, "BLOCK_D": config.block_d,
    }  # fmt: skip
    return args, values


def padded_slots(K: int) -> int:
    return max(16, next_power(K))


def _same_place(k: Tensor, v: Tensor) -> bool:
    """Whether keys and values are one tensor, as in the folded form: it is read once."""
    return k is v or (not k.is_meta and k.data_ptr() == v.data_ptr() and k.stride() == v.stride())


def slot_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, scale: float, eps: float, slot_mask: Tensor | None, return_map: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """q [B,H,K,d], k, v [B,H,L,d] (rows contiguous or copied) -> updates [B,H,K,d], totals [B,H,K] and slot_map [B,L,K]
    (or [0]), all in fp32. Without tokens updates and totals are 0."""
    B, H, K, d = q.shape
    L = k.shape[2]
    updates, totals = (q.new_empty(*shape, dtype=torch.float32) for shape in ((B, H, K, d), (B, H, K)))
    slot_map = q.new_empty((B, L, K) if return_map else (0,), dtype=torch.float32)
    if L == 0:
        return updates.zero_(), totals.zero_(), slot_map
    config = launch.select(_slot_attention_fwd_kernel, k, d)
    args, values = _operands((q, k, v), scale, slot_mask, config)
    several = return_map and H > 1
    parts, blocks = (triton.cdiv(L, config.block_l), 1) if several else launch.split(L, config.block_l, B * H)
    spread = 2.0 ** (14 - math.ceil(math.log2(1 + eps)))  # fp16 ends at 2¹⁶
    partial = {
        "part_sum_ptr": q.new_empty(B, H, parts, d, values["KP"], dtype=torch.float32),
        "part_total_ptr": q.new_empty(B, H, parts, values["KP"], dtype=torch.float32),
        "spread": spread,
    }
    args |= partial | {"map_ptr": slot_map, "heads": H if several else 1, "blocks": blocks, "eps": eps}
    grid = (parts, 1 if several else H, B)
    launch.run(_slot_attention_fwd_kernel, grid, args, values | {"MAP": return_map}, config)
    args = partial | {"updates_ptr": updates, "totals_ptr": totals, "parts": parts}
    values = {"D": d, "K": K, "KP": values["KP"], "BLOCK_D": COMBINE_D}
    launch.run(_slot_attention_combine_kernel, (triton.cdiv(d, COMBINE_D), H, B), args, values, COMBINE)
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
    """inputs: q, k, v; saved: updates and totals -> dq, dk, dv, contiguous, in the dtypes of q, k, v."""
    q, k, v = inputs
    B, H, K, d = q.shape
    L = k.shape[2]
    config = launch.select(_slot_attention_bwd_kernel, k, d)
    args, values = _operands(inputs, scale, slot_mask, config)
    parts, blocks = launch.split(L, config.block_l, B * H)
    dk, dv = (t.new_empty(t.shape) for t in (k, v))
    dq = q.new_empty(B, H, parts, d, values["KP"], dtype=torch.float32)
    # About the tokens of a slot, as large as its total: what is multiplied by it is about as large as dupdates.
    spread = float(min(next_power(L // K), 1024))
    args |= {
        "du_ptr": dupdates.to(k.dtype).contiguous(), "updates_ptr": saved[0].float().contiguous(),
        "totals_ptr": saved[1].contiguous(),
        "dmap_ptr": saved[1] if dslot_map is None else dslot_map.float().contiguous(),
        "dk_ptr": dk, "dv_ptr": dv, "dq_ptr": dq, "blocks": blocks, "eps": eps, "spread": spread,
    }  # fmt: skip
    launch.run(_slot_attention_bwd_kernel, (parts, H, B), args, values | {"MAP": dslot_map is not None}, config)
    dq = (dq.sum(2)[..., :K] * (scale / spread)).transpose(2, 3).to(q.dtype).contiguous()
    return dq, dk, dv
