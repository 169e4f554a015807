"""The decoder's loss on a GPU, tile by tile: forward and backward of a tile of pixels right behind each other.

    total = recon_weight · Σ (x − x̂)² / B  +  interaction_weight · mean_{b,l} Σ_{j<k} w_j w_k,   w = layer mean of maps

Given the slots, pixels are independent. So a tile (whole images, or part of one where an image is larger) goes through
the decoder and back before the next one starts; what leaves it are gradients of weights, folded projections and
queries. Memory beyond those does not grow with the batch or the resolution: a tile has its share (``loss.tiling``).
Weights are packed once, outside the loop over tiles. Layers are the fused kernels, and the output head with
the loss is one (``loss.head``), or where it has another depth, and in a forward alone, products of cuBLAS that are
differentiated by hand. Nothing waits for the device (a test runs it on tensors without
values), so on CUDA all tiles together are captured in a CUDA graph and replayed (``graphs``).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from types import EllipsisType
from typing import NamedTuple, cast

import torch
from torch import Tensor

from fastslots.records import LayerGrads, LossInputs, LossResult, OutputHead

from ._pack import LayerPacks
from .decoder_layer import Needs, layer_backward, layer_forward
from .graphs import GRAPHS, Graphs, wanted
from .launch import allows_tf32
from .loss.feed_forward import Kept
from .loss.head import HeadPacks, head_loss
from .loss.head import serves as head_serves
from .loss.slot_map import slot_map_loss
from .loss.tiling import Tiling, tile_rows, tiles_of
from .output_head import PackedHead, output_head_bwd, output_head_fwd, pack_head


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
    tiling = Tiling(tile_rows(inputs.decoder, dtype) if rows is None else rows, dtype)
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
        self.any = bool(need)
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


class _Packs(NamedTuple):
    """A decoder's weights as kernels load them; the head for the kernel that has the loss, or else for cuBLAS."""

    layers: list[LayerPacks]
    head: HeadPacks | PackedHead

    def of_images(self, images: slice) -> _Packs:
        return self._replace(layers=[layer.of_images(images) for layer in self.layers])


class _Decoded(NamedTuple):
    """A tile on its way forward, and what its backward needs."""

    xs: list[Tensor]  # the input of each layer, and the last one's output
    kept: list[Kept]
    maps: Tensor  # [layers, images, pixels, K]


def _decode(tile: LossInputs, packs: _Packs, sums: _Sums, backward: bool) -> _Decoded:
    xs, kept = [cast(Tensor, tile.decoder.queries)], []
    (B, L, _), K = tile.target.shape, tile.decoder.layers[0].folded.G.shape[3]
    maps = xs[0].new_empty(len(packs.layers), B, L, K, dtype=torch.float32)
    for i, layer in enumerate(packs.layers):
        reached = backward and i >= sums.first
        y, normed = layer_forward(xs[-1], layer, tile.eps, maps[i], reached, reached and sums.layers[i].ff)
        xs.append(y)
        kept.append(normed)
    return _Decoded(xs, kept, maps)


def _run(inputs: LossInputs, need: Sequence[str], grad_scale: float | Tensor, tiling: Tiling) -> list[Tensor]:
    """-> recon, interaction and the gradients that are needed, in fp32."""
    B, L, _ = inputs.target.shape
    tiles = list(tiles_of(B, L, tiling.rows))
    sums = _Sums(inputs, need, len(tiles) == 1)
    queries, layers, head = inputs.decoder
    queries = cast(Tensor, queries).to(tiling.dtype)
    inputs = replace(inputs, decoder=inputs.decoder._replace(queries=queries))
    fused = bool(need) and head_serves(head, queries.shape[2])
    packs = _Packs(
        [LayerPacks(folded, ff, inputs.slot_mask, tiling.dtype) for folded, ff in layers],
        HeadPacks(head, tiling.dtype) if fused else pack_head(head, tiling.dtype),
    )
    of_images, of_pairs = max(B, 1), max(B * L * len(layers) ** 2, 1)
    dpixel = _scalar(2 / of_images * (grad_scale * inputs.recon_weight), queries.device)
    factor = _scalar(grad_scale * inputs.interaction_weight / of_pairs, queries.device) if need else None
    terms: list[Tensor] = []
    for images, pixels in tiles:
        tile = inputs.part(pixels, images)
        tile_packs = packs if images == slice(0, B) else packs.of_images(images)
        weight = None if tile.pixel_weight is None else tile.pixel_weight.float()
        decoded = _decode(tile, tile_packs, sums, bool(need))
        # The maps' mean over N layers: their pair sum is N² times that of the mean.
        pairs, dmap = slot_map_loss(decoded.maps, weight, factor)
        squares, dx = _head(decoded.xs.pop().flatten(0, 1), tile, tile_packs.head, weight, dpixel, sums)
        terms.append(torch.stack([squares, pairs]))
        if need:
            dx = dx.view(-1, tile.target.shape[1], dx.shape[-1])
            dx = _backward(dx, dmap, decoded, tile_packs.layers, images, sums, tile.eps)[..., : queries.shape[2]]
            sums.add("queries", dx, (slice(None) if len(queries) != B else images, pixels))
            sums.end_tile()
    if len(terms) != 1:
        terms = [torch.stack([torch.zeros(2, device=queries.device), *terms]).sum(0)]
    recon, interaction = terms[0].unbind()
    return [recon / of_images, interaction / of_pairs, *sums.total()]


def _head(
    x: Tensor, tile: LossInputs, packs: HeadPacks | PackedHead, weight: Tensor | None, dpixel: Tensor, sums: _Sums
) -> tuple[Tensor, Tensor]:
    """x [N,D] -> Σ weight · error² of its pixels, and where any gradient is needed that of x, as wide as ``pitch``."""
    if isinstance(packs, HeadPacks):
        squares, dx, dhead = head_loss(x, packs, tile.target, weight, dpixel, sums.head, tile.eps)
        if dhead is not None:
            sums.add_head(dhead)
        return squares, dx
    pixels, saved = output_head_fwd(x, packs, tile.eps)
    error = pixels.float() - tile.target.flatten(0, 1)
    squares = error.square()
    if weight is not None:
        squares = squares * weight.flatten()[:, None]
    if not sums.any:
        return squares.sum(), error
    dpixels = error * dpixel if weight is None else error * dpixel * weight.flatten()[:, None]
    dx, dhead = output_head_bwd(dpixels.to(x.dtype), packs, saved, sums.head)
    if dhead is not None:
        sums.add_head(dhead)
    return squares.sum(), dx


def _backward(
    dx: Tensor, dmap: Tensor, decoded: _Decoded, packs: Sequence[LayerPacks], images: slice, sums: _Sums, eps: float
) -> Tensor:
    """Adds the gradients of a tile's layers -> that of the first layer reached: of the queries, if needed."""
    for i in reversed(range(sums.first, len(packs))):
        grads = layer_backward(dx, dmap, decoded.xs.pop(), decoded.kept.pop(), packs[i], eps, sums.layers[i])
        sums.add_layer(i, grads, images)
        dx = grads.x
    return dx
