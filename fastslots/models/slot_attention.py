"""A baseline: the encoder of Slot Attention (Locatello et al., 2020, arXiv 2006.15055, algorithm 1).

With normalised tokens n_t and K slots s_k, three times the same step::

    q_k  = Wq norm(s_k)                         keys Wk n_t, values Wv n_t, no biases
    A_tk = softmax_k(S^-1/2 · Wk n_t · q_k)     over the slots: they compete for each token
    u_k  = Σ_t (A_tk + ε) Wv n_t / Σ_t (A_tk + ε)
    s_k <- GRU(u_k, state s_k);   s_k <- s_k + MLP(norm(s_k))

The first slots are those of ``config.queries``, as in the Transformer ("sampled" draws them from one learned Gaussian,
as published), so that this encoder differs from it in the way slots are refined alone: the tokens are the same.
"""

from __future__ import annotations

import torch
import torch.nn as nn
from torch import Tensor

from fastslots.config.model import SlotVAEConfig
from fastslots.models.encoder import TokenEncoder, posterior_layer
from fastslots.models.queries import KINDS
from fastslots.nn import FoldedTokens

EPSILON = 1e-8


class SlotAttentionEncoder(TokenEncoder):
    """images [B, 3, R, R] in [0, 1] (or features [B, C, R, R]) -> [B, K, S], S = mean | log-scale, or the slots."""

    def __init__(self, config: SlotVAEConfig):
        super().__init__(config)
        width = config.token_width
        hidden = config.slot_attention_hidden or 2 * width
        self.iterations = config.slot_attention_iterations
        self.first_queries = KINDS[config.queries](config)
        self.queries = nn.Parameter(torch.rand(1, self.first_queries.rows or config.num_slots, width))
        self.norm_tokens, self.norm_slots = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.gru = nn.GRUCell(width, width)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))
        self.norm = nn.LayerNorm(width)
        self.output = posterior_layer(config)

    def forward(self, images: Tensor, query_noise: Tensor | None = None) -> Tensor:
        tokens = self.tokens(images)
        slots = self.first_queries(self.queries, images, tokens, query_noise)
        met = FoldedTokens(tokens, slots, self.norm_tokens, normed=True)
        for _ in range(self.iterations):
            slots = self.refine(slots, met)
        out: Tensor = self.output(self.norm(slots))
        return out

    def refine(self, slots: Tensor, tokens: FoldedTokens) -> Tensor:
        """One iteration: slots [B, K, S] -> slots."""
        # Keys and values have no bias, so both projections move to the slots' side: K rows in place of T.
        rows = self.to_q(self.norm_slots(slots)) @ self.to_k.weight
        means, _ = tokens.gather(rows, slots.shape[-1] ** -0.5, EPSILON)
        updates = self.to_v(means)
        slots = self.gru(updates.flatten(0, 1), slots.flatten(0, 1)).view_as(slots)
        change: Tensor = self.mlp(slots)
        return slots + change
