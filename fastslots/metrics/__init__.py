"""Slot Jacobians and segmentation scores."""

from fastslots.metrics.ari import adjusted_rand_index
from fastslots.metrics.jacobian import slot_jacobian
from fastslots.metrics.jacobian_scores import jacobian_ari, jacobian_interaction_score
from fastslots.metrics.segmentation import mean_best_overlap, mean_iou

__all__ = [
    "adjusted_rand_index",
    "jacobian_ari",
    "jacobian_interaction_score",
    "mean_best_overlap",
    "mean_iou",
    "slot_jacobian",
]
