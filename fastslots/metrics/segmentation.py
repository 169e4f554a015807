"""Overlap of predicted segments with the true objects; the background (label 0) is no object."""

from __future__ import annotations

import torch
from torch import Tensor

from fastslots.metrics.ari import contingency


def overlaps(true: Tensor, predicted: Tensor) -> tuple[Tensor, Tensor]:
    """IoU of every object with every segment: float64 [B, objects, segments]; and which objects exist [B, objects]."""
    true, predicted = true.flatten(1), predicted.flatten(1)
    table = contingency(true, predicted, torch.ones_like(true))
    union = table.sum(2, keepdim=True) + table.sum(1, keepdim=True) - table
    return (table / union.clamp_min(1))[:, 1:], table.sum(2)[:, 1:] > 0


def mean_best_overlap(true: Tensor, predicted: Tensor) -> Tensor:
    """mBO: each true object's highest IoU with any segment, mean over the objects of an image.

    true, predicted: integer labels from 0, [B, ...]. Returns float64 [B]; NaN for an image without objects.
    """
    iou, exists = overlaps(true, predicted)
    if not iou.shape[1]:
        return torch.full((true.shape[0],), float("nan"), dtype=torch.float64)
    return (iou.amax(2) * exists).sum(1) / torch.where(exists.any(1), exists.sum(1).double(), float("nan"))


def mean_iou(true: Tensor, predicted: Tensor) -> Tensor:
    """mIoU: as mBO, but a segment serves one object only, in the matching that makes the sum largest (Hungarian).

    true, predicted: integer labels from 0, [B, ...]. Returns float64 [B]; NaN for an image without objects.
    """
    from scipy.optimize import linear_sum_assignment

    iou, exists = overlaps(true, predicted)
    scores = []
    for image, present in zip(iou.cpu(), exists.cpu(), strict=True):
        table = image[present].numpy()
        rows, columns = linear_sum_assignment(table, maximize=True)
        scores.append(table[rows, columns].sum() / len(table) if len(table) else float("nan"))
    return torch.tensor(scores, dtype=torch.float64)
