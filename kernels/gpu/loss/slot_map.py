"""The interaction penalty of the summed slot maps and its gradient, one pass over them.

    w = Σ_layers map      pairs = weight · Σ_{j<k} w_j w_k      dw_k = factor · weight · (Σ_j w_j − w_k)

Pairs are each weight times the running sum of those before it, which does not cancel.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import launch

CONFIG = launch.LaunchConfig(block_l=256, block_c=1, num_warps=4, num_stages=1)


@triton.jit
def _weight(maps_ptr, offs, mask, size, LAYERS: tl.constexpr):
    """One slot's weight of each pixel, summed over layers."""
    total = tl.load(maps_ptr + offs, mask=mask, other=0.0)
    for layer in tl.static_range(1, LAYERS):
        total += tl.load(maps_ptr + layer * size + offs, mask=mask, other=0.0)
    return total


@triton.jit
def _slot_map_loss_kernel(
    maps_ptr, weight_ptr, factor_ptr, dmap_ptr, sums_ptr, rows, size,
    LAYERS: tl.constexpr, K: tl.constexpr, WEIGHTED: tl.constexpr, KEEP: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    # Program: a tile of pixels, and the sum of its pairs. size: numbers of a layer's map.
    offs_l = tl.program_id(0).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    mask = offs_l < rows
    size = tl.cast(size, tl.int64)  # also of 1, which Triton makes a constant
    total = tl.zeros([BLOCK_L], tl.float32)
    pairs = tl.zeros([BLOCK_L], tl.float32)
    for k in tl.static_range(K):
        w = _weight(maps_ptr, offs_l * K + k, mask, size, LAYERS)
        pairs += w * total
        total += w
    if WEIGHTED:
        weight = tl.load(weight_ptr + offs_l, mask=mask, other=0.0)
        pairs *= weight
    tl.store(sums_ptr + tl.program_id(0), tl.sum(pairs, 0))
    if KEEP:
        factor = tl.load(factor_ptr)
        for k in tl.static_range(K):
            dw = (total - _weight(maps_ptr, offs_l * K + k, mask, size, LAYERS)) * factor
            if WEIGHTED:
                dw *= weight
            tl.store(dmap_ptr + offs_l * K + k, dw, mask=mask)


def slot_map_loss(maps: Tensor, weight: Tensor | None, factor: Tensor | None) -> tuple[Tensor, Tensor]:
    """maps [layers,B,L,K] fp32, weight [B,L] fp32 or None -> Σ pairs, fp32 0-d, and its gradient times factor.

    factor: fp32 0-d; None: the gradient is not needed, and has no rows.
    """
    layers, B, L, K = maps.shape
    tiles = triton.cdiv(B * L, CONFIG.block_l)
    dmap = maps.new_empty(B if factor is not None else 0, L, K)
    sums = maps.new_empty(tiles)
    args = {
        "maps_ptr": maps, "weight_ptr": maps if weight is None else weight.contiguous(),
        "factor_ptr": maps if factor is None else factor, "dmap_ptr": dmap, "sums_ptr": sums, "rows": B * L,
        "size": B * L * K,
    }  # fmt: skip
    values = {
        "LAYERS": layers, "K": K, "WEIGHTED": weight is not None, "KEEP": factor is not None,
        "BLOCK_L": CONFIG.block_l,
    }  # fmt: skip
    launch.run(_slot_map_loss_kernel, (tiles,), args, values, CONFIG)
    return sums.sum(), dmap
