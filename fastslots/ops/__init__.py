"""Fused cross-attention with its interaction regulariser, for any slot model.

>>> out, slot_map = cross_attention(q, k, v)
>>> loss = ... + alpha * interaction_penalty(slot_map)
"""

from fastslots.ops.api import (
    cross_attention,
    decoder_layer,
    fold_projections,
    folded_cross_attention,
    interaction_penalty,
    slot_attention,
    token_attention,
)
from fastslots.ops.backends import explain
from fastslots.ops.reference import FeedForward, FoldedProjections, OutputHead, fold_norm

__all__ = [
    "FeedForward",
    "FoldedProjections",
    "OutputHead",
    "cross_attention",
    "decoder_layer",
    "explain",
    "fold_norm",
    "fold_projections",
    "folded_cross_attention",
    "interaction_penalty",
    "slot_attention",
    "token_attention",
]
