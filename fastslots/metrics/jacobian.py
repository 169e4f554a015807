"""Exact slot Jacobians in one backward pass a channel, instead of K·D forward ones.

Pixels are independent given the slots, and a slot reaches a pixel only through its keys and values: through the scores
S[l,h,k] = scale · q_lh · k_hk and the head outputs o[l,h] = Σ_k A[l,h,k] v_hk of each layer. One backward pass of
channel c, summed over all pixels, gives ∂x̂_c/∂S and ∂x̂_c/∂o at every pixel at once; with the small Jacobians of each
slot's keys and values, shared by all pixels, the chain rule gives::

    ∂x̂[c,l]/∂z[k] = Σ_layers Σ_h  ∂x̂_c/∂S[l,h,k] · scale · q_lh · ∂k_hk/∂z[k]  +  A[l,h,k] · ∂x̂_c/∂o[l,h] · ∂v_hk/∂z[k]

exactly. The absolute values are summed over c and D tile by tile: nothing of size C x L x K·D is kept.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastslots.models.decoder import Decoder, DecoderLayer
from fastslots.ops.reference import OutputHead, feed_forward, output_head

TILE_BYTES = 4 << 20
"""Size of a tile's largest tensor: its features, pixels x K x N·2·H·d; the time is flat from 2 to 32 MiB."""


def slot_jacobian(decoder: Decoder | Callable[[Tensor], Tensor], slots: Tensor, tile: int | None = None) -> Tensor:
    """How strongly each slot moves each pixel: ``G[b,k,l] = Σ_c Σ_d |∂x̂[b,c,l] / ∂z[b,k,d]|``, exact.

    Args:
        decoder: a ``Decoder`` (fast route), or any function slots [B,K,D] -> recon [B,C,R,R] (or a tuple that starts
            with it), which is differentiated forward, K·D times an image.
        slots: [B, K, D]. tile: pixels at once; None chooses by memory.

    Returns:
        [B, K, R, R] in the dtype of the decoder, not normalised over slots, without gradient.
    """
    with torch.autocast(slots.device.type, enabled=False):
        if not isinstance(decoder, Decoder):
            return torch.stack([_forward_route(decoder, z) for z in slots.detach()])
        slots = slots.detach().to(decoder.norm.weight.dtype)
        if not len(slots):
            return slots.new_zeros(0, slots.shape[1], decoder.resolution, decoder.resolution)
        return torch.stack([_backward_route(decoder, z, tile) for z in slots])


def _backward_route(decoder: Decoder, z: Tensor, tile: int | None) -> Tensor:
    """z [K, D] -> [K, R, R]"""
    K = len(z)
    with torch.no_grad():
        small = _key_value_jacobians(decoder, z)  # [K, N·2·H·d, D]
        layers = decoder.layers(z[None])
        queries = decoder.queries()[0]
    tile = tile or max(1, TILE_BYTES // (small.shape[1] * K * z.element_size()))
    head, out = decoder.head(), z.new_empty(K, len(queries))
    for start in range(0, len(queries), tile):
        out[:, start : start + tile] = _tile(decoder, layers, head, queries[start : start + tile], small)
    return out.unflatten(1, (decoder.resolution, decoder.resolution))


def _key_value_jacobians(decoder: Decoder, z: Tensor) -> Tensor:
    """∂(k, v of all layers)/∂z of each slot: [K, N·2·H·d, D]."""

    def keys_values(slot: Tensor) -> Tensor:  # [D] -> [N·2·H·d]
        hidden = decoder.slot_mlp(slot)[None, None]
        return torch.cat([kv.flatten() for layer in decoder.transformer for kv in layer.keys_values(hidden)])

    return torch.func.vmap(torch.func.jacfwd(keys_values))(z)


@torch.no_grad()
def _tile(decoder: Decoder, layers: list, head: OutputHead, x: Tensor, small: Tensor) -> Tensor:
    """Σ_c Σ_d |∂x̂[c,l]/∂z[k,d]| of the pixels of one tile: queries x [l, Dq] -> [K, l]."""
    scores, outputs, kept = [], [], []
    with torch.enable_grad():
        x = x.detach().requires_grad_()  # so that the first layer's scores are part of the graph
        for layer, ((G, g, U, b), ff) in zip(decoder.transformer, layers, strict=True):
            normed = F.layer_norm(x, x.shape[-1:])
            S = (normed @ G[0].flatten(1) + g[0].flatten()).unflatten(-1, G.shape[2:])  # [l, H, K]
            attn = S.softmax(-1)
            y = attn.flatten(1) @ U[0].flatten(0, 1) + b
            scores.append(S)
            outputs.append(y)
            kept.append((_heads(layer, normed.detach()), attn.detach()))
            x = feed_forward(x + y, ff)
        channels = output_head(x, head).sum(0).unbind()  # pixels are independent: their sum differentiates all at once
    total = torch.zeros(len(small), len(x), dtype=x.dtype, device=x.device)
    for channel in channels:
        grads = torch.autograd.grad(channel, scores + outputs, retain_graph=channel is not channels[-1])
        features = []
        for layer, (q, attn), dS, dy in zip(
            decoder.transformer, kept, grads[: len(kept)], grads[len(kept) :], strict=True
        ):
            do = (dy @ layer.projections.to_out.weight).unflatten(-1, q.shape[1:])  # [l, H, d]
            for weight, rows in ((dS, q), (attn, do)):  # [l, H, K] and [l, H, d] -> [K, l, H·d]
                features.append((weight.permute(2, 0, 1)[..., None] * rows).flatten(2))
        total += (torch.cat(features, -1) @ small).abs().sum(-1)
    return total


def _heads(layer: DecoderLayer, normed: Tensor) -> Tensor:
    """scale · q of the layer from what its norm gives before the affine part: [l, Dq] -> [l, H, d]."""
    p, norm = layer.projections, layer.norm_q
    return p.scale * p.to_q(normed * norm.weight + norm.bias).unflatten(-1, (p.heads, -1))


def _forward_route(decode: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """Any decoder, one image: forward mode along each of the K·D directions. z [K, D] -> [K, R, R]"""

    def recon(slots: Tensor) -> Tensor:
        out = decode(slots[None])
        return (out[0] if isinstance(out, tuple) else out)[0]

    K, D = z.shape
    directions = torch.eye(K * D, dtype=z.dtype, device=z.device).view(K, D, K, D)
    with torch.no_grad():
        rows = [sum(torch.func.jvp(recon, (z,), (e,))[1].abs().sum(0) for e in slot) for slot in directions]
    return torch.stack(rows)
