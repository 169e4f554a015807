"""``fastslots data features``: the features of a frozen ViT for every image of a data set, computed once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastslots.data import open_dataset, to_float
from fastslots.data.packed.dataset import digest
from fastslots.data.packed.features import Features, write_features
from fastslots.models.vit import VisionTransformer, load_vit
from fastslots.notices import Progress


def make_features(
    data: str | Path,
    checkpoint: Path,
    out: Path,
    grid: int = 16,
    size: int = 128,
    heads: int = 0,
    scale: str = "imagenet",
    dtype: str = "float16",
    max_objects: int | None = None,
    batch: int = 32,
    device: torch.device | None = None,
) -> None:
    """Encode every image of ``data`` (any format of ``open_dataset``) into a folder of features.

    Args:
        checkpoint: weights of the ViT; heads, scale: as in ``load_vit``.
        grid: tokens along a side, the ``resolution`` of the model that trains on them. An image is resized
            (bicubically) to grid · patch pixels a side.
        size: side of images and masks before that; masks stay so.

    Raises UserError: bad data, weights, or a folder that cannot be written. A stop is no loss: the same call goes on.
    """
    vit = load_vit(checkpoint, heads, scale).to(device or torch.device("cpu"))
    dataset = open_dataset(data, max_objects, size)
    made_by: dict[str, object] = {"checkpoint": checkpoint.name, "digest": digest(checkpoint.parent, [checkpoint.name])}
    made_by |= {"patch": vit.patch, "grid": grid}
    made_by |= {"heads": vit.blocks[0].self_attn.num_heads, "scale": scale, "images": size}  # type: ignore[union-attr]

    def compute(start: int, stop: int) -> Features:
        images, masks = dataset.batch(np.arange(start, stop))
        tokens = encode(vit, to_float(torch.from_numpy(images)).to(vit.mean.device), grid)
        return Features(tokens.cpu().numpy(), masks, counts[start:stop])

    counts = _objects(dataset, max_objects)
    everything = np.arange(len(dataset))
    with Progress(lambda done: done / len(dataset)) as progress:
        factors = lambda: dataset.factors_of(everything)  # noqa: E731
        write_features(out, dataset.info, made_by, dtype, compute, factors, batch, progress)


@torch.inference_mode()
def encode(vit: VisionTransformer, images: Tensor, grid: int) -> Tensor:
    """images [B, 3, S, S] in [0, 1], of any side -> [B, grid², width]."""
    side = grid * vit.patch
    if images.shape[-1] != side:
        images = F.interpolate(images, (side, side), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    tokens: Tensor = vit(images)
    return tokens


def _objects(dataset: Any, max_objects: int | None) -> np.ndarray:
    """Objects of the scenes that the filter leaves."""
    counts: np.ndarray = dataset.objects
    return counts[counts <= max_objects] if max_objects else counts
