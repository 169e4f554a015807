"""Training: ``fit`` and its configuration."""

from fastslots.config.run import TrainConfig
from fastslots.train.fitting import fit
from fastslots.train.loop import FitResult
from fastslots.train.step import NonFiniteLossError

__all__ = ["FitResult", "NonFiniteLossError", "TrainConfig", "fit"]
