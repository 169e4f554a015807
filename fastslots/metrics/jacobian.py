"""The slot Jacobian of the decoder, exactly, in C backward passes instead of K·D forward ones.

    jacobian[b,k,l] = Σ_c Σ_d |∂x̂[b,c,l] / ∂z[b,k,d]|        (arXiv 2411.07784; the published form is vmap(jacfwd))

Given the slots, pixels are independent: one backward pass of channel c, summed over pixels, gives ∂x̂_c/∂S and ∂x̂_c/∂y
of every layer at every pixel at once, S the scores and y the output of the attention (``fastslots.ops.reference``).
Slot k enters a layer through its key and value alone, S[l,h,k] = scale · q_lh · k_hk and y_l = Σ_hk A[l,h,k] Wo_h v_hk:

    ∂x̂_c[l]/∂z[k,·] = Σ_layers Σ_h  ∂x̂_c/∂S[l,h,k] · scale · q_lh · ∂k_hk/∂z  +  A[l,h,k] · (∂x̂_c/∂y_l Wo_h) · ∂v_hk/∂z

The small Jacobians ∂(k,v)/∂z, H·d x D a slot and layer, are shared by all pixels. Heads stay apart (d wide) rather than
folded into the slots (Dq wide): 180 multiply-adds become 43 for each of H·K·D numbers a pixel, for one more product
with Wq and Wo. |·| is summed on the fly, tile by tile: nothing of size C·K·D·L exists, and of what grows with R² only
the pixels' queries and the result are held.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fastslots.models.decoder import Decoder, DecoderLayer
from fastslots.ops.reference import FeedForward, FoldedProjections, feed_forward, output_head, slot_softmax

CPU_ROWS = 512
"""Rows (images x pixels) of a tile on a CPU: what one head adds to a channel, K·D numbers a row, stays in L2."""
GPU_ROWS = 16_384
CHANNEL_BLOCK = 8
"""Channels whose gradients are held at once: all of an image, few enough of a feature map's 768."""
TANGENTS = 16
"""Directions that a foreign decoder pushes forward at once."""


def slot_jacobian(
    decoder: Callable,
    slots: Tensor,
    chunk: int | None = None,
    *,
    slot_mask: Tensor | None = None,
) -> Tensor:
    """Σ over channels and slot width of |∂recon/∂slots|, not normalised over slots.

    Args:
        decoder: a fastslots ``Decoder``; or any callable slots -> recon (or (recon, ...)), recon [B, C, R, R], in
            which images do not mix: then K·D forward-mode derivatives are taken, exact but slower.
        slots: [B, K, D] float. Their graph is left alone.
        chunk: rows (images x pixels) handled at once; for a foreign decoder, directions. None: chosen for the device.
        slot_mask: [B, K] bool, True = a real slot; the others get 0. For a fastslots ``Decoder`` alone.

    Returns:
        [B, K, R, R] without gradient, in the decoder's dtype (at least fp32). The same bits for the same call; works
        under no_grad, inference_mode and autocast (which is turned off inside).

    Raises:
        ValueError: slots that are not [B, K, D] of the decoder, a bad chunk, or a slot_mask with a foreign decoder.
    """
    if slots.ndim != 3 or not slots.is_floating_point():
        raise ValueError(f"slots must be float [B, K, D], got {slots.dtype} {list(slots.shape)}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    decoder = getattr(decoder, "_orig_mod", decoder)  # what torch.compile wrapped
    # inference_mode off: autograd refuses its tensors; the clone is an ordinary one.
    with torch.inference_mode(False), torch.autocast(slots.device.type, enabled=False):
        slots = slots.detach().clone()
        if type(decoder) is not Decoder:  # a subclass may decode in another way
            if slot_mask is not None:
                raise ValueError("slot_mask is for a fastslots Decoder: bind it into the callable instead")
            return _forward_route(decoder, slots, chunk or TANGENTS)
        return _backward_route(decoder, slots, chunk, slot_mask)


class _Layer(NamedTuple):
    """One layer as seen from a group of images, without gradients."""

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


def _backward_route(decoder: Decoder, slots: Tensor, chunk: int | None, slot_mask: Tensor | None) -> Tensor:
    width = decoder.slot_mlp[0].in_features
    if slots.shape[2] != width:
        raise ValueError(f"slots has shape {list(slots.shape)}, the decoder takes [B, K, {width}]")
    if slot_mask is not None and slot_mask.shape != slots.shape[:2]:
        raise ValueError(f"slot_mask has shape {list(slot_mask.shape)}, expected {list(slots.shape[:2])} (B, K)")
    dtype = decoder.norm.weight.dtype
    if torch.finfo(dtype).bits < 32:  # derivatives in 16 bits mean little
        decoder, dtype = copy.deepcopy(decoder).float(), torch.float32
    slots = slots.to(dtype)
    rows = chunk or (CPU_ROWS if slots.device.type == "cpu" else GPU_ROWS)
    (B, K, _), R = slots.shape, decoder.resolution
    jacobian = slots.new_empty(B, K, R * R)
    with torch.no_grad():
        queries = decoder.queries()
    group = max(1, rows // R**2)
    for image in range(0, B, group):
        images = slice(image, image + group)
        layers = _layers(decoder, slots[images])
        mask = None if slot_mask is None else slot_mask[images]
        for start in range(0, R**2, rows):
            pixels = slice(start, start + rows)
            jacobian[images, :, pixels] = _tile(decoder, layers, queries[:, pixels], mask, K)
    return jacobian.unflatten(-1, (R, R))


def _layers(decoder: Decoder, slots: Tensor) -> list[_Layer]:
    """Folded projections and the Jacobians of keys and values for slots [B, K, D]."""
    modules = cast("list[DecoderLayer]", list(decoder.transformer))

    def keys_values(z: Tensor) -> list[tuple[Tensor, Tensor]]:
        hidden = decoder.slot_mlp(z)
        return [layer.keys_values(hidden) for layer in modules]

    def derivative(direction: Tensor) -> list[tuple[Tensor, Tensor]]:
        # A slot's key depends on that slot alone, so one direction serves all slots of all images at once.
        return torch.func.jvp(keys_values, (slots,), (direction.expand_as(slots),))[1]

    with torch.no_grad():
        directions = torch.eye(slots.shape[2], dtype=slots.dtype, device=slots.device)
        jacobians = torch.func.vmap(derivative)(directions)  # per layer ([D, B, H, K, d], same)
        layers = []
        for module, (folded, ff), kv in zip(modules, decoder.layers(slots), jacobians, strict=True):
            keys, values = (j.permute(1, 2, 3, 0, 4).flatten(2, 3).contiguous() for j in kv)
            ff = FeedForward(*(t.detach() for t in ff))
            layers.append(_Layer(folded, ff, module, keys * module.projections.scale, values))
    return layers


def _tile(decoder: Decoder, layers: list[_Layer], x: Tensor, slot_mask: Tensor | None, K: int) -> Tensor:
    """Queries x [1, P, Dq] of some pixels -> their part of the Jacobian, [B, K, P]."""
    with torch.enable_grad():
        taps = []
        for layer in layers:
            x, tap = _tapped_layer(x, layer, slot_mask)
            taps.append(tap)
        pixels = output_head(x, decoder.head())
    wanted = [t for tap in taps for t in (tap.scores, tap.y)]
    jacobian = pixels.new_zeros(len(pixels), K, pixels.shape[1])
    for start in range(0, decoder.channels, CHANNEL_BLOCK):
        channels = pixels[..., start : start + CHANNEL_BLOCK].unbind(-1)
        grads = [torch.autograd.grad(channel.sum(), wanted, retain_graph=True) for channel in channels]
        jacobian += _contract(layers, taps, grads, K)
    return jacobian


def _tapped_layer(x: Tensor, layer: _Layer, slot_mask: Tensor | None) -> tuple[Tensor, _Tap]:
    """``reference.decoder_layer`` that also hands out what lies between its steps."""
    G, g, U, b = layer.folded
    B, D, H, K = G.shape
    scores = F.layer_norm(x, x.shape[-1:]) @ G.reshape(B, D, H * K) + g.reshape(B, 1, H * K)
    if not scores.requires_grad:
        scores.requires_grad_()  # layer 1: nothing before it depends on the slots
    attn = slot_softmax(scores.unflatten(-1, (H, K)).transpose(1, 2), slot_mask)
    y = attn.transpose(1, 2).flatten(-2) @ U.reshape(B, H * K, D) + b
    with torch.no_grad():
        q = layer.module.projections.to_q(layer.module.norm_q(x))
        pixels_last = attn.transpose(2, 3).unsqueeze(3).contiguous()
    return feed_forward(x + y, layer.ff), _Tap(q, scores, y, pixels_last)


@torch.no_grad()
def _contract(layers: list[_Layer], taps: list[_Tap], grads: list[tuple[Tensor, ...]], K: int) -> Tensor:
    """Gradients of a block of channels, (∂S, ∂y) a layer -> Σ over the block and the slot width of |∂x̂/∂z|, [B,K,P].

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
    return torch.stack([channel.abs().sum(2) for channel in total]).sum(0)


def _forward_route(decoder: Callable, slots: Tensor, chunk: int) -> Tensor:
    """Any decoder: one forward-mode derivative for each number of a slot, all images at once."""
    K, D = slots.shape[1:]

    def recon(z: Tensor) -> Tensor:
        out = decoder(z)
        return out if isinstance(out, Tensor) else out[0]

    def influence(index: Tensor) -> Tensor:
        direction = F.one_hot(index, K * D).to(slots.dtype).view(1, K, D).expand_as(slots)
        return torch.func.jvp(recon, (slots,), (direction,))[1].abs().sum(1)  # [B, R, R]

    with torch.no_grad():
        parts = [
            torch.func.vmap(influence)(indices) for indices in torch.arange(K * D, device=slots.device).split(chunk)
        ]
    return torch.cat(parts).unflatten(0, (K, D)).sum(1).transpose(0, 1).contiguous()
