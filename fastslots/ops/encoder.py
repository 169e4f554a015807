"""The Transformer encoder as one operator: images to what the posterior needs of each slot, forward and backward.

Its definition is the plain PyTorch of ``fastslots/models/encoder.py``, which serves wherever no kernel does. A kernel
takes an image from its pixels to its slots and back in one task, so that a step has two parallel regions in place of
hundreds; images meet in the sums of the weights' gradients alone, which have one order for any number of threads.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from fastslots.ops import backends
from fastslots.ops.autograd import contiguous_like, operator, shapes_of
from fastslots.ops.backends import is_traced
from fastslots.records import EncoderInputs

KEPT_BYTES = 1 << 25
"""Most memory that a forward leaves for its backward. Where a batch needs more, its backward runs the forward again,
image by image, so that memory does not grow with the batch."""


# ---- the operator ----------------------------------------------------------------------------------------------------


def _encoder_backend(name: str) -> backends.EncoderBackend:
    return cast(backends.EncoderBackend, backends.load(name))


@operator
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
    inputs = EncoderInputs(images, queries, grid, picks, weights, strides, heads, eps)
    return _encoder_backend(backend).encoder_fwd(inputs, keep)


@shapes_of(encoder)
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    *of_inputs, keep, backend = arguments
    inputs = EncoderInputs(*of_inputs)
    size = _encoder_backend(backend).encoder_saved_size(inputs) if keep else 0
    images = inputs.images
    dtype = torch.promote_types(images.dtype, torch.float32)
    out = images.new_empty(images.shape[0], inputs.queries.shape[1], inputs.weights[-1].shape[0])
    return out, images.new_empty(images.shape[0], size, dtype=dtype)


@operator
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
    inputs = EncoderInputs(images, queries, grid, picks, weights, strides, heads, eps)
    dqueries, dweights = _encoder_backend(backend).encoder_bwd(dout, saved, inputs)
    return [dqueries, *dweights]


@shapes_of(encoder_backward)
def _(dout: Tensor, saved: Tensor, *arguments: Any) -> list[Tensor]:
    inputs = EncoderInputs(*arguments[:-1])
    return [contiguous_like(t) for t in (inputs.queries, *inputs.weights)]


def _encoder_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    images, queries, grid, picks, weights, ctx.strides, ctx.heads, ctx.eps, _, ctx.backend = inputs
    _, saved = output
    ctx.mark_non_differentiable(saved)
    ctx.save_for_backward(images, queries, grid, picks, saved, *weights)


def _encoder_vjp(ctx: Any, dout: Tensor, _dsaved: Tensor) -> tuple[Any, ...]:
    images, queries, grid, picks, saved, *weights = ctx.saved_tensors
    arguments = (images, queries, grid, picks, weights, ctx.strides, ctx.heads, ctx.eps, ctx.backend)
    dqueries, *dweights = encoder_backward(dout, saved, *arguments)
    no_strides: list[Tensor] | None = None if ctx.strides else []  # torch takes an empty list for one of tensors
    return None, dqueries, None, None, dweights, no_strides, None, None, None, None


torch.library.register_autograd("fastslots::encoder", _encoder_vjp, setup_context=_encoder_setup)


def encode(inputs: EncoderInputs, name: str) -> Tensor:
    """[B, K, outputs] in the dtype of the weights, by the backend ``name``, which is not "reference"."""
    i = inputs
    keep = not is_traced() and torch.is_grad_enabled() and any(t.requires_grad for t in (i.queries, *i.weights))
    if keep:
        size = _encoder_backend(name).encoder_saved_size(inputs)
        keep = len(i.images) * size * torch.promote_types(i.images.dtype, torch.float32).itemsize <= KEPT_BYTES
    out, _ = encoder(i.images, i.queries, i.grid, i.picks, i.weights, i.strides, i.heads, i.eps, keep, name)
    return out
