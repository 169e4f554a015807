"""A U-Net-like encoder in the place of the Transformer VAE's own; the decoder stays.

fastslots train sprites-mini --model unet_encoder:build --steps 1000        (from this folder)
"""

from __future__ import annotations

import torch
import torch.nn as nn
from torch import Tensor

from fastslots.models import SlotVAE, SlotVAEConfig


def block(fan_in: int, fan_out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(fan_in, fan_out, 3, stride, 1), nn.GroupNorm(4, fan_out), nn.GELU())


class UNetEncoder(nn.Module):
    """images [B, C, R, R] -> [B, K, S], where S holds mean and log-scale of each slot (``config.posterior_width``)."""

    def __init__(self, config: SlotVAEConfig, width: int = 32):
        super().__init__()
        self.down = nn.ModuleList(block(a, width, s) for a, s in ((config.channels, 1), (width, 2), (width, 2)))
        self.up = nn.ModuleList(block(2 * width, width) for _ in range(2))
        self.position = nn.Conv2d(2, width, 1)
        self.queries = nn.Parameter(torch.randn(config.num_slots, width))
        self.gather = nn.MultiheadAttention(width, 4, batch_first=True)
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, config.posterior_width))

    def forward(self, images: Tensor) -> Tensor:
        x, skips = images, []
        for layer in self.down:
            x = layer(x)
            skips.append(x)
        for layer, skip in zip(self.up, reversed(skips[:-1]), strict=True):
            x = layer(torch.cat([nn.functional.interpolate(x, scale_factor=2), skip], 1))
        axis = torch.linspace(-1, 1, images.shape[-1], device=images.device)
        grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"))
        tokens = (x + self.position(grid)).flatten(2).transpose(1, 2)  # [B, R·R, width]
        slots, _ = self.gather(self.queries.expand(len(images), -1, -1), tokens, tokens, need_weights=False)
        return self.out(slots + self.queries)


def build(config: SlotVAEConfig) -> SlotVAE:
    return SlotVAE(config, encoder=UNetEncoder(config))
