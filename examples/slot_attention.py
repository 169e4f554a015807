"""Slot attention from scratch in forty lines: it learns to part three kinds of tokens without labels.

python examples/slot_attention.py
"""

from __future__ import annotations

import torch
import torch.nn as nn
from torch import Tensor

from fastslots.nn import SlotAttention


class Model(nn.Module):
    """Sets of tokens [B, L, width] -> the same tokens, each as the mean of its owners' predictions: [B, L, width]."""

    def __init__(self, width: int = 16, slots: int = 3):
        super().__init__()
        self.first = nn.Parameter(torch.randn(1, slots, width))
        self.attention = SlotAttention(width, iterations=3)
        self.decode = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        first = self.first.expand(len(tokens), -1, -1)
        slots, owners = self.attention(first, tokens, return_map=True)  # [B, K, width], [B, L, K]: who won which token
        return owners @ self.decode(slots), owners


def sets(images: int, width: int, kinds: int = 3) -> tuple[Tensor, Tensor]:
    """Sixty tokens of three kinds a set, the kinds other ones in every set: tokens [B, 60, width], kinds [B, 60]."""
    kind = torch.randint(kinds, (images, 60))
    centres = 3 * torch.randn(images, kinds, width)
    tokens = centres.gather(1, kind[..., None].expand(-1, -1, width))
    return tokens + 0.3 * torch.randn(images, 60, width), kind


def main(steps: int = 300, width: int = 16) -> float:
    """Trains; returns how many pairs of tokens are rightly in one slot, or in two (one slot for all tokens: 1/3)."""
    torch.manual_seed(0)
    model = Model(width)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(1, steps + 1):
        tokens, _ = sets(32, width)
        loss = (model(tokens)[0] - tokens).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step}: error {loss.item():.3f}")
    with torch.no_grad():
        tokens, kind = sets(64, width)
        owner = model(tokens)[1].argmax(-1)
    same = (owner[:, :, None] == owner[:, None]) == (kind[:, :, None] == kind[:, None])
    print(f"pairs parted as their kinds are: {same.float().mean():.3f}")
    return same.float().mean().item()


if __name__ == "__main__":
    main()
