"""The model, its configuration, and the interface of decoders."""

from fastslots.config.model import SlotVAEConfig
from fastslots.models.outputs import LossTerms, SlotVAEOutput
from fastslots.models.slot_decoder import SlotDecoder
from fastslots.models.vae import SlotVAE

__all__ = ["LossTerms", "SlotDecoder", "SlotVAE", "SlotVAEConfig", "SlotVAEOutput"]
