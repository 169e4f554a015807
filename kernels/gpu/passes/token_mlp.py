# ruff: noqa: RUF005  (the Triton front end has no starred tuples)
"""The encoder's token MLP with the norm behind it, forward and backward as one pass over tokens each.

    u = W1 x + b1   h = gelu(u)   z = W2 h + b2   y = norm(z), without affine part

    dz = norm'(dy)   du = (dz·W2) ∘ gelu'(u)   dx = du·W1      dW1 = Σ duᵀ x   db1 = Σ du   dW2 = Σ dzᵀ h   db2 = Σ dz

z is never stored: the norm's backward takes y and 1/σ. The forward keeps h and gelu'(u), the backward leaves dz and du
for two products of cuBLAS over all tokens; a column of ones in h makes db2 in the second, and db1 is summed up on the
way, in fp32, since x has no such column. Of 16-bit rows: in fp32 the products are a library's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch
from .._pack import MergedLinear, Packed, matmul_fp32, pack_feed_forward, unit_columns
from .._tiles import (
    bias_rows,
    dot,
    gelu,
    gelu_and_grad,
    inside_rows,
    load_rows,
    load_tile,
    norm_rows,
    norm_rows_grad,
    store_one,
    store_rows,
    zero_rows,
)


@triton.jit
def _token_mlp_fwd_kernel(
    x_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, y_ptr, rstd_ptr, slope_ptr, h_ptr, rows, eps,
    D: tl.constexpr, OUT: tl.constexpr, UNITS: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # Program: a tile of tokens. With KEEP also h, with a column of ones at UNITS, and gelu'(u).
    WIDTH: tl.constexpr = triton.cdiv(OUT, BLOCK_D) * BLOCK_D
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    start = tl.program_id(0).to(tl.int64) * BLOCK_L
    mask_l = start + tl.arange(0, BLOCK_L) < rows
    x = load_rows(x_ptr + start * D, D, mask_l, D, BLOCK_L, BLOCK_D)
    z = bias_rows(zero_rows(BLOCK_L, BLOCK_D, WIDTH // BLOCK_D), b2_ptr, OUT, BLOCK_D)
    if KEEP:
        store_one(h_ptr + start * (UNITS + 8) + UNITS, UNITS + 8, mask_l, BLOCK_L)
    for unit in range(0, UNITS, BLOCK_C):
        u = tl.zeros([BLOCK_L, BLOCK_C], tl.float32)
        for c in tl.static_range(len(x)):
            u = dot(x[c], load_tile(w1_ptr + c * BLOCK_D * UNITS + unit, UNITS, BLOCK_D, BLOCK_C), u, PRECISION)
        u += tl.load(b1_ptr + unit + tl.arange(0, BLOCK_C))[None, :]
        if KEEP:
            hidden, slope = gelu_and_grad(u, DTYPE)
            hidden = hidden.to(DTYPE)
            at = tl.arange(0, BLOCK_L)[:, None]
            units = unit + tl.arange(0, BLOCK_C)[None, :]
            tl.store(h_ptr + start * (UNITS + 8) + (at * (UNITS + 8) + units), hidden, mask=mask_l[:, None])
            tl.store(slope_ptr + start * UNITS + (at * UNITS + units), slope.to(DTYPE), mask=mask_l[:, None])
        else:
            hidden = gelu(u, DTYPE).to(DTYPE)
        out = ()
        for c in tl.static_range(len(z)):
            w2 = load_tile(w2_ptr + unit * WIDTH + c * BLOCK_D, WIDTH, BLOCK_C, BLOCK_D)
            out = out + (dot(hidden, w2, z[c], PRECISION),)
        z = out
    y, rstd = norm_rows(z, eps, OUT, BLOCK_D, DTYPE)
    store_rows(y_ptr + start * OUT, OUT, y, mask_l, OUT, BLOCK_L, BLOCK_D)
    tl.store(rstd_ptr + start + tl.arange(0, BLOCK_L), rstd, mask=mask_l)


@triton.jit
def _token_mlp_bwd_kernel(
    dy_ptr, y_ptr, rstd_ptr, slope_ptr, w1_ptr, w2_ptr, dx_ptr, dz_ptr, du_ptr, db_ptr, rows,
    D: tl.constexpr, OUT: tl.constexpr, UNITS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # Program: a tile of tokens, and its sums of du.
    WIDTH: tl.constexpr = triton.cdiv(D, BLOCK_D) * BLOCK_D
    WIDTH_OUT: tl.constexpr = triton.cdiv(OUT, BLOCK_D) * BLOCK_D
    DTYPE: tl.constexpr = y_ptr.dtype.element_ty
    start = tl.program_id(0).to(tl.int64) * BLOCK_L
    mask_l = start + tl.arange(0, BLOCK_L) < rows
    y = load_rows(y_ptr + start * OUT, OUT, mask_l, OUT, BLOCK_L, BLOCK_D)
    rstd = tl.load(rstd_ptr + start + tl.arange(0, BLOCK_L), mask=mask_l, other=0.0)  # 0 past the end: so are dz and du
    rows_of_dy = load_rows(dy_ptr + start * OUT, OUT, mask_l, OUT, BLOCK_L, BLOCK_D)
    dy = ()
    for c in tl.static_range(len(y)):
        dy = dy + (rows_of_dy[c].to(tl.float32),)
    grad = inside_rows(norm_rows_grad(dy, y, rstd, OUT), OUT, BLOCK_D)
    dz = ()
    for c in tl.static_range(len(y)):
        dz = dz + (grad[c].to(DTYPE),)
    store_rows(dz_ptr + start * OUT, OUT, dz, mask_l, OUT, BLOCK_L, BLOCK_D)
    dx = zero_rows(BLOCK_L, BLOCK_D, WIDTH // BLOCK_D)
    for unit in range(0, UNITS, BLOCK_C):
        offs = tl.arange(0, BLOCK_L)[:, None] * UNITS + unit + tl.arange(0, BLOCK_C)[None, :]
        slope = tl.load(slope_ptr + start * UNITS + offs, mask=mask_l[:, None], other=0.0).to(tl.float32)
        dhidden = tl.zeros([BLOCK_L, BLOCK_C], tl.float32)
        for c in tl.static_range(len(dz)):
            w2 = load_tile(w2_ptr + unit * WIDTH_OUT + c * BLOCK_D, WIDTH_OUT, BLOCK_C, BLOCK_D)
            dhidden = dot(dz[c], tl.trans(w2), dhidden, PRECISION)
        dhidden *= slope
        db_at = db_ptr + tl.program_id(0).to(tl.int64) * UNITS + unit + tl.arange(0, BLOCK_C)
        tl.store(db_at, tl.sum(dhidden, 0))
        du = dhidden.to(DTYPE)
        tl.store(du_ptr + start * UNITS + offs, du, mask=mask_l[:, None])
        out = ()
        for c in tl.static_range(len(dx)):
            w1 = load_tile(w1_ptr + c * BLOCK_D * UNITS + unit, UNITS, BLOCK_D, BLOCK_C)
            out = out + (dot(du, tl.trans(w1), dx[c], PRECISION),)
        dx = out
    store_rows(dx_ptr + start * D, D, dx, mask_l, D, BLOCK_L, BLOCK_D)


class MlpGrads(NamedTuple):
    x: Tensor
    w1: Tensor  # of weights and biases in fp32
    b1: Tensor
    w2: Tensor
    b2: Tensor


def _packed(w1: Tensor, b1: Tensor, w2: Tensor, x: Tensor, config: launch.LaunchConfig) -> Packed:
    return pack_feed_forward(MergedLinear(w1, b1), w2, x.dtype, config)


def _config(kernel: object, x: Tensor, w2: Tensor) -> launch.LaunchConfig:
    return launch.select(kernel, x, max(x.shape[-1], len(w2)))


def _values(x: Tensor, w2: Tensor, packed: Packed, config: launch.LaunchConfig) -> dict[str, object]:
    return {
        "D": x.shape[-1], "OUT": len(w2), "UNITS": packed.columns, "PRECISION": launch.precision(x.dtype),
        "BLOCK_L": config.block_l, "BLOCK_C": packed.block, "BLOCK_D": config.block_d,
    }  # fmt: skip


def token_mlp_fwd(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, eps: float, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [..., D], w1 [F,D], b1 [F], w2 [OUT,F], b2 [OUT] -> y [..., OUT] like x, and of each row 1/σ, gelu'(u), h.

    keep: whether a backward follows; without one there are no rows of the last two.
    """
    x = x.contiguous()
    rows, config = x[..., 0].numel(), _config(_token_mlp_fwd_kernel, x, w2)
    packed = _packed(w1, b1, w2, x, config)
    y, rstd = x.new_empty(*x.shape[:-1], len(w2)), x.new_empty(rows, dtype=torch.float32)
    slope, h = (x.new_empty(rows if keep else 0, packed.columns + more) for more in (0, 8))
    args = {
        "x_ptr": x, "w1_ptr": packed.w_in, "b1_ptr": packed.b_in, "w2_ptr": packed.w_out,
        "b2_ptr": b2.float().contiguous(), "y_ptr": y, "rstd_ptr": rstd, "slope_ptr": slope, "h_ptr": h, "rows": rows,
        "eps": eps,
    }  # fmt: skip
    values = _values(x, w2, packed, config) | {"KEEP": keep}
    launch.run(_token_mlp_fwd_kernel, (triton.cdiv(rows, config.block_l),), args, values, config)
    return y, rstd, slope, h


def kept_columns(units: int) -> tuple[int, int]:
    """Of what the forward keeps: columns of gelu'(u), and of h."""
    columns = unit_columns(units, launch.LaunchConfig(1, 1, 1, 1))
    return columns, columns + 8


def token_mlp_bwd(
    dy: Tensor, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, y: Tensor, rstd: Tensor, slope: Tensor, h: Tensor
) -> MlpGrads:
    """-> gradients: of x like x, the others in fp32."""
    x, dy = x.contiguous(), dy.to(x.dtype).contiguous()
    (F, D), OUT, rows = w1.shape, len(w2), rstd.numel()
    config = _config(_token_mlp_bwd_kernel, x, w2)
    packed = _packed(w1, b1, w2, x, config)
    tiles = triton.cdiv(rows, config.block_l)
    dx, dz, du = torch.empty_like(x), x.new_empty(rows, OUT), torch.empty_like(slope)
    db = x.new_empty(tiles, packed.columns, dtype=torch.float32)
    args = {
        "dy_ptr": dy, "y_ptr": y, "rstd_ptr": rstd, "slope_ptr": slope, "w1_ptr": packed.w_in,
        "w2_ptr": packed.w_out, "dx_ptr": dx, "dz_ptr": dz, "du_ptr": du, "db_ptr": db, "rows": rows,
    }  # fmt: skip
    launch.run(_token_mlp_bwd_kernel, (tiles,), args, _values(x, w2, packed, config), config)
    dw1 = matmul_fp32(du.t(), x.reshape(rows, D))[:F]
    dw2 = matmul_fp32(dz.t(), h)
    # Contiguous: compiled code reads them by the strides of the fake.
    return MlpGrads(
        dx, dw1.contiguous(), db.sum(0)[:F].contiguous(), dw2[:, :F].contiguous(), dw2[:, packed.columns].contiguous()
    )
