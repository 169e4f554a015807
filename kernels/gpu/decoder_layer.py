# ruff: noqa: RUF005  (the Triton front end has no starred tuples)
"""One pre-norm decoder layer in one kernel: norm, folded attention, residual, norm, feed-forward, residual.

    z = x + A·U + b,  A = softmax_k(norm(x)·G + g)        y = z + W2 gelu(W1 n + b1) + b2,  n = norm(z)

x is read once and y written once; z, n and the hidden units live in registers, and the weights (0.3 MB in bf16 at
widths 180 and 360) stream through L2 in groups of ``BLOCK_C`` columns. The affine part of the second norm is merged
into W1 and b1, in fp32, by the launcher.

The layer's backward saves x alone, and the attention kernel writes z again; inside a tile of the decoder's loss the
forward keeps z. Then, with u = W1 n + b1 and h = gelu(u)::

    dh = dy·W2   du = dh ∘ gelu'(u)   dz = dy + norm'(du·W1)     dW1 = Σ duᵀ n   db1 = Σ du   dW2 = Σ dyᵀ h   db2 = Σ dy

and dz, dw go through the backward of ``folded_cross_attention``. One kernel makes dz and leaves n, h and du in the
compute dtype; dW1 and dW2 are two products of cuBLAS over all rows. A kernel that made u, du and h again for them took
longer than the bytes do (docs/kernels.md).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastslots.records import FeedForward, FoldedProjections, LayerGrads

from . import launch
from ._pack import LayerPacks, constexprs, fit_slots, matmul_fp32, split_norm_grads
from ._tiles import (
    bias_rows,
    dot,
    gelu,
    gelu_and_grad,
    load_rows,
    load_tile,
    norm_rows,
    norm_rows_grad,
    store_column_sums,
    store_map,
    store_rows,
    zero_rows,
)
from .folded_cross_attention import attend, attention_backward, attention_forward


@triton.jit
def _decoder_layer_fwd_kernel(
    x_ptr, w_in_ptr, b_in_ptr, w_out_ptr, bias_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, y_ptr, map_ptr, z_ptr, L, eps,
    D: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, COLUMNS: tl.constexpr, UNITS: tl.constexpr,
    SHARED_X: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr,
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
    if KEEP:
        store_rows(z_ptr + row * D, D, z, mask_l, D, BLOCK_L, BLOCK_D)
    normed, _ = norm_rows(z, eps, D, BLOCK_D, x_ptr.dtype.element_ty)
    y = bias_rows(z, b2_ptr, D, BLOCK_D)
    for unit in range(0, UNITS, BLOCK_F):
        u = tl.zeros([BLOCK_L, BLOCK_F], tl.float32)
        for c in tl.static_range(len(normed)):
            u = dot(normed[c], load_tile(w1_ptr + c * BLOCK_D * UNITS + unit, UNITS, BLOCK_D, BLOCK_F), u, PRECISION)
        u += tl.load(b1_ptr + unit + tl.arange(0, BLOCK_F))[None, :]
        hidden = gelu(u, x_ptr.dtype.element_ty).to(x_ptr.dtype.element_ty)
        out = ()
        for c in tl.static_range(len(normed)):
            w = load_tile(w2_ptr + unit * WIDTH + c * BLOCK_D, WIDTH, BLOCK_F, BLOCK_D)
            out = out + (dot(hidden, w, y[c], PRECISION),)
        y = out
    store_rows(y_ptr + row * D, D, y, mask_l, D, BLOCK_L, BLOCK_D)


@triton.jit
def _feed_forward_dx_kernel(
    z_ptr, dy_ptr, w1_ptr, b1_ptr, w2_ptr, dz_ptr, db2_ptr, n_ptr, h_ptr, du_ptr, db1_ptr, rows, eps,
    D: tl.constexpr, UNITS: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # With KEEP also n [rows, WIDTH], h and du [rows, UNITS] and the tile's sum of du: what the weights' gradients take.
    WIDTH: tl.constexpr = triton.cdiv(D, BLOCK_D) * BLOCK_D
    DTYPE: tl.constexpr = z_ptr.dtype.element_ty
    tile = tl.program_id(0).to(tl.int64)
    start = tile * BLOCK_L
    mask_l = start + tl.arange(0, BLOCK_L) < rows
    dy = load_rows(dy_ptr + start * D, D, mask_l, D, BLOCK_L, BLOCK_D)
    normed, rstd = norm_rows(load_rows(z_ptr + start * D, D, mask_l, D, BLOCK_L, BLOCK_D), eps, D, BLOCK_D, DTYPE)
    store_column_sums(db2_ptr + tile * WIDTH, dy, BLOCK_D)
    if KEEP:
        store_rows(n_ptr + start * WIDTH, WIDTH, normed, mask_l, WIDTH, BLOCK_L, BLOCK_D)
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
        hidden, slope = gelu_and_grad(u, DTYPE)
        # Rows past the end have dy = 0, hence du = 0.
        du = dhidden * slope
        if KEEP:
            offs = tl.arange(0, BLOCK_L)[:, None] * UNITS + unit + tl.arange(0, BLOCK_C)[None, :]
            tl.store(h_ptr + start * UNITS + offs, hidden.to(DTYPE), mask=mask_l[:, None])
            tl.store(du_ptr + start * UNITS + offs, du.to(DTYPE), mask=mask_l[:, None])
            tl.store(db1_ptr + tile * UNITS + unit + tl.arange(0, BLOCK_C), tl.sum(du, 0))
        du = du.to(DTYPE)
        out = ()
        for c in tl.static_range(len(normed)):
            out = out + (dot(du, tl.trans(w1[c]), dnormed[c], PRECISION),)
        dnormed = out
    dnormed = norm_rows_grad(dnormed, normed, rstd, D)
    # dy once more, from the cache: kept across the loop for this alone, it would push other registers out.
    residual = load_rows(dy_ptr + start * D, D, mask_l, D, BLOCK_L, BLOCK_D)
    dz = ()
    for c in tl.static_range(len(normed)):
        dz = dz + (dnormed[c] + residual[c].to(tl.float32),)
    store_rows(dz_ptr + start * D, D, dz, mask_l, D, BLOCK_L, BLOCK_D)


def decoder_layer_fwd(
    x: Tensor, folded: FoldedProjections, ff: FeedForward, slot_mask: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """x [B or 1,L,D], folded projections, feed-forward weights -> y [B,L,D] like x, slot_map [B,L,K] fp32."""
    y, slot_map, _ = layer_forward(x, LayerPacks(folded, ff, slot_mask, x.dtype), eps, keep=False)
    return y, slot_map


def layer_forward(x: Tensor, packs: LayerPacks, eps: float, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """-> y, slot_map and, with ``keep``, z [B,L,D], which the backward then need not make again (else y once more)."""
    x = x.contiguous()
    B, D, _, K = packs.folded.G.shape
    L = x.shape[1]
    config = fit_slots(launch.select(_decoder_layer_fwd_kernel, x, D), K)
    attention, units = packs.attention(config), packs.feed_forward(config)
    y, slot_map = x.new_empty(B, L, D), x.new_empty(B, L, K, dtype=torch.float32)
    z = torch.empty_like(y) if keep else y
    args = {
        "x_ptr": x, "w_in_ptr": attention.w_in, "b_in_ptr": attention.b_in, "w_out_ptr": attention.w_out,
        "bias_ptr": packs.bias, "w1_ptr": units.w_in, "b1_ptr": units.b_in, "w2_ptr": units.w_out,
        "b2_ptr": packs.ff.b2.float().contiguous(), "y_ptr": y, "map_ptr": slot_map, "z_ptr": z, "L": L, "eps": eps,
    }  # fmt: skip
    values = constexprs(attention, K, config, x.dtype, D)
    values |= {"UNITS": units.columns, "BLOCK_F": units.block, "SHARED_X": x.shape[0] != B, "KEEP": keep}
    launch.run(_decoder_layer_fwd_kernel, (triton.cdiv(L, config.block_l), B), args, values, config)
    return y, slot_map, z


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
    z, _ = attention_forward(x, packs, True, eps)
    grads = layer_backward(dy.to(x.dtype).contiguous(), dslot_map, x, z, packs, eps)
    assert grads.ff is not None
    # Contiguous: they are cut out of padded sums, and compiled code reads them by the strides of the fake.
    like = (t.to(weight.dtype).contiguous() for t, weight in zip(grads.ff, ff, strict=True))
    return grads._replace(ff=FeedForward(*like))


def layer_backward(
    dy: Tensor, dslot_map: Tensor, x: Tensor, z: Tensor, packs: LayerPacks, eps: float, needs: Needs = EVERYTHING
) -> LayerGrads:
    """-> gradients of x (like x), of ``folded`` (like its tensors) and of the feed-forward (fp32)."""
    dz, dff = _feed_forward_backward(dy, z, packs, eps, needs.ff)
    dx, dfolded = attention_backward(dz, dslot_map, x, packs, True, eps, needs.folded)
    return LayerGrads(dx, dfolded, dff)


def _feed_forward_backward(
    dy: Tensor, z: Tensor, packs: LayerPacks, eps: float, need: bool
) -> tuple[Tensor, FeedForward | None]:
    """-> dz, and the gradients of the feed-forward in fp32.

    Those of its matrices are products over all rows, which are cuBLAS's: of n, h and du in the compute dtype.
    """
    D, F, rows = z.shape[2], packs.ff.w1.shape[0], z.shape[0] * z.shape[1]
    config = launch.select(_feed_forward_dx_kernel, z, D)
    units = packs.feed_forward(config)
    width, columns, tiles = units.w_in.shape[1], units.columns, triton.cdiv(rows, config.block_l)
    dz, db2 = torch.empty_like(z), z.new_empty(tiles, width, dtype=torch.float32)
    args = {
        "z_ptr": z, "dy_ptr": dy, "w1_ptr": units.w_in, "b1_ptr": units.b_in, "w2_ptr": units.w_out, "dz_ptr": dz,
        "db2_ptr": db2, "n_ptr": dz, "h_ptr": dz, "du_ptr": dz, "db1_ptr": db2, "rows": rows, "eps": eps,
    }  # fmt: skip
    if need:
        n, (h, du) = z.new_empty(rows, width), (z.new_empty(rows, columns) for _ in range(2))
        db1 = z.new_empty(tiles, columns, dtype=torch.float32)
        args |= {"n_ptr": n, "h_ptr": h, "du_ptr": du, "db1_ptr": db1}
    values = {
        "D": D, "UNITS": columns, "KEEP": need, "PRECISION": launch.precision(z.dtype),
        "BLOCK_L": config.block_l, "BLOCK_C": units.block, "BLOCK_D": config.block_d,
    }  # fmt: skip
    launch.run(_feed_forward_dx_kernel, (tiles,), args, values, config)
    if not need:
        return dz, None
    dw = matmul_fp32(du.t(), n)[:F, :D]
    dw2 = matmul_fp32(dy.flatten(0, 1).t(), h)[:, :F]
    db = db1.sum(0)[:F]
    dnorm_weight, dnorm_bias, dw1 = split_norm_grads(dw, db, packs.ff)
    return dz, FeedForward(dnorm_weight, dnorm_bias, dw1, db, dw2, db2.sum(0)[:D])
