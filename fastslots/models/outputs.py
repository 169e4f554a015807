"""What a ``SlotVAE`` gives: a posterior, decoded pictures, the terms of its loss."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

from torch import Tensor

from fastslots.models.slot_decoder import Decoded
from fastslots.ops import interaction_penalty


class Posterior(NamedTuple):
    """A diagonal Gaussian per slot, and a draw from it; all [B, K, D]."""

    slots: Tensor
    mean: Tensor
    std: Tensor
    kl: Tensor  # scalar: summed over slots and width, mean over the batch


class SlotVAEOutput(NamedTuple):
    """What ``SlotVAE.forward`` returns."""

    recon: Tensor  # [B, C, R, R]
    slots: Tensor  # [B, K, D], z
    mean: Tensor  # [B, K, D]
    std: Tensor  # [B, K, D], zeros for the plain autoencoder
    slot_map: Tensor | None  # [B, R·R, K], sum over heads, mean over layers; None of a decoder without one
    kl: Tensor  # scalar
    interaction: Tensor  # scalar, 0 without a slot map


class TrainingOutput:
    """The attributes of ``SlotVAEOutput`` in a training step, where nothing is decoded until it is looked at: the loss
    decodes in tiles, and keeps no picture."""

    def __init__(self, decode: Callable[[Tensor], Decoded], posterior: Posterior):
        self._decode = decode
        self.slots, self.mean, self.std, self.kl = posterior

    @cached_property
    def _decoded(self) -> Decoded:
        return self._decode(self.slots)

    @property
    def recon(self) -> Tensor:
        return self._decoded.recon

    @property
    def slot_map(self) -> Tensor | None:
        return self._decoded.slot_map

    @property
    def interaction(self) -> Tensor:
        return self.kl.new_zeros(()) if self.slot_map is None else interaction_penalty(self.slot_map)


class LossTerms(NamedTuple):
    """Scalars: ``total`` is the weighted sum and the only one with a gradient; the others unweighted and detached."""

    total: Tensor
    recon: Tensor
    kl: Tensor
    interaction: Tensor
