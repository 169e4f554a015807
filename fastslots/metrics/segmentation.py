"""How well the slots' masks match the objects: ARI, mean best overlap and mean IoU.

Every function takes the decoder's slot map (or labels) and the true label maps, and gives one number per image, so
that callers average over whichever images they mean to. 0 is the label of the background. Pixels whose true label is
``ignore`` are not scored (Pascal VOC's and Cityscapes' 255: "do not care"); None scores all.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastslots.metrics.rand_index import adjusted_rand_index, as_tensor, contingency

Grid = tuple[int, int]  # height and width of the pixels of a slot map


def ari(slot_map: Tensor, masks: Tensor, ignore: int | None = None, grid: Grid | None = None) -> Tensor:
    """Adjusted Rand index over all pixels, the background an object like any other: [B] float64.

    Args:
        slot_map: [B, L, K] float (argmax over slots), or integer labels [B, H, W]; a tensor or a NumPy array.
        masks: [B, H, W] integer labels (or [B, H, W, 1], [B, 1, H, W]; or NumPy's).
        ignore: the true label of pixels that are not scored.
        grid: height and width of the slot map's L pixels, where they are not those of the masks: it is then resized to
            them bilinearly.

    Raises:
        TypeError, ValueError: other arguments; an L that is neither the masks' H·W nor the product of ``grid``.
    """
    slot_map = as_tensor(slot_map, "slot_map")
    masks = as_masks(masks, len(slot_map))
    return adjusted_rand_index(masks, slot_labels(slot_map, masks, grid), ignore=ignore)


def fg_ari(slot_map: Tensor, masks: Tensor, ignore: int | None = None, grid: Grid | None = None) -> Tensor:
    """Adjusted Rand index over the pixels of objects alone, [B] float64; 1 for an image without any. See ``ari``."""
    slot_map = as_tensor(slot_map, "slot_map")
    masks = as_masks(masks, len(slot_map))
    return adjusted_rand_index(masks, slot_labels(slot_map, masks, grid), foreground_only=True, ignore=ignore)


def mean_best_overlap(
    slot_map: Tensor,
    masks: Tensor,
    include_background: bool = False,
    ignore: int | None = None,
    grid: Grid | None = None,
) -> Tensor:
    """mBO: for each true object the largest IoU that any slot has with it, averaged over objects: [B] float64.

    A slot may be the best of several objects. The background is no object, unless asked for, but a slot's pixels on it
    count in its union; ignored pixels count nowhere. An image without objects gives 1. Arguments as in ``ari``.
    """
    overlap, is_object, _, _ = slot_overlaps(slot_map, masks, include_background, ignore, grid)
    return _mean_over_objects(overlap.amax(-1), is_object)


def mean_iou(
    slot_map: Tensor,
    masks: Tensor,
    include_background: bool = False,
    ignore: int | None = None,
    grid: Grid | None = None,
) -> Tensor:
    """mIoU: as ``mean_best_overlap``, but each slot serves one object at most, matched for the largest sum (Hungarian).

    Objects left without a slot count 0.
    """
    from scipy.optimize import linear_sum_assignment  # exact; kept out of the import of fastslots

    overlap, is_object, _, _ = slot_overlaps(slot_map, masks, include_background, ignore, grid)
    matched = torch.zeros(overlap.shape[:2], dtype=overlap.dtype)
    for image, scores in enumerate(overlap.cpu()):  # rows that are no object hold zeros and take nothing from the sum
        rows, columns = map(torch.from_numpy, linear_sum_assignment(scores.numpy(), maximize=True))
        matched[image, rows] = scores[rows, columns]
    return _mean_over_objects(matched.to(overlap.device), is_object)


def slot_labels(slot_map: Tensor, masks: Tensor, grid: Grid | None = None) -> Tensor:
    """The slot with the largest weight at every pixel of the masks, [B, H, W] int64; labels are passed through.

    Height and width are those of the masks, or of ``grid``: a number of pixels alone would leave them to be guessed.

    Raises ValueError: masks that are not [B, H, W], or a slot_map that is not [B, L, K] with L their H·W or the grid's.
    """
    slot_map = as_tensor(slot_map, "slot_map")
    masks = as_masks(masks, len(slot_map))
    if not slot_map.is_floating_point():
        if slot_map.shape != masks.shape:
            raise ValueError(f"labels {list(slot_map.shape)} and masks {list(masks.shape)} must have the same shape")
        return slot_map.long()
    height, width = masks.shape[1:] if grid is None else grid
    if slot_map.ndim != 3 or not slot_map.shape[2] or slot_map.shape[1] != height * width:
        what = "masks" if grid is None else "grid"
        raise ValueError(
            f"slot_map must be [B, L, K] with L the {height} x {width} pixels of the {what}, got "
            f"{list(slot_map.shape)}: give grid=(height, width) of the slot map where it differs from the masks"
        )
    return resize_to(slot_map.transpose(1, 2).unflatten(-1, (height, width)), masks).argmax(1)


def resize_to(scores: Tensor, masks: Tensor) -> Tensor:
    """scores [B, K, r, r] -> [B, K, R, R], bilinearly, where the masks [B, R, R] are of another size."""
    if scores.shape[-2:] == masks.shape[-2:]:
        return scores
    return F.interpolate(scores, size=masks.shape[-2:], mode="bilinear", align_corners=False)


def as_masks(masks: Tensor, images: int) -> Tensor:
    """[images, R, R] out of a tensor or NumPy array, also of [images, R, R, 1] or [images, 1, R, R].

    Raises TypeError, ValueError unless they are integer labels of that shape.
    """
    masks = as_tensor(masks, "masks")
    if masks.ndim == 4 and 1 in (masks.shape[1], masks.shape[3]):
        masks = masks.squeeze(3 if masks.shape[3] == 1 else 1)
    if masks.is_floating_point():
        raise TypeError(f"masks must hold integer labels, got {masks.dtype}")
    if masks.ndim != 3 or len(masks) != images:
        raise ValueError(f"masks must be [{images}, R, R], got {list(masks.shape)}")
    return masks


def slot_overlaps(
    slot_map: Tensor,
    masks: Tensor,
    include_background: bool = False,
    ignore: int | None = None,
    grid: Grid | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """IoU of every true label with every slot, [B, T, P] float64; which rows are objects there, [B, T] bool; the true
    labels of the rows, [T]; the slots of the columns, [P]: those that own a pixel. Arguments as in ``ari``.
    """
    slot_map = as_tensor(slot_map, "slot_map")
    masks = as_masks(masks, len(slot_map))
    counts, names, slots = contingency(masks, slot_labels(slot_map, masks, grid), ignore)
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
