"""Pictures of what the slots hold: one row an image, columns input, reconstruction, masks, maps, Jacobians."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastslots.metrics import slot_jacobian
from fastslots.models import SlotVAE

# Okabe and Ito's colours, told apart by colour-blind readers too; then lighter ones for sets with many slots
COLOURS = np.array(
    [
        *((0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233), (213, 94, 0), (240, 228, 66)),
        *((150, 150, 150), (120, 94, 240), (100, 143, 40), (254, 97, 0), (0, 200, 200)),
    ],
    dtype=np.uint8,
)
GAP = 2
SIDE = 96  # small images are enlarged to at least this


@torch.no_grad()
def slot_grid(model: SlotVAE, images: Tensor, path: Path) -> None:
    """Write a PNG: each row input | reconstruction | slots by colour (map) | slots by colour (Jacobian) | then for
    every slot its map and its share of the Jacobian. images: float [B, 3, R, R] in [0, 1]."""
    noise = torch.zeros(len(images), model.config.num_slots, model.config.slot_dim, device=images.device)
    result = model(images, noise)
    R, K = model.config.resolution, model.config.num_slots
    maps = result.slot_map.transpose(1, 2).unflatten(-1, (R, R)).cpu() / model.config.decoder_heads  # in [0, 1]
    jacobian = slot_jacobian(model.decoder, result.slots).cpu()
    shares = jacobian / jacobian.sum(1, keepdim=True).clamp_min(torch.finfo(jacobian.dtype).tiny)
    rows = []
    for i in range(len(images)):
        tiles = [_rgb(images[i]), _rgb(result.recon[i]), _by_colour(maps[i]), _by_colour(shares[i])]
        tiles += [_grey(maps[i, k]) for k in range(K)] + [_grey(shares[i, k]) for k in range(K)]
        rows.append(_join([_enlarge(tile) for tile in tiles], axis=1))
    Image.fromarray(_join(rows, axis=0)).save(path, optimize=True)


def _rgb(image: Tensor) -> np.ndarray:
    return (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()


def _grey(values: Tensor) -> np.ndarray:
    return np.repeat((values.clamp(0, 1) * 255).round().byte().numpy()[..., None], 3, -1)


def _by_colour(shares: Tensor) -> np.ndarray:
    """The colour of the strongest slot at each pixel, dimmed by its share: [K, R, R] -> [R, R, 3]."""
    strongest, owner = shares.max(0)
    colours = COLOURS[owner.numpy() % len(COLOURS)]
    return (colours * strongest.clamp(0, 1).numpy()[..., None]).astype(np.uint8)


def _enlarge(tile: np.ndarray) -> np.ndarray:
    factor = max(1, -(-SIDE // tile.shape[0]))
    return tile.repeat(factor, 0).repeat(factor, 1)


def _join(parts: list[np.ndarray], axis: int) -> np.ndarray:
    shape = list(parts[0].shape)
    shape[axis] = GAP
    gap = np.full(shape, 255, np.uint8)
    return np.concatenate([piece for part in parts for piece in (part, gap)][:-1], axis)
