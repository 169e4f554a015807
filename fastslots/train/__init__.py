"""Training: ``fit`` and its configuration."""

from fastslots.config.run import TrainConfig
from fastslots.train.loop import FitResult, NonFiniteLossError, fit

__all__ = ["FitResult", "NonFiniteLossError", "TrainConfig", "fit"]
