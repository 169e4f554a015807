"""What defines a model and a run, and the presets."""

from fastslots.config.model import SlotVAEConfig
from fastslots.config.run import TrainConfig

__all__ = ["SlotVAEConfig", "TrainConfig"]
