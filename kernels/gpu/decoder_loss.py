"""The decoder's loss on a GPU, tile by tile: forward and backward of a tile of pixels right behind each other.

    total = recon_weight · Σ (x − x̂)² / B  +  interaction_weight · mean_{b,l} Σ_{j<k} w_j w_k,   w = layer mean of maps

Given the slots, pixels are independent. So a tile (whole images, or part of one where an image is larger) goes through
the decoder and back before the next one starts; what leaves it are gradients of weights, folded projections and
queries. Memory beyond those does not grow with the batch or the resolution. Layers are the fused kernels; the output
head (a norm and a few products 180 wide) is cuBLAS, differentiated by hand. Nothing waits for the device (a test runs
it on tensors without values), so on CUDA all tiles together are captured in a CUDA graph and replayed (``graphs``).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import accumulate
from types import EllipsisType
from typing import NamedTuple, cast

import torch
from torch import Tensor

from fastslots.records import LayerGrads, LossInputs, LossResult, OutputHead

from .decoder_layer import Needs, decoder_layer_bwd, decoder_layer_fwd
from .graphs import GRAPHS, Graphs, wanted
from .launch import allows_tf32
from .output_head import SavedHead, output_head_bwd, output_head_fwd

TILE_ROWS = 65536
"""Rows (images x pixels) of a tile where the size of L2 is not known."""
LIVE_TENSORS = 4
"""Tensors [rows, D] that a layer's backward goes back and forth between: x, z and their gradients."""
MIN_ROWS, MAX_ROWS = 16384, 131072
"""At least a program of 128 rows for each of about 128 multiprocessors; beyond the most, L2 would not be the limit."""


@cache
def _rows_in_l2(device: int, row_bytes: int) -> int:
    fit = torch.cuda.get_device_properties(device).L2_cache_size // (LIVE_TENSORS * row_bytes)
    return min(max(fit // 4096 * 4096, MIN_ROWS), MAX_ROWS)


def tile_rows(like: Tensor, dtype: torch.dtype) -> int:
    """Rows of a tile whose tensors, of the width of ``like``, stay in the L2 of its device (H100: 32,768 x 180 bf16).

    A function of device, width and type alone, so the order of sums, and with it every bit, is the same in each run.
    """
    if not like.is_cuda:
        return TILE_ROWS
    return _rows_in_l2(like.device.index or 0, like.shape[-1] * dtype.itemsize)


def _tiles(batch: int, pixels: int, rows: int) -> Iterator[tuple[slice, slice]]:
    """Slices of images and of pixels; several images at once, or parts of one."""
    images, step = max(1, rows // max(pixels, 1)), max(1, min(pixels, rows))
    for image in range(0, batch, images):
        for start in range(0, pixels, step):
            yield slice(image, min(image + images, batch)), slice(start, min(start + step, pixels))


def _pair_sum(slot_map: Tensor) -> Tensor:
    """Σ_{j<k} w_j w_k of each pixel, as each weight times the running sum of those before it (it does not cancel)."""
    # Not ``cumsum``, which torch refuses on a GPU where a program asks for deterministic algorithms.
    before = list(accumulate(slot_map[..., :-1].unbind(-1)))
    return (slot_map[..., 1:] * torch.stack(before, -1)).sum(-1) if before else torch.zeros_like(slot_map[..., 0])


def decoder_loss(
    inputs: LossInputs,
    need: Collection[str],
    grad_scale: float | Tensor = 1.0,
    rows: int | None = None,
    graphs: Graphs | None = None,
) -> LossResult:
    """Loss terms and the gradients of ``grad_scale · total``.

    Args:
        inputs: with queries [B or 1,L,D] that are made already.
        need: names of ``inputs.tensors()`` whose gradients are needed; without any, only the forward runs.
        grad_scale: the loss scale of mixed precision, a float or a 0-d tensor.
        rows: images x pixels of a tile; None: as many as fit L2.
        graphs: where to capture and replay; None: this process's for CUDA tensors (``graphs.wanted``), else nowhere.
    """
    tensors = inputs.tensors()
    needed = [name for name in tensors if name in need]
    queries = tensors["queries"]
    device_type = queries.device.type
    autocast = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type) if autocast else queries.dtype
    tiling = Tiling(tile_rows(queries, dtype) if rows is None else rows, dtype)
    if graphs is None and wanted(queries.device):
        graphs = GRAPHS
    with torch.no_grad(), torch.autocast(device_type, enabled=False):
        if graphs is None:
            recon, interaction, *grads = _run(inputs, needed, grad_scale, tiling)
        else:
            recon, interaction, *grads = _replay(graphs, inputs, needed, grad_scale, tiling)
    like = {name: grad.to(tensors[name].dtype) for name, grad in zip(needed, grads, strict=True)}
    return LossResult(recon, interaction, like)


class Tiling(NamedTuple):
    rows: int  # images x pixels of a tile
    dtype: torch.dtype  # of activations and products


def _replay(
    graphs: Graphs, inputs: LossInputs, need: Sequence[str], grad_scale: float | Tensor, tiling: Tiling
) -> list[Tensor]:
    """``_run`` as a function of tensors alone: weights that change from step to step are tensors too."""
    tensors, device = inputs.tensors(), inputs.target.device
    others = {"target": inputs.target, "pixel_weight": inputs.pixel_weight, "slot_mask": inputs.slot_mask}
    present = {name: t for name, t in others.items() if t is not None}
    scalars = {
        "recon_weight": _scalar(inputs.recon_weight, device),
        "interaction_weight": _scalar(inputs.interaction_weight, device),
        "grad_scale": _scalar(grad_scale, device),
    }
    every = tensors | present | scalars

    def function(values: Sequence[Tensor]) -> list[Tensor]:
        at = dict(zip(every, values, strict=True))
        same = replace(
            inputs.with_tensors(at), target=at["target"],
            pixel_weight=at.get("pixel_weight"), slot_mask=at.get("slot_mask"),
            recon_weight=at["recon_weight"], interaction_weight=at["interaction_weight"],
        )  # fmt: skip
        return _run(same, need, at["grad_scale"], tiling)

    key = (tuple(need), tiling, tuple(every), inputs.eps, allows_tf32())
    return graphs(key, function, list(every.values()))


def _scalar(value: float | Tensor, device: torch.device) -> Tensor:
    """A 0-d fp32 tensor on the device, made without waiting for it."""
    if isinstance(value, Tensor):
        return value.to(device, torch.float32, non_blocking=True)
    return torch.full((), value, device=device, dtype=torch.float32)


class _Sums:
    """The gradients that are needed, summed over tiles in fp32, by the names of ``LossInputs.tensors``."""

    def __init__(self, inputs: LossInputs, need: Sequence[str]):
        tensors = inputs.tensors()
        self.sums = {name: torch.zeros_like(tensors[name], dtype=torch.float32) for name in need}
        self.layers = [
            Needs(*(any(f"layers.{i}.{name}" in self.sums for name in record._fields) for record in layer))
            for i, layer in enumerate(inputs.decoder.layers)
        ]
        self.head = any(name.startswith("head.") for name in need)
        reached = [any(layer) or "queries" in self.sums for layer in self.layers]
        self.first = reached.index(True) if any(reached) else len(reached)
        """The first layer that the backward has to reach."""

    def add(self, name: str, grad: Tensor, part: slice | tuple[slice, slice] | EllipsisType = ...) -> None:
        if name in self.sums:
            self.sums[name][part] += grad

    def add_layer(self, i: int, grads: LayerGrads, images: slice) -> None:
        for name, grad in {} if grads.folded is None else grads.folded._asdict().items():
            self.add(f"layers.{i}.{name}", grad, ... if name == "b" else images)  # b belongs to no image
        for name, grad in {} if grads.ff is None else grads.ff._asdict().items():
            self.add(f"layers.{i}.{name}", grad)

    def add_head(self, grads: OutputHead) -> None:
        self.add("head.norm_weight", grads.norm_weight)
        self.add("head.norm_bias", grads.norm_bias)
        for i, (dweight, dbias) in enumerate(zip(grads.weights, grads.biases, strict=True)):
            self.add(f"head.weights.{i}", dweight)
            self.add(f"head.biases.{i}", dbias)


class _Decoded(NamedTuple):
    """A tile on its way forward, and what its backward needs."""

    xs: list[Tensor]  # the input of each layer
    slot_map: Tensor  # mean over layers
    pixels: Tensor  # [N, C]
    head: SavedHead


def _decode(tile: LossInputs) -> _Decoded:
    layers = tile.decoder.layers
    xs, slot_map = [cast(Tensor, tile.decoder.queries)], torch.zeros((), device=tile.target.device)
    for folded, ff in layers:
        y, layer_map = decoder_layer_fwd(xs[-1], folded, ff, tile.slot_mask, tile.eps)
        slot_map = slot_map + layer_map / len(layers)
        xs.append(y)
    return _Decoded(xs, slot_map, *output_head_fwd(xs.pop().flatten(0, 1), tile.decoder.head, tile.eps))


def _run(inputs: LossInputs, need: Sequence[str], grad_scale: float | Tensor, tiling: Tiling) -> list[Tensor]:
    """-> recon, interaction and the gradients that are needed, in fp32."""
    sums = _Sums(inputs, need)
    B, L, _ = inputs.target.shape
    queries, layers, head = inputs.decoder
    head = OutputHead(
        head.norm_weight.to(tiling.dtype), head.norm_bias.to(tiling.dtype),
        [w.to(tiling.dtype) for w in head.weights], [b.to(tiling.dtype) for b in head.biases],
    )  # fmt: skip
    queries = cast(Tensor, queries).to(tiling.dtype)
    inputs = replace(inputs, decoder=inputs.decoder._replace(queries=queries, head=head))
    recon = torch.zeros((), device=queries.device, dtype=torch.float32)
    interaction = torch.zeros_like(recon)
    for images, pixels in _tiles(B, L, tiling.rows):
        tile = inputs.part(pixels, images)
        weight = None if tile.pixel_weight is None else tile.pixel_weight.float()
        decoded = _decode(tile)
        slot_map = decoded.slot_map
        error = decoded.pixels.float() - tile.target.flatten(0, 1).float()
        pairs = _pair_sum(slot_map)
        if weight is None:
            recon += error.square().sum() / B
            interaction += pairs.sum() / (B * L)
        else:
            recon += (error.square().sum(-1) * weight.flatten()).sum() / B
            interaction += (pairs * weight).sum() / (B * L)
        if not need:
            continue
        dpixels = error * (2 / B) * (grad_scale * inputs.recon_weight)
        dmap = (slot_map.sum(-1, keepdim=True) - slot_map) / (B * L * len(layers))
        dmap = dmap * (grad_scale * inputs.interaction_weight)
        if weight is not None:
            dpixels, dmap = dpixels * weight.flatten()[:, None], dmap * weight[..., None]
        dx = _backward(tile, decoded, dpixels.to(tiling.dtype), dmap, images, sums)
        sums.add("queries", dx, (slice(None) if len(queries) != B else images, pixels))
    return [recon, interaction, *sums.sums.values()]


def _backward(tile: LossInputs, decoded: _Decoded, dpixels: Tensor, dmap: Tensor, images: slice, sums: _Sums) -> Tensor:
    """Adds the gradients of a tile's head and layers -> that of the first layer reached: of the queries, if needed."""
    dx, dhead = output_head_bwd(dpixels, tile.decoder.head, decoded.head, sums.head)
    dx = dx.view(-1, tile.target.shape[1], dx.shape[-1])
    if dhead is not None:
        sums.add_head(dhead)
    for i in reversed(range(sums.first, len(tile.decoder.layers))):
        folded, ff = tile.decoder.layers[i]
        grads = decoder_layer_bwd(dx, dmap, decoded.xs[i], folded, ff, tile.slot_mask, tile.eps, sums.layers[i])
        sums.add_layer(i, grads, images)
        dx = grads.x
    return dx
