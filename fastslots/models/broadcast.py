"""A baseline: the spatial broadcast decoder (Watters et al., 2019; as in Slot Attention, Locatello et al., 2020).

Each slot is decoded alone, into an image r_k and a mask's logits a_k; the picture is their mixture::

    m[b,k,l] = softmax_k(a[b,k,l])          x̂[b,c,l] = Σ_k m[b,k,l] r[b,k,c,l]

So slots meet in the softmax alone (an additive decoder). The slot map is H · m, H = ``decoder_heads``: its sum over the
slots is H as that of the Transformer's decoder, which adds up H heads, so alpha, R and R/H² mean the same for both.

A slot is repeated over a small grid, a linear embedding of (y, x, 1-y, 1-x) is added, and 5x5 transposed convolutions
of stride 2 double the side up to R; one more of stride 1 and a 3x3 convolution give r and a. ReLU between them.
"""

from __future__ import annotations

import torch
import torch.nn as nn
from torch import Tensor

from fastslots.config.model import SlotVAEConfig
from fastslots.models.layers import grid
from fastslots.ops.decoder_loss import DecoderLossTerms
from fastslots.ops.reference import interaction_penalty, reconstruction_error, slot_softmax


class BroadcastDecoder(nn.Module):
    """slots [B, K, D] -> recon [B, C, R, R], slot_map [B, R·R, K] (masks times ``decoder_heads``)."""

    def __init__(self, config: SlotVAEConfig):
        super().__init__()
        self.resolution, self.channels, self.heads = config.resolution, config.channels, config.decoder_heads
        self.slot_dim, self.side = config.slot_dim, config.broadcast_side
        self.width = C = config.broadcast_channels
        yx = grid(self.side)
        self.register_buffer("grid", torch.cat([yx, 1 - yx], -1), persistent=False)
        self.position = nn.Linear(4, config.slot_dim)
        layers: list[nn.Module] = []
        width = config.slot_dim
        for _ in range((config.resolution // self.side).bit_length() - 1):
            layers += [nn.ConvTranspose2d(width, C, 5, stride=2, padding=2, output_padding=1), nn.ReLU()]
            width = C
        layers += [
            nn.ConvTranspose2d(width, C, 5, padding=2),
            nn.ReLU(),
            nn.Conv2d(C, config.channels + 1, 3, padding=1),
        ]
        self.cnn = nn.Sequential(*layers)

    def components(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """slots [B, K, D] -> each slot's image [B, K, C, R, R] and mask logits [B, K, R, R]; slots do not meet."""
        B, K, D = slots.shape
        x = slots.reshape(B * K, D, 1, 1) + self.position(self.grid).T.reshape(D, self.side, self.side)
        out = self.cnn(x).unflatten(0, (B, K))
        return out[:, :, :-1], out[:, :, -1]

    def masks(self, logits: Tensor, slot_mask: Tensor | None = None) -> Tensor:
        """Mask logits [B, K, R, R] -> masks [B, K, R, R], at least fp32; 0 for slots that are masked False."""
        return slot_softmax(logits.flatten(2).transpose(1, 2)[:, None], slot_mask)[:, 0].mT.view(logits.shape)

    def forward(self, slots: Tensor, slot_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """slots [B, K, D] -> recon [B, C, R, R], slot_map [B, R·R, K]; slot_mask [B, K] bool, True = a real slot."""
        images, logits = self.components(slots)
        masks = self.masks(logits, slot_mask)
        recon = (images * masks[:, :, None]).sum(1)
        return recon, self.heads * masks.flatten(2).transpose(1, 2)

    def loss(
        self,
        slots: Tensor,
        images: Tensor,
        recon_weight: float | Tensor,
        interaction_weight: float | Tensor,
        *,
        pixels: Tensor | None = None,
        pixel_weight: Tensor | None = None,
        slot_mask: Tensor | None = None,
        grad_scale: float | Tensor = 1.0,
        backend: str = "auto",
    ) -> DecoderLossTerms:
        """The loss of ``Decoder.loss``, by plain autograd: convolutions mix pixels, so there are no tiles.

        For the same reason a subset of pixels would save nothing: ``pixels`` and ``pixel_weight`` are not looked at,
        and the loss is that of all pixels, which theirs estimates. Nor are ``grad_scale`` (gradients are made when
        the scaled total is differentiated) and ``backend`` (there is one).

        Raises:
            ValueError: images of another shape than the decoder's.
        """
        expected = (slots.shape[0], self.channels, self.resolution, self.resolution)
        if tuple(images.shape) != expected:
            raise ValueError(f"images has shape {list(images.shape)}, expected {list(expected)} (B of slots, C, R, R)")
        decoded, slot_map = self(slots, slot_mask)
        recon = reconstruction_error(decoded.flatten(2).mT, images.flatten(2).mT)
        interaction = interaction_penalty(slot_map)
        total = recon_weight * recon + interaction_weight * interaction
        return DecoderLossTerms(total, recon.detach(), interaction.detach())
