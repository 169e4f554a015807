"""The decoder's loss on a GPU, tile by tile: forward and backward of a tile of pixels right behind each other.

    total = recon_weight · Σ (x − x̂)² / B  +  interaction_weight · mean_{b,l} Σ_{j<k} w_j w_k,   w = layer mean of maps

Given the slots, pixels are independent. So a tile (whole images, or part of one where an image is larger) goes through
the decoder and back before the next one starts; what leaves it are gradients of weights, folded projections and
queries. Memory beyond those does not grow with the batch or the resolution. Layers are the fused kernels; the output
head (a norm and a few products 180 wide) is cuBLAS, differentiated by hand. Nothing waits for the device (a test runs
it on tensors without values), so on CUDA all tiles together are captured in a CUDA graph and replayed (``graphs``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .decoder_layer import decoder_layer_bwd, decoder_layer_fwd
from .graphs import GRAPHS, Graphs, wanted
from .launch import allows_tf32

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


Norm = tuple[Tensor, Tensor]
"""Weight and bias of the last norm."""


def _head_forward(x: Tensor, norm: Norm, weights: Sequence[Tensor], biases: Sequence[Tensor], eps: float):
    """x [N, D] -> pixels [N, C] and what the backward needs."""
    normed, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], norm[0], norm[1], eps)
    inputs: list[Tensor] = [normed]
    sums: list[Tensor] = []
    for weight, bias in zip(weights, biases, strict=True):
        if sums:
            inputs.append(torch.nn.functional.gelu(sums[-1]))
        sums.append(torch.addmm(bias, inputs[-1], weight.t()))
    return sums[-1], (mean, rstd, inputs, sums)


def _head_backward(
    dpixels: Tensor, x: Tensor, norm: Norm, weights: Sequence[Tensor], saved: tuple[Any, ...], need: bool
) -> tuple[Tensor, list[Tensor]]:
    """-> dx and, where there is need, the gradients of norm weight, norm bias, weights, biases, in fp32."""
    mean, rstd, inputs, sums = saved
    dweights: list[Tensor] = []
    dbiases: list[Tensor] = []
    d = dpixels
    for i in reversed(range(len(weights))):
        if need:
            dweights.insert(0, (d.t() @ inputs[i]).float())
            dbiases.insert(0, d.sum(0, dtype=torch.float32))
        d = d @ weights[i]
        if i:
            d = torch.ops.aten.gelu_backward(d, sums[i - 1])
    mask = [True, need, need]
    dx, dnorm_weight, dnorm_bias = torch.ops.aten.native_layer_norm_backward(
        d, x, x.shape[-1:], mean, rstd, *norm, mask
    )
    return dx, [dnorm_weight.float(), dnorm_bias.float(), *dweights, *dbiases] if need else []


def _pair_sum(slot_map: Tensor) -> Tensor:
    """Σ_{j<k} w_j w_k of each pixel, as each weight times the running sum of those before it (it does not cancel)."""
    # Not ``cumsum``, which torch refuses on a GPU where a program asks for deterministic algorithms.
    before = list(accumulate(slot_map[..., :-1].unbind(-1)))
    return (slot_map[..., 1:] * torch.stack(before, -1)).sum(-1) if before else torch.zeros_like(slot_map[..., 0])


def decoder_loss(
    inputs: Any,
    need_grads: Sequence[bool],
    grad_scale: float | Tensor = 1.0,
    rows: int | None = None,
    graphs: Graphs | None = None,
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Loss terms and the gradients of ``grad_scale · total``.

    Args:
        inputs: the record of ``ops.decoder_loss``: queries [B or 1,L,D], layers of (folded, feed-forward), head,
            target [B,L,C], pixel_weight [B,L] or None, slot_mask [B,K] or None, both weights, eps.
        need_grads: in the order of ``inputs.differentiable()``; where none is asked for, only the forward runs.
        grad_scale: the loss scale of mixed precision, a float or a 0-d tensor.
        rows: images x pixels of a tile; None: as many as fit L2.
        graphs: where to capture and replay; None: this process's for CUDA tensors (``graphs.wanted``), else nowhere.

    Returns:
        recon and interaction (fp32 scalars, unweighted), gradients in the same order (None where not asked for).
    """
    flat = inputs.differentiable()
    device_type = inputs.queries.device.type
    cast = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type) if cast else inputs.queries.dtype
    rows = tile_rows(inputs.queries, dtype) if rows is None else rows
    if graphs is None and wanted(inputs.queries.device):
        graphs = GRAPHS
    with torch.no_grad(), torch.autocast(device_type, enabled=False):
        if graphs is None:
            recon, interaction, *grads = _run(inputs, need_grads, grad_scale, rows, dtype)
        else:
            recon, interaction, *grads = _replay(graphs, inputs, need_grads, grad_scale, rows, dtype)
    made = iter(grads)
    return recon, interaction, [next(made).to(t.dtype) if need else None
                                for t, need in zip(flat, need_grads, strict=True)]  # fmt: skip


def _replay(
    graphs: Graphs, inputs: Any, need: Sequence[bool], grad_scale: float | Tensor, rows: int, dtype: torch.dtype
) -> list[Tensor]:
    """``_run`` as a function of tensors alone: weights that change from step to step are tensors too."""
    flat, device = inputs.differentiable(), inputs.queries.device
    optional = {name: getattr(inputs, name) for name in ("pixel_weight", "slot_mask")}
    given = {name: t for name, t in optional.items() if t is not None}
    scalars = [_scalar(value, device) for value in (inputs.recon_weight, inputs.interaction_weight, grad_scale)]

    def function(tensors: Sequence[Tensor]) -> list[Tensor]:
        *rest, recon_weight, interaction_weight, scale = tensors
        same = replace(
            inputs.with_tensors(rest[: len(flat)]), target=rest[len(flat)],
            recon_weight=recon_weight, interaction_weight=interaction_weight,
            **dict(zip(given, rest[len(flat) + 1 :], strict=True)),
        )  # fmt: skip
        return _run(same, need, scale, rows, dtype)

    key = (tuple(need), rows, dtype, len(inputs.layers), tuple(given), inputs.eps, allows_tf32())
    return graphs(key, function, [*flat, inputs.target, *given.values(), *scalars])


def _scalar(value: float | Tensor, device: torch.device) -> Tensor:
    """A 0-d fp32 tensor on the device, made without waiting for it."""
    if isinstance(value, Tensor):
        return value.to(device, torch.float32, non_blocking=True)
    return torch.full((), value, device=device, dtype=torch.float32)


class _Needs(NamedTuple):
    """Which gradients are needed, of each layer and of the head; the first layer that the backward has to reach."""

    starts: range  # of the layers in the flat order
    folded: list[bool]
    feed_forward: list[bool]
    head: bool
    first: int


def _needs(inputs: Any, need: Sequence[bool]) -> _Needs:
    size = sum(map(len, inputs.layers[0]))
    stop = 1 + size * len(inputs.layers)
    starts = range(1, stop, size)
    folded = [any(need[at : at + len(f)]) for at, (f, _) in zip(starts, inputs.layers, strict=True)]
    feed_forward = [any(need[at + len(f) : at + size]) for at, (f, _) in zip(starts, inputs.layers, strict=True)]
    some = [need[0] or any(need[1 : at + size]) for at in starts]  # of this layer or one before
    return _Needs(starts, folded, feed_forward, any(need[stop:]), some.index(True) if any(some) else len(some))


def _run(inputs: Any, need: Sequence[bool], grad_scale: float | Tensor, rows: int, dtype: torch.dtype) -> list[Tensor]:
    """-> recon, interaction and the gradients that are needed, in fp32. The backward ends at the first of them."""
    flat = inputs.differentiable()
    needs = _needs(inputs, need)
    B, L, _ = inputs.target.shape
    queries, layers, head = inputs.queries.to(dtype), inputs.layers, inputs.head
    D, shared = queries.shape[2], queries.shape[0] != B
    norm = (head.norm_weight.to(dtype), head.norm_bias.to(dtype))
    weights, biases = [w.to(dtype) for w in head.weights], [b.to(dtype) for b in head.biases]
    recon = torch.zeros((), device=queries.device, dtype=torch.float32)
    interaction = torch.zeros_like(recon)
    grads = [torch.zeros_like(t, dtype=torch.float32) if n else None for t, n in zip(flat, need, strict=True)]
    for images, pixels in _tiles(B, L, rows):
        x = queries[slice(None) if shared else images, pixels]
        mask = None if inputs.slot_mask is None else inputs.slot_mask[images]
        weight = None if inputs.pixel_weight is None else inputs.pixel_weight[images, pixels].float()
        folded = [(f.G[images], f.g[images], f.U[images], f.b) for f, _ in layers]
        xs, slot_map = [x], torch.zeros((), device=queries.device)
        for projections, (_, ff) in zip(folded, layers, strict=True):
            y, layer_map = decoder_layer_fwd(xs[-1], *projections, **ff._asdict(), slot_mask=mask, eps=inputs.eps)
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
        if not any(need):
            continue
        dout = error * (2 / B) * (grad_scale * inputs.recon_weight)
        dmap = (slot_map.sum(-1, keepdim=True) - slot_map) / (B * L * len(layers))
        dmap = dmap * (grad_scale * inputs.interaction_weight)
        if weight is not None:
            dout, dmap = dout * weight.flatten()[:, None], dmap * weight[..., None]
        dx, head_grads = _head_backward(dout.to(dtype), last, norm, weights, saved, needs.head)
        dx = dx.view(-1, pixels.stop - pixels.start, D)
        _add(grads[len(flat) - len(head_grads) :], head_grads)
        for i in reversed(range(needs.first, len(layers))):
            dinput, dG, dg, dU, *shared_grads = decoder_layer_bwd(
                dx, dmap, xs[i], *folded[i], **layers[i][1]._asdict(), slot_mask=mask, eps=inputs.eps,
                need_folded=needs.folded[i], need_feed_forward=needs.feed_forward[i],
            )  # fmt: skip
            assert dinput is not None  # never left out
            dx, at = dinput, needs.starts[i]
            _add([None if g is None else g[images] for g in grads[at : at + 3]], (dG, dg, dU))
            _add(grads[at + 3 : at + 3 + len(shared_grads)], shared_grads)
        if grads[0] is not None:
            grads[0][slice(None) if shared else images, pixels] += dx
    return [recon, interaction, *(grad for grad in grads if grad is not None)]


def _add(sums: Sequence[Tensor | None], grads: Sequence[Tensor | None]) -> None:
    """``sums += grads``, where there is a sum."""
    for total, grad in zip(sums, grads, strict=True):
        if total is not None and grad is not None:
            total += grad
