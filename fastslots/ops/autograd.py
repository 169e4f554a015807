"""Kernels as differentiable torch operators: those of pixels and of the encoder.

They work in eager mode, under ``torch.compile(fullgraph=True)`` and ``export``. Inside forward-mode AD and functorch
transforms they would answer with silent zeros: ``backends.select`` takes the reference there. Outputs that no one used
come to a backward as zeros (autograd makes them), so kernels always see both cotangents.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastslots.ops import backends


def _operator(function: Callable) -> Callable:
    """Register ``function`` as an operator of its name -> what calls it.

    ``torch.library.custom_op`` does the same and imports Dynamo at the first call, which takes seconds. A
    backward refuses to be differentiated: left alone, torch would only warn, and drop its gradient.
    """
    name = f"fastslots::{function.__name__}"
    schema = torch.library.infer_schema(function, mutates_args=())
    torch.library.define(name, schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(name, "default", function)
    if name.endswith("_backward"):
        torch.library.register_autograd(name, _refuse)
    return getattr(torch.ops.fastslots, function.__name__).default


def _refuse(ctx, *grads):
    raise RuntimeError("kernels have no autograd formula of their backward: take second derivatives by the reference")


def _map_like(x: Tensor, batch: int, pixels: int, slots: int) -> Tensor:
    return x.new_empty(batch, pixels, slots, dtype=torch.promote_types(x.dtype, torch.float32))


# ---- cross_attention -------------------------------------------------------------------------------------------------


@_operator
def cross_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, slot_mask: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    return backends.load(backend).cross_attention_fwd(q, k, v, scale, slot_mask)


@torch.library.register_fake("fastslots::cross_attention")
def _(q, k, v, scale, slot_mask, backend):
    return torch.empty_like(q, memory_format=torch.contiguous_format), _map_like(q, q.shape[0], q.shape[2], k.shape[2])


@_operator
def cross_attention_backward(
    dout: Tensor,
    dslot_map: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    slot_mask: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return backends.load(backend).cross_attention_bwd(dout, dslot_map, q, k, v, scale, slot_mask)


@torch.library.register_fake("fastslots::cross_attention_backward")
def _(dout, dslot_map, q, k, v, scale, slot_mask, backend):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))


def _cross_attention_setup(ctx, inputs, output):
    q, k, v, ctx.scale, slot_mask, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, slot_mask)


def _cross_attention_vjp(ctx, dout, dslot_map):
    q, k, v, slot_mask = ctx.saved_tensors
    dq, dk, dv = cross_attention_backward(dout, dslot_map, q, k, v, ctx.scale, slot_mask, ctx.backend)
    return dq, dk, dv, None, None, None


torch.library.register_autograd(
    "fastslots::cross_attention", _cross_attention_vjp, setup_context=_cross_attention_setup
)


# ---- folded_cross_attention ------------------------------------------------------------------------------------------


@_operator
def folded_cross_attention(
    x: Tensor, G: Tensor, g: Tensor, U: Tensor, b: Tensor, slot_mask: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    return backends.load(backend).folded_cross_attention_fwd(x, G, g, U, b, slot_mask)


@torch.library.register_fake("fastslots::folded_cross_attention")
def _(x, G, g, U, b, slot_mask, backend):
    B, K = g.shape[0], g.shape[2]
    return x.new_empty(B, x.shape[1], x.shape[2]), _map_like(x, B, x.shape[1], K)


@_operator
def folded_cross_attention_backward(
    dy: Tensor, dslot_map: Tensor, x: Tensor, G: Tensor, g: Tensor, U: Tensor, slot_mask: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return backends.load(backend).folded_cross_attention_bwd(dy, dslot_map, x, G, g, U, slot_mask)


@torch.library.register_fake("fastslots::folded_cross_attention_backward")
def _(dy, dslot_map, x, G, g, U, slot_mask, backend):
    like = tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, G, g, U))
    return (*like, U.new_empty(U.shape[3]))


def _folded_setup(ctx, inputs, output):
    x, G, g, U, _, slot_mask, ctx.backend = inputs
    ctx.save_for_backward(x, G, g, U, slot_mask)


def _folded_vjp(ctx, dy, dslot_map):
    x, G, g, U, slot_mask = ctx.saved_tensors
    return (*folded_cross_attention_backward(dy, dslot_map, x, G, g, U, slot_mask, ctx.backend), None, None)


torch.library.register_autograd("fastslots::folded_cross_attention", _folded_vjp, setup_context=_folded_setup)


# ---- decoder_layer ---------------------------------------------------------------------------------------------------


@_operator
def decoder_layer(
    x: Tensor, folded: list[Tensor], ff: list[Tensor], slot_mask: Tensor | None, eps: float, backend: str
) -> tuple[Tensor, Tensor]:
    return backends.load(backend).decoder_layer_fwd(x, *folded, *ff, slot_mask, eps)


@torch.library.register_fake("fastslots::decoder_layer")
def _(x, folded, ff, slot_mask, eps, backend):
    B, K = folded[1].shape[0], folded[1].shape[2]
    return x.new_empty(B, x.shape[1], x.shape[2]), _map_like(x, B, x.shape[1], K)


@_operator
def decoder_layer_backward(
    dy: Tensor,
    dslot_map: Tensor,
    x: Tensor,
    folded: list[Tensor],
    ff: list[Tensor],
    slot_mask: Tensor | None,
    eps: float,
    backend: str,
) -> list[Tensor]:
    """-> dx, then the gradients of folded and ff in order. x is all that the forward saves; the rest is recomputed."""
    return list(backends.load(backend).decoder_layer_bwd(dy, dslot_map, x, *folded, *ff, slot_mask, eps))


@torch.library.register_fake("fastslots::decoder_layer_backward")
def _(dy, dslot_map, x, folded, ff, slot_mask, eps, backend):
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, *folded, *ff)]


def _layer_setup(ctx, inputs, output):
    x, folded, ff, slot_mask, ctx.eps, ctx.backend = inputs
    ctx.save_for_backward(x, slot_mask, *folded, *ff)
    ctx.num_folded = len(folded)


def _layer_vjp(ctx, dy, dslot_map):
    x, slot_mask, *weights = ctx.saved_tensors
    folded, ff = weights[: ctx.num_folded], weights[ctx.num_folded :]
    dx, *grads = decoder_layer_backward(dy, dslot_map, x, folded, ff, slot_mask, ctx.eps, ctx.backend)
    return dx, grads[: ctx.num_folded], grads[ctx.num_folded :], None, None, None


torch.library.register_autograd("fastslots::decoder_layer", _layer_vjp, setup_context=_layer_setup)


# ---- token_attention -------------------------------------------------------------------------------------------------


@_operator
def token_attention(rows: Tensor, tokens: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """-> gathered and the log-sum-exp of each row's scores, which the backward needs and no public op returns."""
    return backends.load(backend).token_attention_fwd(rows, tokens)


@torch.library.register_fake("fastslots::token_attention")
def _(rows, tokens, backend):
    gathered = torch.empty_like(rows, memory_format=torch.contiguous_format)
    return gathered, rows.new_empty(rows.shape[:2], dtype=torch.promote_types(rows.dtype, torch.float32))


@_operator
def token_attention_backward(
    dgathered: Tensor, rows: Tensor, tokens: Tensor, gathered: Tensor, lse: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    return backends.load(backend).token_attention_bwd(dgathered, rows, tokens, gathered, lse)


@torch.library.register_fake("fastslots::token_attention_backward")
def _(dgathered, rows, tokens, gathered, lse, backend):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (rows, tokens))


def _token_attention_setup(ctx, inputs, output):
    rows, tokens, ctx.backend = inputs
    gathered, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(rows, tokens, gathered, lse)


def _token_attention_vjp(ctx, dgathered, _dlse):
    rows, tokens, gathered, lse = ctx.saved_tensors
    grads = token_attention_backward(dgathered, rows, tokens, gathered, lse, ctx.backend)
    return *grads, None


torch.library.register_autograd(
    "fastslots::token_attention", _token_attention_vjp, setup_context=_token_attention_setup
)


# ---- encoder ---------------------------------------------------------------------------------------------------------


@_operator
def encoder(
    images: Tensor,
    queries: Tensor,
    grid: Tensor | None,
    picks: Tensor | None,
    weights: list[Tensor],
    strides: list[int],
    heads: int,
    eps: float,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """-> the encoder's output and, with ``keep``, what its backward reads ([B, n]; without, [B, 0])."""
    return backends.load(backend).encoder_fwd(images, queries, grid, picks, weights, strides, heads, eps, keep)


@torch.library.register_fake("fastslots::encoder")
def _(images, queries, grid, picks, weights, strides, heads, eps, keep, backend):
    size = 0
    if keep:
        size = backends.load(backend).encoder_saved_size(images, queries, grid, picks, weights, strides, heads)
    dtype = torch.promote_types(images.dtype, torch.float32)
    out = images.new_empty(images.shape[0], queries.shape[1], weights[-1].shape[0])
    return out, images.new_empty(images.shape[0], size, dtype=dtype)


@_operator
def encoder_backward(
    dout: Tensor,
    saved: Tensor,
    images: Tensor,
    queries: Tensor,
    grid: Tensor | None,
    picks: Tensor | None,
    weights: list[Tensor],
    strides: list[int],
    heads: int,
    eps: float,
    backend: str,
) -> list[Tensor]:
    """-> gradients of queries, then of the weights."""
    arguments = (images, queries, grid, picks, weights, strides, heads, eps)
    return list(backends.load(backend).encoder_bwd(dout, saved, *arguments))


@torch.library.register_fake("fastslots::encoder_backward")
def _(dout, saved, images, queries, grid, picks, weights, strides, heads, eps, backend):
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (queries, *weights)]


def _encoder_setup(ctx, inputs, output):
    images, queries, grid, picks, weights, ctx.strides, ctx.heads, ctx.eps, _, ctx.backend = inputs
    _, saved = output
    ctx.mark_non_differentiable(saved)
    ctx.save_for_backward(images, queries, grid, picks, saved, *weights)


def _encoder_vjp(ctx, dout, _dsaved):
    images, queries, grid, picks, saved, *weights = ctx.saved_tensors
    arguments = (images, queries, grid, picks, weights, ctx.strides, ctx.heads, ctx.eps, ctx.backend)
    dqueries, *dweights = encoder_backward(dout, saved, *arguments)
    no_strides = None if ctx.strides else []  # torch takes an empty list for one of tensors
    return None, dqueries, None, None, dweights, no_strides, None, None, None, None


torch.library.register_autograd("fastslots::encoder", _encoder_vjp, setup_context=_encoder_setup)
