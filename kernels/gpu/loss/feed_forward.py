# ruff: noqa: RUF005  (the Triton front end has no starred tuples)
"""The backward of a feed-forward whose forward has kept what only it could make cheaply: h = gelu(u) and gelu'(u).

    n = norm(z)   u = W1 n + b1   y = z + W2 h + b2          du = (dy·W2) ∘ gelu'(u)   dz = dy + norm'(du·W1)
    dW1 = Σ duᵀ n   db1 = Σ du   dW2 = Σ dyᵀ h   db2 = Σ dy

The forward has u in registers, and both functions of it for one exponential; making u again would cost a third of the
backward's products and most of its other instructions. The kernel makes du and dz; dW1 and dW2 are two products of
cuBLAS over all rows, and columns of ones in n and h make db1 and db2 in the same two: sums over rows inside the kernel
cost a tenth of its instructions. The output head's first two maps are such a feed-forward without the residual.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fastslots.records import FeedForward

from .. import launch
from .._pack import FeedForwardPacks, matmul_fp32, pitch, split_norm_grads
from .._tiles import add_rows, dot, inside_rows, load_rows, load_tile, norm_rows_grad, store_rows, zero_rows


@triton.jit
def _feed_forward_dz_kernel(
    n_ptr, rstd_ptr, dy_ptr, w1_ptr, w2_ptr, slope_ptr, dz_ptr, du_ptr, rows,
    D: tl.constexpr, DY: tl.constexpr, DZ: tl.constexpr, UNITS: tl.constexpr,
    RESIDUAL: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # Rows of dy are DY wide and those of dz DZ, zeros in their padding. With KEEP also du, for the weights' gradients.
    WIDTH: tl.constexpr = triton.cdiv(D, BLOCK_D) * BLOCK_D
    WIDTH_DY: tl.constexpr = triton.cdiv(DY, BLOCK_D) * BLOCK_D
    PITCH: tl.constexpr = D // 8 * 8 + 8
    DTYPE: tl.constexpr = n_ptr.dtype.element_ty
    start = tl.program_id(0).to(tl.int64) * BLOCK_L
    mask_l = start + tl.arange(0, BLOCK_L) < rows
    dy = load_rows(dy_ptr + start * DY, DY, mask_l, DY, BLOCK_L, BLOCK_D)
    dnormed = zero_rows(BLOCK_L, BLOCK_D, WIDTH // BLOCK_D)
    for unit in range(0, UNITS, BLOCK_C):
        offs = tl.arange(0, BLOCK_L)[:, None] * UNITS + unit + tl.arange(0, BLOCK_C)[None, :]
        slope = tl.load(slope_ptr + start * UNITS + offs, mask=mask_l[:, None], other=0.0).to(tl.float32)
        dhidden = tl.zeros([BLOCK_L, BLOCK_C], tl.float32)
        for c in tl.static_range(len(dy)):
            w2 = load_tile(w2_ptr + unit * WIDTH_DY + c * BLOCK_D, WIDTH_DY, BLOCK_C, BLOCK_D)
            dhidden = dot(dy[c], tl.trans(w2), dhidden, PRECISION)
        du = (dhidden * slope).to(DTYPE)
        if KEEP:
            tl.store(du_ptr + start * UNITS + offs, du, mask=mask_l[:, None])
        out = ()
        for c in tl.static_range(len(dnormed)):
            w1 = load_tile(w1_ptr + c * BLOCK_D * UNITS + unit, UNITS, BLOCK_D, BLOCK_C)
            out = out + (dot(du, tl.trans(w1), dnormed[c], PRECISION),)
        dnormed = out
    # Its column of ones meets gradients that are zero.
    normed = load_rows(n_ptr + start * PITCH, PITCH, mask_l, D if D == WIDTH else PITCH, BLOCK_L, BLOCK_D)
    rstd = tl.load(rstd_ptr + start + tl.arange(0, BLOCK_L), mask=mask_l, other=0.0)
    dnormed = norm_rows_grad(dnormed, normed, rstd, D)
    if RESIDUAL:  # dy once more, from the cache: kept across the loop for this alone, it would take registers
        residual = load_rows(dy_ptr + start * DY, DY, mask_l, DY, BLOCK_L, BLOCK_D)
        dnormed = add_rows(dnormed, residual, D, BLOCK_D)
    else:
        dnormed = inside_rows(dnormed, D, BLOCK_D)
    store_rows(dz_ptr + start * DZ, DZ, dnormed, mask_l, DZ, BLOCK_L, BLOCK_D)


class Kept(NamedTuple):
    """What the backward of a feed-forward needs of its forward; rows without entries where none follows."""

    n: Tensor  # [..., above D], normed, with a column of ones at D
    rstd: Tensor  # [...] fp32, 1/σ
    slope: Tensor  # [..., units] gelu'(u)
    h: Tensor  # [..., units + 8], with a column of ones at units; no rows where no weight needs a gradient


def feed_forward_backward(
    dy: Tensor, kept: Kept, packs: FeedForwardPacks, need: bool, residual: bool
) -> tuple[Tensor, FeedForward | None]:
    """dy [..., OUT or more] -> dz, as wide as ``pitch``, and with ``need`` the feed-forward's gradients in fp32."""
    D, like, rows = packs.ff.w1.shape[1], kept.n, kept.rstd.numel()
    config = launch.select(_feed_forward_dz_kernel, like, max(D, packs.ff.w2.shape[0]))
    units = packs.feed_forward(config)
    columns = units.columns
    dz = like.new_empty(*kept.rstd.shape, pitch(D))
    du = like.new_empty(rows if need else 0, columns)
    args = {
        "n_ptr": like, "rstd_ptr": kept.rstd, "dy_ptr": dy, "w1_ptr": units.w_in, "w2_ptr": units.w_out,
        "slope_ptr": kept.slope, "dz_ptr": dz, "du_ptr": du, "rows": rows,
    }  # fmt: skip
    values = {
        "D": D, "DY": dy.shape[-1], "DZ": dz.shape[-1], "UNITS": columns, "RESIDUAL": residual, "KEEP": need,
        "PRECISION": launch.precision(like.dtype), "BLOCK_L": config.block_l, "BLOCK_C": units.block,
        "BLOCK_D": config.block_d,
    }  # fmt: skip
    launch.run(_feed_forward_dz_kernel, (triton.cdiv(rows, config.block_l),), args, values, config)
    return dz, weight_grads(dy, du, kept.n, kept.h, packs) if need else None


def weight_grads(dy: Tensor, du: Tensor, n: Tensor, h: Tensor, packs: FeedForwardPacks) -> FeedForward:
    """Products over all rows, which are cuBLAS's, of the compute dtype -> fp32. Columns of ones in n and h make the
    gradients of the biases in the same products. Rows are padded to whole 16 bytes, for which cuBLAS is fastest."""
    (F, D), OUT, columns = packs.ff.w1.shape, packs.ff.w2.shape[0], du.shape[1]
    dw = matmul_fp32(du.t(), n.flatten(0, -2))[:F]
    dw2 = matmul_fp32(dy.flatten(0, -2).t(), h.flatten(0, -2))[:OUT]
    dw, db, dw2, db2 = dw[:, :D], dw[:, D], dw2[:, :F], dw2[:, columns]
    dnorm_weight, dnorm_bias, dw1 = split_norm_grads(dw, db, packs.ff)
    return FeedForward(dnorm_weight, dnorm_bias, dw1, db, dw2, db2)
