"""The Transformer encoder as one operator: images to what the posterior needs of each slot, forward and backward.

Its definition is the plain PyTorch of ``fastslots/models/encoder.py``, which serves wherever no kernel does. A kernel
takes an image from its pixels to its slots and back in one task, so that a step has two parallel regions in place of
hundreds; images meet in the sums of the weights' gradients alone, which have one order for any number of threads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastslots.ops import autograd, backends
from fastslots.ops.backends import is_traced

KEPT_BYTES = 1 << 25
"""Most memory that a forward leaves for its backward. Where a batch needs more, its backward runs the forward again,
image by image, so that memory does not grow with the batch."""


@dataclass(frozen=True)
class EncoderInputs:
    """What the operator is handed. Axes: B images, K slots, S width, T tokens.

    ``weights``, in this order, each followed by its bias unless it says otherwise: the convolutions, the position's map
    (both only with ``strides``), both maps of the token MLP, with ``picks`` the seed weight [S, S] (no bias), then of
    each layer

        cross: norm_q, norm_tokens, to_q, to_kv, to_out     self: norm, to_qkv, to_out     ff: norm, w1, w2

    then the last norm and, where there is one, the output layer.
    """

    images: Tensor  # [B, C, R, R], without gradient
    queries: Tensor  # [B or 1, K, S]
    grid: Tensor | None  # [T, 4] of the tokens' places; None where the images are features, whose pixels are the tokens
    picks: Tensor | None  # [B, K] int64: first query k is queries[k] + W · token[pick], W the seed weight
    weights: list[Tensor]
    strides: list[int]  # of the convolutions; none for features
    heads: int
    eps: float = 1e-5


def encode(inputs: EncoderInputs, name: str) -> Tensor:
    """[B, K, outputs] in the dtype of the weights, by the backend ``name``, which is not "reference"."""
    i = inputs
    keep = not is_traced() and torch.is_grad_enabled() and any(t.requires_grad for t in (i.queries, *i.weights))
    if keep:
        size = backends.load(name).encoder_saved_size(
            i.images, i.queries, i.grid, i.picks, i.weights, i.strides, i.heads
        )
        keep = len(i.images) * size * torch.promote_types(i.images.dtype, torch.float32).itemsize <= KEPT_BYTES
    out, _ = autograd.encoder(i.images, i.queries, i.grid, i.picks, i.weights, i.strides, i.heads, i.eps, keep, name)
    return out
