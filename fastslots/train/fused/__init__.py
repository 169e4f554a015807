"""A training step whose loss and update are a call of a kernel each, where nothing asks for more."""

from fastslots.train.fused.loss import FusedLoss, fused_loss
from fastslots.train.fused.update import FusedUpdate, fused_update

__all__ = ["FusedLoss", "FusedUpdate", "fused_loss", "fused_update"]
