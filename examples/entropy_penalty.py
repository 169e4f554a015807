"""A penalty on the attention's entropy beside, or in place of, the interaction penalty, as a loss of your own.

The interaction penalty asks that one slot owns a pixel in all heads together; the entropy of each head's attention asks
it of every head alone, and does not mind heads that disagree. ``statistics=("entropy",)`` returns it with its gradient
and stores no attention.

python examples/entropy_penalty.py --alpha 0 --weight 60 --seed 31
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastslots.models import SlotVAE
from fastslots.ops import cross_attention
from fastslots.train import FitResult, TrainConfig, fit
from fastslots.train.schedule import alpha_at


class EntropyPenalty:
    """Mean entropy in nats over images, layers, heads and some pixels; it sets in as alpha does in the preset."""

    def __init__(self, model: SlotVAE, config: TrainConfig, pixels: int = 64):
        self.model, self.config, self.pixels, self.step = model, replace(config, alpha=1.0), pixels, 0

    def on_step(self, step: int, terms: dict[str, float]) -> None:
        self.step = step

    def __call__(self, result: Any, images: Tensor) -> Tensor:
        decoder = self.model.decoder
        code = decoder.position_code
        x = decoder.query_mlp(code[torch.randint(len(code), (self.pixels,), device=code.device)])[None]
        hidden, entropies = decoder.slot_mlp(result.slots), []
        for layer in decoder.transformer:
            split = layer.projections.split_heads
            q = split(layer.projections.to_q(layer.norm_q(x))).expand(len(hidden), -1, -1, -1)
            k, v = layer.keys_values(hidden)
            out, _, rows = cross_attention(q, k, v, layer.projections.scale, statistics=("entropy",))
            entropies.append(rows["entropy"].mean())
            x = x + layer.projections.to_out(out.transpose(1, 2).flatten(2))
            ff = layer.ff
            x = x + ff.w2(torch.nn.functional.gelu(ff.w1(ff.norm(x))))
        return alpha_at(self.config, self.step + 1) * torch.stack(entropies).mean()


def main(weight: float = 60.0, alpha: float = 0.0, out: Path | None = None, **changes: Any) -> FitResult:
    """Trains ``sprites-mini`` with it; weight 60 costs an undecided pixel about what alpha 12 does."""
    config = TrainConfig.preset("sprites-mini", alpha=alpha, **changes)
    torch.manual_seed(config.seed)
    model = SlotVAE(config)
    penalty = EntropyPenalty(model, config)
    return fit(config, out=out, model=model, losses={"entropy": (weight, penalty)}, callbacks=[penalty])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--weight", type=float, default=60.0)
    parser.add_argument("--alpha", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=3500)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--holdout", default="")
    parser.add_argument("--eval_every", type=int, default=1000)
    main(**vars(parser.parse_args()))
