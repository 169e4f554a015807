"""A bias and GELU, forward and backward, as one pass over memory each: formulas in the package's docstring."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch
from .._pack import next_power
from .._tiles import gelu, gelu_and_grad
from . import COLUMNS, PROGRAMS


@triton.jit
def _bias_gelu_fwd_kernel(u_ptr, bias_ptr, h_ptr, rows, D: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr):
    # Program: one chunk of columns of one tile of rows; on one axis, since tiles may be more than another axis holds.
    CHUNKS: tl.constexpr = triton.cdiv(D, BLOCK_D)
    offs_d = tl.program_id(0) % CHUNKS * BLOCK_D + tl.arange(0, BLOCK_D)
    start = (tl.program_id(0) // CHUNKS).to(tl.int64) * BLOCK_L
    offs = tl.arange(0, BLOCK_L)[:, None] * D + offs_d[None, :]
    mask = (start + tl.arange(0, BLOCK_L) < rows)[:, None]
    if D % BLOCK_D:
        mask = mask & (offs_d < D)[None, :]
    bias = tl.load(bias_ptr + offs_d, mask=offs_d < D, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + start * D + offs, mask=mask, other=0.0).to(tl.float32) + bias[None, :]
    tl.store(h_ptr + start * D + offs, gelu(u, u_ptr.dtype.element_ty).to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _bias_gelu_bwd_kernel(
    dh_ptr, u_ptr, bias_ptr, du_ptr, dbias_ptr, rows, blocks,
    D: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # Program (chunk of columns, part of the rows): du of them, and the sum of each column in fp32.
    offs_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    part = tl.program_id(1).to(tl.int64)
    offs = tl.arange(0, BLOCK_L)[:, None] * D + offs_d[None, :]
    bias = tl.load(bias_ptr + offs_d, mask=offs_d < D, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
    for block in range(blocks):
        start = (part * blocks + block) * BLOCK_L
        mask = (start + tl.arange(0, BLOCK_L) < rows)[:, None]
        if D % BLOCK_D:
            mask = mask & (offs_d < D)[None, :]
        dh = tl.load(dh_ptr + start * D + offs, mask=mask, other=0.0)
        u = tl.load(u_ptr + start * D + offs, mask=mask, other=0.0).to(tl.float32) + bias[None, :]
        _, slope = gelu_and_grad(u, u_ptr.dtype.element_ty)
        du = dh.to(tl.float32) * slope  # past the end dh is 0
        tl.store(du_ptr + start * D + offs, du.to(du_ptr.dtype.element_ty), mask=mask)
        total += du
    tl.store(dbias_ptr + part * D + offs_d, tl.sum(total, 0), mask=offs_d < D)


def _config(block_l: int, D: int) -> launch.LaunchConfig:
    return launch.LaunchConfig(block_l, 1, num_warps=4, num_stages=1, block_d=min(COLUMNS, next_power(D)))


def _values(config: launch.LaunchConfig, D: int) -> dict[str, int]:
    return {"D": D, "BLOCK_L": config.block_l, "BLOCK_D": config.block_d}


def bias_gelu_fwd(u: Tensor, bias: Tensor) -> Tensor:
    """u [..., D], bias [D] -> h like u (contiguous)."""
    u = u.contiguous()
    h, D = torch.empty_like(u), u.shape[-1]
    rows = u.numel() // max(D, 1)
    config = _config(64, D)
    grid = (triton.cdiv(D, config.block_d) * triton.cdiv(rows, config.block_l),)
    args = {"u_ptr": u, "bias_ptr": bias.contiguous(), "h_ptr": h, "rows": rows}
    launch.run(_bias_gelu_fwd_kernel, grid, args, _values(config, D), config)
    return h


def bias_gelu_bwd(dh: Tensor, u: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """-> du like u (contiguous), dbias [D] fp32."""
    u, dh = u.contiguous(), dh.to(u.dtype).contiguous()
    du, D = torch.empty_like(u), u.shape[-1]
    rows = u.numel() // max(D, 1)
    config = _config(32, D)
    chunks = triton.cdiv(D, config.block_d)
    parts, blocks = launch.split(rows, config.block_l, chunks, PROGRAMS)
    dbias = u.new_empty(parts, D, dtype=torch.float32)
    args = {
        "dh_ptr": dh, "u_ptr": u, "bias_ptr": bias.contiguous(), "du_ptr": du, "dbias_ptr": dbias, "rows": rows,
        "blocks": blocks,
    }  # fmt: skip
    launch.run(_bias_gelu_bwd_kernel, (chunks, parts), args, _values(config, D), config)
    return du, dbias.sum(0)
