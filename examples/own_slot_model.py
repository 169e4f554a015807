"""The op inside a slot model of one's own: a small autoencoder whose pixels attend to its slots.

    python examples/own_slot_model.py --steps 200

It learns built-in sprites, with the interaction penalty on the attention's slot map, and prints the loss as it falls.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn as nn
from torch import Tensor

from fastslots.data import Loader, SpritesDataset, to_float
from fastslots.nn import InteractionCrossAttention
from fastslots.ops import interaction_penalty

SIDE, SLOTS, WIDTH = 32, 4, 64


class SlotModel(nn.Module):
    """images [B, 3, R, R] -> reconstruction [B, 3, R, R], slot map [B, R·R, K]"""

    def __init__(self) -> None:
        super().__init__()
        self.cnn = nn.Sequential(nn.Conv2d(3, WIDTH, 5, 4, 2), nn.GELU(), nn.Conv2d(WIDTH, WIDTH, 3, 1, 1))
        self.to_slots = nn.Linear(WIDTH * (SIDE // 4) ** 2, SLOTS * WIDTH)
        self.queries = nn.Parameter(torch.randn(1, SIDE**2, WIDTH))
        self.attention = InteractionCrossAttention(query_width=WIDTH, slot_width=WIDTH, heads=4, inner_width=WIDTH)
        self.to_pixels = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, 3))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        slots = self.to_slots(self.cnn(images).flatten(1)).unflatten(1, (SLOTS, WIDTH))
        attended, slot_map = self.attention(self.queries, slots)  # the queries are shared by all images: batch 1
        pixels = self.to_pixels(self.queries + attended)
        return pixels.transpose(1, 2).unflatten(2, (SIDE, SIDE)), slot_map


def main(steps: int) -> float:
    torch.manual_seed(0)
    model = SlotModel()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    with Loader(SpritesDataset(seed=0, size=SIDE), seed=0, batch_size=16) as loader:
        for step, batch in zip(range(1, steps + 1), loader, strict=False):
            images = to_float(batch.images)
            recon, slot_map = model(images)
            error = (recon - images).square().sum() / len(images)
            loss = error + interaction_penalty(slot_map)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 20 == 0 or step == steps:
                print(f"step {step}: error {error.item():.1f}, slots share {interaction_penalty(slot_map).item():.2f}")
    return error.item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    main(parser.parse_args().steps)
