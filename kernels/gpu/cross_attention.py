# ruff: noqa: RUF005  (the Triton front end has no starred tuples)
"""Cross-attention of pixels to few slots, with the weights summed over heads, and statistics of rows, in the same pass.

    S = scale · q kᵀ    A = softmax_k S    out = A v    slot_map[l,k] = Σ_h c_h A[h,l,k]    (arXiv 2411.07784, §4)
    lse = log Σ_k exp S      entropy = −Σ_k A log A = lse − Σ_k A S

Backward, from dout, dw = ∂/∂slot_map, and those of the statistics, S and A recomputed::

    dA = dout vᵀ + c_h dw − dentropy S      dS = A ∘ (dA − Σ_k A dA + dlse)
    dq = scale · dS k      dk = scale · dSᵀ q      dv = Aᵀ dout      dc_h = Σ_l,k dw A

Saved: q, k, v. A program of the forward takes a tile of pixels through all heads, so the map is summed in registers and
written once; K of up to 128 fits one padded tile, so softmax needs no online pass. dk and dv are summed over pixels as
fp32 partials of fixed ranges, then over those: the same call gives the same bits. Products accumulate in fp32.

Loads of q are as wide as its rows are aligned: 16 bytes where strides and d are multiples of 16 bytes, single elements
at d = 43. k and v are packed to whole tiles first (K rows an image).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastslots.records import Statistics, StatisticsInputs

from . import launch
from ._pack import fit_slots, next_power, pad_rows, round_up, stride_unit, unit_rows
from ._tiles import dot, load_map, load_rows, load_tile, store_map, store_rows, with_bias, zero_rows

MAX_SLOTS = 128
MAX_WIDTH_OF_MANY = 192
"""Widest rows of more than ``launch.MANY_SLOTS``."""
WIDE_SUMS = 64 * 128
"""Elements, slots x width, above which dk and dv are sums of two launches: together they do not fit the registers."""


@triton.jit
def _softmax(
    q, k_ptr, bias_ptr, scale, WIDTH: tl.constexpr, KP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A and S − top [BLOCK_L, KP], both 0 for padded and masked slots; top, and log Σ exp(S − top), of each row."""
    scores = tl.zeros([BLOCK_L, KP], tl.float32)
    for c in tl.static_range(len(q)):
        k = load_tile(k_ptr + c * BLOCK_D, WIDTH, KP, BLOCK_D)
        scores = dot(q[c], tl.trans(k), scores, PRECISION)
    scores = with_bias(scores * scale, tl.load(bias_ptr + tl.arange(0, KP)))
    top = tl.max(scores, 1)
    top = tl.where(top == float("-inf"), 0.0, top)
    below = scores - top[:, None]
    weights = tl.exp(below)
    # The largest weight is exactly 1, so a sum below 1 is that of a row without slots, 0. A sum of NaN stays one.
    total = tl.maximum(tl.sum(weights, 1), 1.0, propagate_nan=tl.PropagateNan.ALL)
    return weights / total[:, None], tl.where(below == float("-inf"), 0.0, below), top, tl.log(total)


@triton.jit
def _cross_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, weights_ptr, out_ptr, map_ptr, entropy_ptr, lse_ptr,
    stride_qb, stride_qh, stride_ql, L, heads, scale,
    D: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, WEIGHTED: tl.constexpr, ROWS: tl.constexpr,
    UNIT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = triton.cdiv(D, BLOCK_D) * BLOCK_D
    image = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0).to(tl.int64) * BLOCK_L
    offs_l = tl.arange(0, BLOCK_L)
    mask_l = start + offs_l < L
    slot_map = tl.zeros([BLOCK_L, KP], tl.float32)
    q_ptr += (image * stride_qb + start * stride_ql) * UNIT
    for head in range(heads):
        of_head = image * heads + head
        slots = of_head * (KP * WIDTH)
        rows = of_head * L + start
        q_rows = q_ptr + (of_head - image * heads) * stride_qh * UNIT
        q = load_rows(q_rows, stride_ql * UNIT, mask_l, D, BLOCK_L, BLOCK_D)
        attn, below, top, log_total = _softmax(
            q, k_ptr + slots, bias_ptr + image * KP, scale, WIDTH, KP, PRECISION, BLOCK_L, BLOCK_D
        )
        slot_map += attn * tl.load(weights_ptr + head) if WEIGHTED else attn
        if ROWS:
            tl.store(entropy_ptr + rows + offs_l, log_total - tl.sum(attn * below, 1), mask=mask_l)
            tl.store(lse_ptr + rows + offs_l, top + log_total, mask=mask_l)  # 0 without slots, as both are
        out = ()
        for c in tl.static_range(len(q)):
            v = load_tile(v_ptr + slots + c * BLOCK_D, WIDTH, KP, BLOCK_D)
            out = out + (dot(attn.to(v.dtype), v, tl.zeros([BLOCK_L, BLOCK_D], tl.float32), PRECISION),)
        store_rows(out_ptr + rows * D, D, out, mask_l, D, BLOCK_L, BLOCK_D)
    store_map(map_ptr + (image * L + start) * K, slot_map, mask_l, K, KP, BLOCK_L)


@triton.jit
def _cross_attention_bwd_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, weights_ptr, dout_ptr, dmap_ptr, dentropy_ptr, dlse_ptr,
    dq_ptr, dk_ptr, dv_ptr, dweights_ptr,
    stride_qb, stride_qh, stride_ql, stride_ob, stride_oh, stride_ol, L, blocks, scale,
    D: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, WEIGHTED: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, VALUES: tl.constexpr, DWEIGHTS: tl.constexpr,
    UNIT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # Program (part, head, image): ``blocks`` tiles of pixels. dw is the same for all heads, so heads need not meet.
    # KEYS: dq, dk and those of the head's weight. VALUES: dv. dk and dv are accumulated transposed, [d, K]: K of 8 or
    # 16 suits the narrow side of a tensor-core product.
    WIDTH: tl.constexpr = triton.cdiv(D, BLOCK_D) * BLOCK_D
    CHUNKS: tl.constexpr = triton.cdiv(D, BLOCK_D)
    part = tl.program_id(0)
    image = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    of_head = image * tl.num_programs(1) + head
    partial = of_head * tl.num_programs(0) + part
    k_ptr += of_head * (KP * WIDTH)
    v_ptr += of_head * (KP * WIDTH)
    dk = zero_rows(BLOCK_D, KP, CHUNKS)
    dv = zero_rows(BLOCK_D, KP, CHUNKS)
    dweight = tl.zeros([BLOCK_L], tl.float32)
    weight = tl.load(weights_ptr + head) if WEIGHTED else 1.0
    offs_l = tl.arange(0, BLOCK_L)
    for block in range(blocks):
        start = (part.to(tl.int64) * blocks + block) * BLOCK_L
        mask_l = start + offs_l < L
        rows = of_head * L + start
        q_rows = q_ptr + (image * stride_qb + head * stride_qh + start * stride_ql) * UNIT
        q = load_rows(q_rows, stride_ql * UNIT, mask_l, D, BLOCK_L, BLOCK_D)
        dout_rows = dout_ptr + (image * stride_ob + head * stride_oh + start * stride_ol) * UNIT
        dout = load_rows(dout_rows, stride_ol * UNIT, mask_l, D, BLOCK_L, BLOCK_D)
        attn, below, _, _ = _softmax(q, k_ptr, bias_ptr + image * KP, scale, WIDTH, KP, PRECISION, BLOCK_L, BLOCK_D)
        # Rows past L have cotangents of 0, hence dS = 0: they add nothing to dk and dv.
        if VALUES:
            new_dv = ()
            for c in tl.static_range(CHUNKS):
                new_dv = new_dv + (dot(tl.trans(dout[c]), attn.to(q[0].dtype), dv[c], PRECISION),)
            dv = new_dv
        if KEYS:
            dslot_map = load_map(dmap_ptr + (image * L + start) * K, mask_l, K, KP, BLOCK_L)
            if DWEIGHTS:
                dweight += tl.sum(attn * dslot_map, 1)
            dattn = dslot_map * weight
            for c in tl.static_range(CHUNKS):
                v = load_tile(v_ptr + c * BLOCK_D, WIDTH, KP, BLOCK_D)
                dattn = dot(dout[c], tl.trans(v), dattn, PRECISION)
            if ROWS:
                dattn -= below * tl.load(dentropy_ptr + rows + offs_l, mask=mask_l, other=0.0)[:, None]
            mean = tl.sum(attn * dattn, 1)
            if ROWS:
                mean -= tl.load(dlse_ptr + rows + offs_l, mask=mask_l, other=0.0)
            dscores = (attn * (dattn - mean[:, None]) * scale).to(q[0].dtype)
            dq = ()
            new_dk = ()
            for c in tl.static_range(CHUNKS):
                k = load_tile(k_ptr + c * BLOCK_D, WIDTH, KP, BLOCK_D)
                dq = dq + (dot(dscores, k, tl.zeros([BLOCK_L, BLOCK_D], tl.float32), PRECISION),)
                new_dk = new_dk + (dot(tl.trans(q[c]), dscores, dk[c], PRECISION),)
            dk = new_dk
            store_rows(dq_ptr + rows * D, D, dq, mask_l, D, BLOCK_L, BLOCK_D)
    offs = tl.arange(0, BLOCK_D)[:, None] * KP + tl.arange(0, KP)[None, :]
    for c in tl.static_range(CHUNKS):
        offs_c = (partial * WIDTH + c * BLOCK_D) * KP + offs
        if KEYS:
            tl.store(dk_ptr + offs_c, dk[c])
        if VALUES:
            tl.store(dv_ptr + offs_c, dv[c])
    if DWEIGHTS:
        tl.store(dweights_ptr + partial, tl.sum(dweight, 0))


def _slot_bias(k: Tensor, slot_mask: Tensor | None, slots: int) -> Tensor:
    """[B, slots] fp32: 0 for a real slot, -inf for a padded or masked one."""
    bias = k.new_full((k.shape[0], slots), float("-inf"), dtype=torch.float32)
    bias[:, : k.shape[2]] = 0.0 if slot_mask is None else torch.where(slot_mask, 0.0, float("-inf"))
    return bias


def _config(kernel: Any, q: Tensor, slots: int) -> launch.LaunchConfig:
    config = launch.select(kernel, q, q.shape[3], slots)
    return config if slots > launch.MANY_SLOTS else fit_slots(config, slots)


def _operands(
    inputs: StatisticsInputs, config: launch.LaunchConfig, *rows: Tensor
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments and constexprs that forward and backward have in common; rows: whose strides they take."""
    q, k, v, slot_mask, weights, scale, _ = inputs
    d, K = q.shape[3], k.shape[2]
    slots, width = max(16, next_power(K)), round_up(d, config.block_d)
    unit = stride_unit(*rows)
    args = {
        "q_ptr": q,
        "k_ptr": pad_rows(k, slots, width, k.dtype), "v_ptr": pad_rows(v, slots, width, v.dtype),
        "bias_ptr": _slot_bias(k, slot_mask, slots),
        "weights_ptr": q if weights is None else weights.float().contiguous(),
        "L": q.shape[2], "scale": scale,
    }  # fmt: skip
    for name, t in zip("qo", rows, strict=False):
        args |= {f"stride_{name}{axis}": t.stride(i) // unit for i, axis in enumerate("bhl")}
    values = {
        "D": d, "K": K, "KP": slots, "WEIGHTED": weights is not None, "ROWS": inputs.rows, "UNIT": unit,
        "PRECISION": launch.precision(q.dtype), "BLOCK_L": config.block_l, "BLOCK_D": config.block_d,
    }  # fmt: skip
    return args, values


def attention_statistics_fwd(inputs: StatisticsInputs) -> Statistics:
    """q [B,H,L,d] (rows contiguous or copied), k, v [B,H,K,d] -> out [B,H,L,d] in the dtype of q; in fp32 slot_map
    [B,L,K], and entropy and lse [B,H,L] ([0] where they are not wanted)."""
    q = unit_rows(inputs.q)
    (B, H, L, _), K = q.shape, inputs.k.shape[2]
    config = _config(_cross_attention_fwd_kernel, q, K)
    args, values = _operands(inputs._replace(q=q), config, q)
    out, slot_map = q.new_empty(q.shape), q.new_empty(B, L, K, dtype=torch.float32)
    entropy, lse = (q.new_empty((B, H, L) if inputs.rows else (0,), dtype=torch.float32) for _ in range(2))
    args |= {"out_ptr": out, "map_ptr": slot_map, "entropy_ptr": entropy, "lse_ptr": lse, "heads": H}
    launch.run(_cross_attention_fwd_kernel, (triton.cdiv(L, config.block_l), B), args, values, config)
    return Statistics(out, slot_map, entropy, lse)


def attention_statistics_bwd(
    grads: Statistics, inputs: StatisticsInputs, need_head_weights: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> dq, dk, dv, contiguous, in the dtypes of q, k, v, and that of the heads' weights in fp32 ([0] where it is not
    needed)."""
    q, dout = unit_rows(inputs.q), unit_rows(grads.out.to(inputs.q.dtype))
    (B, H, L, d), K = q.shape, inputs.k.shape[2]
    config = _config(_cross_attention_bwd_kernel, q, K)
    args, values = _operands(inputs._replace(q=q), config, q, dout)
    width, slots = args["k_ptr"].shape[3], values["KP"]
    # Many programs, but not so many that their sums of dk and dv are more than what they read.
    programs = max(512, min(2048, 2048 * 1024 // (width * slots)))
    parts, blocks = launch.split(L, config.block_l, B * H, target=programs)
    dq = q.new_empty(q.shape)
    dk, dv = (q.new_empty(B, H, parts, width, slots, dtype=torch.float32) for _ in range(2))
    dweights = q.new_empty((B, H, parts) if need_head_weights else (0,), dtype=torch.float32)
    args |= {
        "dout_ptr": dout, "dmap_ptr": grads.slot_map.float().contiguous(),
        "dentropy_ptr": grads.entropy.contiguous(), "dlse_ptr": grads.lse.contiguous(),
        "dq_ptr": dq, "dk_ptr": dk, "dv_ptr": dv, "dweights_ptr": dweights, "blocks": blocks,
    }  # fmt: skip
    for keys, of_values in ((True, False), (False, True)) if slots * width > WIDE_SUMS else ((True, True),):
        variant = {"KEYS": keys, "VALUES": of_values, "DWEIGHTS": keys and need_head_weights}
        launch.run(_cross_attention_bwd_kernel, (parts, H, B), args, values | variant, config)
    dk, dv = (t.sum(2)[:, :, :d, :K].transpose(2, 3).to(q.dtype).contiguous() for t in (dk, dv))
    return dq, dk, dv, dweights.sum((0, 2)) if need_head_weights else dweights


def cross_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, scale: float, slot_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """q [B,H,L,d] (rows contiguous or copied), k, v [B,H,K,d] -> out [B,H,L,d], slot_map [B,L,K] fp32."""
    result = attention_statistics_fwd(StatisticsInputs(q, k, v, slot_mask, None, scale, rows=False))
    return result.out, result.slot_map


def cross_attention_bwd(
    dout: Tensor, dslot_map: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, slot_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dq, dk, dv, contiguous, in the dtypes of q, k, v."""
    grads = Statistics(dout, dslot_map, entropy=dslot_map, lse=dslot_map)  # nobody reads the last two
    dq, dk, dv, _ = attention_statistics_bwd(
        grads, StatisticsInputs(q, k, v, slot_mask, None, scale, rows=False), False
    )
    return dq, dk, dv
