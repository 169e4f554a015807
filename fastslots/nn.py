"""Modules for other people's slot models: parameters over the functional ops of ``fastslots.ops``."""

from __future__ import annotations

import torch.nn as nn
from torch import Tensor

from fastslots.ops import FoldedProjections, fold_projections, folded_cross_attention


class AttentionProjections(nn.Module):
    """The four projections of a cross-attention; keys and values share one matrix, as published.

    The key bias cancels in a softmax over keys, so that path never reads it and its gradient is exactly zero: a
    rounding-sized one would be blown up to ±lr by Adam. It exists because published checkpoints hold it.
    """

    def __init__(self, query_width: int, source_width: int, inner_width: int, heads: int, scale: float | None = None):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(query_width, inner_width)
        self.to_kv = nn.Linear(source_width, 2 * inner_width)
        self.to_out = nn.Linear(inner_width, query_width)
        self.scale = query_width**-0.5 if scale is None else scale  # as published: the query's width, not the head's

    def split_heads(self, x: Tensor) -> Tensor:
        """[B, n, H·d] -> [B, H, n, d]"""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def key_value_weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """Key weight [H·d, source], value weight [H·d, source], value bias [H·d]."""
        inner = self.to_q.out_features
        key, value = self.to_kv.weight.split(inner)
        return key, value, self.to_kv.bias[inner:]

    def keys_values(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """source [B, K, source_width] -> k, v [B, H, K, d]; k without the bias that cancels."""
        wk, wv, bv = self.key_value_weights()
        return self.split_heads(source @ wk.T), self.split_heads(source @ wv.T + bv)

    def fold(self, k: Tensor, v: Tensor) -> FoldedProjections:
        """k, v [B, H, K, d] -> both projections of the query side folded into them."""
        return fold_projections(
            self.to_q.weight, self.to_q.bias, k, v, self.to_out.weight, self.to_out.bias, self.scale
        )


class InteractionCrossAttention(nn.Module):
    """Cross-attention of many queries to few slots that also returns what the interaction penalty needs.

    >>> attention = InteractionCrossAttention(query_width=180, slot_width=64, heads=12, inner_width=516)
    >>> out, slot_map = attention(pixels, slots)          # [B, L, 180], [B, L, K]
    >>> loss = ... + alpha * fastslots.ops.interaction_penalty(slot_map)

    The projections of the query side are folded into the slots, so their cost does not grow with the number of pixels
    and no attention matrix per head is kept by the kernels. No norm and no residual: add your own.

    Args:
        query_width, slot_width: widths of the inputs. heads: H. inner_width: all heads together (None: query_width).
        scale: factor on the scores; None means query_width^-1/2, as published.
        backend: see ``fastslots.ops.cross_attention``.

    Raises ValueError where inner_width is no multiple of heads.
    """

    def __init__(
        self,
        query_width: int,
        slot_width: int,
        heads: int,
        inner_width: int | None = None,
        scale: float | None = None,
        backend: str = "auto",
    ):
        super().__init__()
        inner_width = query_width if inner_width is None else inner_width
        if inner_width % heads:
            raise ValueError(f"inner_width {inner_width} must be a multiple of heads {heads}")
        self.backend = backend
        self.projections = AttentionProjections(query_width, slot_width, inner_width, heads, scale)

    def forward(self, queries: Tensor, slots: Tensor, slot_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """queries [B or 1, L, query_width], slots [B, K, slot_width] -> out [B, L, query_width], slot_map [B, L, K].

        slot_mask: [B, K] bool, True for a real slot: images with fewer slots are padded.
        """
        folded = self.projections.fold(*self.projections.keys_values(slots))
        return folded_cross_attention(queries, folded, self.backend, slot_mask=slot_mask)
