"""Object masks from the slot map of a trained run, as PNG files of labels, with their scores.

python examples/masks_from_slot_map.py runs/sprites-mini-1 --out masks
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastslots.data import SpritesDataset, read_batch, to_float
from fastslots.metrics import fg_ari
from fastslots.models import SlotVAE

IMAGES = 8


@torch.no_grad()
def main(run: Path, out: Path) -> float:
    model = SlotVAE.from_run(run)
    R, K, D = model.config.resolution, model.config.num_slots, model.config.slot_dim
    images, truth = read_batch(SpritesDataset(seed=7, size=R), np.arange(IMAGES))
    result = model(to_float(images), torch.zeros(IMAGES, K, D))  # no noise: z is the posterior mean
    labels = result.slot_map.argmax(-1).view(IMAGES, R, R)  # slot_map: [B, R·R, K]
    out.mkdir(parents=True, exist_ok=True)
    for i, mask in enumerate(labels):
        Image.fromarray(mask.byte().numpy()).save(out / f"mask_{i}.png")
    score = fg_ari(labels, truth.long()).mean().item()
    print(f"{IMAGES} masks in {out}, FG-ARI {score:.3f}")
    return score


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, default=Path("masks"))
    args = parser.parse_args()
    main(args.run, args.out)
