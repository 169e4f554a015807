# ruff: noqa: RUF005  (the Triton front end has no starred tuples)
"""Cross-attention of pixels to few slots, with the weights summed over heads in the same pass.

    S = scale · q kᵀ      A = softmax_k S      out = A v      slot_map[l,k] = Σ_h A[h,l,k]      (arXiv 2411.07784, §4)

Backward, from dout and dw = ∂/∂slot_map, S and A recomputed::

    dA = dout vᵀ + dw      dS = A ∘ (dA − Σ_k A dA)      dq = scale · dS k      dk = scale · dSᵀ q      dv = Aᵀ dout

Saved: q, k, v. A program of the forward takes a tile of pixels through all heads, so the map is summed in registers and
written once; K of 5 to 64 fits one padded tile, so softmax needs no online pass. dk and dv are summed over pixels as
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

from . import launch
from ._pack import fit_slots, next_power, pad_rows, round_up
from ._tiles import (
    dot,
    load_map,
    load_rows,
    load_tile,
    slot_softmax,
    slot_softmax_grad,
    store_map,
    store_rows,
    with_bias,
    zero_rows,
)

MAX_TILE_ROWS = 1024
"""Above every BLOCK_L of the launch table."""


@triton.jit
def _scores(q, k_ptr, bias_ptr, scale, WIDTH: tl.constexpr, KP: tl.constexpr, PRECISION: tl.constexpr,
            BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """[BLOCK_L, KP], -inf for padded and masked slots."""
    scores = tl.zeros([BLOCK_L, KP], tl.float32)
    for c in tl.static_range(len(q)):
        k = load_tile(k_ptr + c * BLOCK_D, WIDTH, KP, BLOCK_D)
        scores = dot(q[c], tl.trans(k), scores, PRECISION)
    return with_bias(scores * scale, tl.load(bias_ptr + tl.arange(0, KP)))


@triton.jit
def _cross_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, out_ptr, map_ptr, stride_qb, stride_qh, stride_ql, L, heads, scale,
    D: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = triton.cdiv(D, BLOCK_D) * BLOCK_D
    image = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0).to(tl.int64) * BLOCK_L
    mask_l = start + tl.arange(0, BLOCK_L) < L
    slot_map = tl.zeros([BLOCK_L, KP], tl.float32)
    q_ptr += image * stride_qb + start * stride_ql
    for head in range(heads):
        slots = (image * heads + head) * (KP * WIDTH)
        q = load_rows(q_ptr, stride_ql, mask_l, D, BLOCK_L, BLOCK_D)
        q_ptr += stride_qh
        scores = _scores(q, k_ptr + slots, bias_ptr + image * KP, scale, WIDTH, KP, PRECISION, BLOCK_L, BLOCK_D)
        attn = tl.reshape(slot_softmax(scores, BLOCK_L, KP, KP), [BLOCK_L, KP])
        slot_map += attn
        out = ()
        for c in tl.static_range(len(q)):
            v = load_tile(v_ptr + slots + c * BLOCK_D, WIDTH, KP, BLOCK_D)
            out = out + (dot(attn.to(v.dtype), v, tl.zeros([BLOCK_L, BLOCK_D], tl.float32), PRECISION),)
        store_rows(out_ptr + ((image * heads + head) * L + start) * D, D, out, mask_l, D, BLOCK_L, BLOCK_D)
    store_map(map_ptr + (image * L + start) * K, slot_map, mask_l, K, KP, BLOCK_L)


@triton.jit
def _cross_attention_bwd_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, dout_ptr, dmap_ptr, dq_ptr, dk_ptr, dv_ptr,
    stride_qb, stride_qh, stride_ql, stride_ob, stride_oh, stride_ol, L, blocks, scale,
    D: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # Program (part, head, image): ``blocks`` tiles of pixels. dw is the same for all heads, so heads need not meet.
    # dk and dv are accumulated transposed, [d, K]: K of 8 or 16 suits the narrow side of a tensor-core product.
    WIDTH: tl.constexpr = triton.cdiv(D, BLOCK_D) * BLOCK_D
    CHUNKS: tl.constexpr = triton.cdiv(D, BLOCK_D)
    part = tl.program_id(0)
    image = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    of_head = image * tl.num_programs(1) + head
    k_ptr += of_head * (KP * WIDTH)
    v_ptr += of_head * (KP * WIDTH)
    dk = zero_rows(BLOCK_D, KP, CHUNKS)
    dv = zero_rows(BLOCK_D, KP, CHUNKS)
    for block in range(blocks):
        start = (part.to(tl.int64) * blocks + block) * BLOCK_L
        mask_l = start + tl.arange(0, BLOCK_L) < L
        q_rows = q_ptr + image * stride_qb + head * stride_qh + start * stride_ql
        q = load_rows(q_rows, stride_ql, mask_l, D, BLOCK_L, BLOCK_D)
        dout_rows = dout_ptr + image * stride_ob + head * stride_oh + start * stride_ol
        dout = load_rows(dout_rows, stride_ol, mask_l, D, BLOCK_L, BLOCK_D)
        dslot_map = load_map(dmap_ptr + (image * L + start) * K, mask_l, K, KP, BLOCK_L)
        scores = _scores(q, k_ptr, bias_ptr + image * KP, scale, WIDTH, KP, PRECISION, BLOCK_L, BLOCK_D)
        attn = slot_softmax(scores, BLOCK_L, KP, KP)
        dattn = tl.zeros([BLOCK_L, KP], tl.float32)
        for c in tl.static_range(CHUNKS):
            v = load_tile(v_ptr + c * BLOCK_D, WIDTH, KP, BLOCK_D)
            dattn = dot(dout[c], tl.trans(v), dattn, PRECISION)
        # Rows past L have dout = 0 and dslot_map = 0, hence dS = 0: they add nothing to dk and dv.
        dscores = slot_softmax_grad(attn, tl.reshape(dattn, [BLOCK_L, 1, KP]), dslot_map)
        dscores = (tl.reshape(dscores, [BLOCK_L, KP]) * scale).to(q[0].dtype)
        weights = tl.reshape(attn, [BLOCK_L, KP]).to(q[0].dtype)
        dq = ()
        new_dk = ()
        new_dv = ()
        for c in tl.static_range(CHUNKS):
            k = load_tile(k_ptr + c * BLOCK_D, WIDTH, KP, BLOCK_D)
            dq = dq + (dot(dscores, k, tl.zeros([BLOCK_L, BLOCK_D], tl.float32), PRECISION),)
            new_dk = new_dk + (dot(tl.trans(q[c]), dscores, dk[c], PRECISION),)
            new_dv = new_dv + (dot(tl.trans(dout[c]), weights, dv[c], PRECISION),)
        dk = new_dk
        dv = new_dv
        store_rows(dq_ptr + (of_head * L + start) * D, D, dq, mask_l, D, BLOCK_L, BLOCK_D)
    partial = of_head * tl.num_programs(0) + part
    offs = tl.arange(0, BLOCK_D)[:, None] * KP + tl.arange(0, KP)[None, :]
    for c in tl.static_range(CHUNKS):
        offs_c = (partial * WIDTH + c * BLOCK_D) * KP + offs
        tl.store(dk_ptr + offs_c, dk[c])
        tl.store(dv_ptr + offs_c, dv[c])


def _slot_bias(k: Tensor, slot_mask: Tensor | None, slots: int) -> Tensor:
    """[B, slots] fp32: 0 for a real slot, -inf for a padded or masked one."""
    bias = k.new_full((k.shape[0], slots), float("-inf"), dtype=torch.float32)
    bias[:, : k.shape[2]] = 0.0 if slot_mask is None else torch.where(slot_mask, 0.0, float("-inf"))
    return bias


def _unit_rows(t: Tensor) -> Tensor:
    """The tensor itself where rows are contiguous and a tile's offsets fit 32 bits, whatever the other strides; else a
    copy."""
    return t if t.stride(-1) == 1 and t.stride(-2) < 2**31 // MAX_TILE_ROWS else t.contiguous()


def _operands(
    q: Tensor, k: Tensor, v: Tensor, scale: float, slot_mask: Tensor | None, config: launch.LaunchConfig
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments and constexprs that forward and backward have in common."""
    d, K = q.shape[3], k.shape[2]
    slots, width = max(16, next_power(K)), round_up(d, config.block_d)
    args = {
        "q_ptr": q,
        "k_ptr": pad_rows(k, slots, width, k.dtype), "v_ptr": pad_rows(v, slots, width, v.dtype),
        "bias_ptr": _slot_bias(k, slot_mask, slots),
        "stride_qb": q.stride(0), "stride_qh": q.stride(1), "stride_ql": q.stride(2), "L": q.shape[2], "scale": scale,
    }  # fmt: skip
    values = {
        "D": d, "K": K, "KP": slots, "PRECISION": launch.precision(q.dtype),
        "BLOCK_L": config.block_l, "BLOCK_D": config.block_d,
    }  # fmt: skip
    return args, values


def cross_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, scale: float, slot_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """q [B,H,L,d] (rows contiguous or copied), k, v [B,H,K,d] -> out [B,H,L,d], slot_map [B,L,K] fp32."""
    B, H, L, d = q.shape
    q = _unit_rows(q)
    config = fit_slots(launch.select(_cross_attention_fwd_kernel, q, d), k.shape[2])
    args, values = _operands(q, k, v, scale, slot_mask, config)
    out, slot_map = q.new_empty(B, H, L, d), q.new_empty(B, L, k.shape[2], dtype=torch.float32)
    args |= {"out_ptr": out, "map_ptr": slot_map, "heads": H}
    launch.run(_cross_attention_fwd_kernel, (triton.cdiv(L, config.block_l), B), args, values, config)
    return out, slot_map


def cross_attention_bwd(
    dout: Tensor, dslot_map: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, slot_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dq, dk, dv, contiguous, in the dtypes of q, k, v."""
    B, H, L, d = q.shape
    K = k.shape[2]
    q, dout, dslot_map = _unit_rows(q), _unit_rows(dout.to(q.dtype)), dslot_map.float().contiguous()
    config = fit_slots(launch.select(_cross_attention_bwd_kernel, q, d), K)
    args, values = _operands(q, k, v, scale, slot_mask, config)
    parts, blocks = launch.split(L, config.block_l, B * H, target=2048)
    width, slots = args["k_ptr"].shape[3], values["KP"]
    dq = q.new_empty(B, H, L, d)
    dk, dv = (q.new_empty(B, H, parts, width, slots, dtype=torch.float32) for _ in range(2))
    args |= {
        "dout_ptr": dout, "dmap_ptr": dslot_map, "dq_ptr": dq, "dk_ptr": dk, "dv_ptr": dv, "blocks": blocks,
        "stride_ob": dout.stride(0), "stride_oh": dout.stride(1), "stride_ol": dout.stride(2),
    }  # fmt: skip
    launch.run(_cross_attention_bwd_kernel, (parts, H, B), args, values, config)
    dk, dv = (t.sum(2)[:, :, :d, :K].transpose(2, 3).to(k.dtype).contiguous() for t in (dk, dv))
    return dq, dk, dv
