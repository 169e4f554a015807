"""Slot Attention (Locatello et al., 2020) as the encoder: its loop is twenty lines.

fastslots train sprites-mini --model slot_attention_encoder:build --steps 1000        (from this folder)
"""

from __future__ import annotations

import torch
import torch.nn as nn
from torch import Tensor

from fastslots.models import SlotVAE, SlotVAEConfig


class SlotAttention(nn.Module):
    """tokens [B, T, S] -> slots [B, K, S]: slots compete for each token, three times over."""

    def __init__(self, slots: int, width: int):
        super().__init__()
        self.first = nn.Parameter(torch.randn(1, slots, width))
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.gru, self.norm = nn.GRUCell(width, width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        slots = self.first.expand(len(tokens), -1, -1)
        k, v = self.to_k(tokens), self.to_v(tokens)
        for _ in range(3):
            scores = self.to_q(self.norm(slots)) @ k.transpose(1, 2) * k.shape[-1] ** -0.5
            attn = scores.softmax(1) + 1e-8  # over the slots
            updates = attn / attn.sum(-1, keepdim=True) @ v
            slots = self.gru(updates.flatten(0, 1), slots.flatten(0, 1)).view_as(slots)
            slots = slots + self.mlp(slots)
        return slots


class Encoder(nn.Module):
    """images [B, C, R, R] -> [B, K, S]"""

    def __init__(self, config: SlotVAEConfig, width: int = 64):
        super().__init__()
        self.cnn = nn.Sequential(
            nn.Conv2d(config.channels + 2, width, 5, 2, 2), nn.GELU(), nn.Conv2d(width, width, 5, 1, 2)
        )
        self.norm, self.attention = nn.LayerNorm(width), SlotAttention(config.num_slots, width)
        self.out = nn.Linear(width, config.posterior_width)

    def forward(self, images: Tensor) -> Tensor:
        axis = torch.linspace(-1, 1, images.shape[-1], device=images.device)
        grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij")).expand(len(images), -1, -1, -1)
        tokens = self.cnn(torch.cat([images, grid], 1)).flatten(2).transpose(1, 2)
        return self.out(self.attention(self.norm(tokens)))


def build(config: SlotVAEConfig) -> SlotVAE:
    return SlotVAE(config, encoder=Encoder(config))
