"""Adjusted Rand index (Hubert & Arabie, 1985), batched, exact in its counts and defined for every input."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

DENSE_CELLS = 1 << 22
"""Largest contingency table counted by addressing; beyond it the pairs of labels that occur are sorted instead."""


def adjusted_rand_index(
    true_labels: Tensor, pred_labels: Tensor, foreground_only: bool = False, ignore: int | None = None
) -> Tensor:
    """Agreement of two labelings of the same pixels, corrected for chance: 1 is equal up to renaming, 0 is chance.

    In pairs of pixels that are together in both (tp), in one (fp, fn) or in none (tn) of the two labelings::

        ARI = 2 (tp·tn − fn·fp) / ((tp + fn)(fn + tn) + (tp + fp)(fp + tn))

    Equal labelings give 1, also where the quotient is 0/0: one cluster on both sides, one pixel, no pixel at all.

    Args:
        true_labels, pred_labels: [B, ...] integer (or bool), or [pixels] of one image; any values, which need not be
            contiguous; tensors or NumPy arrays.
        foreground_only: count only the pixels whose true label is not 0, the background.
        ignore: leave out the pixels of this true label (255 where it means "do not care"); None leaves none out.

    Returns:
        [B] float64 in [-0.5, 1] ([1] for one image), never NaN. Pairs are counted in int64.

    Raises:
        TypeError: labels that are no integers. ValueError: other shapes.
    """
    true, pred = flat_labels(true_labels, pred_labels)
    keep = true != 0 if foreground_only else torch.ones_like(true, dtype=torch.bool)
    if ignore is not None:
        keep &= true != ignore
    rows, true_names = _compact(true)
    columns, pred_names = _compact(pred)
    T, P = len(true_names), len(pred_names)
    image = torch.arange(len(true), device=true.device)[:, None]
    row_key, column_key = (image * T + rows)[keep], (image * P + columns)[keep]
    row_pairs = _pairs_per_image(row_key, T, len(true))
    column_pairs = _pairs_per_image(column_key, P, len(true))
    tp = _pairs_per_image(row_key * P + columns[keep], T * P, len(true))
    pixels = keep.sum(1)
    fn, fp = row_pairs - tp, column_pairs - tp
    tn = pixels * (pixels - 1) // 2 - tp - fn - fp
    equal = (fn == 0) & (fp == 0)
    tp, tn, fn, fp = (count.double() for count in (tp, tn, fn, fp))
    bottom = (tp + fn) * (fn + tn) + (tp + fp) * (fp + tn)  # positive unless equal
    return torch.where(equal, 1.0, 2 * (tp * tn - fn * fp) / bottom.masked_fill(equal, 1.0))


def contingency(true_labels: Tensor, pred_labels: Tensor, ignore: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Counts of pixels per pair of labels, [B, T, P] int64, and the labels of rows [T] and columns [P], ascending.

    Rows and columns are the labels that occur anywhere in the batch (and those between them, when few). Pixels whose
    true label is ``ignore`` count nowhere.
    """
    true, pred = flat_labels(true_labels, pred_labels)
    rows, true_names = _compact(true)
    columns, pred_names = _compact(pred)
    T, P = len(true_names), len(pred_names)
    image = torch.arange(len(true), device=true.device)[:, None]
    key = (image * T + rows) * P + columns
    key = key.flatten() if ignore is None else key[true != ignore]
    counts = torch.bincount(key, minlength=len(true) * T * P)
    return counts.view(len(true), T, P), true_names, pred_names


def flat_labels(true_labels: Tensor, pred_labels: Tensor) -> tuple[Tensor, Tensor]:
    """Both as [B, pixels] int64, checked."""
    true_labels, pred_labels = as_tensor(true_labels, "true_labels"), as_tensor(pred_labels, "pred_labels")
    for name, labels in (("true_labels", true_labels), ("pred_labels", pred_labels)):
        if labels.is_floating_point() or labels.is_complex():
            raise TypeError(f"{name} must hold integer labels, got {labels.dtype}")
    if true_labels.shape != pred_labels.shape or true_labels.ndim < 1:
        raise ValueError(
            f"labels must have the same shape [B, ...]: true {list(true_labels.shape)}, pred {list(pred_labels.shape)}"
        )
    if true_labels.ndim == 1:  # one image's pixels, as other libraries take them
        true_labels, pred_labels = true_labels[None], pred_labels[None]
    flat = len(true_labels), math.prod(true_labels.shape[1:])  # not -1, which no empty tensor accepts
    return true_labels.long().reshape(flat), pred_labels.long().reshape(flat)


def as_tensor(values: Tensor, name: str) -> Tensor:
    """A tensor or NumPy array as a tensor. TypeError, in a sentence, for what is neither."""
    if isinstance(values, Tensor):
        return values
    try:
        array = np.asarray(values)
        # torch has few unsigned types: what NumPy holds in them is widened
        return torch.as_tensor(array.astype(np.int64) if array.dtype.kind == "u" and array.itemsize > 1 else array)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be a tensor or a NumPy array of numbers, got {type(values).__name__}") from None


def _compact(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Labels renumbered from 0, and their names ascending; a small range is only shifted, which needs no sort."""
    if labels.numel():
        low, high = (int(bound) for bound in labels.aminmax())
        if high - low < 256:
            return labels - low, torch.arange(low, high + 1, device=labels.device)
    names, renumbered = labels.unique(return_inverse=True)
    return renumbered, names


def _pairs_per_image(key: Tensor, keys_per_image: int, images: int) -> Tensor:
    """Σ n(n-1)/2 over the counts n of each key, for keys image·keys_per_image + label: [images] int64."""
    if images * keys_per_image <= DENSE_CELLS:
        counts = torch.bincount(key, minlength=images * keys_per_image).view(images, keys_per_image)
        return (counts * (counts - 1) // 2).sum(1)
    key, counts = key.unique(return_counts=True)
    pairs = torch.zeros(images, dtype=torch.int64, device=key.device)
    return pairs.index_add_(0, key // keys_per_image, counts * (counts - 1) // 2)
