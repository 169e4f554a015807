"""The slot Jacobian of the Transformer decoder, exactly, in C backward passes instead of K·D forward ones.

Given the slots, pixels are independent: one backward
pass of channel c, summed over pixels, gives ∂x̂_c/∂S and ∂x̂_c/∂y of every layer at every pixel at once, S the scores
and y the output of the attention (``fastslots.ops.reference``). Slot k enters a layer through its key and value alone,
S[l,h,k] = scale · q_lh · k_hk and y_l = Σ_hk A[l,h,k] Wo_h v_hk:

    ∂x̂_c[l]/∂z[k,·] = Σ_layers Σ_h  ∂x̂_c/∂S[l,h,k] · scale · q_lh · ∂k_hk/∂z  +  A[l,h,k] · (∂x̂_c/∂y_l Wo_h) · ∂v_hk/∂z

The small Jacobians ∂(k,v)/∂z, H·d x D a slot and layer, are shared by all pixels. Heads stay apart (d wide) rather than
folded into the slots (Dq wide): 180 multiply-adds become 43 for each of H·K·D numbers a pixel, for one more product
with Wq and Wo. |·| is summed on the fly, tile by tile: nothing of size C·K·D·L exists, and of what grows with R² only
the pixels' queries and the result are held. On a CPU a kernel does the same (``kernels/cpu/slot_jacobian.h``).

With ``differentiable`` the result carries a gradient, to slots and weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import NamedTuple, Protocol, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fastslots.models.layers import DecoderLayer, rows_at
from fastslots.models.slot_decoder import JacobianRequest
from fastslots.ops import backends
from fastslots.ops.backends import is_traced
from fastslots.ops.reference import feed_forward, output_head, slot_softmax
from fastslots.ops.second_order import second_order
from fastslots.records import FeedForward, FoldedDecoder, FoldedLayer, FoldedProjections, OutputHead, Tangents, describe

CPU_ROWS = 512
"""Rows (images x pixels) of a tile on a CPU: what one head adds to a channel, K·D numbers a row, stays in L2."""
GPU_ROWS = 16_384
KERNEL_IMAGES = 16
"""Images handed to a kernel at once: each has Jacobians of its keys and values, 4·K·D·H·d numbers at two layers."""
CHANNEL_BLOCK = 8
"""Channels whose gradients are held at once: all of an image, few enough of a feature map's 768."""


class Transformer(Protocol):
    """What is asked of a decoder here (``fastslots.models.decoder.Decoder``)."""

    channels: int
    slot_mlp: nn.Sequential
    transformer: nn.ModuleList
    norm: nn.LayerNorm

    def queries(self) -> Tensor: ...
    def layers(self, slots: Tensor) -> list[FoldedLayer]: ...
    def head(self) -> OutputHead: ...


class _Layer(NamedTuple):
    """One layer as seen from a group of images."""

    folded: FoldedProjections
    ff: FeedForward
    module: DecoderLayer
    keys: Tensor  # [B, H, K·D, d], scale · ∂k/∂z
    values: Tensor  # [B, H, K·D, d], ∂v/∂z


class _Tap(NamedTuple):
    """What one layer's forward pass of a tile leaves for the derivative."""

    q: Tensor  # [B or 1, P, H·d]
    scores: Tensor  # [B, P, H·K], in the graph
    y: Tensor  # [B, P, Dq], in the graph
    attn: Tensor  # [B, H, K, 1, P]


def transformer_jacobian(decoder: Transformer, slots: Tensor, request: JacobianRequest) -> Tensor:
    """slots [B, K, D] in the decoder's dtype -> reduced [B, K, R·R or P], otherwise [B, C, R·R or P, K, D]."""
    with torch.set_grad_enabled(request.differentiable):
        queries = decoder.queries()
        if request.pixels is not None:
            queries = rows_at(queries[0], request.pixels)
    name = _backend(decoder, slots, queries, request)
    if name != "reference":
        return _by_kernel(decoder, slots, queries, request.slot_mask, name)
    (_, K, D), pixels = slots.shape, queries.shape[1]
    rows = request.chunk or (CPU_ROWS if slots.device.type == "cpu" else GPU_ROWS)
    shape = (0, K, pixels) if request.reduce else (0, decoder.channels, pixels, K, D)
    parts = [slots.new_empty(shape)]
    group = max(1, rows // max(pixels, 1))
    for own, z, mask in _groups(group, slots, queries, request.slot_mask):
        layers = _layers(decoder, z, request.differentiable)
        tiles = [
            _tile(decoder, layers, own[:, start : start + rows], mask, K, request) for start in range(0, pixels, rows)
        ]
        parts += [torch.cat(tiles, 2)] if tiles else []
    return torch.cat(parts)


def _backend(decoder: Transformer, slots: Tensor, queries: Tensor, request: JacobianRequest) -> str:
    """Name of the backend that serves: kernels give the sum alone, without a gradient."""
    if not request.reduce or request.differentiable or is_traced():
        if request.backend not in ("auto", "reference"):
            raise ValueError(
                f"backend={request.backend!r} has no differentiable, unreduced or traced Jacobian: use auto"
            )
        return "reference"
    K, heads = slots.shape[1], _modules(decoder)[0].projections.heads
    G = slots.new_empty(0, queries.shape[2], heads, K)  # what the folded slots will be: only its shape is asked for
    chain = max(len(decoder.transformer), len(decoder.head().weights))
    return backends.select(describe("slot_jacobian", (queries, G), chain), request.backend)


def _groups(
    size: int, slots: Tensor, queries: Tensor, slot_mask: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """(queries, slots, mask) of ``size`` images at a time."""
    for first in range(0, len(slots), size):
        images = slice(first, first + size)
        own = queries if len(queries) == 1 else queries[images]
        yield own, slots[images], None if slot_mask is None else slot_mask[images]


def _by_kernel(decoder: Transformer, slots: Tensor, queries: Tensor, slot_mask: Tensor | None, name: str) -> Tensor:
    kernel = cast(backends.JacobianBackend, backends.load(name)).slot_jacobian
    parts = [slots.new_empty(0, slots.shape[1], queries.shape[1])]
    with torch.no_grad():
        for own, z, mask in _groups(KERNEL_IMAGES, slots, queries, slot_mask):
            tangents = []
            for module, jacobians in zip(_modules(decoder), _key_value_jacobians(decoder, z), strict=True):
                p, norm = module.projections, module.norm_q
                keys, values = (j.permute(1, 3, 0, 2, 4).flatten(3) for j in jacobians)  # [B, K, D, H·d]
                query = p.to_q.weight, p.to_q.bias, norm.weight, norm.bias
                tangents.append(Tangents(*query, p.to_out.weight, keys * p.scale, values))
            folded = FoldedDecoder(own, decoder.layers(z), decoder.head())
            parts.append(kernel(folded, tangents, mask, decoder.norm.eps))
    return torch.cat(parts)


def _modules(decoder: Transformer) -> list[DecoderLayer]:
    return cast("list[DecoderLayer]", list(decoder.transformer))


def _key_value_jacobians(decoder: Transformer, slots: Tensor) -> list[tuple[Tensor, Tensor]]:
    """∂k/∂z and ∂v/∂z of every layer, [D, B, H, K, d] each, for slots [B, K, D]."""

    def keys_values(z: Tensor) -> list[tuple[Tensor, Tensor]]:
        hidden = decoder.slot_mlp(z)
        return [layer.keys_values(hidden) for layer in _modules(decoder)]

    def derivative(direction: Tensor) -> list[tuple[Tensor, Tensor]]:
        # A slot's key depends on that slot alone, so one direction serves all slots of all images at once.
        tangents: list[tuple[Tensor, Tensor]] = torch.func.jvp(keys_values, (slots,), (direction.expand_as(slots),))[1]
        return tangents

    return torch.func.vmap(derivative)(torch.eye(slots.shape[2], dtype=slots.dtype, device=slots.device))


def _layers(decoder: Transformer, slots: Tensor, differentiable: bool) -> list[_Layer]:
    """Folded projections and the Jacobians of keys and values for slots [B, K, D]."""
    with torch.set_grad_enabled(differentiable):
        with second_order() if differentiable else nullcontext():
            jacobians = _key_value_jacobians(decoder, slots)
        layers = []
        for module, (folded, ff), kv in zip(_modules(decoder), decoder.layers(slots), jacobians, strict=True):
            keys, values = (j.permute(1, 2, 3, 0, 4).flatten(2, 3).contiguous() for j in kv)
            if not differentiable:
                ff = FeedForward(*(t.detach() for t in ff))
            layers.append(_Layer(folded, ff, module, keys * module.projections.scale, values))
    return layers


def _tile(
    decoder: Transformer, layers: list[_Layer], x: Tensor, slot_mask: Tensor | None, K: int, request: JacobianRequest
) -> Tensor:
    """Queries x [B or 1, P, Dq] of some pixels -> their part of the Jacobian: [B, K, P], or [B, C, P, K, D]."""
    differentiable = request.differentiable
    with torch.enable_grad():
        taps = []
        for layer in layers:
            x, tap = _tapped_layer(x, layer, slot_mask, differentiable)
            taps.append(tap)
        pixels = output_head(x, decoder.head())
    wanted = [t for tap in taps for t in (tap.scores, tap.y)]
    parts = []
    for start in range(0, decoder.channels, CHANNEL_BLOCK):
        channels = pixels[..., start : start + CHANNEL_BLOCK].unbind(-1)
        grads = [
            torch.autograd.grad(channel.sum(), wanted, retain_graph=True, create_graph=differentiable)
            for channel in channels
        ]
        with torch.set_grad_enabled(differentiable):
            block = _contract(layers, taps, grads, K)
            if request.reduce:
                parts.append(torch.stack([channel.abs().sum(2) for channel in block]).sum(0))
            else:
                parts.append(torch.stack(block, 1))  # [B, channels, K, D, P]
    if request.reduce:
        return torch.stack(parts).sum(0)
    return torch.cat(parts, 1).permute(0, 1, 4, 2, 3)


def _tapped_layer(x: Tensor, layer: _Layer, slot_mask: Tensor | None, differentiable: bool) -> tuple[Tensor, _Tap]:
    """``reference.decoder_layer`` that also hands out what lies between its steps."""
    G, g, U, b = layer.folded
    B, D, H, K = G.shape
    scores = F.layer_norm(x, x.shape[-1:]) @ G.reshape(B, D, H * K) + g.reshape(B, 1, H * K)
    if not scores.requires_grad:
        scores.requires_grad_()  # layer 1: nothing before it depends on the slots
    attn = slot_softmax(scores.unflatten(-1, (H, K)).transpose(1, 2), slot_mask)
    y = attn.transpose(1, 2).flatten(-2) @ U.reshape(B, H * K, D) + b
    with torch.set_grad_enabled(differentiable):
        q = layer.module.projections.to_q(layer.module.norm_q(x))
        pixels_last = attn.transpose(2, 3).unsqueeze(3).contiguous()
    return feed_forward(x + y, layer.ff), _Tap(q, scores, y, pixels_last)


def _contract(layers: list[_Layer], taps: list[_Tap], grads: list[tuple[Tensor, ...]], K: int) -> list[Tensor]:
    """Gradients of a block of channels, (∂S, ∂y) a layer -> ∂x̂/∂z of each channel, [B, K, D, P].

    Pixels lie last throughout, so that what differs from pixel to pixel multiplies along whole rows.
    """
    B, H, KD, d = layers[0].keys.shape
    P = taps[0].scores.shape[1]
    total = [layers[0].keys.new_zeros(B, K, KD // K, P) for _ in grads]
    for i, (layer, tap) in enumerate(zip(layers, taps, strict=True)):
        wo = layer.module.projections.to_out.weight
        dscores = [g[2 * i].transpose(1, 2).reshape(B, H, K, 1, P) for g in grads]
        dout = [g[2 * i + 1] @ wo for g in grads]  # [B, P, H·d]
        for h in range(H):
            head = slice(h * d, (h + 1) * d)
            # [B, K, D, P]: how a score, and how a channel through the values, follows each number of a slot
            by_key = (layer.keys[:, h] @ tap.q[..., head].transpose(1, 2)).unflatten(1, (K, -1))
            for c, channel in enumerate(total):
                by_value = (layer.values[:, h] @ dout[c][..., head].transpose(1, 2)).unflatten(1, (K, -1))
                channel.addcmul_(tap.attn[:, h], by_value).addcmul_(dscores[c][:, h], by_key)
    return total
