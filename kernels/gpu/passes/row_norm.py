# ruff: noqa: RUF005  (the Triton front end has no starred tuples)
"""Layer norm of rows, forward and backward, as one pass over memory each: formulas in the package's docstring."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch
from .._pack import next_power
from .._tiles import bias_rows, inside_rows, load_rows, store_rows, zero_rows
from . import COLUMNS, PROGRAMS


@triton.jit
def _wide(rows):
    """Rows in fp32."""
    out = ()
    for c in tl.static_range(len(rows)):
        out = out + (rows[c].to(tl.float32),)
    return out


@triton.jit
def _centred(rows, mean, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """rows − mean, zeros past column D."""
    out = ()
    for c in tl.static_range(len(rows)):
        out = out + (rows[c] - mean[:, None],)
    return inside_rows(out, D, BLOCK_D)


@triton.jit
def _row_sum(rows):
    """Of each row, all chunks together."""
    total = rows[0]
    for c in tl.static_range(1, len(rows)):
        total += rows[c]
    return tl.sum(total, 1)


@triton.jit
def _times(a, b):
    out = ()
    for c in tl.static_range(len(a)):
        out = out + (a[c] * b[c],)
    return out


@triton.jit
def _scaled(rows, weight_ptr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """rows ∘ weight, by columns."""
    out = ()
    for c in tl.static_range(len(rows)):
        offs_d = c * BLOCK_D + tl.arange(0, BLOCK_D)
        out = out + (rows[c] * tl.load(weight_ptr + offs_d, mask=offs_d < D, other=0.0).to(tl.float32)[None, :],)
    return out


@triton.jit
def _row_norm_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr, rows, eps,
    D: tl.constexpr, PITCH: tl.constexpr, AFFINE: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # AFFINE: γ and β are applied to what was normed; else the bias is added before. PITCH: columns of a row of y.
    start = tl.program_id(0).to(tl.int64) * BLOCK_L
    mask_l = start + tl.arange(0, BLOCK_L) < rows
    x = _wide(load_rows(x_ptr + start * D, D, mask_l, D, BLOCK_L, BLOCK_D))
    if not AFFINE:
        x = bias_rows(x, bias_ptr, D, BLOCK_D)
    mean = _row_sum(x) / D
    y = _centred(x, mean, D, BLOCK_D)  # the whole row is in registers, so nothing cancels
    rstd = tl.rsqrt(_row_sum(_times(y, y)) / D + eps)
    out = ()
    for c in tl.static_range(len(y)):
        out = out + (y[c] * rstd[:, None],)
    if AFFINE:
        out = bias_rows(_scaled(out, weight_ptr, D, BLOCK_D), bias_ptr, D, BLOCK_D)
    store_rows(y_ptr + start * PITCH, PITCH, out, mask_l, PITCH, BLOCK_L, BLOCK_D)
    tl.store(mean_ptr + start + tl.arange(0, BLOCK_L), mean, mask=mask_l)
    tl.store(rstd_ptr + start + tl.arange(0, BLOCK_L), rstd, mask=mask_l)


@triton.jit
def _row_norm_bwd_kernel(
    dy_ptr, x_ptr, vector_ptr, mean_ptr, rstd_ptr, dx_ptr, sums_ptr, rows, blocks,
    D: tl.constexpr, PITCH: tl.constexpr, DX: tl.constexpr, AFFINE: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # Program: a part of the rows. The vector is γ, or without an affine part the bias. Sums of columns, [1 or 2, D] a
    # program: AFFINE dγ and dβ, else db. PITCH, DX: columns of a row of dy and of dx, zeros past the first D.
    CHUNKS: tl.constexpr = triton.cdiv(D, BLOCK_D)
    part = tl.program_id(0).to(tl.int64)
    first_sums = zero_rows(BLOCK_L, BLOCK_D, CHUNKS)
    second_sums = first_sums
    for block in range(blocks):
        start = (part * blocks + block) * BLOCK_L
        offs_l = start + tl.arange(0, BLOCK_L)
        mask_l = offs_l < rows
        x = _wide(load_rows(x_ptr + start * D, D, mask_l, D, BLOCK_L, BLOCK_D))
        dy = _wide(load_rows(dy_ptr + start * PITCH, PITCH, mask_l, PITCH, BLOCK_L, BLOCK_D))
        mean = tl.load(mean_ptr + offs_l, mask=mask_l, other=0.0)
        rstd = tl.load(rstd_ptr + offs_l, mask=mask_l, other=0.0)  # past the end nothing is added to any sum
        dn = dy
        if AFFINE:
            dn = _scaled(dy, vector_ptr, D, BLOCK_D)
        else:
            x = bias_rows(x, vector_ptr, D, BLOCK_D)
        centred = _centred(x, mean, D, BLOCK_D)
        first = _row_sum(dn) / D
        second = rstd * rstd * _row_sum(_times(dn, centred)) / D
        dx = ()
        new_first, new_second = (), ()
        for c in tl.static_range(CHUNKS):
            dx = dx + (rstd[:, None] * (dn[c] - first[:, None] - centred[c] * second[:, None]),)
            if AFFINE:
                new_first = new_first + (first_sums[c] + dy[c] * (centred[c] * rstd[:, None]),)
                new_second = new_second + (second_sums[c] + dy[c],)
            else:
                new_first = new_first + (first_sums[c] + dx[c],)
                new_second = new_second + (second_sums[c],)
        first_sums, second_sums = new_first, new_second
        store_rows(dx_ptr + start * DX, DX, inside_rows(dx, D, BLOCK_D), mask_l, DX, BLOCK_L, BLOCK_D)
    for c in tl.static_range(CHUNKS):
        offs_d = c * BLOCK_D + tl.arange(0, BLOCK_D)
        if AFFINE:
            tl.store(sums_ptr + part * 2 * D + offs_d, tl.sum(first_sums[c], 0), mask=offs_d < D)
            tl.store(sums_ptr + part * 2 * D + D + offs_d, tl.sum(second_sums[c], 0), mask=offs_d < D)
        else:
            tl.store(sums_ptr + part * D + offs_d, tl.sum(first_sums[c], 0), mask=offs_d < D)


def _config(pitch: int) -> launch.LaunchConfig:
    """A tile holds whole rows."""
    warps = 4 if pitch <= 192 else 8
    return launch.LaunchConfig(16, 1, warps, num_stages=1, block_d=min(COLUMNS, next_power(pitch)))


def _values(config: launch.LaunchConfig, D: int, pitch: int, affine: bool) -> dict[str, int | bool]:
    return {"D": D, "PITCH": pitch, "AFFINE": affine, "BLOCK_L": config.block_l, "BLOCK_D": config.block_d}


def row_norm_fwd(
    x: Tensor, weight: Tensor | None, bias: Tensor, eps: float, pitch: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """x [..., D] -> y [..., pitch or D] in the dtype of x, zeros past column D, and the mean and 1/σ of each row, fp32.

    weight, bias: γ and β [D]. Without a weight it is ``bias_norm``, and the bias is added to x first.
    """
    x = x.contiguous()
    D = x.shape[-1]
    rows, pitch = x.numel() // max(D, 1), pitch or D
    y = x.new_empty(*x.shape[:-1], pitch)
    mean, rstd = (x.new_empty(rows, dtype=torch.float32) for _ in range(2))
    config = _config(pitch)
    args = {
        "x_ptr": x, "weight_ptr": bias if weight is None else weight.contiguous(), "bias_ptr": bias.contiguous(),
        "y_ptr": y, "mean_ptr": mean, "rstd_ptr": rstd, "rows": rows, "eps": eps,
    }  # fmt: skip
    values = _values(config, D, pitch, weight is not None)
    launch.run(_row_norm_fwd_kernel, (triton.cdiv(rows, config.block_l),), args, values, config)
    return y, mean, rstd


def row_norm_bwd(
    dy: Tensor, x: Tensor, vector: Tensor, mean: Tensor, rstd: Tensor, affine: bool, dx_pitch: int | None = None
) -> tuple[Tensor, Tensor]:
    """dy [..., pitch], in whose columns past D are zeros -> dx [..., dx_pitch or D], zeros past column D; sums of
    columns, fp32: [2, D] of dγ and dβ where it is affine (vector: γ), else [1, D] of the bias (vector: the bias)."""
    x, dy = x.contiguous(), dy.to(x.dtype).contiguous()
    D, pitch = x.shape[-1], dy.shape[-1]
    dx = x.new_empty(*x.shape[:-1], dx_pitch or D)
    rows = x.numel() // max(D, 1)
    config = _config(max(pitch, dx.shape[-1]))
    parts, blocks = launch.split(rows, config.block_l, 1, PROGRAMS)
    sums = x.new_empty(parts, 2 if affine else 1, D, dtype=torch.float32)
    args = {
        "dy_ptr": dy, "x_ptr": x, "vector_ptr": vector.contiguous(), "mean_ptr": mean, "rstd_ptr": rstd, "dx_ptr": dx,
        "sums_ptr": sums, "rows": rows, "blocks": blocks,
    }  # fmt: skip
    values = {"DX": dx.shape[-1]} | _values(config, D, pitch, affine)
    launch.run(_row_norm_bwd_kernel, (parts,), args, values, config)
    return dx, sums.sum(0)


def bias_norm_fwd(x: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x [..., D], bias [D] -> x + bias, each row normed without affine part, and mean and 1/σ of each row."""
    return row_norm_fwd(x, None, bias, eps)


def bias_norm_bwd(dy: Tensor, x: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """-> dx like x (contiguous), dbias [D] fp32."""
    dx, sums = row_norm_bwd(dy, x, bias, mean, rstd, affine=False)
    return dx, sums[0]
