"""Adjusted Rand index, batched (Hubert and Arabie, 1985)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def contingency(true: Tensor, predicted: Tensor, weight: Tensor) -> Tensor:
    """Pixels of each pair of labels: integers from 0 and weights, [B, n] -> float64 [B, true, predicted]."""
    rows = F.one_hot(true.long()).double() * weight.double()[..., None]
    return rows.transpose(1, 2) @ F.one_hot(predicted.long()).double()


def adjusted_rand_index(true: Tensor, predicted: Tensor, foreground: bool = False) -> Tensor:
    """Agreement of two labelings of the same pixels, 1 for equal partitions and 0 on average for random ones.

    Args:
        true, predicted: integer labels from 0, [B, ...] of one shape.
        foreground: leave out pixels whose true label is 0.

    Returns:
        float64 [B]. Where both partitions are trivial in the same way (one cluster each, every pixel its own, no pixel
        at all) they agree: 1, never NaN.

    Raises ValueError where the shapes differ.
    """
    if true.shape != predicted.shape:
        raise ValueError(f"true has shape {list(true.shape)}, predicted {list(predicted.shape)}: they must be equal")
    true, predicted = true.flatten(1), predicted.flatten(1)
    if not true.numel():
        return torch.ones(true.shape[0], dtype=torch.float64, device=true.device)
    weight = (true != 0) if foreground else torch.ones_like(true)
    table = contingency(true, predicted, weight)

    def pairs(count: Tensor) -> Tensor:
        return count * (count - 1) / 2

    together = pairs(table).sum((1, 2))
    rows, columns = pairs(table.sum(2)).sum(1), pairs(table.sum(1)).sum(1)
    total = pairs(table.sum((1, 2)))
    expected = rows * columns / total.clamp_min(1)
    highest = (rows + columns) / 2
    trivial = highest == expected  # one cluster on both sides, all singletons on both, or under two pixels
    return torch.where(trivial, torch.ones_like(together), (together - expected) / (highest - expected))
