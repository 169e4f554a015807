# ruff: noqa: RUF005  (the Triton front end has no starred tuples)
"""One pre-norm decoder layer in one kernel: norm, folded attention, residual, norm, feed-forward, residual.

    z = x + A·U + b,  A = softmax_k(norm(x)·G + g)        y = z + W2 gelu(W1 n + b1) + b2,  n = norm(z)

x is read once and y written once; z, n and the hidden units live in registers, and the weights (0.3 MB in bf16 at
widths 180 and 360) stream through L2 in groups of ``BLOCK_C`` columns. The affine part of the second norm is merged
into W1 and b1, in fp32, by the launcher.

Backward saves x alone. The attention kernel writes z again; then, with u = W1 n + b1 and h = gelu(u)::

    dh = dy·W2   du = dh ∘ gelu'(u)   dz = dy + norm'(du·W1)     dW1 = Σ duᵀ n   db1 = Σ du   dW2 = Σ dyᵀ h   db2 = Σ dy

and dz, dw go through the backward of ``folded_cross_attention``. As there, rows (dz) and weights (dW1, dW2) are two
kernels, since their accumulators do not fit together; weights are fp32 partials of fixed ranges of rows, summed after.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastslots.records import FeedForward, FoldedProjections, LayerGrads

from . import launch
from ._pack import MergedLinear, Packed, fit_slots, merge_norm, pack_attention, pack_feed_forward, split_norm_grads
from ._tiles import (
    bias_rows,
    dot,
    gelu,
    gelu_grad,
    load_rows,
    load_tile,
    norm_rows,
    norm_rows_grad,
    store_column_sums,
    store_map,
    store_rows,
    zero_rows,
)
from .folded_cross_attention import attend, constexprs, folded_cross_attention_bwd, folded_cross_attention_fwd


@triton.jit
def _decoder_layer_fwd_kernel(
    x_ptr, w_in_ptr, b_in_ptr, w_out_ptr, bias_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, y_ptr, map_ptr, L, eps,
    D: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, COLUMNS: tl.constexpr, UNITS: tl.constexpr,
    SHARED_X: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = triton.cdiv(D, BLOCK_D) * BLOCK_D
    image = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0).to(tl.int64) * BLOCK_L
    mask_l = start + tl.arange(0, BLOCK_L) < L
    row = image * L + start
    x_row = start if SHARED_X else row
    x = load_rows(x_ptr + x_row * D, D, mask_l, D, BLOCK_L, BLOCK_D)
    normed, _ = norm_rows(x, eps, D, BLOCK_D, x_ptr.dtype.element_ty)
    z, slot_map = attend(
        normed, bias_rows(x, bias_ptr, D, BLOCK_D), w_in_ptr, b_in_ptr, w_out_ptr, image,
        D, KP, COLUMNS, PRECISION, BLOCK_L, BLOCK_C, BLOCK_D,
    )  # fmt: skip
    store_map(map_ptr + row * K, slot_map, mask_l, K, KP, BLOCK_L)
    normed, _ = norm_rows(z, eps, D, BLOCK_D, x_ptr.dtype.element_ty)
    y = bias_rows(z, b2_ptr, D, BLOCK_D)
    for unit in range(0, UNITS, BLOCK_F):
        u = tl.zeros([BLOCK_L, BLOCK_F], tl.float32)
        for c in tl.static_range(len(normed)):
            u = dot(normed[c], load_tile(w1_ptr + c * BLOCK_D * UNITS + unit, UNITS, BLOCK_D, BLOCK_F), u, PRECISION)
        hidden = gelu(u + tl.load(b1_ptr + unit + tl.arange(0, BLOCK_F))[None, :]).to(x_ptr.dtype.element_ty)
        out = ()
        for c in tl.static_range(len(normed)):
            w = load_tile(w2_ptr + unit * WIDTH + c * BLOCK_D, WIDTH, BLOCK_F, BLOCK_D)
            out = out + (dot(hidden, w, y[c], PRECISION),)
        y = out
    store_rows(y_ptr + row * D, D, y, mask_l, D, BLOCK_L, BLOCK_D)


@triton.jit
def _feed_forward_dx_kernel(
    z_ptr, dy_ptr, w1_ptr, b1_ptr, w2_ptr, dz_ptr, db2_ptr, rows, eps,
    D: tl.constexpr, UNITS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = triton.cdiv(D, BLOCK_D) * BLOCK_D
    start = tl.program_id(0).to(tl.int64) * BLOCK_L
    mask_l = start + tl.arange(0, BLOCK_L) < rows
    dy = load_rows(dy_ptr + start * D, D, mask_l, D, BLOCK_L, BLOCK_D)
    normed, rstd = norm_rows(
        load_rows(z_ptr + start * D, D, mask_l, D, BLOCK_L, BLOCK_D), eps, D, BLOCK_D, z_ptr.dtype.element_ty
    )
    dnormed = zero_rows(BLOCK_L, BLOCK_D, len(normed))
    for unit in range(0, UNITS, BLOCK_C):
        u = tl.zeros([BLOCK_L, BLOCK_C], tl.float32)
        dhidden = tl.zeros([BLOCK_L, BLOCK_C], tl.float32)
        w1 = ()
        for c in tl.static_range(len(normed)):
            w1 = w1 + (load_tile(w1_ptr + c * BLOCK_D * UNITS + unit, UNITS, BLOCK_D, BLOCK_C),)
            w2 = load_tile(w2_ptr + unit * WIDTH + c * BLOCK_D, WIDTH, BLOCK_C, BLOCK_D)
            u = dot(normed[c], w1[c], u, PRECISION)
            dhidden = dot(dy[c], tl.trans(w2), dhidden, PRECISION)
        u += tl.load(b1_ptr + unit + tl.arange(0, BLOCK_C))[None, :]
        du = (dhidden * gelu_grad(u)).to(z_ptr.dtype.element_ty)
        out = ()
        for c in tl.static_range(len(normed)):
            out = out + (dot(du, tl.trans(w1[c]), dnormed[c], PRECISION),)
        dnormed = out
    dnormed = norm_rows_grad(dnormed, normed, rstd, D)
    dz = ()
    for c in tl.static_range(len(normed)):
        dz = dz + (dnormed[c] + dy[c].to(tl.float32),)
    store_rows(dz_ptr + start * D, D, dz, mask_l, D, BLOCK_L, BLOCK_D)
    store_column_sums(db2_ptr + tl.program_id(0).to(tl.int64) * WIDTH, dy, BLOCK_D)


@triton.jit
def _feed_forward_dw_kernel(
    z_ptr, dy_ptr, w1_ptr, b1_ptr, w2_ptr, dw1_ptr, db1_ptr, dw2_ptr, rows, blocks, eps,
    D: tl.constexpr, UNITS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # Program (group of units, part): its columns of both gradients, [D, units] each, over ``blocks`` tiles of rows.
    WIDTH: tl.constexpr = triton.cdiv(D, BLOCK_D) * BLOCK_D
    CHUNKS: tl.constexpr = triton.cdiv(D, BLOCK_D)
    unit = tl.program_id(0) * BLOCK_C
    part = tl.program_id(1).to(tl.int64)
    b1 = tl.load(b1_ptr + unit + tl.arange(0, BLOCK_C))
    w1 = ()
    w2 = ()
    for c in tl.static_range(CHUNKS):
        w1 = w1 + (load_tile(w1_ptr + c * BLOCK_D * UNITS + unit, UNITS, BLOCK_D, BLOCK_C),)
        w2 = w2 + (load_tile(w2_ptr + unit * WIDTH + c * BLOCK_D, WIDTH, BLOCK_C, BLOCK_D),)
    dw1 = zero_rows(BLOCK_D, BLOCK_C, CHUNKS)
    dw2 = zero_rows(BLOCK_D, BLOCK_C, CHUNKS)
    db1 = tl.zeros([BLOCK_C], tl.float32)
    for block in range(blocks):
        start = (part * blocks + block) * BLOCK_L
        mask_l = start + tl.arange(0, BLOCK_L) < rows
        dy = load_rows(dy_ptr + start * D, D, mask_l, D, BLOCK_L, BLOCK_D)
        normed, _ = norm_rows(
            load_rows(z_ptr + start * D, D, mask_l, D, BLOCK_L, BLOCK_D), eps, D, BLOCK_D, z_ptr.dtype.element_ty
        )
        u = tl.zeros([BLOCK_L, BLOCK_C], tl.float32)
        dhidden = tl.zeros([BLOCK_L, BLOCK_C], tl.float32)
        for c in tl.static_range(CHUNKS):
            u = dot(normed[c], w1[c], u, PRECISION)
            dhidden = dot(dy[c], tl.trans(w2[c]), dhidden, PRECISION)
        u += b1[None, :]
        # Rows past the end have dy = 0: du = 0, and dy = 0 in the second product.
        du = dhidden * gelu_grad(u)
        db1 += tl.sum(du, 0)
        du = du.to(z_ptr.dtype.element_ty)
        hidden = gelu(u).to(z_ptr.dtype.element_ty)
        new1 = ()
        new2 = ()
        for c in tl.static_range(CHUNKS):
            new1 = new1 + (dot(tl.trans(normed[c]), du, dw1[c], PRECISION),)
            new2 = new2 + (dot(tl.trans(dy[c]), hidden, dw2[c], PRECISION),)
        dw1 = new1
        dw2 = new2
    tl.store(db1_ptr + part * UNITS + unit + tl.arange(0, BLOCK_C), db1)
    offs = tl.arange(0, BLOCK_D)[:, None] * UNITS + unit + tl.arange(0, BLOCK_C)[None, :]
    for c in tl.static_range(CHUNKS):
        offs_c = (part * WIDTH + c * BLOCK_D) * UNITS + offs
        tl.store(dw1_ptr + offs_c, dw1[c])
        tl.store(dw2_ptr + offs_c, dw2[c])


def decoder_layer_fwd(
    x: Tensor, folded: FoldedProjections, ff: FeedForward, slot_mask: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """x [B or 1,L,D], folded projections, feed-forward weights -> y [B,L,D] like x, slot_map [B,L,K] fp32."""
    x = x.contiguous()
    B, D, _, K = folded.G.shape
    L = x.shape[1]
    config = fit_slots(launch.select(_decoder_layer_fwd_kernel, x, D), K)
    attention = pack_attention(folded, slot_mask, x.dtype, config)
    units = pack_feed_forward(merge_norm(ff), ff.w2, x.dtype, config)
    y, slot_map = x.new_empty(B, L, D), x.new_empty(B, L, K, dtype=torch.float32)
    args = {
        "x_ptr": x, "w_in_ptr": attention.w_in, "b_in_ptr": attention.b_in, "w_out_ptr": attention.w_out,
        "bias_ptr": folded.b.float().contiguous(), "w1_ptr": units.w_in, "b1_ptr": units.b_in,
        "w2_ptr": units.w_out, "b2_ptr": ff.b2.float().contiguous(), "y_ptr": y, "map_ptr": slot_map, "L": L,
        "eps": eps,
    }  # fmt: skip
    values = constexprs(attention, K, config, x.dtype, D)
    values |= {"UNITS": units.columns, "BLOCK_F": units.block, "SHARED_X": x.shape[0] != B}
    launch.run(_decoder_layer_fwd_kernel, (triton.cdiv(L, config.block_l), B), args, values, config)
    return y, slot_map


class Needs(NamedTuple):
    """Which records of a layer need gradients, besides its input."""

    folded: bool = True
    ff: bool = True


EVERYTHING = Needs()


def decoder_layer_bwd(
    dy: Tensor,
    dslot_map: Tensor,
    x: Tensor,
    folded: FoldedProjections,
    ff: FeedForward,
    slot_mask: Tensor | None = None,
    eps: float = 1e-5,
    needs: Needs = EVERYTHING,
) -> LayerGrads:
    """-> gradients of x and of the weights, each like its tensor; the forward's attention runs again."""
    dy = dy.to(x.dtype).contiguous()
    z, _ = folded_cross_attention_fwd(x, folded, slot_mask, True, eps)
    first = merge_norm(ff)
    dz, db2 = _input_grad(dy, z, first, ff.w2, eps)
    dx, dfolded = folded_cross_attention_bwd(dz, dslot_map, x, folded, slot_mask, True, eps, needs.folded)
    if not needs.ff:
        return LayerGrads(dx, dfolded, None)
    dw, db1, dw2 = _weight_grads(dy, z, first, ff.w2, eps)
    dnorm_weight, dnorm_bias, dw1 = split_norm_grads(dw, db1, ff)
    grads = FeedForward(dnorm_weight, dnorm_bias, dw1, db1, dw2, db2)
    # Contiguous: they are cut out of padded sums, and compiled code reads them by the strides of the fake.
    like = (t.to(weight.dtype).contiguous() for t, weight in zip(grads, ff, strict=True))
    return LayerGrads(dx, dfolded, FeedForward(*like))


def _values(units: Packed, config: launch.LaunchConfig, dtype: torch.dtype, D: int) -> dict[str, object]:
    return {
        "D": D, "UNITS": units.columns, "PRECISION": launch.precision(dtype),
        "BLOCK_L": config.block_l, "BLOCK_C": units.block, "BLOCK_D": config.block_d,
    }  # fmt: skip


def _input_grad(dy: Tensor, z: Tensor, first: MergedLinear, w2: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """-> dz, and db2 [D] in fp32, whose sum over rows passes by here anyway."""
    D, rows = z.shape[2], z.shape[0] * z.shape[1]
    config = launch.select(_feed_forward_dx_kernel, z, D)
    units = pack_feed_forward(first, w2, z.dtype, config)
    dz, tiles = torch.empty_like(z), triton.cdiv(rows, config.block_l)
    db2 = z.new_empty(tiles, units.w_in.shape[1], dtype=torch.float32)
    args = {
        "z_ptr": z, "dy_ptr": dy, "w1_ptr": units.w_in, "b1_ptr": units.b_in, "w2_ptr": units.w_out, "dz_ptr": dz,
        "db2_ptr": db2, "rows": rows, "eps": eps,
    }  # fmt: skip
    launch.run(_feed_forward_dx_kernel, (tiles,), args, _values(units, config, z.dtype, D), config)
    return dz, db2.sum(0)[:D]


def _weight_grads(dy: Tensor, z: Tensor, first: MergedLinear, w2: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """-> dW of the merged first layer [F,D], db1 [F], dw2 [D,F], fp32."""
    D, rows, F = z.shape[2], z.shape[0] * z.shape[1], w2.shape[1]
    config = launch.select(_feed_forward_dw_kernel, z, D)
    units = pack_feed_forward(first, w2, z.dtype, config)
    parts, blocks = launch.split(rows, config.block_l, units.groups)
    dw1, dw2 = (z.new_empty(parts, units.w_in.shape[1], units.columns, dtype=torch.float32) for _ in range(2))
    db1 = z.new_empty(parts, units.columns, dtype=torch.float32)
    args = {
        "z_ptr": z, "dy_ptr": dy, "w1_ptr": units.w_in, "b1_ptr": units.b_in, "w2_ptr": units.w_out,
        "dw1_ptr": dw1, "db1_ptr": db1, "dw2_ptr": dw2, "rows": rows, "blocks": blocks, "eps": eps,
    }  # fmt: skip
    launch.run(_feed_forward_dw_kernel, (units.groups, parts), args, _values(units, config, z.dtype, D), config)
    return dw1.sum(0)[:D, :F].t(), db1.sum(0)[:F], dw2.sum(0)[:D, :F]
