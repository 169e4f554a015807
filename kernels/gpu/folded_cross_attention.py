# ruff: noqa: RUF005  (the Triton front end has no starred tuples)
"""Folded cross-attention of pixels to slots, alone or with the layer norm and the residual of a decoder layer.

With n = x (alone) or n = norm(x) (``NORM``), per pixel l and over columns (h, k)::

    S = n·G + g      A = softmax over k inside each h      y = A·U + b (+ x with NORM)      slot_map = Σ_h A

Backward, from dy and dw = ∂/∂slot_map, S and A recomputed::

    dA = dy·Uᵀ      dS = A ∘ (dA + dw − Σ_k A (dA + dw))      dn = dS·Gᵀ      dx = dn, or norm'(dn) + dy with NORM
    dG = nᵀ·dS      dg = Σ_l dS      dU = Aᵀ·dy      db = Σ_l dy

Saved: nothing but the inputs. Tensors are row-major; x may have batch 1, shared by all images: it is never repeated,
and one program sums its gradient over the images. Products accumulate in fp32; softmax, norm and sums are fp32. dG, dg
and dU are summed over pixels as fp32 partials of fixed ranges of pixels, then over those by a second reduction: the
same call gives the same bits.

The operators store no score and no weight of a head: dG and dU have a kernel of their own, since dx needs all columns
of a few rows and they all rows of a few columns, and it makes S and dA again. In a tile of the decoder's loss, whose
memory is bounded, the kernel of dx stores n, A and dS in the compute dtype (``keep``), for products of cuBLAS.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastslots.records import FoldedProjections

from . import _pack, launch
from ._pack import KeptAttention, LayerPacks, Packed, constexprs, fit_slots, pitch
from ._tiles import (
    add_rows,
    attend,
    attn_and_grad,
    bias_rows,
    dot,
    load_map,
    load_rows,
    load_tile,
    norm_rows,
    norm_rows_grad,
    store_column_sums,
    store_map,
    store_one,
    store_rows,
    store_rows_and_one,
    zero_rows,
)


@triton.jit
def _folded_attention_fwd_kernel(
    x_ptr, w_in_ptr, b_in_ptr, w_out_ptr, bias_ptr, y_ptr, map_ptr, rstd_ptr, L, eps,
    D: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, COLUMNS: tl.constexpr,
    NORM: tl.constexpr, NORM_Y: tl.constexpr, SHARED_X: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0).to(tl.int64) * BLOCK_L
    mask_l = start + tl.arange(0, BLOCK_L) < L
    row = image * L + start
    x_row = start if SHARED_X else row
    x = load_rows(x_ptr + x_row * D, D, mask_l, D, BLOCK_L, BLOCK_D)
    if NORM:
        normed, _ = norm_rows(x, eps, D, BLOCK_D, x_ptr.dtype.element_ty)
        acc = bias_rows(x, bias_ptr, D, BLOCK_D)
    else:
        normed = x
        acc = bias_rows(zero_rows(BLOCK_L, BLOCK_D, len(x)), bias_ptr, D, BLOCK_D)
    y, slot_map = attend(
        normed, acc, w_in_ptr, b_in_ptr, w_out_ptr, image, D, KP, COLUMNS, PRECISION, BLOCK_L, BLOCK_C, BLOCK_D
    )
    store_map(map_ptr + row * K, slot_map, mask_l, K, KP, BLOCK_L)
    if NORM_Y:
        normed, rstd = norm_rows(y, eps, D, BLOCK_D, x_ptr.dtype.element_ty)
        store_rows_and_one(y_ptr + row * (D // 8 * 8 + 8), normed, mask_l, D, BLOCK_L, BLOCK_D)
        tl.store(rstd_ptr + row + tl.arange(0, BLOCK_L), rstd, mask=mask_l)
    else:
        store_rows(y_ptr + row * D, D, y, mask_l, D, BLOCK_L, BLOCK_D)


@triton.jit
def _folded_attention_dx_kernel(
    x_ptr, dy_ptr, dmap_ptr, residual_ptr, w_in_ptr, b_in_ptr, w_out_ptr, dx_ptr, db_ptr, n_ptr, attn_ptr, dscores_ptr,
    L, images, eps,
    D: tl.constexpr, DY: tl.constexpr, DX: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, COLUMNS: tl.constexpr,
    NORM: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # Program (l, i): rows of image i of x, which stands for ``images`` images of dy (1, or all where x is shared). Rows
    # of dy are DY wide and those of dx DX, zeros from D on. With KEEP also n, A and dS, where those of all images of a
    # shared x lie side by side: what the gradients of weights and bias take; without it the bias's parts.
    WIDTH: tl.constexpr = triton.cdiv(D, BLOCK_D) * BLOCK_D
    x_image = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0).to(tl.int64) * BLOCK_L
    mask_l = start + tl.arange(0, BLOCK_L) < L
    x_row = x_image * L + start
    normed = load_rows(x_ptr + x_row * D, D, mask_l, D, BLOCK_L, BLOCK_D)
    if NORM:
        normed, rstd = norm_rows(normed, eps, D, BLOCK_D, x_ptr.dtype.element_ty)
    if KEEP:
        store_rows_and_one(n_ptr + x_row * (D // 8 * 8 + 8), normed, mask_l, D, BLOCK_L, BLOCK_D)
    dnormed = zero_rows(BLOCK_L, BLOCK_D, len(normed))
    for i in range(images):
        image = x_image * images + i
        row = image * L + start
        dy = load_rows(dy_ptr + row * DY, DY, mask_l, DY, BLOCK_L, BLOCK_D)
        if KEEP:
            store_one(attn_ptr + row * (COLUMNS + 8) + COLUMNS, COLUMNS + 8, mask_l, BLOCK_L)
        else:
            store_column_sums(db_ptr + (image * tl.num_programs(0) + tl.program_id(0)) * WIDTH, dy, BLOCK_D)
        dslot_map = load_map(dmap_ptr + row * K, mask_l, K, KP, BLOCK_L)
        for column in range(0, COLUMNS, BLOCK_C):
            b_in = tl.load(b_in_ptr + image * COLUMNS + column + tl.arange(0, BLOCK_C))
            w_in = ()
            w_out = ()
            w_in_image = w_in_ptr + image * (WIDTH * COLUMNS) + column
            w_out_image = w_out_ptr + (image * COLUMNS + column) * WIDTH
            for c in tl.static_range(len(normed)):
                w_in = w_in + (load_tile(w_in_image + c * BLOCK_D * COLUMNS, COLUMNS, BLOCK_D, BLOCK_C),)
                w_out = w_out + (load_tile(w_out_image + c * BLOCK_D, WIDTH, BLOCK_C, BLOCK_D),)
            attn, dscores = attn_and_grad(normed, dy, dslot_map, w_in, b_in, w_out, KP, PRECISION, BLOCK_L, BLOCK_C)
            dscores = dscores.to(x_ptr.dtype.element_ty)
            if KEEP:
                columns = column + tl.arange(0, BLOCK_C)[None, :]
                rows = tl.arange(0, BLOCK_L)[:, None]
                attn_offs = rows * (COLUMNS + 8) + columns
                tl.store(attn_ptr + row * (COLUMNS + 8) + attn_offs, attn, mask=mask_l[:, None])
                side_by_side = rows * (images * COLUMNS) + columns
                tl.store(dscores_ptr + (x_row * images + i) * COLUMNS + side_by_side, dscores, mask=mask_l[:, None])
            out = ()
            for c in tl.static_range(len(normed)):
                out = out + (dot(dscores, tl.trans(w_in[c]), dnormed[c], PRECISION),)
            dnormed = out
    if NORM:
        dnormed = norm_rows_grad(dnormed, normed, rstd, D)
        residual = load_rows(residual_ptr + x_row * DY, DY, mask_l, DY, BLOCK_L, BLOCK_D)
        dnormed = add_rows(dnormed, residual, D, BLOCK_D)
    store_rows(dx_ptr + x_row * DX, DX, dnormed, mask_l, DX, BLOCK_L, BLOCK_D)


@triton.jit
def _folded_attention_dw_kernel(
    x_ptr, dy_ptr, dmap_ptr, w_in_ptr, b_in_ptr, w_out_ptr, dw_in_ptr, db_in_ptr, dw_out_ptr, L, blocks, eps,
    D: tl.constexpr, DY: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, COLUMNS: tl.constexpr,
    NORM: tl.constexpr, SHARED_X: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # Program (group of heads, part, image): its columns of dG and dU over ``blocks`` tiles of rows. Groups run fastest,
    # so that those which read the same rows run together and find them in L2.
    WIDTH: tl.constexpr = triton.cdiv(D, BLOCK_D) * BLOCK_D
    CHUNKS: tl.constexpr = triton.cdiv(D, BLOCK_D)
    column = tl.program_id(0) * BLOCK_C
    part = tl.program_id(1)
    image = tl.program_id(2).to(tl.int64)
    b_in = tl.load(b_in_ptr + image * COLUMNS + column + tl.arange(0, BLOCK_C))
    w_in = ()
    w_out = ()
    for c in tl.static_range(CHUNKS):
        w_in = w_in + (
            load_tile(w_in_ptr + image * (WIDTH * COLUMNS) + c * BLOCK_D * COLUMNS + column, COLUMNS, BLOCK_D, BLOCK_C),
        )
        w_out = w_out + (
            load_tile(w_out_ptr + (image * COLUMNS + column) * WIDTH + c * BLOCK_D, WIDTH, BLOCK_C, BLOCK_D),
        )
    dw_in = zero_rows(BLOCK_D, BLOCK_C, CHUNKS)
    dw_out = zero_rows(BLOCK_D, BLOCK_C, CHUNKS)
    db_in = tl.zeros([BLOCK_C], tl.float32)
    for block in range(blocks):
        start = (part.to(tl.int64) * blocks + block) * BLOCK_L
        mask_l = start + tl.arange(0, BLOCK_L) < L
        row = image * L + start
        x_row = start if SHARED_X else row
        normed = load_rows(x_ptr + x_row * D, D, mask_l, D, BLOCK_L, BLOCK_D)
        dy = load_rows(dy_ptr + row * DY, DY, mask_l, DY, BLOCK_L, BLOCK_D)
        dslot_map = load_map(dmap_ptr + row * K, mask_l, K, KP, BLOCK_L)
        if NORM:
            normed, _ = norm_rows(normed, eps, D, BLOCK_D, x_ptr.dtype.element_ty)
        # Rows past L have dy = 0 and dslot_map = 0, hence dS = 0: they add nothing to any sum.
        attn, dscores = attn_and_grad(normed, dy, dslot_map, w_in, b_in, w_out, KP, PRECISION, BLOCK_L, BLOCK_C)
        db_in += tl.sum(dscores, 0)
        dscores = dscores.to(x_ptr.dtype.element_ty)
        new_in = ()
        new_out = ()
        for c in tl.static_range(CHUNKS):
            new_in = new_in + (dot(tl.trans(normed[c]), dscores, dw_in[c], PRECISION),)
            new_out = new_out + (dot(tl.trans(dy[c]), attn, dw_out[c], PRECISION),)
        dw_in = new_in
        dw_out = new_out
    partial = image * tl.num_programs(1) + part
    tl.store(db_in_ptr + partial * COLUMNS + column + tl.arange(0, BLOCK_C), db_in)
    offs = tl.arange(0, BLOCK_D)[:, None] * COLUMNS + column + tl.arange(0, BLOCK_C)[None, :]
    for c in tl.static_range(CHUNKS):
        offs_c = (partial * WIDTH + c * BLOCK_D) * COLUMNS + offs
        tl.store(dw_in_ptr + offs_c, dw_in[c])
        tl.store(dw_out_ptr + offs_c, dw_out[c])


def folded_cross_attention_fwd(
    x: Tensor, folded: FoldedProjections, slot_mask: Tensor | None = None, norm: bool = False, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """x [B or 1,L,D] (already normed; with ``norm`` not) -> y [B,L,D] like x, slot_map [B,L,K] fp32."""
    y, slot_map, _ = attention_forward(x, LayerPacks(folded, None, slot_mask, x.dtype), norm, eps)
    return y, slot_map


def attention_forward(
    x: Tensor, packs: LayerPacks, norm: bool, eps: float, norm_y: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """-> y, slot_map and 1/σ of y: ``folded_cross_attention_fwd`` of packed weights.

    With ``norm`` also the norm before it and the residual. With ``norm_y`` y is normed, its rows with a column of ones
    at D as the feed-forward's backward takes them (``Normed``); else 1/σ is the map once more.
    """
    x = x.contiguous()
    (B, D, _, K), L = packs.folded.G.shape, x.shape[1]
    config = fit_slots(launch.select(_folded_attention_fwd_kernel, x, D), K)
    packed = packs.attention(config)
    y, slot_map = x.new_empty(B, L, pitch(D + 1) if norm_y else D), x.new_empty(B, L, K, dtype=torch.float32)
    rstd = x.new_empty(B, L, dtype=torch.float32) if norm_y else slot_map
    args = {
        "x_ptr": x, "w_in_ptr": packed.w_in, "b_in_ptr": packed.b_in, "w_out_ptr": packed.w_out,
        "bias_ptr": packs.bias, "y_ptr": y, "map_ptr": slot_map, "rstd_ptr": rstd, "L": L, "eps": eps,
    }  # fmt: skip
    values = constexprs(packed, K, config, x.dtype, D)
    values |= {"NORM": norm, "NORM_Y": norm_y, "SHARED_X": x.shape[0] != B}
    launch.run(_folded_attention_fwd_kernel, (triton.cdiv(L, config.block_l), B), args, values, config)
    return y, slot_map, rstd


def folded_cross_attention_bwd(
    dy: Tensor, dslot_map: Tensor, x: Tensor, folded: FoldedProjections, slot_mask: Tensor | None = None,
    norm: bool = False, eps: float = 1e-5,
) -> tuple[Tensor, FoldedProjections | None]:  # fmt: skip
    """-> dx like x and the gradients of ``folded``, each like its tensor, never None."""
    packs = LayerPacks(folded, None, slot_mask, x.dtype)
    return attention_backward(dy.to(x.dtype).contiguous(), dslot_map, x, packs, norm, eps)


def attention_backward(
    dy: Tensor, dslot_map: Tensor, x: Tensor, packs: LayerPacks, norm: bool, eps: float,
    need_folded: bool = True, keep: bool = False,
) -> tuple[Tensor, FoldedProjections | None]:  # fmt: skip
    """-> dx and the gradients of ``packs.folded``, each like its tensor; None where none is needed.

    dy is [B,L,D], or as wide as ``pitch`` with zeros from D on. With ``keep`` dx is so too, and what the weights'
    gradients take is stored for cuBLAS (three tensors with a row for each pixel); without it no weight of a head is.
    """
    call = _Backward(dy, dslot_map.float().contiguous(), x.contiguous(), packs, norm, eps)
    dx, db, kept = _input_grad(call, keep, keep and need_folded)
    if not need_folded:
        return dx, None
    grads = (*_weight_grads(call), db) if kept is None else _pack.attention_products(dy, kept, packs.folded.G)
    return dx, FoldedProjections(*grads[:3], grads[3].to(packs.folded.b.dtype))


class _Backward(NamedTuple):
    """What both backward kernels are launched on, contiguous where it has pixels."""

    dy: Tensor
    dslot_map: Tensor
    x: Tensor
    packs: LayerPacks
    norm: bool
    eps: float

    def operands(self, packed: Packed) -> dict[str, Any]:
        pixels = {"x_ptr": self.x, "dy_ptr": self.dy, "dmap_ptr": self.dslot_map, "L": self.x.shape[1], "eps": self.eps}
        return pixels | {"w_in_ptr": packed.w_in, "b_in_ptr": packed.b_in, "w_out_ptr": packed.w_out}


def _input_grad(
    call: _Backward, pitched: bool = False, keep: bool = False
) -> tuple[Tensor, Tensor, KeptAttention | None]:
    """-> dx, db [D] in fp32 (its rows pass by here anyway) or, with ``keep``, what passes by for the products."""
    x, dy, (B, D, _, K), L = call.x, call.dy, call.packs.folded.G.shape, call.x.shape[1]
    config = fit_slots(launch.select(_folded_attention_dx_kernel, x, D), K)
    packed = call.packs.attention(config)
    tiles, images = triton.cdiv(L, config.block_l), B // max(x.shape[0], 1)
    dx = x.new_empty(*x.shape[:2], pitch(D) if pitched else D)
    db = x.new_empty(0 if keep else B, tiles, packed.w_in.shape[1], dtype=torch.float32)
    residual = dy.sum(0, keepdim=True, dtype=torch.float32) if images != 1 and call.norm else dy
    args = call.operands(packed)
    args |= {"residual_ptr": residual, "dx_ptr": dx, "db_ptr": db, "images": images}
    args |= dict.fromkeys(("n_ptr", "attn_ptr", "dscores_ptr"), dx)
    kept = None
    if keep:
        n, attn = x.new_empty(*x.shape[:2], pitch(D + 1)), x.new_empty(B, L, packed.columns + 8)
        kept = KeptAttention(n, attn, x.new_empty(x.shape[0], L, images, packed.columns), packed.slots)
        args |= {"n_ptr": n, "attn_ptr": attn, "dscores_ptr": kept.dscores}
    values = constexprs(packed, K, config, x.dtype, D)
    values |= {"NORM": call.norm, "KEEP": keep, "DY": dy.shape[2], "DX": dx.shape[2]}
    launch.run(_folded_attention_dx_kernel, (tiles, x.shape[0]), args, values, config)
    return dx, db.sum((0, 1))[:D], kept


def _weight_grads(call: _Backward) -> tuple[Tensor, Tensor, Tensor]:
    """-> dG, dg, dU."""
    x, G = call.x, call.packs.folded.G
    B, D, _, K = G.shape
    config = fit_slots(launch.select(_folded_attention_dw_kernel, x, D), K)
    packed = call.packs.attention(config)
    parts, blocks = launch.split(x.shape[1], config.block_l, B * packed.groups)
    size = (B, parts, packed.w_in.shape[1], packed.columns)
    dw_in, dw_out = (x.new_empty(size, dtype=torch.float32) for _ in range(2))
    db_in = x.new_empty(B, parts, packed.columns, dtype=torch.float32)
    args = call.operands(packed)
    args |= {"dw_in_ptr": dw_in, "db_in_ptr": db_in, "dw_out_ptr": dw_out, "blocks": blocks}
    values = constexprs(packed, K, config, x.dtype, D)
    values |= {"NORM": call.norm, "SHARED_X": x.shape[0] != B, "DY": call.dy.shape[2]}
    launch.run(_folded_attention_dw_kernel, (packed.groups, parts, B), args, values, config)
    return _pack.unpack_attention(dw_in.sum(1), db_in.sum(1), dw_out.sum(1), G, packed.slots)
