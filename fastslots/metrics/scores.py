"""J-ARI and JIS, from the slot Jacobian and the true masks; at once, or batch by batch for a whole set.

With P = jacobian / Σ_k jacobian, pixel by pixel (arXiv 2411.07784)::

    J-ARI = adjusted Rand index, on foreground pixels, of argmax_k P against the masks; mean over images
    JIS   = (m − 1/K) / (1 − 1/K),  m the mean of max_k P over all foreground pixels together

JIS is 0 where every slot acts on a pixel alike and 1 where one slot alone does. Where the masks are of another size
than the Jacobian (feature maps), P is resized bilinearly to theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from fastslots.errors import UserError
from fastslots.metrics.rand_index import adjusted_rand_index, as_tensor
from fastslots.metrics.segmentation import (
    Grid,
    ari,
    as_masks,
    fg_ari,
    mean_best_overlap,
    mean_iou,
    resize_to,
    slot_labels,
)
from fastslots.models.jacobian import slot_share


def jacobian_ari(jacobian: Tensor, masks: Tensor, ignore: int | None = None) -> float:
    """J-ARI: mean over images; an image without foreground counts 1.

    jacobian: [B, K, R, R] as ``slot_jacobian`` gives it. masks: [B, R, R] integer labels, 0 = background. ignore: the
    label of pixels that are not scored.
    Raises TypeError, ValueError for other arguments, an empty batch, or a Jacobian that is negative or not finite.
    """
    return _one_batch(jacobian, masks, ignore).j_ari


def jacobian_interaction_score(jacobian: Tensor, masks: Tensor, ignore: int | None = None) -> float:
    """JIS, pooled over all foreground pixels given; pixels whose Jacobian is zero are left out.

    Within [0, 1]; 1 for a single slot, which shares no pixel; 0 where no pixel is left to look at. Arguments as in
    ``jacobian_ari``.
    """
    return _one_batch(jacobian, masks, ignore).jis


class JacobianScores(NamedTuple):
    j_ari: float
    jis: float
    images: int
    pixels: int  # foreground pixels whose Jacobian is not zero: what JIS is a mean of


class JacobianMeter:
    """J-ARI and JIS of a set, given batch by batch.

    mode: "pooled" gives what one call with all images would give, whatever the batches; "paper" averages the batches'
    values, as published figures do, so that it depends on how images are grouped.
    ignore: the label of pixels that are not scored.
    """

    def __init__(self, mode: str = "pooled", ignore: int | None = None):
        if mode not in ("pooled", "paper"):
            raise ValueError(f"mode must be 'pooled' or 'paper', got {mode!r}")
        self.mode, self._ignore = mode, ignore
        self.of_images: list[float] = []  # J-ARI of each
        self._batches: list[
            tuple[float, int, float, int]
        ] = []  # sum and count of J-ARI over images, of JIS over pixels

    def update(self, jacobian: Tensor, masks: Tensor) -> None:
        """jacobian [B, K, R, R], masks [B, R, R]; an empty batch changes nothing."""
        jacobian = as_tensor(jacobian, "jacobian")
        if jacobian.ndim != 4 or not jacobian.is_floating_point() or not jacobian.shape[1]:
            raise ValueError(f"jacobian must be float [B, K, R, R], got {jacobian.dtype} {list(jacobian.shape)}")
        masks = as_masks(masks, len(jacobian))
        share = _share_of_masks(jacobian, masks)
        if not len(share):
            return
        agreement = adjusted_rand_index(masks, share.argmax(1), foreground_only=True, ignore=self._ignore)
        self.of_images += agreement.tolist()
        K = share.shape[1]
        seen = (masks != 0) & (share.sum(1) > 0)
        if self._ignore is not None:
            seen &= masks != self._ignore
        largest = share.amax(1)[seen]
        # clamped: rounding, and resizing beside a pixel whose Jacobian is zero, may leave less than 1/K
        specialisation = ((largest - 1 / K) / (1 - 1 / K)).clamp(0, 1) if K > 1 else torch.ones_like(largest)
        self._batches.append(
            (agreement.sum().item(), len(agreement), specialisation.sum().item(), specialisation.numel())
        )

    def result(self) -> JacobianScores:
        """Raises ValueError before the first image."""
        if not self._batches:
            raise ValueError("no images: J-ARI and JIS need at least one")
        j_ari, j_ari_of, jis, jis_of = self.sums()
        _, images, _, pixels = zip(*self._batches, strict=True)
        return JacobianScores(j_ari / j_ari_of, jis / max(jis_of, 1), sum(images), sum(pixels))

    def sums(self) -> tuple[float, int, float, int]:
        """J-ARI's sum and the number of terms in it, then JIS's: those of several meters may be added.

        A term is an image and a pixel, or in mode "paper" a batch.
        """
        if not self._batches:
            return 0.0, 0, 0.0, 0
        if self.mode == "paper":
            j_ari = [total / count for total, count, _, _ in self._batches]
            jis = [total / count for _, _, total, count in self._batches if count]
            return sum(j_ari), len(j_ari), sum(jis), len(jis)
        j_ari_sum, images, jis_sum, pixels = (sum(column) for column in zip(*self._batches, strict=True))
        return j_ari_sum, int(images), jis_sum, int(pixels)


class SegmentationMeter:
    """ARI, FG-ARI, mBO and mIoU of images and their means, given batch by batch.

    ignore: the label of pixels that are not scored. grid: height and width of the slot map, as in ``ari``.
    """

    SCORES: ClassVar[dict[str, Callable[..., Tensor]]] = {
        "ari": ari,
        "fg_ari": fg_ari,
        "mbo": mean_best_overlap,
        "miou": mean_iou,
    }

    def __init__(self, ignore: int | None = None, grid: Grid | None = None) -> None:
        self._ignore, self._grid = ignore, grid
        self._sums = dict.fromkeys(self.SCORES, 0.0)
        self.of_images: dict[str, list[float]] = {name: [] for name in self.SCORES}
        self.images = 0

    def update(self, slot_map: Tensor, masks: Tensor) -> None:
        """slot_map [B, L, K] float or labels [B, R, R]; masks [B, R, R] integer labels."""
        labels = slot_labels(slot_map, masks, self._grid)
        for name, score in self.SCORES.items():
            of_images = score(labels, masks, ignore=self._ignore)
            self._sums[name] += of_images.sum().item()
            self.of_images[name] += of_images.tolist()
        self.images += len(masks)

    def result(self) -> dict[str, float]:
        """Raises ValueError before the first image."""
        if not self.images:
            raise ValueError("no images: segmentation scores need at least one")
        return {name: total / self.images for name, total in self._sums.items()}


def _share_of_masks(jacobian: Tensor, masks: Tensor) -> Tensor:
    """``slot_share`` at the masks' size, in float64."""
    jacobian = jacobian.detach().double()
    if not torch.isfinite(jacobian.sum(1)).all() or (jacobian < 0).any():
        raise UserError("jacobian must be finite and not negative: has the model diverged? Try an earlier checkpoint")
    return resize_to(slot_share(jacobian), masks)


def _one_batch(jacobian: Tensor, masks: Tensor, ignore: int | None) -> JacobianScores:
    meter = JacobianMeter(ignore=ignore)
    meter.update(jacobian, masks)
    return meter.result()
