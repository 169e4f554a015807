"""Scores of slot models: the exact slot Jacobian, what follows from it, and segmentation by the slot map.

>>> G = slot_jacobian(model.decoder, slots)                          # [B, K, R, R]
>>> jacobian_ari(G, masks), jacobian_interaction_score(G, masks)     # masks [B, R, R], 0 = background
"""

from fastslots.metrics.interaction_order import InteractionOrder, interaction_order
from fastslots.metrics.rand_index import adjusted_rand_index
from fastslots.metrics.scores import (
    JacobianMeter,
    JacobianScores,
    SegmentationMeter,
    jacobian_ari,
    jacobian_interaction_score,
)
from fastslots.metrics.segmentation import ari, fg_ari, mean_best_overlap, mean_iou
from fastslots.models.jacobian import slot_jacobian

__all__ = [
    "InteractionOrder",
    "JacobianMeter",
    "JacobianScores",
    "SegmentationMeter",
    "adjusted_rand_index",
    "ari",
    "fg_ari",
    "interaction_order",
    "jacobian_ari",
    "jacobian_interaction_score",
    "mean_best_overlap",
    "mean_iou",
    "slot_jacobian",
]
