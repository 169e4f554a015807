"""Slots to images: every pixel is a query that attends to the slots. A pixel never attends to a pixel."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import cast

import torch
import torch.nn as nn
from torch import Tensor

from fastslots.config.model import SlotVAEConfig
from fastslots.models.layers import FeedForwardLayer, grid, mlp, rows_at, xavier_
from fastslots.nn import AttentionProjections
from fastslots.ops import checks, decoder_layer
from fastslots.ops.backends import is_traced
from fastslots.ops.decoder_loss import DecoderLossTerms, LossInputs, decoder_loss
from fastslots.ops.reference import (
    FeedForward,
    FoldedProjections,
    OutputHead,
    QueryMlp,
    fold_norm,
    output_head,
)

CACHED_ROWS = 1024


class DecoderLayer(nn.Module):
    """Cross-attention to the slots and a feed-forward; ``fold`` turns the slots into what the ops take."""

    def __init__(self, config: SlotVAEConfig):
        super().__init__()
        self.norm_q = nn.LayerNorm(config.query_width)
        self.norm_slots = nn.LayerNorm(config.slot_width)
        self.projections = AttentionProjections(
            config.query_width, config.slot_width, config.slot_width, config.decoder_heads
        )
        self.ff = FeedForwardLayer(config.query_width)

    def keys_values(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """slots [B, K, slot_width] -> k, v [B, H, K, d]."""
        return self.projections.keys_values(self.norm_slots(slots))

    def fold(self, slots: Tensor) -> FoldedProjections:
        """slots [B, K, slot_width] -> folded projections, the affine part of the query norm included."""
        folded = self.projections.fold(*self.keys_values(slots))
        return fold_norm(folded, self.norm_q.weight, self.norm_q.bias)


class Decoder(nn.Module):
    """slots [B, K, D] -> recon [B, C, R, R], slot_map [B, R·R, K] (sum over heads, mean over layers)."""

    def __init__(self, config: SlotVAEConfig):
        super().__init__()
        self.resolution, self.channels, self.slot_dim = config.resolution, config.channels, config.slot_dim
        self.slot_mlp = mlp(config.slot_dim, config.slot_hidden, config.slot_width)
        self.query_mlp = mlp(4 * config.octaves, config.query_hidden, config.query_width)
        self.transformer = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        self.norm = nn.LayerNorm(config.query_width)
        self.output_mlp = mlp(config.query_width, *config.output_hidden, config.channels)
        self.register_buffer("position_code", position_code(config.resolution, config.octaves), persistent=False)
        xavier_(self.transformer)

    def queries(self) -> Tensor:
        """The pixels' queries, the same for every image: [1, L, query_width]."""
        return _by_rows(self.query_mlp, cast(Tensor, self.position_code))[None]

    def _queries_at(self, pixels: Tensor) -> Tensor:
        """Queries of each image's own pixels, [B, P] int64 -> [B, P, query_width]: by whichever is less work."""
        code = cast(Tensor, self.position_code)
        return self.query_mlp(code[pixels]) if pixels.numel() < len(code) else rows_at(self.queries()[0], pixels)

    def layers(self, slots: Tensor) -> list[tuple[FoldedProjections, FeedForward]]:
        """What each layer needs to know of the slots and of its weights; K rows an image, in fp32."""
        if slots.ndim != 3 or slots.shape[2] != self.slot_dim:
            raise ValueError(f"slots has shape {list(slots.shape)}, expected [B, K, {self.slot_dim}]")
        with torch.autocast(slots.device.type, enabled=False):
            hidden = self.slot_mlp(slots.to(self.norm.weight.dtype))
            layers = cast(Iterable[DecoderLayer], self.transformer)
            return [(layer.fold(hidden), layer.ff.weights()) for layer in layers]

    def head(self) -> OutputHead:
        return OutputHead(self.norm.weight, self.norm.bias, *_linear_maps(self.output_mlp))

    def forward(self, slots: Tensor, slot_mask: Tensor | None = None, backend: str = "auto") -> tuple[Tensor, Tensor]:
        """slots [B, K, D] -> recon [B, C, R, R], slot_map [B, R·R, K]; slot_mask [B, K] bool, True = a real slot.

        backend: of its layers; "reference" for what must consist of torch's own operators (an export).
        """
        x, maps = self.queries(), []
        for folded, ff in self.layers(slots):
            x, slot_map = decoder_layer(x, folded, ff, backend, slot_mask=slot_mask, eps=self.norm.eps)
            maps.append(slot_map)
        head = self.head()
        pixels = _by_rows(lambda rows: output_head(rows, head, self.norm.eps), x)
        recon = pixels.transpose(1, 2).unflatten(-1, (self.resolution, self.resolution))
        return recon, torch.stack(maps).mean(0)

    def loss(
        self,
        slots: Tensor,
        images: Tensor,
        recon_weight: float | Tensor,
        interaction_weight: float | Tensor,
        *,
        pixels: Tensor | None = None,
        pixel_weight: Tensor | None = None,
        slot_mask: Tensor | None = None,
        grad_scale: float | Tensor = 1.0,
        backend: str = "auto",
    ) -> DecoderLossTerms:
        """The decoder's loss, forward and backward tile by tile (``fastslots.ops.decoder_loss``).

        Args:
            slots: [B, K, D]. images: [B, C, R, R], the targets.
            recon_weight, interaction_weight: floats or 0-d tensors, known on the way forward.
            pixels: [B, P] int64, decode these pixels alone (rows of R·R, drawn with replacement); None decodes all.
            pixel_weight: [B, P] (or [B, L]), 1 / (L · probability) of each drawn pixel, so that both terms estimate
                those of all pixels without bias; None: drawn uniformly.
            slot_mask: [B, K] bool, True = a real slot.
            grad_scale: the loss scale of mixed precision.

        Returns:
            total (carries the gradient), recon = Σ(x − x̂)²/B, interaction = mean over pixels of Σ_{j<k} w_j w_k.

        Raises:
            TypeError, ValueError: naming the argument, its shape or dtype, and what was expected.
        """
        B, R = slots.shape[0], self.resolution
        checks.tensor("images", images, 4, "[B, C, R, R]")
        checks.shape("images", images, (B, self.channels, R, R), "(B of slots, C, R, R)")
        checks.slot_mask(slot_mask, slots, *slots.shape[:2])
        if pixels is not None and (pixels.dtype != torch.int64 or pixels.ndim != 2 or not pixels.shape[1]):
            raise ValueError(f"pixels must be int64 [{B}, P], P above 0, got {pixels.dtype} {list(pixels.shape)}")
        P = R * R if pixels is None else pixels.shape[1]
        if pixels is not None:
            checks.shape("pixels", pixels, (B, P), "(B of slots, P)")
        if pixel_weight is not None:
            checks.shape("pixel_weight", pixel_weight, (B, P), "(B of slots, a pixel each)")
        target = images.flatten(2).transpose(1, 2)
        expansion = 1.0  # the error is a sum over all pixels, of which P are seen; the penalty is a mean
        queries: Tensor | QueryMlp = QueryMlp(cast(Tensor, self.position_code), *_linear_maps(self.query_mlp))
        if pixels is not None:
            expansion = R * R / P
            queries = self._queries_at(pixels)
            target = target.gather(1, pixels[..., None].expand(-1, -1, self.channels))
        inputs = LossInputs(
            queries=queries,
            layers=self.layers(slots),
            head=self.head(),
            target=target,
            pixel_weight=pixel_weight,
            slot_mask=slot_mask,
            recon_weight=recon_weight * expansion,
            interaction_weight=interaction_weight,
            eps=self.norm.eps,
        )
        terms = decoder_loss(inputs, grad_scale, backend)
        return terms._replace(recon=terms.recon * expansion)


def _by_rows(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``function(x)``, which treats all rows [..., width] alike.

    On a CPU and without gradients, part by part: hidden layers stay in cache (clevr6's queries take 41 ms, not 65) and
    never exist for all rows.
    """
    if torch.is_grad_enabled() or x.device.type != "cpu" or is_traced():
        return function(x)
    parts = [function(part) for part in x.flatten(0, -2).split(CACHED_ROWS)]
    return torch.cat(parts).unflatten(0, x.shape[:-1])


def _linear_maps(mlp: nn.Sequential) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and biases of an MLP's linear layers."""
    linears = [module for module in mlp if isinstance(module, nn.Linear)]
    return [m.weight for m in linears], [m.bias for m in linears]


def position_code(resolution: int, octaves: int) -> Tensor:
    """sin(y), sin(x), cos(y), cos(x) at frequencies 2^o·π of (y, x) in [0, 1]: [R·R, 4·octaves] fp32."""
    frequencies = math.pi * 2.0 ** torch.arange(octaves)
    angles = (grid(resolution)[:, :, None] * frequencies).flatten(1)  # y's octaves, then x's
    return torch.cat([angles.sin(), angles.cos()], -1)
