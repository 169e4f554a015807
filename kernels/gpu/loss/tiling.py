"""How a decoder's loss is cut into tiles: as many rows (images x pixels) at once as their tensors have memory for."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import torch

from fastslots.records import FoldedDecoder, FoldedLayer, OutputHead

from .._pack import attention_block, padded_slots, pitch, round_up, unit_columns
from ..launch import LaunchConfig
from ..output_head import padded
from .head import serves as head_serves

TILE_BYTES, TILE_SHARE = 4 << 30, 8
"""Memory of a tile's tensors: this, or where that is less, one part in so many of the device's."""
WIDEST = LaunchConfig(1, block_c=64, num_warps=1, num_stages=1)
"""Of the most hidden columns that kernels take at once: the tensors which they keep are padded to whole blocks."""


class Tiling(NamedTuple):
    rows: int  # images x pixels of a tile
    dtype: torch.dtype  # of activations and products


@cache
def tile_bytes(device: int) -> int:
    return min(TILE_BYTES, torch.cuda.get_device_properties(device).total_memory // TILE_SHARE)


def tile_rows(decoder: FoldedDecoder, dtype: torch.dtype) -> int:
    """Rows of a tile whose tensors take the memory of a tile.

    A function of device, shapes and type alone, so the order of sums, and with it every bit, is the same in each run.
    A tile is a few dozen launches, so fewer of them are faster; what bounds them is memory, which does not grow with
    the batch or the resolution.
    """
    like = decoder.head.norm_weight
    memory = tile_bytes(like.device.index or 0) if like.is_cuda else TILE_BYTES
    return max(1, memory // row_bytes(decoder, dtype))


def row_bytes(decoder: FoldedDecoder, dtype: torch.dtype) -> int:
    """Memory of all tensors that a row of a tile has at once, where every gradient is needed.

    What the layers keep stays until the backward comes to them. Beside it are at first the head's tensors, and when
    these are gone again those of the last layer's backward.
    """
    (D, _, K), layers, size = decoder.layers[0].folded.G.shape[1:], decoder.layers, dtype.itemsize
    kept = sum(D + pitch(D + 1) + 2 * _units(layer) + 8 for layer in layers)  # y, n, slope and h
    maps = (len(layers) + 1) * K + len(layers)  # those of the layers, the gradient of their sum, and 1/σ
    at_once = max(_of_head(decoder.head, D, dtype), _of_backward(layers[-1], D) * size)
    return kept * size + maps * torch.float32.itemsize + at_once


def _of_backward(layer: FoldedLayer, D: int) -> int:
    """Elements of a layer's backward: dy and dz, then du, or dx, n, A and dS. Its output is gone by then."""
    H, K = layer.folded.G.shape[2:]
    slots = padded_slots(K)
    columns = round_up(H * slots, attention_block(WIDEST, H, slots))
    return 2 * pitch(D) + max(_units(layer), pitch(D) + pitch(D + 1) + 2 * columns + 8) - D


def _of_head(head: OutputHead, D: int, dtype: torch.dtype) -> int:
    """Bytes of the head's forward and backward: as one with the loss, or as products of cuBLAS."""
    outs = [len(weight) for weight in head.weights]
    if head_serves(head, D):  # n, slope, h and du; u2, which becomes its gradient; dx, and 1/σ
        elements = pitch(D + 1) + 3 * unit_columns(outs[0], WIDEST) + 8 + pitch(outs[1]) + pitch(D)
        return elements * dtype.itemsize + torch.float32.itemsize
    widths = [padded(width, dtype) for width in (D, *outs)]
    # The norm's result, sums and inputs of each map, the pixels and their gradient, and two gradients on the way back.
    elements = widths[0] + 2 * sum(widths[1:]) + 2 * max(*widths[:-1], pitch(D))
    # Mean and 1/σ, and the errors of the pixels: as numbers, squared, weighted and as a gradient.
    return elements * dtype.itemsize + (2 + 5 * outs[-1]) * torch.float32.itemsize


def _units(layer: FoldedLayer) -> int:
    return unit_columns(len(layer.ff.w1), WIDEST)


def tiles_of(batch: int, pixels: int, rows: int) -> Iterator[tuple[slice, slice]]:
    """Slices of images and of pixels; several images at once, or parts of one."""
    images, step = max(1, rows // max(pixels, 1)), max(1, min(pixels, rows))
    for image in range(0, batch, images):
        for start in range(0, pixels, step):
            yield slice(image, min(image + images, batch)), slice(start, min(start + step, pixels))
