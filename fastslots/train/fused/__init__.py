"""A training step of two kernel calls, of the loss and of the update, where model and options allow it."""

from fastslots.train.fused.loss import FusedLoss, fused_loss
from fastslots.train.fused.update import FusedUpdate, fused_update

__all__ = ["FusedLoss", "FusedUpdate", "fused_loss", "fused_update"]
