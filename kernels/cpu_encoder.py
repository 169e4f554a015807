"""The encoder of the ``cpu`` backend: one operator from images to slots and back."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastslots.records import EncoderInputs

from .cpu_calls import binding, isa, kernel, plain, wide


def encoder_saved_size(inputs: EncoderInputs) -> int:
    """Elements (fp32 or wider) that ``encoder_fwd`` keeps of an image; of the inputs only the shapes count."""
    queries, picks = inputs.queries[:1], None if inputs.picks is None else inputs.picks[:1]
    shapes = tuple(
        None if t is None else tuple(map(int, t.shape)) for t in (inputs.images[:1], queries, inputs.grid, picks)
    )
    weights = tuple(tuple(map(int, t.shape)) for t in inputs.weights)
    return _encoder_saved_size(isa(), wide(inputs.images.dtype), shapes, weights, tuple(inputs.strides), inputs.heads)


@cache
def _encoder_saved_size(
    isa_name: str,
    dtype: torch.dtype,
    shapes: tuple[tuple[int, ...] | None, ...],
    weights: tuple[tuple[int, ...], ...],
    strides: tuple[int, ...],
    heads: int,
) -> int:
    # NumPy's arrays in place of tensors, which may be fake ones here; nobody touches their memory.
    numbers = np.dtype(np.float32 if dtype == torch.float32 else np.float64)
    images, queries, grid, picks = (None if shape is None else np.empty(shape, numbers) for shape in shapes)
    size: int = binding("encoder_saved_size", dtype)(
        images=images,
        queries=queries,
        grid=grid,
        picks=None if picks is None else np.zeros(picks.shape, np.int64),
        weights=[np.empty(shape, numbers) for shape in weights],
        strides=list(strides),
        heads=heads,
        isa=isa_name,
    )
    return size


def _encoder_arguments(inputs: EncoderInputs, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "images": plain(inputs.images, dtype),
        "queries": plain(inputs.queries, dtype),
        "grid": None if inputs.grid is None else plain(inputs.grid, dtype),
        "picks": None if inputs.picks is None else inputs.picks.contiguous(),
        "weights": [plain(w, dtype) for w in inputs.weights],
        "strides": list(inputs.strides),
        "heads": inputs.heads,
        "eps": inputs.eps,
        "winograd": os.environ.get("FASTSLOTS_WINOGRAD", "1") != "0",
    }


def encoder_fwd(inputs: EncoderInputs, keep: bool) -> tuple[Tensor, Tensor]:
    """-> out [B,K,outputs], and what the backward reads ([B,n], n = 0 unless ``keep``: it runs the forward again).

    See ``kernels/cpu/encoder.h``.
    """
    images = inputs.images
    dtype = wide(images.dtype)
    saved = images.new_empty(len(images), encoder_saved_size(inputs) if keep else 0, dtype=dtype)
    out = images.new_empty(len(images), inputs.queries.shape[1], inputs.weights[-1].shape[0], dtype=dtype)
    arguments = _encoder_arguments(inputs, dtype)
    kernel("encoder_fwd", dtype)(**arguments, saved=saved if keep else None, out=out)
    return out.to(images.dtype), saved


def encoder_bwd(dout: Tensor, saved: Tensor, inputs: EncoderInputs) -> tuple[Tensor, list[Tensor]]:
    """-> the gradient of queries, and those of the weights, in their order."""
    dtype = wide(inputs.images.dtype)
    dqueries = inputs.queries.new_empty(inputs.queries.shape, dtype=dtype)
    grads = [t.new_empty(t.shape, dtype=dtype) for t in inputs.weights]
    kernel("encoder_bwd", dtype)(
        **_encoder_arguments(inputs, dtype),
        saved=saved if saved.shape[1] else None,
        out_grad=plain(dout, dtype),
        queries_grad=dqueries,
        grads=grads,
    )
    like = [grad.to(t.dtype) for grad, t in zip(grads, inputs.weights, strict=True)]
    return dqueries.to(inputs.queries.dtype), like
