"""Shapes and random inputs of every op."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fastslots.records import (
    FeedForward,
    FoldedDecoder,
    FoldedLayer,
    FoldedProjections,
    LossInputs,
    OutputHead,
)


class Shape(NamedTuple):
    """One case: B images, H heads, L pixels, K slots, d head width, D query width, F feed-forward width."""

    B: int
    H: int
    L: int
    K: int
    d: int
    D: int
    F: int


# The presets' widths at few pixels (odd, so that every tile has a tail: no kernel looks further), then the edges.
SHAPES: dict[str, Shape] = {
    "sprites": Shape(2, 12, 77, 5, 43, 180, 360),
    "clevr6": Shape(2, 12, 131, 7, 43, 180, 360),
    "clevrtex": Shape(2, 12, 65, 11, 43, 360, 720),
    "sprites-mini": Shape(3, 4, 64, 4, 16, 64, 128),
    "one-pixel": Shape(2, 2, 1, 3, 5, 10, 20),
    "one-slot": Shape(2, 3, 9, 1, 4, 12, 24),
    "sixteen-slots": Shape(1, 2, 33, 16, 8, 16, 32),
    "many-slots": Shape(1, 4, 17, 20, 4, 16, 16),  # K > d and H·K > D: no size coincides with another
    "one-wide": Shape(2, 2, 8, 3, 1, 2, 3),
    "no-images": Shape(0, 2, 8, 3, 4, 8, 16),
}


# Fewer pixels, and the edges of the Triton kernels' tiles: their interpreter takes a second where a CPU takes one in a
# thousand.
INTERPRETED_SHAPES: dict[str, Shape] = {
    "clevr6": Shape(2, 12, 40, 7, 43, 180, 360),
    "sprites": Shape(1, 12, 33, 5, 43, 180, 360),
    "clevrtex": Shape(1, 12, 17, 11, 43, 360, 720),
    "sprites-mini": Shape(2, 4, 64, 4, 16, 64, 128),
    "one-pixel": Shape(2, 2, 1, 3, 43, 180, 40),
    "one-slot": Shape(1, 3, 9, 1, 4, 20, 24),
    "64-slots": Shape(1, 8, 31, 64, 4, 24, 16),
    "17-slots": Shape(1, 3, 65, 17, 4, 37, 50),
}
UNALIGNED = Shape(B=2, H=3, L=5, K=4, d=5, D=20, F=24)
"""D and F fill no block of the Triton kernels: padded weights, and gradients cut out."""


class TokenShape(NamedTuple):
    """One case of token attention: B images, M rows (heads x queries), T tokens, S their width."""

    B: int
    M: int
    T: int
    S: int


# The presets' widths, then a tile of 96 tokens and its neighbours, and the edges.
TOKEN_SHAPES: dict[str, TokenShape] = {
    "clevr6": TokenShape(2, 28, 500, 128),
    "sprites": TokenShape(2, 20, 131, 64),
    "clevrtex": TokenShape(1, 44, 256, 128),
    "sprites-mini": TokenShape(8, 16, 64, 64),
    "tile": TokenShape(1, 3, 96, 32),
    "tile-1": TokenShape(1, 3, 95, 10),
    "tile+1": TokenShape(1, 3, 97, 1),
    "one-row": TokenShape(3, 1, 33, 5),
    "no-images": TokenShape(0, 3, 7, 8),
}
# Every tile of the Triton kernels has 64 tokens or fewer here, so every T but the first two has a tail.
INTERPRETED_TOKEN_SHAPES: dict[str, TokenShape] = {
    "clevr6": TokenShape(2, 28, 128, 128),
    "sprites": TokenShape(1, 20, 128, 64),
    "clevrtex": TokenShape(2, 44, 90, 128),
    "one-token": TokenShape(2, 6, 1, 20),
    "one-row": TokenShape(1, 1, 65, 24),
    "odd-width": TokenShape(2, 9, 129, 37),
    "128-rows": TokenShape(1, 128, 70, 128),
    "wide": TokenShape(1, 5, 50, 300),
}


def random_qkv(shape: Shape, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """q [B,H,L,d], k, v [B,H,K,d]; scores wide enough that the softmax is far from uniform."""
    g = torch.Generator().manual_seed(seed)
    B, H, L, K, d, _, _ = shape
    q = 2 * torch.randn(B, H, L, d, generator=g, dtype=torch.float64)
    k, v = torch.randn(2, B, H, K, d, generator=g, dtype=torch.float64)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def random_layer(
    shape: Shape, dtype: torch.dtype = torch.float64, seed: int = 0, shared_queries: bool = False
) -> tuple[Tensor, FoldedProjections, FeedForward]:
    """x [B or 1, L, D], folded projections and feed-forward weights of one decoder layer."""
    g = torch.Generator().manual_seed(seed)

    def draw(*size: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        return (shift + scale * torch.randn(*size, generator=g, dtype=torch.float64)).to(dtype)

    B, H, L, K, _, D, F = shape
    x = draw(1 if shared_queries else B, L, D, shift=0.3)  # a mean, so that a norm that forgets it fails
    folded = FoldedProjections(
        draw(B, D, H, K, scale=2 * D**-0.5), draw(B, H, K), draw(B, H, K, D, scale=H**-0.5), draw(D)
    )
    norm_weight, norm_bias = draw(D, scale=0.2, shift=1.0), draw(D, scale=0.2)
    w1, b1, w2, b2 = draw(F, D, scale=D**-0.5), draw(F), draw(D, F, scale=F**-0.5), draw(D)
    ff = FeedForward(norm_weight, norm_bias, w1, b1, w2, b2)
    return x, folded, ff


def random_mask(shape: Shape) -> Tensor:
    """[B, K] bool, about six of ten slots real; the first image has none."""
    mask = torch.rand(shape.B, shape.K, generator=torch.Generator().manual_seed(1)) > 0.4
    mask[:1] = False
    return mask


class LayerInputs(NamedTuple):
    """Inputs and cotangents of one decoder layer's kernels: those of pixels in one dtype, weights in fp32."""

    x: Tensor
    folded: FoldedProjections
    ff: FeedForward
    mask: Tensor | None
    dy: Tensor
    dmap: Tensor


def layer_inputs(shape: Shape, dtype: torch.dtype, shared: bool = False, masked: bool = False) -> LayerInputs:
    x, folded, ff = random_layer(shape, torch.float32, shared_queries=shared)
    g = torch.Generator().manual_seed(1)
    dy, dmap = torch.randn(shape.B, shape.L, shape.D, generator=g), torch.randn(shape.B, shape.L, shape.K, generator=g)
    return LayerInputs(x.to(dtype), folded, ff, random_mask(shape) if masked else None, dy.to(dtype), dmap)


class LossCase(NamedTuple):
    """What a decoder's loss is made of, beside its sizes."""

    layers: int = 2
    head: tuple[int, ...] = (20, 3)  # rows of each linear map; the last is C
    shared: bool = True  # queries of all images
    weighted: bool = False  # pixel weights
    masked: bool = False
    dtype: torch.dtype = torch.float64


def loss_inputs(shape: Shape, case: LossCase = LossCase(), seed: int = 0) -> LossInputs:  # noqa: B008  (a constant)
    """Inputs of ``decoder_loss``, with a norm and linear maps as the head."""
    g = torch.Generator().manual_seed(seed)

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*size, generator=g, dtype=torch.float64)

    stack = [random_layer(shape, seed=seed + i, shared_queries=case.shared) for i in range(case.layers)]
    maps = [draw(out, into, scale=into**-0.5) for into, out in pairwise((shape.D, *case.head))]
    head = OutputHead(1 + draw(shape.D, scale=0.2), draw(shape.D), maps, [draw(out) for out in case.head])
    inputs = LossInputs(
        FoldedDecoder(stack[0][0], [FoldedLayer(folded, ff) for _, folded, ff in stack], head),
        draw(shape.B, shape.L, case.head[-1]),
        0.5 + torch.rand(shape.B, shape.L, generator=g, dtype=torch.float64) if case.weighted else None,
        random_mask(shape) if case.masked else None,
        recon_weight=0.7,
        interaction_weight=1.3,
    )
    return in_dtype(inputs, case.dtype)


def in_dtype(inputs: LossInputs, dtype: torch.dtype) -> LossInputs:
    """The same inputs in another element type."""
    weight = None if inputs.pixel_weight is None else inputs.pixel_weight.to(dtype)
    same = inputs.with_tensors({name: t.to(dtype) for name, t in inputs.tensors().items()})
    return replace(same, target=inputs.target.to(dtype), pixel_weight=weight)


def on(device: torch.device | str, value: Any) -> Any:
    """The same tensors on another device (``meta``: without values): of a tensor, ``LossInputs``, or any nesting of
    tuples, records, lists and dictionaries of tensors. Strides of dense tensors are kept."""
    if isinstance(value, LossInputs):
        return replace(
            value.with_tensors(on(device, value.tensors())),
            **{f.name: on(device, getattr(value, f.name)) for f in fields(value) if f.name != "decoder"},
        )
    return tree_map_only(Tensor, lambda t: t.detach().to(device).requires_grad_(t.requires_grad), value)
