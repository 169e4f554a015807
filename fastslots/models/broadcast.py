"""A baseline: the spatial broadcast decoder (Watters et al., 2019; as in Slot Attention, Locatello et al., 2020).

Each slot is decoded alone, into an image r_k and a mask's logits a_k; the picture is their mixture::

    m[b,k,l] = softmax_k(a[b,k,l])          x̂[b,c,l] = Σ_k m[b,k,l] r[b,k,c,l]

So slots meet in the softmax alone (an additive decoder). The slot map is H · m, H = ``decoder_heads``: its sum over the
slots is H as that of the Transformer's decoder, which adds up H heads, so alpha, R and R/H² mean the same for both.

A slot is repeated over a small grid, a linear embedding of (y, x, 1-y, 1-x) is added, and 5x5 transposed convolutions
of stride 2 double the side up to R; one more of stride 1 and a 3x3 convolution give r and a. ReLU between them.

The slot Jacobian follows from x̂ = Σ_k m_k r_k with m = softmax(a)::

    ∂x̂/∂z[k,d] = m_k (∂r_k/∂z[k,d] + (r_k − x̂) ∂a_k/∂z[k,d])
"""

from __future__ import annotations

import torch
import torch.nn as nn
from torch import Tensor

from fastslots.config.model import SlotVAEConfig
from fastslots.models.layers import grid
from fastslots.models.slot_decoder import JacobianRequest, SlotDecoder, check_slots
from fastslots.ops.reference import real_slots, slot_softmax

TANGENT_NUMBERS = 1 << 25
"""Numbers that the widest layer may hold for all directions of a Jacobian pushed forward together."""


class BroadcastDecoder(SlotDecoder):
    """slots [B, K, D] -> recon [B, C, R, R], slot_map [B, R·R, K] (masks times ``decoder_heads``).

    Convolutions mix pixels, so its loss has no tiles, and a subset of the pixels would cost as much as all of them.
    """

    any_slots = True

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
        images, logits = self.components(*real_slots(slot_mask, 1, slots))
        masks = self.masks(logits, slot_mask)
        recon = (images * masks[:, :, None]).sum(1)
        return recon, self.heads * masks.flatten(2).transpose(1, 2)

    def jacobian(self, slots: Tensor, request: JacobianRequest) -> Tensor:
        """``SlotDecoder.jacobian`` in D forward derivatives instead of K·D: one direction serves all slots at once."""
        if request.backend not in ("auto", "reference"):
            return super().jacobian(slots, request)  # which says that there is none
        check_slots(slots, request.slot_mask, self.slot_dim)
        (slots,) = real_slots(request.slot_mask, 1, slots)
        jacobian = _jacobian(self, slots, request)
        return jacobian if request.pixels is not None else jacobian.unflatten(2, (self.resolution, self.resolution))

    def multiplications(self, slots: Tensor) -> int:
        # A pixel meets each weight at most once for each slot.
        return slots.shape[:2].numel() * self.resolution**2 * sum(w.numel() for w in self.parameters())


def _jacobian(decoder: BroadcastDecoder, slots: Tensor, request: JacobianRequest) -> Tensor:
    """Reduced: [B, K, R·R or P]; otherwise [B, C, R·R or P, K, D]."""
    B, K, D = slots.shape
    numbers = B * K * decoder.resolution**2 * decoder.width
    chunk = request.chunk or max(1, TANGENT_NUMBERS // max(numbers, 1))

    def at_pixels(x: Tensor) -> Tensor:  # [B, K, ..., R, R] -> [B, K, ..., L or P]
        x = x.flatten(-2)
        if request.pixels is None:
            return x
        index = request.pixels.view(B, *([1] * (x.ndim - 2)), -1)
        return x.gather(-1, index.expand(*x.shape[:-1], -1))

    with torch.set_grad_enabled(request.differentiable):
        images, logits = decoder.components(slots)
        masks = decoder.masks(logits, request.slot_mask)
        recon = (images * masks[:, :, None]).sum(1, keepdim=True)
        mask, rest = at_pixels(masks)[:, :, None], at_pixels(images - recon)

        def derivative(direction: Tensor) -> Tensor:
            tangents = torch.func.jvp(decoder.components, (slots,), (direction.expand_as(slots),))[1]
            dimages, dlogits = map(at_pixels, tangents)
            return mask * (dimages + rest * dlogits[:, :, None])  # [B, K, C, P]

        def reduced(direction: Tensor) -> Tensor:
            return derivative(direction).abs().sum(2)

        directions = torch.eye(D, dtype=slots.dtype, device=slots.device).split(chunk)
        function = torch.func.vmap(reduced if request.reduce else derivative)
        if request.reduce:
            return torch.stack([function(some).sum(0) for some in directions]).sum(0)
        return torch.cat([function(some) for some in directions]).permute(1, 3, 4, 2, 0)
