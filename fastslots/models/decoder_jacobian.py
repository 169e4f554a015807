"""The slot Jacobian of our decoders, exactly and cheaply; ``fastslots.metrics.slot_jacobian`` is its public face.

**Transformer**, in C backward passes instead of K·D forward ones. Given the slots, pixels are independent: one backward
pass of channel c, summed over pixels, gives ∂x̂_c/∂S and ∂x̂_c/∂y of every layer at every pixel at once, S the scores
and y the output of the attention (``fastslots.ops.reference``). Slot k enters a layer through its key and value alone,
S[l,h,k] = scale · q_lh · k_hk and y_l = Σ_hk A[l,h,k] Wo_h v_hk:

    ∂x̂_c[l]/∂z[k,·] = Σ_layers Σ_h  ∂x̂_c/∂S[l,h,k] · scale · q_lh · ∂k_hk/∂z  +  A[l,h,k] · (∂x̂_c/∂y_l Wo_h) · ∂v_hk/∂z

The small Jacobians ∂(k,v)/∂z, H·d x D a slot and layer, are shared by all pixels. Heads stay apart (d wide) rather than
folded into the slots (Dq wide): 180 multiply-adds become 43 for each of H·K·D numbers a pixel, for one more product
with Wq and Wo. |·| is summed on the fly, tile by tile: nothing of size C·K·D·L exists, and of what grows with R² only
the pixels' queries and the result are held. On a CPU a kernel does the same (``kernels/cpu/slot_jacobian.h``).

**Spatial broadcast**, in D forward derivatives instead of K·D: slots are decoded alone, into images r_k and mask logits
a_k, so one direction serves all slots at once, and x̂ = Σ_k m_k r_k with m = softmax(a) gives

    ∂x̂/∂z[k,d] = m_k (∂r_k/∂z[k,d] + (r_k − x̂) ∂a_k/∂z[k,d])

With ``differentiable`` the result carries a gradient, to slots and weights.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fastslots.models.broadcast import BroadcastDecoder
from fastslots.models.decoder import Decoder, DecoderLayer
from fastslots.models.layers import rows_at
from fastslots.models.second_order import second_order
from fastslots.ops import backends
from fastslots.ops.backends import is_traced
from fastslots.ops.decoder_loss import decoder_tensors
from fastslots.ops.reference import (
    FeedForward,
    FoldedProjections,
    feed_forward,
    interaction_penalty,
    output_head,
    slot_softmax,
)

CPU_ROWS = 512
"""Rows (images x pixels) of a tile on a CPU: what one head adds to a channel, K·D numbers a row, stays in L2."""
GPU_ROWS = 16_384
KERNEL_IMAGES = 16
"""Images handed to a kernel at once: each has Jacobians of its keys and values, 4·K·D·H·d numbers at two layers."""
CHANNEL_BLOCK = 8
"""Channels whose gradients are held at once: all of an image, few enough of a feature map's 768."""
TANGENT_NUMBERS = 1 << 25
"""Numbers that the widest layer of a broadcast decoder may hold for all directions pushed forward together."""


class Request(NamedTuple):
    """What is asked of a Jacobian besides decoder and slots; see ``fastslots.metrics.slot_jacobian``."""

    chunk: int | None = None
    slot_mask: Tensor | None = None  # [B, K] bool
    pixels: Tensor | None = None  # [B, P]
    reduce: bool = True
    differentiable: bool = False
    backend: str = "auto"


def jacobian_penalty(
    decoder: Decoder | BroadcastDecoder, slots: Tensor, pixels: Tensor, pixel_weight: Tensor | None = None
) -> Tensor:
    """How much slots share pixels, by the Jacobian itself rather than by attention: a scalar with a gradient.

    With P = each slot's share of a pixel's Jacobian (Σ_c Σ_d |∂x̂/∂z|, normalised over slots), the mean over the given
    pixels of Σ_{j<k} P_j P_k: 0 where one slot alone acts on each pixel, ½(1 − 1/K) where all act alike. Shares make
    it free of scale: a decoder cannot lower it by shrinking its derivatives.

    slots: [B, K, D]; pixels: [B, P] int64, rows of R·R; pixel_weight: [B, P], 1 / (L · probability) of each.
    """
    request = Request(pixels=pixels, differentiable=True)
    with torch.autocast(slots.device.type, enabled=False):
        jacobian = exact_jacobian(decoder, slots.to(torch.promote_types(slots.dtype, torch.float32)), request)
    return interaction_penalty(slot_share(jacobian).transpose(1, 2), pixel_weight)


def slot_share(jacobian: Tensor) -> Tensor:
    """Each slot's share of a pixel's Jacobian: [B, K, ...], of the same dtype; zeros where all are zero."""
    return jacobian / jacobian.sum(1, keepdim=True).clamp_min(torch.finfo(jacobian.dtype).tiny)


def exact_jacobian(decoder: Decoder | BroadcastDecoder, slots: Tensor, request: Request) -> Tensor:
    """Reduced: [B, K, R·R or P]; otherwise [B, C, R·R or P, K, D]. slots: [B, K, D]."""
    width = decoder.slot_dim
    if slots.shape[2] != width:
        raise ValueError(f"slots has shape {list(slots.shape)}, the decoder takes [B, K, {width}]")
    mask = request.slot_mask
    if mask is not None and mask.shape != slots.shape[:2]:
        raise ValueError(f"slot_mask has shape {list(mask.shape)}, expected {list(slots.shape[:2])} (B, K)")
    dtype = next(decoder.parameters()).dtype
    if torch.finfo(dtype).bits < 32:  # derivatives in 16 bits mean little
        if request.differentiable:
            raise ValueError(f"a differentiable Jacobian needs weights of at least 32 bits, got {dtype}")
        decoder, dtype = copy.deepcopy(decoder).float(), torch.float32
    slots = slots.to(dtype)
    if isinstance(decoder, BroadcastDecoder):
        return _broadcast(decoder, slots, request)
    return _transformer(decoder, slots, request)


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


def _transformer(decoder: Decoder, slots: Tensor, request: Request) -> Tensor:
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


def _backend(decoder: Decoder, slots: Tensor, queries: Tensor, request: Request) -> str:
    """Name of the backend that serves: kernels give the sum alone, without a gradient."""
    if not request.reduce or request.differentiable or is_traced():
        if request.backend not in ("auto", "reference"):
            raise ValueError(
                f"backend={request.backend!r} has no differentiable, unreduced or traced Jacobian: use auto"
            )
        return "reference"
    K, heads = slots.shape[1], _modules(decoder)[0].projections.heads
    G = slots.new_empty(0, queries.shape[2], heads, K)  # what the folded slots will be: only its shape is asked for
    return backends.select("slot_jacobian", (queries, G), request.backend)


def _groups(
    size: int, slots: Tensor, queries: Tensor, slot_mask: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """(queries, slots, mask) of ``size`` images at a time."""
    for first in range(0, len(slots), size):
        images = slice(first, first + size)
        own = queries if len(queries) == 1 else queries[images]
        yield own, slots[images], None if slot_mask is None else slot_mask[images]


def _by_kernel(decoder: Decoder, slots: Tensor, queries: Tensor, slot_mask: Tensor | None, name: str) -> Tensor:
    kernel = backends.load(name).slot_jacobian
    parts = [slots.new_empty(0, slots.shape[1], queries.shape[1])]
    with torch.no_grad():
        for own, z, mask in _groups(KERNEL_IMAGES, slots, queries, slot_mask):
            tangents = []
            for module, jacobians in zip(_modules(decoder), _key_value_jacobians(decoder, z), strict=True):
                p, norm = module.projections, module.norm_q
                keys, values = (j.permute(1, 3, 0, 2, 4).flatten(3) for j in jacobians)  # [B, K, D, H·d]
                tangents.append(
                    (p.to_q.weight, p.to_q.bias, norm.weight, norm.bias, p.to_out.weight, keys * p.scale, values)
                )
            tensors = decoder_tensors(own, decoder.layers(z), decoder.head())
            parts.append(kernel(tensors, tangents, mask, decoder.norm.eps))
    return torch.cat(parts)


def _modules(decoder: Decoder) -> list[DecoderLayer]:
    return cast("list[DecoderLayer]", list(decoder.transformer))


def _key_value_jacobians(decoder: Decoder, slots: Tensor) -> list[tuple[Tensor, Tensor]]:
    """∂k/∂z and ∂v/∂z of every layer, [D, B, H, K, d] each, for slots [B, K, D]."""

    def keys_values(z: Tensor) -> list[tuple[Tensor, Tensor]]:
        hidden = decoder.slot_mlp(z)
        return [layer.keys_values(hidden) for layer in _modules(decoder)]

    def derivative(direction: Tensor) -> list[tuple[Tensor, Tensor]]:
        # A slot's key depends on that slot alone, so one direction serves all slots of all images at once.
        return torch.func.jvp(keys_values, (slots,), (direction.expand_as(slots),))[1]

    return torch.func.vmap(derivative)(torch.eye(slots.shape[2], dtype=slots.dtype, device=slots.device))


def _layers(decoder: Decoder, slots: Tensor, differentiable: bool) -> list[_Layer]:
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
    decoder: Decoder, layers: list[_Layer], x: Tensor, slot_mask: Tensor | None, K: int, request: Request
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


def _broadcast(decoder: BroadcastDecoder, slots: Tensor, request: Request) -> Tensor:
    B, K, D = slots.shape
    numbers = B * K * decoder.resolution**2 * decoder.width
    chunk = request.chunk or max(1, TANGENT_NUMBERS // max(numbers, 1))

    def at_pixels(x: Tensor) -> Tensor:  # [B, K, ..., R, R] -> [B, K, ..., L or P]
        x = x.flatten(-2)
        if request.pixels is None:
            return x
        index = request.pixels.view(B, *([1] * (x.ndim - 2)), -1)
        return x.gather(-1, index.expand(*x.shape[:-1], -1))

    with torch.set_grad_enabled(request.differentiable):
        images, logits = decoder.components(slots)
        masks = decoder.masks(logits, request.slot_mask)
        recon = (images * masks[:, :, None]).sum(1, keepdim=True)
        mask, rest = at_pixels(masks)[:, :, None], at_pixels(images - recon)

        def derivative(direction: Tensor) -> Tensor:
            tangents = torch.func.jvp(decoder.components, (slots,), (direction.expand_as(slots),))[1]
            dimages, dlogits = map(at_pixels, tangents)
            return mask * (dimages + rest * dlogits[:, :, None])  # [B, K, C, P]

        def reduced(direction: Tensor) -> Tensor:
            return derivative(direction).abs().sum(2)

        directions = torch.eye(D, dtype=slots.dtype, device=slots.device).split(chunk)
        function = torch.func.vmap(reduced if request.reduce else derivative)
        if request.reduce:
            return torch.stack([function(some).sum(0) for some in directions]).sum(0)
        return torch.cat([function(some) for some in directions]).permute(1, 3, 4, 2, 0)
