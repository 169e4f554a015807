"""J-ARI and JIS: do the slots' Jacobians separate the objects, and how exclusively (arXiv 2411.07784, §6)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastslots.metrics.ari import adjusted_rand_index


def normalise_over_slots(jacobian: Tensor) -> Tensor:
    """[B, K, R, R] non-negative -> shares that sum to 1 over slots; zero where all slots are zero."""
    total = jacobian.sum(1, keepdim=True)
    return jacobian / torch.where(total > 0, total, torch.ones_like(total))


def _shares(jacobian: Tensor, masks: Tensor) -> Tensor:
    """Shares at the masks' resolution: normalised, *then* resized bilinearly where the grid is another (ClevrTex)."""
    if jacobian.ndim != 4 or masks.ndim != 3 or len(jacobian) != len(masks):
        shapes = f"{list(jacobian.shape)} and {list(masks.shape)}"
        raise ValueError(f"expected a Jacobian [B, K, R, R] and masks [B, R, R], got shapes {shapes}")
    shares = normalise_over_slots(jacobian.detach().double().cpu())
    if shares.shape[2:] != masks.shape[1:]:
        shares = F.interpolate(shares, masks.shape[1:], mode="bilinear", align_corners=False)
    return shares


def jacobian_ari_per_image(jacobian: Tensor, masks: Tensor) -> Tensor:
    """ARI of argmax_k of the Jacobian against the true masks, on foreground pixels: float64 [B]."""
    return adjusted_rand_index(masks.cpu(), _shares(jacobian, masks).argmax(1), foreground=True)


def interaction_score_sums(jacobian: Tensor, masks: Tensor) -> tuple[float, int]:
    """Σ of the largest share over foreground pixels, and how many they are; pixels of zero Jacobian left out."""
    shares = _shares(jacobian, masks)
    counted = (masks.cpu() != 0) & (shares.sum(1) > 0)
    return shares.amax(1)[counted].sum().item(), int(counted.sum())


def rescale_interaction_score(mean_share: float, num_slots: int) -> float:
    """1/K -> 0 and 1 -> 1; a single slot is exclusive by itself: 1."""
    return 1.0 if num_slots == 1 else (mean_share - 1 / num_slots) / (1 - 1 / num_slots)


def jacobian_ari(jacobian: Tensor, masks: Tensor) -> float:
    """J-ARI: mean over images of the foreground ARI of argmax_k; 1 for an image without foreground.

    jacobian: [B, K, R, R] from ``slot_jacobian``; masks: [B, R, R] integer labels, 0 = background.
    Raises ValueError for other shapes.
    """
    return jacobian_ari_per_image(jacobian, masks).mean().item()


def jacobian_interaction_score(jacobian: Tensor, masks: Tensor) -> float:
    """JIS: the largest slot's share of the Jacobian, mean over all foreground pixels given, 1/K -> 0 and 1 -> 1.

    Arguments as for ``jacobian_ari``. NaN where there is no foreground pixel to judge.
    """
    total, count = interaction_score_sums(jacobian, masks)
    return rescale_interaction_score(total / count, jacobian.shape[1]) if count else float("nan")
