"""A loss on slots, a metric and a callback of your own, handed to ``fit``.

python examples/loss_on_slots.py --steps 1000
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastslots.train import FitResult, TrainConfig, fit


def overlap(result: Any, images: Tensor) -> Tensor:
    """Mean squared cosine between the slots of an image: 0 where they are all orthogonal."""
    z = torch.nn.functional.normalize(result.slots, dim=-1)
    cosines = z @ z.transpose(1, 2)
    return (cosines - torch.eye(cosines.shape[1], device=z.device)).square().mean()


def used_slots(result: Any, images: Tensor, masks: Tensor | None) -> float:
    """How many slots show at least one pixel of an image; the mean over images."""
    owner = result.slot_map.argmax(-1)
    return sum(len(image.unique()) for image in owner) / len(owner)


class Best:
    """Remembers the best evaluation, and says at the end where the run lies."""

    score = float("-inf")

    def on_evaluation(self, step: int, scores: dict[str, Any]) -> None:
        self.score = max(self.score, scores["j_ari"])

    def on_end(self, folder: Path) -> None:
        print(f"{folder}: best J-ARI {self.score:.3f}")


def main(out: Path | None = None, steps: int = 1000, **changes: Any) -> FitResult:
    config = TrainConfig.preset("sprites-mini", steps=steps, **changes)
    extras = {"losses": {"overlap": (0.5, overlap)}, "metrics": {"used_slots": used_slots}, "callbacks": [Best()]}
    return fit(config, out=out, **extras)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps", type=int, default=1000)
    main(**vars(parser.parse_args()))
