"""The decoder's loss, tile by tile: forward and backward of a tile of pixels in one go.

Given the slots, pixels are independent and the loss is a sum over pixels. So each tile is decoded, compared with its
target and differentiated before the next one starts; only the gradients of the weights and of the folded projections
leave it. No activation outlives its tile, and memory does not grow with R²: even the first layer's queries are made
tile by tile, of position codes, where the backend can (``QueryMlp``; their MLP is all that may be computed twice).
Elsewhere, and where each image has its own, they are given, and their gradient leaves the tile.

    total = recon_weight · Σ (x − x̂)² / B  +  interaction_weight · mean_{b,l} Σ_{j<k} w_j w_k

Both weights must be known on the way forward. Gradients are made there, scaled by ``grad_scale`` (the loss scale of
mixed precision, so that small ones survive 16 bits), and handed out by autograd when ``total`` is differentiated.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fastslots.ops import backends, reference
from fastslots.ops.backends import is_traced
from fastslots.ops.reference import FeedForward, FoldedProjections, OutputHead, QueryMlp

TILE_ROWS = 4096
"""Rows (images x pixels) of a tile in plain PyTorch: enough to feed its matrix products, few enough for cache."""


class DecoderLossTerms(NamedTuple):
    """Scalars: ``total`` carries the gradient; ``recon`` and ``interaction`` are unweighted and detached."""

    total: Tensor
    recon: Tensor
    interaction: Tensor


def decoder_tensors(
    queries: Tensor | QueryMlp, layers: list[tuple[FoldedProjections, FeedForward]], head: OutputHead
) -> list[Tensor]:
    """A decoder as one list, the order in which kernels take it and give gradients."""
    flat = [queries] if isinstance(queries, Tensor) else [*queries.weights, *queries.biases]
    for folded, ff in layers:
        flat += [*folded, *ff]
    return [*flat, head.norm_weight, head.norm_bias, *head.weights, *head.biases]


@dataclass(frozen=True)
class LossInputs:
    """What a tile needs. Targets, pixel weights and masks carry no gradient."""

    queries: Tensor | QueryMlp  # [B or 1, L, D], or what makes them
    layers: list[tuple[FoldedProjections, FeedForward]]
    head: OutputHead
    target: Tensor  # [B, L, C]
    pixel_weight: Tensor | None  # [B, L]
    slot_mask: Tensor | None  # [B, K] bool
    recon_weight: float | Tensor
    interaction_weight: float | Tensor
    eps: float = 1e-5

    def made_queries(self) -> Tensor:
        """[B or 1, L, D]"""
        return self.queries if isinstance(self.queries, Tensor) else self.queries.queries()

    def differentiable(self) -> list[Tensor]:
        return decoder_tensors(self.queries, self.layers, self.head)

    def with_tensors(self, flat: list[Tensor]) -> LossInputs:
        """The same inputs with ``flat`` in the places of ``differentiable()``."""
        it = iter(flat)
        queries: Tensor | QueryMlp
        if isinstance(self.queries, Tensor):
            queries = next(it)
        else:
            weights = [next(it) for _ in self.queries.weights]
            queries = QueryMlp(self.queries.code, weights, [next(it) for _ in self.queries.biases])
        layers = []
        for folded, ff in self.layers:
            layers.append((FoldedProjections(*(next(it) for _ in folded)), FeedForward(*(next(it) for _ in ff))))
        head = OutputHead(
            next(it), next(it), [next(it) for _ in self.head.weights], [next(it) for _ in self.head.biases]
        )
        return replace(self, queries=queries, layers=layers, head=head)

    def pixels(self, start: int, stop: int) -> LossInputs:
        """The same inputs for pixels start..stop alone."""
        weight = None if self.pixel_weight is None else self.pixel_weight[:, start:stop]
        target, queries = self.target[:, start:stop], self.queries
        if isinstance(queries, Tensor):
            queries = queries[:, start:stop]
        else:
            queries = queries._replace(code=queries.code[start:stop])
        return replace(self, queries=queries, target=target, pixel_weight=weight)


def _loss(inputs: LossInputs) -> tuple[Tensor, Tensor]:
    """(recon, interaction) of these pixels, untiled."""
    queries = inputs.made_queries()
    pixels, slot_map = reference.decode(queries, inputs.layers, inputs.head, inputs.slot_mask, inputs.eps)
    recon = reference.reconstruction_error(pixels, inputs.target, inputs.pixel_weight)
    return recon, reference.interaction_penalty(slot_map, inputs.pixel_weight)


def reference_decoder_loss(
    inputs: LossInputs, need_grads: list[bool], grad_scale: float | Tensor = 1.0, rows: int = TILE_ROWS
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """The tiled loss in plain PyTorch -> recon, interaction, and the gradients of ``grad_scale · total`` asked for.

    The signature of every backend's ``decoder_loss``.
    """
    B, L, _ = inputs.target.shape
    step = max(1, rows // max(B, 1))
    recon = inputs.target.new_zeros((), dtype=torch.promote_types(inputs.target.dtype, torch.float32))
    interaction = torch.zeros_like(recon)
    leaves = [t.detach().requires_grad_(need) for t, need in zip(inputs.differentiable(), need_grads, strict=True)]
    # Queries that are given differ from tile to tile: each tile's gradient has its own place.
    given, weights = (leaves[:1], leaves[1:]) if isinstance(inputs.queries, Tensor) else ([], leaves)
    given_grads = [torch.zeros_like(t) if t.requires_grad else None for t in given]
    any_grad = any(need_grads)
    for start in range(0, L, step):
        tile = inputs.pixels(start, min(start + step, L))
        own = [t[:, start : start + step].detach().requires_grad_(t.requires_grad) for t in given]
        with torch.set_grad_enabled(any_grad):
            tile_recon, tile_pairs = _loss(tile.with_tensors([*own, *weights]))
            share = tile.target.shape[1] / L  # a mean over the tile's pixels is this share of the mean over all
            total = grad_scale * (inputs.recon_weight * tile_recon + inputs.interaction_weight * share * tile_pairs)
        recon += tile_recon.detach()
        interaction += share * tile_pairs.detach()
        if any_grad:
            total.backward()
        for t, grad in zip(own, given_grads, strict=True):
            if grad is not None:
                assert t.grad is not None
                grad[:, start : start + step] = t.grad
    return recon, interaction, [*given_grads, *(_grad_or_zeros(leaf) for leaf in weights)]


def _grad_or_zeros(leaf: Tensor) -> Tensor | None:
    """Gradient of a leaf; zeros where no tile reached it (no pixels), None where none was asked for."""
    return torch.zeros_like(leaf) if leaf.requires_grad and leaf.grad is None else leaf.grad


class _TiledLoss(torch.autograd.Function):
    """Runs a backend's ``decoder_loss`` in forward and hands out its gradients in backward."""

    @staticmethod
    def forward(ctx, inputs: LossInputs, grad_scale, backend: str, *tensors: Tensor):
        need = list(ctx.needs_input_grad[3:])
        run = reference_decoder_loss if backend == "reference" else backends.load(backend).decoder_loss
        recon, interaction, grads = run(inputs.with_tensors(list(tensors)), need, grad_scale)
        total = inputs.recon_weight * recon + inputs.interaction_weight * interaction
        ctx.grads, ctx.grad_scale = grads, grad_scale
        ctx.mark_non_differentiable(recon, interaction)
        return total, recon, interaction

    @staticmethod
    def backward(ctx, dtotal: Tensor, *_):
        # Not once_differentiable: that objects only where dtotal itself needs a gradient, and would let a second
        # derivative through the folding pass, silently incomplete.
        if torch.is_grad_enabled():
            raise RuntimeError("decoder.loss cannot be differentiated twice (create_graph): use decoder(slots)")
        if ctx.grads is None:
            raise RuntimeError(
                "decoder.loss was already differentiated: its gradients are handed out once. Call it again."
            )
        factor = dtotal / ctx.grad_scale
        grads = [None if g is None else g.mul_(factor.to(g.dtype)) for g in ctx.grads]  # nobody else holds them
        ctx.grads = None
        return None, None, None, *grads


def decoder_loss(inputs: LossInputs, grad_scale: float | Tensor = 1.0, backend: str = "auto") -> DecoderLossTerms:
    """The decoder's loss with its gradients made on the way forward, tile by tile.

    Inputs that need no gradient cost none; under ``no_grad`` only the forward runs. Differentiating twice raises.
    ValueError: a weight of a term that needs a gradient, or a backend that cannot serve.
    Inside forward AD, a functorch transform or ``torch.compile`` the untiled reference is traced instead, which is
    right in every mode.
    """
    if is_traced():
        recon, interaction = _loss(inputs)
        total = inputs.recon_weight * recon + inputs.interaction_weight * interaction
        return DecoderLossTerms(total, recon.detach(), interaction.detach())
    for what in ("recon_weight", "interaction_weight"):
        weight = getattr(inputs, what)
        if isinstance(weight, Tensor) and weight.requires_grad:
            raise ValueError(f"{what} cannot have a gradient, which is made on the way forward: pass {what}.detach()")
    name = _serve(inputs, backend)
    if name != "reference" and not getattr(backends.load(name), "MAKES_QUERIES", False):
        inputs = replace(inputs, queries=inputs.made_queries())
    flat = inputs.differentiable()
    return DecoderLossTerms(*_TiledLoss.apply(inputs, grad_scale, name, *flat))


def _serve(inputs: LossInputs, backend: str) -> str:
    """Name of the backend; queries that are not made yet are asked for by their shape."""
    queries, tensors = inputs.queries, inputs.differentiable()
    if isinstance(queries, QueryMlp):
        last = queries.weights[-1]
        tensors = [last.new_empty(1, 0, len(last)), *tensors[2 * len(queries.weights) :]]
    return backends.select("decoder_loss", tensors, backend)
