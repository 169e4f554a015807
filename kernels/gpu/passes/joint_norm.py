"""Layer norm over tokens and channels together, without affine part: one row of millions of numbers for each image.

torch's layer norm gives a row to one block, so a batch of 32 would occupy 32 multiprocessors. Here an image is cut into
tiles, each a program's::

    mean_i, M2_i of each tile          m = Σ nᵢ meanᵢ / n     M2 = Σ M2ᵢ + nᵢ (meanᵢ − m)²    (Chan 1983)
    y = (x − m) / σ, σ² = M2 / n + ε   dx = (dy − mean(dy) − y · mean(dy · y)) / σ

Where x is a sum of the image's own rows and of others that all images share (the tokens' positions), it is added up on
the way, and never stored. Sums are fp32 and have one order. Saved: y, in the dtype of x, and 1/σ.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch
from .._pack import next_power

BLOCK = 4096
"""Elements of a tile."""
CONFIG = launch.LaunchConfig(block_l=BLOCK, block_c=1, num_warps=8, num_stages=1)


@triton.jit
def _tile(x_ptr, shared_ptr, image, size, offs, SHARED: tl.constexpr):
    """Numbers of an image in fp32, with what all images share where there is such."""
    x = tl.load(x_ptr + image * size + offs, mask=offs < size, other=0.0).to(tl.float32)
    if SHARED:
        x += tl.load(shared_ptr + offs, mask=offs < size, other=0.0).to(tl.float32)
    return x


@triton.jit
def _joint_norm_moments_kernel(
    x_ptr, shared_ptr, mean_ptr, square_ptr, size, SHARED: tl.constexpr, BLOCK_L: tl.constexpr
):
    # Program (tile, image): mean and sum of squared deviations of its elements.
    tile = tl.program_id(0).to(tl.int64)
    image = tl.program_id(1).to(tl.int64)
    offs = tile * BLOCK_L + tl.arange(0, BLOCK_L)
    inside = offs < size
    x = _tile(x_ptr, shared_ptr, image, size, offs, SHARED)
    count = tl.minimum(size - tile * BLOCK_L, BLOCK_L).to(tl.float32)
    mean = tl.sum(x, 0) / count
    deviation = tl.where(inside, x - mean, 0.0)
    at = image * tl.num_programs(0) + tile
    tl.store(mean_ptr + at, mean)
    tl.store(square_ptr + at, tl.sum(deviation * deviation, 0))


@triton.jit
def _joint_norm_fwd_kernel(
    x_ptr, shared_ptr, mean_ptr, square_ptr, y_ptr, rstd_ptr, size, tiles, eps,
    SHARED: tl.constexpr, TILES: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    image = tl.program_id(1).to(tl.int64)
    every = tl.arange(0, TILES)
    counts = tl.where(every < tiles, tl.minimum(size - every * BLOCK_L, BLOCK_L), 0).to(tl.float32)
    means = tl.load(mean_ptr + image * tiles + every, mask=every < tiles, other=0.0)
    squares = tl.load(square_ptr + image * tiles + every, mask=every < tiles, other=0.0)
    mean = tl.sum(means * counts, 0) / size
    apart = means - mean
    rstd = tl.rsqrt(tl.sum(squares + counts * apart * apart, 0) / size + eps)
    offs = tile * BLOCK_L + tl.arange(0, BLOCK_L)
    x = _tile(x_ptr, shared_ptr, image, size, offs, SHARED)
    tl.store(y_ptr + image * size + offs, ((x - mean) * rstd).to(y_ptr.dtype.element_ty), mask=offs < size)
    if tile == 0:
        tl.store(rstd_ptr + image, rstd)


@triton.jit
def _joint_norm_sums_kernel(dy_ptr, y_ptr, first_ptr, second_ptr, size, BLOCK_L: tl.constexpr):
    # Program (tile, image): Σ dy and Σ dy · y of its elements.
    tile = tl.program_id(0).to(tl.int64)
    image = tl.program_id(1).to(tl.int64)
    offs = tile * BLOCK_L + tl.arange(0, BLOCK_L)
    dy = tl.load(dy_ptr + image * size + offs, mask=offs < size, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + image * size + offs, mask=offs < size, other=0.0).to(tl.float32)
    at = image * tl.num_programs(0) + tile
    tl.store(first_ptr + at, tl.sum(dy, 0))
    tl.store(second_ptr + at, tl.sum(dy * y, 0))


@triton.jit
def _joint_norm_bwd_kernel(
    dy_ptr, y_ptr, first_ptr, second_ptr, rstd_ptr, dx_ptr, size, tiles, TILES: tl.constexpr, BLOCK_L: tl.constexpr
):
    tile = tl.program_id(0).to(tl.int64)
    image = tl.program_id(1).to(tl.int64)
    every = tl.arange(0, TILES)
    first = tl.sum(tl.load(first_ptr + image * tiles + every, mask=every < tiles, other=0.0), 0) / size
    second = tl.sum(tl.load(second_ptr + image * tiles + every, mask=every < tiles, other=0.0), 0) / size
    rstd = tl.load(rstd_ptr + image)
    offs = tile * BLOCK_L + tl.arange(0, BLOCK_L)
    dy = tl.load(dy_ptr + image * size + offs, mask=offs < size, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + image * size + offs, mask=offs < size, other=0.0).to(tl.float32)
    dx = (dy - first - y * second) * rstd
    tl.store(dx_ptr + image * size + offs, dx.to(dx_ptr.dtype.element_ty), mask=offs < size)


def _partials(x: Tensor, tiles: int) -> tuple[Tensor, Tensor]:
    first, second = (x.new_empty(x.shape[0], tiles, dtype=torch.float32) for _ in range(2))
    return first, second


def joint_norm_fwd(x: Tensor, eps: float, shared: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x [B,T,S], shared [T,S] to be added to each image, or None -> y like x (contiguous), normed over T and S
    together, and 1/σ [B] fp32."""
    x = x.contiguous()
    B, size = x.shape[0], x.shape[1] * x.shape[2]
    tiles = triton.cdiv(size, BLOCK)
    mean, square = _partials(x, tiles)
    y, rstd = torch.empty_like(x), x.new_empty(B, dtype=torch.float32)
    args: dict[str, Any] = {"x_ptr": x, "shared_ptr": x if shared is None else shared.contiguous()}
    args |= {"mean_ptr": mean, "square_ptr": square, "size": size}
    values = {"SHARED": shared is not None, "BLOCK_L": BLOCK}
    launch.run(_joint_norm_moments_kernel, (tiles, B), args, values, CONFIG)
    args |= {"y_ptr": y, "rstd_ptr": rstd, "tiles": tiles, "eps": eps}
    launch.run(_joint_norm_fwd_kernel, (tiles, B), args, values | {"TILES": next_power(tiles)}, CONFIG)
    return y, rstd


def joint_norm_bwd(dy: Tensor, y: Tensor, rstd: Tensor) -> Tensor:
    """-> dx like y."""
    dy = dy.to(y.dtype).contiguous()
    B, size = y.shape[0], y.shape[1] * y.shape[2]
    tiles = triton.cdiv(size, BLOCK)
    first, second = _partials(y, tiles)
    dx = torch.empty_like(y)
    args = {"dy_ptr": dy, "y_ptr": y, "first_ptr": first, "second_ptr": second, "size": size}
    launch.run(_joint_norm_sums_kernel, (tiles, B), args, {"BLOCK_L": BLOCK}, CONFIG)
    args |= {"rstd_ptr": rstd, "dx_ptr": dx, "tiles": tiles}
    launch.run(_joint_norm_bwd_kernel, (tiles, B), args, {"TILES": next_power(tiles), "BLOCK_L": BLOCK}, CONFIG)
    return dx
