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
from fastslots.ops.decoder_loss import DecoderLossTerms, decoder_loss
from fastslots.ops.flops import tell_counter
from fastslots.ops.reference import fold_norm
from fastslots.records import (
    FeedForward,
    FoldedDecoder,
    FoldedLayer,
    FoldedProjections,
    LossInputs,
    OutputHead,
    QueryMlp,
)

__all__ = [
    "DecoderLossTerms",
    "FeedForward",
    "FoldedDecoder",
    "FoldedLayer",
    "FoldedProjections",
    "LossInputs",
    "OutputHead",
    "QueryMlp",
    "cross_attention",
    "decoder_layer",
    "decoder_loss",
    "explain",
    "fold_norm",
    "fold_projections",
    "folded_cross_attention",
    "interaction_penalty",
    "slot_attention",
    "token_attention",
]

tell_counter()
