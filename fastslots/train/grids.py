"""Pictures of what the slots hold: one row an image, columns input, reconstruction, masks, maps, Jacobians."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastslots.models import SlotVAE
from fastslots.report.explorer import views
from fastslots.report.pictures import by_colour, grey, rgb

GAP = 2
SIDE = 96  # small images are enlarged to at least this


@torch.no_grad()
def slot_grid(model: SlotVAE, images: Tensor, path: Path) -> None:
    """Write a PNG: each row input | reconstruction | slots by colour (map) | slots by colour (Jacobian) | then for
    every slot its map and its share of the Jacobian. images: float [B, 3, R, R] in [0, 1]."""
    noise = torch.zeros(len(images), model.config.num_slots, model.config.slot_dim, device=images.device)
    slots = model.encode(images, noise).slots
    recon, maps, shares = views(model.decoder, slots, model.config.decoder_heads)
    rows = []
    for i in range(len(images)):
        tiles = [rgb(images[i]), rgb(recon[i]), by_colour(maps[i]), by_colour(shares[i])]
        tiles += [grey(values) for values in (*maps[i], *shares[i])]
        rows.append(_join([_enlarge(tile) for tile in tiles], axis=1))
    Image.fromarray(_join(rows, axis=0)).save(path, optimize=True)


def _enlarge(tile: np.ndarray) -> np.ndarray:
    factor = max(1, -(-SIDE // tile.shape[0]))
    return tile.repeat(factor, 0).repeat(factor, 1)


def _join(parts: list[np.ndarray], axis: int) -> np.ndarray:
    shape = list(parts[0].shape)
    shape[axis] = GAP
    gap = np.full(shape, 255, np.uint8)
    return np.concatenate([piece for part in parts for piece in (part, gap)][:-1], axis)
