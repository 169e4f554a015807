# ruff: noqa: RUF005  (the Triton front end has no starred tuples)
"""One pre-norm decoder layer in one kernel: norm, folded attention, residual, norm, feed-forward, residual.

    z = x + A·U + b,  A = softmax_k(norm(x)·G + g)        y = z + W2 gelu(W1 n + b1) + b2,  n = norm(z)

x is read once and y written once; z, n and the hidden units live in registers, and the weights (0.3 MB in bf16 at
widths 180 and 360) stream through L2 in groups of ``BLOCK_C`` columns. The affine part of the second norm is merged
into W1 and b1, in fp32, by the launcher.

The layer's backward saves x alone, and the attention kernel makes n again. Then, with u = W1 n + b1 and h = gelu(u)::

    dh = dy·W2   du = dh ∘ gelu'(u)   dz = dy + norm'(du·W1)     dW1 = Σ duᵀ n   db1 = Σ du   dW2 = Σ dyᵀ h   db2 = Σ dy

and dz, dw go through the backward of ``folded_cross_attention``. One kernel makes u again, dz, and leaves h and du in
the compute dtype for two products of cuBLAS; one that made u, du and h again for dW1 and dW2 took longer than the bytes
do (docs/kernels.md). Inside a tile of the decoder's loss the forward keeps n, 1/σ, h and gelu'(u)
(``loss.feed_forward``). Rows that only kernels and cuBLAS see are padded to whole 16 bytes, without which cuBLAS falls
back to kernels of an older kind.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastslots.records import FeedForward, FoldedProjections, LayerGrads

from . import launch
from ._pack import LayerPacks, constexprs, fit_slots, pitch
from ._tiles import (
    add_rows,
    attend,
    bias_rows,
    dot,
    gelu,
    gelu_and_grad,
    load_rows,
    load_tile,
    norm_rows,
    norm_rows_grad,
    store_map,
    store_one,
    store_rows,
    store_rows_and_one,
    zero_rows,
)
from .folded_cross_attention import attention_backward, attention_forward
from .loss.feed_forward import Kept, feed_forward_backward, weight_grads


@triton.jit
def _decoder_layer_fwd_kernel(
    x_ptr, w_in_ptr, b_in_ptr, w_out_ptr, bias_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, y_ptr, map_ptr, n_ptr, rstd_ptr,
    slope_ptr, h_ptr, L, eps,
    D: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, COLUMNS: tl.constexpr, UNITS: tl.constexpr,
    SHARED_X: tl.constexpr, KEEP: tl.constexpr, KEEP_H: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # KEEP: n and 1/σ with gelu'(u), and with KEEP_H also h with a column of ones, for a backward right behind.
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
    normed, rstd = norm_rows(z, eps, D, BLOCK_D, x_ptr.dtype.element_ty)
    if KEEP:
        store_rows_and_one(n_ptr + row * (D // 8 * 8 + 8), normed, mask_l, D, BLOCK_L, BLOCK_D)
        tl.store(rstd_ptr + row + tl.arange(0, BLOCK_L), rstd, mask=mask_l)
    if KEEP_H:
        store_one(h_ptr + row * (UNITS + 8) + UNITS, UNITS + 8, mask_l, BLOCK_L)
    y = bias_rows(z, b2_ptr, D, BLOCK_D)
    for unit in range(0, UNITS, BLOCK_F):
        u = tl.zeros([BLOCK_L, BLOCK_F], tl.float32)
        for c in tl.static_range(len(normed)):
            u = dot(normed[c], load_tile(w1_ptr + c * BLOCK_D * UNITS + unit, UNITS, BLOCK_D, BLOCK_F), u, PRECISION)
        u += tl.load(b1_ptr + unit + tl.arange(0, BLOCK_F))[None, :]
        if KEEP:
            hidden, slope = gelu_and_grad(u, x_ptr.dtype.element_ty)
            at = tl.arange(0, BLOCK_L)[:, None]
            units = unit + tl.arange(0, BLOCK_F)[None, :]
            slope = slope.to(x_ptr.dtype.element_ty)
            tl.store(slope_ptr + (row + at) * UNITS + units, slope, mask=mask_l[:, None])
        else:
            hidden = gelu(u, x_ptr.dtype.element_ty)
        hidden = hidden.to(x_ptr.dtype.element_ty)
        if KEEP_H:
            tl.store(h_ptr + (row + at) * (UNITS + 8) + units, hidden, mask=mask_l[:, None])
        out = ()
        for c in tl.static_range(len(normed)):
            w = load_tile(w2_ptr + unit * WIDTH + c * BLOCK_D, WIDTH, BLOCK_F, BLOCK_D)
            out = out + (dot(hidden, w, y[c], PRECISION),)
        y = out
    store_rows(y_ptr + row * D, D, y, mask_l, D, BLOCK_L, BLOCK_D)


@triton.jit
def _feed_forward_dx_kernel(
    n_ptr, rstd_ptr, dy_ptr, w1_ptr, b1_ptr, w2_ptr, dz_ptr, h_ptr, du_ptr, rows,
    D: tl.constexpr, DY: tl.constexpr, DZ: tl.constexpr, UNITS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # Rows of dy are DY wide and those of dz DZ, zeros from D on. Also h, with a column of ones at UNITS, and du: what
    # the weights' gradients take.
    WIDTH: tl.constexpr = triton.cdiv(D, BLOCK_D) * BLOCK_D
    PITCH: tl.constexpr = D // 8 * 8 + 8
    DTYPE: tl.constexpr = n_ptr.dtype.element_ty
    start = tl.program_id(0).to(tl.int64) * BLOCK_L
    mask_l = start + tl.arange(0, BLOCK_L) < rows
    dy = load_rows(dy_ptr + start * DY, DY, mask_l, DY, BLOCK_L, BLOCK_D)
    # Its column of ones meets weights that are zero, and gradients that are.
    normed = load_rows(n_ptr + start * PITCH, PITCH, mask_l, D if D == WIDTH else PITCH, BLOCK_L, BLOCK_D)
    dnormed = zero_rows(BLOCK_L, BLOCK_D, len(normed))
    store_one(h_ptr + start * (UNITS + 8) + UNITS, UNITS + 8, mask_l, BLOCK_L)
    for unit in range(0, UNITS, BLOCK_C):
        u = tl.zeros([BLOCK_L, BLOCK_C], tl.float32)
        dhidden = tl.zeros([BLOCK_L, BLOCK_C], tl.float32)
        w1 = ()
        for c in tl.static_range(len(normed)):
            w1 = w1 + (load_tile(w1_ptr + c * BLOCK_D * UNITS + unit, UNITS, BLOCK_D, BLOCK_C),)
            u = dot(normed[c], w1[c], u, PRECISION)
        for c in tl.static_range(len(normed)):
            w2 = load_tile(w2_ptr + unit * WIDTH + c * BLOCK_D, WIDTH, BLOCK_C, BLOCK_D)
            dhidden = dot(dy[c], tl.trans(w2), dhidden, PRECISION)
        u += tl.load(b1_ptr + unit + tl.arange(0, BLOCK_C))[None, :]
        hidden, slope = gelu_and_grad(u, DTYPE)
        # Rows past the end have dy = 0, hence du = 0.
        du = (dhidden * slope).to(DTYPE)
        at = tl.arange(0, BLOCK_L)[:, None]
        units = unit + tl.arange(0, BLOCK_C)[None, :]
        h_offs = at * (UNITS + 8) + units
        tl.store(h_ptr + start * (UNITS + 8) + h_offs, hidden.to(DTYPE), mask=mask_l[:, None])
        tl.store(du_ptr + start * UNITS + (at * UNITS + units), du, mask=mask_l[:, None])
        out = ()
        for c in tl.static_range(len(normed)):
            out = out + (dot(du, tl.trans(w1[c]), dnormed[c], PRECISION),)
        dnormed = out
    rstd = tl.load(rstd_ptr + start + tl.arange(0, BLOCK_L), mask=mask_l, other=0.0)
    dnormed = norm_rows_grad(dnormed, normed, rstd, D)
    # dy once more, from the cache: kept across the loop for this alone, it would push other registers out.
    residual = load_rows(dy_ptr + start * DY, DY, mask_l, DY, BLOCK_L, BLOCK_D)
    store_rows(dz_ptr + start * DZ, DZ, add_rows(dnormed, residual, D, BLOCK_D), mask_l, DZ, BLOCK_L, BLOCK_D)


def decoder_layer_fwd(
    x: Tensor, folded: FoldedProjections, ff: FeedForward, slot_mask: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """x [B or 1,L,D], folded projections, feed-forward weights -> y [B,L,D] like x, slot_map [B,L,K] fp32."""
    B, _, _, K = folded.G.shape
    slot_map = x.new_empty(B, x.shape[1], K, dtype=torch.float32)
    y, _ = layer_forward(x, LayerPacks(folded, ff, slot_mask, x.dtype), eps, slot_map)
    return y, slot_map


def layer_forward(
    x: Tensor, packs: LayerPacks, eps: float, slot_map: Tensor, keep: bool = False, keep_h: bool = False
) -> tuple[Tensor, Kept]:
    """-> y, and what its backward need not make again; writes slot_map [B,L,K] fp32.

    keep: whether a backward follows, keep_h: whether the feed-forward's weights then need gradients; what is not kept
    has no rows.
    """
    x = x.contiguous()
    B, D, _, K = packs.folded.G.shape
    L = x.shape[1]
    config = fit_slots(launch.select(_decoder_layer_fwd_kernel, x, D), K)
    attention, units = packs.attention(config), packs.feed_forward(config)
    y, kept, kept_h = x.new_empty(B, L, D), B if keep else 0, B if keep_h else 0
    n, rstd = x.new_empty(kept, L, pitch(D + 1)), x.new_empty(kept, L, dtype=torch.float32)
    slope, h = x.new_empty(kept, L, units.columns), x.new_empty(kept_h, L, units.columns + 8)
    args = {
        "x_ptr": x, "w_in_ptr": attention.w_in, "b_in_ptr": attention.b_in, "w_out_ptr": attention.w_out,
        "bias_ptr": packs.bias, "w1_ptr": units.w_in, "b1_ptr": units.b_in, "w2_ptr": units.w_out,
        "b2_ptr": packs.ff.b2.float().contiguous(), "y_ptr": y, "map_ptr": slot_map, "n_ptr": n, "rstd_ptr": rstd,
        "slope_ptr": slope, "h_ptr": h, "L": L, "eps": eps,
    }  # fmt: skip
    values = constexprs(attention, K, config, x.dtype, D)
    values |= {"UNITS": units.columns, "BLOCK_F": units.block, "SHARED_X": x.shape[0] != B}
    values |= {"KEEP": keep, "KEEP_H": keep_h}
    launch.run(_decoder_layer_fwd_kernel, (triton.cdiv(L, config.block_l), B), args, values, config)
    return y, Kept(n, rstd, slope, h)


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
) -> LayerGrads:
    """-> gradients of x and of the weights, each like its tensor; the forward's attention runs again."""
    packs = LayerPacks(folded, ff, slot_mask, x.dtype)
    n, _, rstd = attention_forward(x, packs, True, eps, norm_y=True)
    dz, dff = _feed_forward_backward(dy.to(x.dtype).contiguous(), n, rstd, packs)
    dx, dfolded = attention_backward(dz, dslot_map, x, packs, True, eps)
    # Contiguous: they are cut out of padded sums, and compiled code reads them by the strides of the fake.
    like = (t.to(weight.dtype).contiguous() for t, weight in zip(dff, ff, strict=True))
    return LayerGrads(dx, dfolded, FeedForward(*like))


def layer_backward(
    dy: Tensor, dslot_map: Tensor, x: Tensor, kept: Kept, packs: LayerPacks, eps: float, needs: Needs = EVERYTHING
) -> LayerGrads:
    """-> gradients of x (like x), of ``folded`` (like its tensors) and of the feed-forward (fp32).

    For tiles whose memory is bounded: cuBLAS makes the gradients of weights, of h, du and weights of heads that are
    stored for it. Rows of dy may be, and those of dx are, as wide as ``pitch``.
    """
    dz, dff = feed_forward_backward(dy, kept, packs, needs.ff, residual=True)
    dx, dfolded = attention_backward(dz, dslot_map, x, packs, True, eps, needs.folded, keep=True)
    return LayerGrads(dx, dfolded, dff)


def _feed_forward_backward(dy: Tensor, n: Tensor, rstd: Tensor, packs: LayerPacks) -> tuple[Tensor, FeedForward]:
    """-> dz, as wide as ``pitch``, and the gradients of the feed-forward in fp32; u and h are made again."""
    D, rows = packs.ff.w1.shape[1], rstd.numel()
    config = launch.select(_feed_forward_dx_kernel, n, D)
    units = packs.feed_forward(config)
    dz = n.new_empty(*rstd.shape, pitch(D))
    h, du = (n.new_empty(rows, width) for width in (units.columns + 8, units.columns))
    args = {
        "n_ptr": n, "rstd_ptr": rstd, "dy_ptr": dy, "w1_ptr": units.w_in, "b1_ptr": units.b_in,
        "w2_ptr": units.w_out, "dz_ptr": dz, "h_ptr": h, "du_ptr": du, "rows": rows,
    }  # fmt: skip
    values = {
        "D": D, "DY": dy.shape[2], "DZ": dz.shape[2], "UNITS": units.columns,
        "PRECISION": launch.precision(n.dtype), "BLOCK_L": config.block_l, "BLOCK_C": units.block,
        "BLOCK_D": config.block_d,
    }  # fmt: skip
    launch.run(_feed_forward_dx_kernel, (triton.cdiv(rows, config.block_l),), args, values, config)
    return dz, weight_grads(dy, du, n, h, packs)
