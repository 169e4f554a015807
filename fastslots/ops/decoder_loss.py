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

from collections.abc import Collection
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastslots.ops import backends, checks, reference
from fastslots.ops.backends import is_traced
from fastslots.records import LossInputs, LossResult, describe_decoder

TILE_ROWS = 4096
"""Rows (images x pixels) of a tile in plain PyTorch: enough to feed its matrix products, few enough for cache."""


class DecoderLossTerms(NamedTuple):
    """Scalars: ``total`` carries the gradient; ``recon`` and ``interaction`` are unweighted and detached."""

    total: Tensor
    recon: Tensor
    interaction: Tensor


def _loss(inputs: LossInputs) -> tuple[Tensor, Tensor]:
    """(recon, interaction) of these pixels, untiled."""
    pixels, slot_map = reference.decode(inputs.decoder, inputs.slot_mask, inputs.eps)
    recon = reference.reconstruction_error(pixels, inputs.target, inputs.pixel_weight)
    return recon, reference.interaction_penalty(slot_map, inputs.pixel_weight)


def reference_decoder_loss(
    inputs: LossInputs, need: Collection[str], grad_scale: float | Tensor = 1.0, rows: int = TILE_ROWS
) -> LossResult:
    """The tiled loss in plain PyTorch, with the gradients of ``grad_scale · total`` whose names ``need`` holds.

    The signature of every backend's ``decoder_loss``.
    """
    B, L, _ = inputs.target.shape
    step = max(1, rows // max(B, 1))
    recon = inputs.target.new_zeros((), dtype=torch.promote_types(inputs.target.dtype, torch.float32))
    interaction = torch.zeros_like(recon)
    leaves = {name: t.detach().requires_grad_(name in need) for name, t in inputs.tensors().items()}
    queries = leaves.get("queries")
    grads = {} if queries is None or not queries.requires_grad else {"queries": torch.zeros_like(queries)}
    for start in range(0, L, step):
        pixels = slice(start, min(start + step, L))
        tile, tensors = inputs.part(pixels), leaves
        if queries is not None:  # they differ from tile to tile: each tile's gradient has its place
            tensors = leaves | {"queries": queries[:, pixels].detach().requires_grad_(queries.requires_grad)}
        with torch.set_grad_enabled(bool(need)):
            tile_recon, tile_pairs = _loss(tile.with_tensors(tensors))
            share = tile.target.shape[1] / L  # a mean over the tile's pixels is this share of the mean over all
            total = grad_scale * (inputs.recon_weight * tile_recon + inputs.interaction_weight * share * tile_pairs)
        recon += tile_recon.detach()
        interaction += share * tile_pairs.detach()
        if need:
            total.backward()
        if "queries" in grads:
            grads["queries"][:, pixels] = _gradient(tensors["queries"])
    grads |= {name: _gradient(leaf) for name, leaf in leaves.items() if leaf.requires_grad and leaf is not queries}
    return LossResult(recon, interaction, grads)


def _gradient(leaf: Tensor) -> Tensor:
    """Gradient of a leaf; zeros where no tile reached it (no pixels)."""
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


class _TiledLoss(torch.autograd.Function):
    """Runs a backend's ``decoder_loss`` in forward and hands out its gradients in backward."""

    @staticmethod
    def forward(
        ctx: Any, inputs: LossInputs, grad_scale: float | Tensor, backend: str, *tensors: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """tensors: those of ``inputs.tensors()``, once more and in that order: autograd sees arguments alone."""
        names = list(inputs.tensors())
        need = [name for name, needed in zip(names, ctx.needs_input_grad[3:], strict=True) if needed]
        run = reference_decoder_loss if backend == "reference" else backends.load(backend).decoder_loss
        inputs = inputs.with_tensors(dict(zip(names, tensors, strict=True)))
        recon, interaction, grads = run(inputs, need, grad_scale)
        total = inputs.recon_weight * recon + inputs.interaction_weight * interaction
        ctx.grads, ctx.names, ctx.grad_scale = grads, names, grad_scale
        ctx.mark_non_differentiable(recon, interaction)
        return total, recon, interaction

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        # Not once_differentiable: that objects only where dtotal itself needs a gradient, and would let a second
        # derivative through the folding pass, silently incomplete.
        if torch.is_grad_enabled():
            raise RuntimeError("decoder.loss cannot be differentiated twice (create_graph): use decoder(slots)")
        if ctx.grads is None:
            raise RuntimeError(
                "decoder.loss was already differentiated: its gradients are handed out once. Call it again."
            )
        factor, grads = dtotal / ctx.grad_scale, ctx.grads
        ctx.grads = None
        for dtype in dict.fromkeys(g.dtype for g in grads.values()):  # in place: they are nobody else's
            torch._foreach_mul_([g for g in grads.values() if g.dtype == dtype], factor.to(dtype))
        return None, None, None, *(grads.get(name) for name in ctx.names)


def decoder_loss(inputs: LossInputs, grad_scale: float | Tensor = 1.0, backend: str = "auto") -> DecoderLossTerms:
    """The decoder's loss with its gradients made on the way forward, tile by tile.

    Args:
        inputs: a folded decoder, the target [B, L, C], pixel weights and a slot mask (or None), and both weights, which
            are floats or 0-d tensors without gradient: see ``LossInputs``.
        grad_scale: the loss scale of mixed precision, a float or a 0-d tensor; it cancels in ``total``'s gradient.
        backend: "auto", "reference", "cpu" or "triton"; one named outright either serves or raises.

    Returns:
        total (carries the gradient), recon = Σ(x − x̂)²/B, interaction = mean over pixels of Σ_{j<k} w_j w_k.

    Raises:
        TypeError, ValueError: an argument of the wrong type or shape, a weight of a term that needs a gradient, or a
            backend that cannot serve. Differentiating twice raises RuntimeError.

    Inputs that need no gradient cost none; under ``no_grad`` only the forward runs. Inside forward AD, a functorch
    transform or ``torch.compile`` the untiled reference is traced instead, which is right in every mode.
    """
    checks.loss_inputs(inputs)
    layers = [
        layer._replace(folded=reference.real_slots_folded(inputs.slot_mask, layer.folded))
        for layer in inputs.decoder.layers
    ]
    inputs = replace(inputs, decoder=inputs.decoder._replace(layers=layers))
    if is_traced():
        recon, interaction = _loss(inputs)
        total = inputs.recon_weight * recon + inputs.interaction_weight * interaction
        return DecoderLossTerms(total, recon.detach(), interaction.detach())
    for name in ("recon_weight", "interaction_weight"):
        weight = getattr(inputs, name)
        if isinstance(weight, Tensor) and weight.requires_grad:
            raise ValueError(f"{name} cannot have a gradient, which is made on the way forward: pass {name}.detach()")
    serving = backends.select(describe_decoder("decoder_loss", inputs.decoder), backend)
    if serving != "reference" and not getattr(backends.load(serving), "MAKES_QUERIES", False):
        queries = reference.made_queries(inputs.decoder.queries)
        inputs = replace(inputs, decoder=inputs.decoder._replace(queries=queries))
    if not torch.is_grad_enabled():  # autograd would tell of weights even then that they need a gradient
        inputs = inputs.with_tensors({name: t.detach() for name, t in inputs.tensors().items()})
    terms = _TiledLoss.apply(inputs, grad_scale, serving, *inputs.tensors().values())  # type: ignore[no-untyped-call]
    return DecoderLossTerms(*terms)
