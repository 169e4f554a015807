"""``fastslots data features``: the features of a frozen ViT for every image of a data set, computed once."""

from __future__ import annotations

from dataclasses import dataclass
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


@dataclass(frozen=True)
class VitFile:
    """Weights of a ViT on disk, and what they do not say of it: see ``load_vit``."""

    path: Path
    heads: int = 0
    scale: str = "imagenet"


@dataclass(frozen=True)
class Encoding:
    """How images become features."""

    grid: int = 16  # tokens along a side: the ``resolution`` of the model that trains on them
    size: int = 128  # pixels a side of images and masks as they are read; masks stay so
    dtype: str = "float16"
    batch: int = 32  # images encoded at once


def make_features(
    data: str | Path,
    weights: VitFile,
    out: Path,
    encoding: Encoding = Encoding(),
    max_objects: int | None = None,
    device: torch.device | None = None,
) -> None:
    """Encode every image of ``data`` (any format of ``open_dataset``) into a folder of features.

    An image is resized (bicubically) to grid · patch pixels a side. Raises UserError: bad data, weights, or a folder
    that cannot be written. A stop is no loss: the same call goes on.
    """
    vit = load_vit(weights.path, weights.heads, weights.scale).to(device or torch.device("cpu"))
    dataset = open_dataset(data, max_objects, encoding.size)
    file, grid = weights.path, encoding.grid
    made_by: dict[str, object] = {"checkpoint": file.name, "digest": digest(file.parent, [file.name])}
    made_by |= {"patch": vit.patch, "grid": grid, "heads": vit.heads, "scale": weights.scale, "images": encoding.size}

    def compute(start: int, stop: int) -> Features:
        images, masks = dataset.batch(np.arange(start, stop))
        tokens = encode(vit, to_float(torch.from_numpy(images)).to(vit.mean.device), grid)
        return Features(tokens.cpu().numpy(), masks, counts[start:stop])

    counts = _objects(dataset, max_objects)
    everything = np.arange(len(dataset))
    with Progress(lambda done: done / len(dataset)) as progress:
        factors = lambda: dataset.factors_of(everything)  # noqa: E731
        write_features(out, dataset.info, made_by, encoding.dtype, compute, factors, encoding.batch, progress)


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
