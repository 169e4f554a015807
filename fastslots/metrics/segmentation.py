"""How well the slots' masks match the objects: ARI, mean best overlap and mean IoU.

Every function takes the decoder's slot map (or labels) and the true label maps, and gives one number per image, so
that callers average over whichever images they mean to. 0 is the label of the background.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastslots.metrics.rand_index import adjusted_rand_index, contingency


def ari(slot_map: Tensor, masks: Tensor) -> Tensor:
    """Adjusted Rand index over all pixels, the background an object like any other: [B] float64.

    slot_map: [B, L, K] float (argmax over slots; resized bilinearly if masks are of another size), or integer labels
    [B, R, R]. masks: [B, R, R] integer labels (or [B, R, R, 1], or NumPy's). Raises TypeError, ValueError otherwise.
    """
    masks = as_masks(masks, len(slot_map))
    return adjusted_rand_index(masks, slot_labels(slot_map, masks))


def fg_ari(slot_map: Tensor, masks: Tensor) -> Tensor:
    """Adjusted Rand index over the pixels of objects alone, [B] float64; 1 for an image without any. See ``ari``."""
    masks = as_masks(masks, len(slot_map))
    return adjusted_rand_index(masks, slot_labels(slot_map, masks), foreground_only=True)


def mean_best_overlap(slot_map: Tensor, masks: Tensor, include_background: bool = False) -> Tensor:
    """mBO: for each true object the largest IoU that any slot has with it, averaged over objects: [B] float64.

    A slot may be the best of several objects. The background is no object, unless asked for, but a slot's pixels on it
    count in its union. An image without objects gives 1. Arguments as in ``ari``.
    """
    overlap, is_object, _, _ = slot_overlaps(slot_map, masks, include_background)
    return _mean_over_objects(overlap.amax(-1), is_object)


def mean_iou(slot_map: Tensor, masks: Tensor, include_background: bool = False) -> Tensor:
    """mIoU: as ``mean_best_overlap``, but each slot serves one object at most, matched for the largest sum (Hungarian).

    Objects left without a slot count 0.
    """
    from scipy.optimize import linear_sum_assignment  # exact; kept out of the import of fastslots

    overlap, is_object, _, _ = slot_overlaps(slot_map, masks, include_background)
    matched = torch.zeros(overlap.shape[:2], dtype=overlap.dtype)
    for image, scores in enumerate(overlap.cpu()):  # rows that are no object hold zeros and take nothing from the sum
        rows, columns = map(torch.from_numpy, linear_sum_assignment(scores.numpy(), maximize=True))
        matched[image, rows] = scores[rows, columns]
    return _mean_over_objects(matched.to(overlap.device), is_object)


def slot_labels(slot_map: Tensor, masks: Tensor) -> Tensor:
    """The slot with the largest weight at every pixel of the masks, [B, R, R] int64; labels are passed through.

    Raises ValueError: masks that are not [B, R, R], or a slot_map that is not [B, L, K] with L a square.
    """
    masks = as_masks(masks, len(slot_map))
    if not slot_map.is_floating_point():
        if slot_map.shape != masks.shape:
            raise ValueError(f"labels {list(slot_map.shape)} and masks {list(masks.shape)} must have the same shape")
        return slot_map.long()
    side = math.isqrt(slot_map.shape[1]) if slot_map.ndim == 3 else 0
    if side == 0 or side**2 != slot_map.shape[1]:
        raise ValueError(f"slot_map must be [B, R·R, K], got {list(slot_map.shape)}")
    return resize_to(slot_map.transpose(1, 2).unflatten(-1, (side, side)), masks).argmax(1)


def resize_to(scores: Tensor, masks: Tensor) -> Tensor:
    """scores [B, K, r, r] -> [B, K, R, R], bilinearly, where the masks [B, R, R] are of another size."""
    if scores.shape[-2:] == masks.shape[-2:]:
        return scores
    return F.interpolate(scores, size=masks.shape[-2:], mode="bilinear", align_corners=False)


def as_masks(masks: Tensor, images: int) -> Tensor:
    """[images, R, R] out of a tensor or NumPy array, also of [images, R, R, 1] or [images, 1, R, R].

    Raises TypeError, ValueError unless they are integer labels of that shape.
    """
    masks = torch.as_tensor(masks)
    if masks.ndim == 4 and 1 in (masks.shape[1], masks.shape[3]):
        masks = masks.squeeze(3 if masks.shape[3] == 1 else 1)
    if masks.is_floating_point():
        raise TypeError(f"masks must hold integer labels, got {masks.dtype}")
    if masks.ndim != 3 or len(masks) != images:
        raise ValueError(f"masks must be [{images}, R, R], got {list(masks.shape)}")
    return masks


def slot_overlaps(
    slot_map: Tensor, masks: Tensor, include_background: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """IoU of every true label with every slot, [B, T, P] float64; which rows are objects there, [B, T] bool; the true
    labels of the rows, [T]; the slots of the columns, [P]: those that own a pixel. Arguments as in ``ari``.
    """
    masks = as_masks(masks, len(slot_map))
    counts, names, slots = contingency(masks, slot_labels(slot_map, masks))
    size = counts.sum(2, keepdim=True)
    union = size + counts.sum(1, keepdim=True) - counts
    is_object = size[..., 0] > 0
    if not include_background:
        is_object = is_object & (names != 0)
    return counts / union.clamp_min(1).double() * is_object[..., None], is_object, names, slots


def _mean_over_objects(score: Tensor, is_object: Tensor) -> Tensor:
    """score, is_object [B, T] -> [B]; 1 where an image holds no object: nothing was missed."""
    objects = is_object.sum(1)
    return torch.where(objects > 0, (score * is_object).sum(1) / objects.clamp_min(1), 1.0)
