"""The model and its configuration."""

from fastslots.config.model import SlotVAEConfig
from fastslots.models.vae import LossTerms, SlotVAE, SlotVAEOutput

__all__ = ["LossTerms", "SlotVAE", "SlotVAEConfig", "SlotVAEOutput"]
