"""Training: ``fit`` and its configuration."""

from fastslots.train.config import TrainConfig
from fastslots.train.loop import FitResult, NonFiniteLossError, fit

__all__ = ["FitResult", "NonFiniteLossError", "TrainConfig", "fit"]
