"""Parameters and small layers that the encoder and the decoder are made of."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from fastslots.config.model import SlotVAEConfig
from fastslots.nn import AttentionProjections
from fastslots.ops.reference import fold_norm
from fastslots.records import FeedForward, FoldedProjections


class FeedForwardLayer(nn.Module):
    """Parameters of a pre-norm feed-forward block, handed to the ops as a tuple."""

    def __init__(self, width: int, expansion: int = 2):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.w1 = nn.Linear(width, expansion * width)
        self.w2 = nn.Linear(expansion * width, width)

    def weights(self) -> FeedForward:
        w1, w2 = self.w1, self.w2
        return FeedForward(self.norm.weight, self.norm.bias, w1.weight, w1.bias, w2.weight, w2.bias)


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


def hooks_of(module: nn.Module) -> tuple[Mapping[int, Any], ...]:
    """What waits for this module's forward or backward, and is called then."""
    m = module
    return m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks


def is_hooked(module: nn.Module) -> bool:
    """Whether somebody waits for this module's forward or backward, which a fused kernel would pass by."""
    return any(hooks_of(module))


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with GELU between them."""
    layers: list[nn.Module] = []
    for i, (fan_in, fan_out) in enumerate(pairwise(widths)):
        layers += [nn.GELU()] * (i > 0) + [nn.Linear(fan_in, fan_out)]
    return nn.Sequential(*layers)


@torch.no_grad()
def xavier_(transformer: nn.Module) -> None:
    """The published initialisation: every matrix inside a Transformer Xavier-uniform, its biases PyTorch's default."""
    for parameter in transformer.parameters():
        if parameter.ndim == 2:
            nn.init.xavier_uniform_(parameter)


def rows_at(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x [L, width] at index [...] int64 -> [..., width], with a gradient that has the same bits every time.

    On a CPU torch adds an advanced index's gradients with atomics, in the order in which threads come, and those of
    ``index_select`` one after the other; on a GPU it is the other way round.
    """
    if x.device.type != "cpu":
        return x[index]
    rows: Tensor = x.index_select(0, index.flatten()).unflatten(0, index.shape)
    return rows


def grid(side: int) -> Tensor:
    """Coordinates (y, x) in [0, 1] of a square grid, row by row: [side², 2] fp32."""
    axis = torch.linspace(0, 1, side)
    return torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
