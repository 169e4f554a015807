"""The decoder's loss on a GPU, tile by tile: forward and backward of a tile of pixels right behind each other.

    total = recon_weight · Σ (x − x̂)² / B  +  interaction_weight · mean_{b,l} Σ_{j<k} w_j w_k,   w = layer mean of maps

Given the slots, pixels are independent. So a tile (whole images, or part of one where an image is larger) goes through
the decoder and back before the next one starts; what leaves it are gradients of weights, folded projections and
queries. Memory beyond those does not grow with the batch or the resolution. Layers are the fused kernels; the output
head (a norm and a few products 180 wide) is cuBLAS, differentiated by hand. Nothing waits for the device, so all of it
can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .decoder_layer import decoder_layer_bwd, decoder_layer_fwd

TILE_ROWS = 65536
"""Rows (images x pixels) of a tile: enough programs of 128 rows to fill a GPU, and few enough tiles that launches stay
small beside the work. At width 180 in bf16 a tensor of a tile is 24 MB, so one or two of them live in L2."""


def _tiles(batch: int, pixels: int, rows: int) -> Iterator[tuple[slice, slice]]:
    """Slices of images and of pixels; several images at once, or parts of one."""
    images, step = max(1, rows // max(pixels, 1)), min(pixels, rows)
    for image in range(0, batch, images):
        for start in range(0, pixels, step):
            yield slice(image, min(image + images, batch)), slice(start, min(start + step, pixels))


def _head_forward(x: Tensor, norm: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor], eps: float):
    """x [N, D] -> pixels [N, C] and what the backward needs."""
    normed, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], *norm, eps)
    inputs, sums = [normed], []
    for weight, bias in zip(weights, biases, strict=True):
        if sums:
            inputs.append(torch.nn.functional.gelu(sums[-1]))
        sums.append(torch.addmm(bias, inputs[-1], weight.t()))
    return sums[-1], (mean, rstd, inputs, sums)


def _head_backward(dpixels: Tensor, x: Tensor, norm: Sequence[Tensor], weights: Sequence[Tensor], saved):
    """-> dx and the gradients of norm weight, norm bias, weights, biases, in fp32."""
    mean, rstd, inputs, sums = saved
    dweights, dbiases, d = [], [], dpixels
    for i in reversed(range(len(weights))):
        dweights.insert(0, (d.t() @ inputs[i]).float())
        dbiases.insert(0, d.sum(0, dtype=torch.float32))
        d = d @ weights[i]
        if i:
            d = torch.ops.aten.gelu_backward(d, sums[i - 1])
    mask = [True, True, True]
    dx, dnorm_weight, dnorm_bias = torch.ops.aten.native_layer_norm_backward(
        d, x, x.shape[-1:], mean, rstd, *norm, mask
    )
    return dx, [dnorm_weight.float(), dnorm_bias.float(), *dweights, *dbiases]


def _pair_sum(slot_map: Tensor) -> Tensor:
    """Σ_{j<k} w_j w_k of each pixel, as each weight times the running sum of those before it (it does not cancel)."""
    return (slot_map[..., 1:] * slot_map[..., :-1].cumsum(-1)).sum(-1)


def decoder_loss(
    inputs: Any, need_grads: Sequence[bool], grad_scale: float | Tensor = 1.0, rows: int = TILE_ROWS
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Loss terms and the gradients of ``grad_scale · total``.

    Args:
        inputs: the record of ``fastslots.ops.tiled``: queries [B or 1,L,D], layers of (folded, feed-forward), head,
            target [B,L,C], pixel_weight [B,L] or None, slot_mask [B,K] or None, both weights, eps.
        need_grads: in the order of ``inputs.differentiable()``; where none is asked for, only the forward runs.
        grad_scale: the loss scale of mixed precision, a float or a 0-d tensor.

    Returns:
        recon and interaction (fp32 scalars, unweighted), gradients in the same order (None where not asked for).
    """
    flat = inputs.differentiable()
    device_type = inputs.queries.device.type
    cast = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type) if cast else inputs.queries.dtype
    with torch.no_grad(), torch.autocast(device_type, enabled=False):
        recon, interaction, grads = _run(inputs, flat, any(need_grads), grad_scale, rows, dtype)
    if not any(need_grads):
        return recon, interaction, [None] * len(flat)
    return recon, interaction, [
        grad.to(t.dtype) if need else None for grad, t, need in zip(grads, flat, need_grads, strict=True)
    ]  # fmt: skip


def _run(inputs, flat, any_grad, grad_scale, rows, dtype):
    B, L, _ = inputs.target.shape
    queries, layers, head = inputs.queries.to(dtype), inputs.layers, inputs.head
    D, shared = queries.shape[2], queries.shape[0] != B
    norm = (head.norm_weight.to(dtype), head.norm_bias.to(dtype))
    weights, biases = [w.to(dtype) for w in head.weights], [b.to(dtype) for b in head.biases]
    recon = torch.zeros((), device=queries.device, dtype=torch.float32)
    interaction = torch.zeros_like(recon)
    grads = [torch.zeros_like(t, dtype=torch.float32) for t in flat] if any_grad else []
    for images, pixels in _tiles(B, L, rows):
        x = queries[slice(None) if shared else images, pixels]
        mask = None if inputs.slot_mask is None else inputs.slot_mask[images]
        weight = None if inputs.pixel_weight is None else inputs.pixel_weight[images, pixels].float()
        folded = [(f.G[images], f.g[images], f.U[images], f.b) for f, _ in layers]
        xs, slot_map = [x], torch.zeros((), device=queries.device)
        for projections, (_, ff) in zip(folded, layers, strict=True):
            y, layer_map = decoder_layer_fwd(xs[-1], *projections, *ff, mask, inputs.eps)
            slot_map = slot_map + layer_map / len(layers)
            xs.append(y)
        last = xs.pop().flatten(0, 1)
        out, saved = _head_forward(last, norm, weights, biases, inputs.eps)
        error = out.float() - inputs.target[images, pixels].flatten(0, 1).float()
        pairs = _pair_sum(slot_map)
        if weight is None:
            recon += error.square().sum() / B
            interaction += pairs.sum() / (B * L)
        else:
            recon += (error.square().sum(-1) * weight.flatten()).sum() / B
            interaction += (pairs * weight).sum() / (B * L)
        if not any_grad:
            continue
        dout = error * (2 / B) * (grad_scale * inputs.recon_weight)
        dmap = (slot_map.sum(-1, keepdim=True) - slot_map) / (B * L * len(layers))
        dmap = dmap * (grad_scale * inputs.interaction_weight)
        if weight is not None:
            dout, dmap = dout * weight.flatten()[:, None], dmap * weight[..., None]
        dx, head_grads = _head_backward(dout.to(dtype), last, norm, weights, saved)
        dx = dx.view(-1, pixels.stop - pixels.start, D)
        _add(grads[len(flat) - len(head_grads) :], head_grads)
        for i in reversed(range(len(layers))):
            dx, dG, dg, dU, *shared_grads = decoder_layer_bwd(
                dx, dmap, xs[i], *folded[i], *layers[i][1], mask, inputs.eps
            )
            at = 1 + i * (4 + len(layers[i][1]))
            _add([g[images] for g in grads[at : at + 3]], (dG, dg, dU))
            _add(grads[at + 3 : at + 3 + len(shared_grads)], shared_grads)
        grads[0][slice(None) if shared else images, pixels] += dx
    return recon, interaction, grads


def _add(sums: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    for total, grad in zip(sums, grads, strict=True):
        total += grad
