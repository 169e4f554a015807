"""The decoder's loss on a GPU, tile by tile: forward and backward of a tile of pixels right behind each other.

    total = recon_weight · Σ (x − x̂)² / B  +  interaction_weight · mean_{b,l} Σ_{j<k} w_j w_k,   w = layer mean of maps

Given the slots, pixels are independent. So a tile (whole images, or part of one where an image is larger) goes through
the decoder and back before the next one starts; what leaves it are gradients of weights, folded projections and
queries. Memory beyond those does not grow with the batch or the resolution: a tile takes at most ``TILE_BYTES``.
Weights are packed once, outside the loop over tiles. Layers are the fused kernels; the output head's
products are cuBLAS's, and it is differentiated by hand. Nothing waits for the device (a test runs it on tensors without
values), so on CUDA all tiles together are captured in a CUDA graph and replayed (``graphs``).
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

from ._pack import LayerPacks
from .decoder_layer import Needs, Normed, layer_backward, layer_forward
from .graphs import GRAPHS, Graphs, wanted
from .launch import allows_tf32
from .output_head import PackedHead, SavedHead, output_head_bwd, output_head_fwd, pack_head

TILE_BYTES, TILE_SHARE = 4 << 30, 8
"""Memory of a tile's tensors: this, or where that is less, one part in so many of the device's."""
ROW_TENSORS = 22
"""Tensors [rows, D] that a tile of a two-layer decoder has at once, in the compute dtype: input, n and output of each
layer, what the head keeps and makes, and h and du (twice as wide) of the layer whose gradients are made. What the
attention's gradients take (n, and A and dS, as wide as heads x slots) comes when those are gone again, and is less."""


@cache
def _tile_bytes(device: int) -> int:
    return min(TILE_BYTES, torch.cuda.get_device_properties(device).total_memory // TILE_SHARE)


def tile_rows(like: Tensor, dtype: torch.dtype) -> int:
    """Rows (images x pixels) of a tile whose tensors, of the width of ``like``, take the memory of a tile.

    A function of device, width and type alone, so the order of sums, and with it every bit, is the same in each run.
    A tile is a few dozen launches, so fewer of them are faster; what bounds them is memory, which does not grow with
    the batch or the resolution.
    """
    memory = _tile_bytes(like.device.index or 0) if like.is_cuda else TILE_BYTES
    return max(1, memory // (ROW_TENSORS * like.shape[-1] * dtype.itemsize))


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
        rows: images x pixels of a tile; None: as many as ``tile_rows`` says.
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


Part = slice | tuple[slice, slice] | EllipsisType
"""Where in a tensor a tile's gradient belongs."""


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

    def __init__(self, inputs: LossInputs, need: Sequence[str], whole: bool):
        """whole: one tile holds all images and pixels, so that its gradients are the sums."""
        self._tensors, self._need, self._whole = inputs.tensors(), list(need), whole
        self._sums: dict[str, Tensor] = {}
        self._pending: dict[str, tuple[Tensor, Part]] = {}
        self.layers = [
            Needs(*(any(f"layers.{i}.{name}" in need for name in record._fields) for record in layer))
            for i, layer in enumerate(inputs.decoder.layers)
        ]
        self.head = any(name.startswith("head.") for name in need)
        reached = [any(layer) or "queries" in need for layer in self.layers]
        self.first = reached.index(True) if any(reached) else len(reached)
        """The first layer that the backward has to reach."""

    def add(self, name: str, grad: Tensor, part: Part = ...) -> None:
        if name in self._need:
            self._pending[name] = grad, part

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

    def end_tile(self) -> None:
        """One addition for all gradients of a tile; of the only tile none."""
        if self._whole:
            self._sums = {name: grad for name, (grad, _) in self._pending.items()}
            return
        if not self._sums:
            sizes = [self._tensors[name].numel() for name in self._need]
            flat = torch.zeros(sum(sizes), dtype=torch.float32, device=self._tensors["queries"].device)
            parts = zip(self._need, flat.split(sizes), strict=True)
            self._sums = {name: part.view(self._tensors[name].shape) for name, part in parts}
        if self._pending:
            sums = [self._sums[name][part] for name, (_, part) in self._pending.items()]
            torch._foreach_add_(sums, [grad.float() for grad, _ in self._pending.values()])
            self._pending.clear()

    def total(self) -> list[Tensor]:
        """In the order of ``need``, fp32; those that no tile reached are zeros."""
        if not self._whole:
            self.end_tile()
            return [self._sums[name] for name in self._need]
        none = {name: t for name, t in self._tensors.items() if name in self._need and name not in self._sums}
        zeros = {name: torch.zeros_like(t, dtype=torch.float32) for name, t in none.items()}
        return [(self._sums | zeros)[name].float() for name in self._need]


class _Decoded(NamedTuple):
    """A tile on its way forward, and what its backward needs."""

    xs: list[Tensor]  # the input of each layer
    normed: list[Normed]  # what each layer's feed-forward takes; where a backward follows
    slot_map: Tensor  # sum over layers
    pixels: Tensor  # [N, C]
    head: SavedHead


def _decode(tile: LossInputs, packs: Sequence[LayerPacks], head: PackedHead, keep: bool) -> _Decoded:
    xs, kept, maps = [cast(Tensor, tile.decoder.queries)], [], []
    for layer in packs:
        y, layer_map, normed = layer_forward(xs[-1], layer, tile.eps, keep)
        xs.append(y)
        kept.append(normed)
        maps.append(layer_map)
    slot_map = maps[0]
    for layer_map in maps[1:]:
        slot_map += layer_map
    return _Decoded(xs, kept, slot_map, *output_head_fwd(xs.pop().flatten(0, 1), head, tile.eps))


def _run(inputs: LossInputs, need: Sequence[str], grad_scale: float | Tensor, tiling: Tiling) -> list[Tensor]:
    """-> recon, interaction and the gradients that are needed, in fp32."""
    B, L, _ = inputs.target.shape
    tiles = list(_tiles(B, L, tiling.rows))
    sums = _Sums(inputs, need, len(tiles) == 1)
    queries, layers, head = inputs.decoder
    queries = cast(Tensor, queries).to(tiling.dtype)
    inputs = replace(inputs, decoder=inputs.decoder._replace(queries=queries))
    packed_head = pack_head(head, tiling.dtype)
    packs = [LayerPacks(folded, ff, inputs.slot_mask, tiling.dtype) for folded, ff in layers]
    terms = torch.zeros(2, device=queries.device, dtype=torch.float32)
    for images, pixels in tiles:
        tile = inputs.part(pixels, images)
        tile_packs = packs if images == slice(0, B) else [layer.of_images(images) for layer in packs]
        weight = None if tile.pixel_weight is None else tile.pixel_weight.float()
        decoded = _decode(tile, tile_packs, packed_head, bool(need))
        error = decoded.pixels.float() - tile.target.flatten(0, 1)
        # The maps' mean over N layers: their pair sum is N² times that of the mean.
        pairs, squares = _pair_sum(decoded.slot_map), error.square()
        if weight is not None:
            squares, pairs = squares * weight.flatten()[:, None], pairs * weight
        terms += torch.stack([squares.sum(), pairs.sum()])
        if not need:
            continue
        dpixels = error * (2 / B * (grad_scale * inputs.recon_weight))
        factor = grad_scale * inputs.interaction_weight / (B * L * len(layers) ** 2)
        dmap = (decoded.slot_map.sum(-1, keepdim=True) - decoded.slot_map) * factor
        if weight is not None:
            dpixels, dmap = dpixels * weight.flatten()[:, None], dmap * weight[..., None]
        dx = _backward(tile, tile_packs, packed_head, decoded, dpixels.to(tiling.dtype), dmap, images, sums)
        sums.add("queries", dx, (slice(None) if len(queries) != B else images, pixels))
        sums.end_tile()
    recon, interaction = terms.unbind()
    return [recon / max(B, 1), interaction / max(B * L * len(layers) ** 2, 1), *sums.total()]


def _backward(
    tile: LossInputs, packs: Sequence[LayerPacks], head: PackedHead, decoded: _Decoded, dpixels: Tensor, dmap: Tensor,
    images: slice, sums: _Sums,
) -> Tensor:  # fmt: skip
    """Adds the gradients of a tile's head and layers -> that of the first layer reached: of the queries, if needed."""
    D = cast(Tensor, tile.decoder.queries).shape[-1]
    dx, dhead = output_head_bwd(dpixels, head, decoded.head, sums.head)
    dx = dx.view(-1, tile.target.shape[1], dx.shape[-1])
    if dhead is not None:
        sums.add_head(dhead)
    for i in reversed(range(sums.first, len(packs))):
        grads = layer_backward(dx, dmap, decoded.xs[i], decoded.normed[i], packs[i], tile.eps, sums.layers[i])
        sums.add_layer(i, grads, images)
        dx = grads.x
    return dx[..., :D]
