"""The model and its configuration."""

from fastslots.models.config import SlotVAEConfig
from fastslots.models.vae import LossTerms, SlotVAE, SlotVAEOutput

__all__ = ["LossTerms", "SlotVAE", "SlotVAEConfig", "SlotVAEOutput"]
