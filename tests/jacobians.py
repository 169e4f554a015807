"""A small decoder, and its slot Jacobian by forward-mode derivatives of the published decoder, without any folding."""

from __future__ import annotations

import torch

from fastslots.bench import published
from fastslots.models import SlotVAEConfig
from fastslots.models.decoder import Decoder


def tiny(seed: int = 0, **overrides) -> Decoder:
    """No two sizes coincide, and slots far enough apart that attention is not uniform."""
    torch.manual_seed(seed)
    sizes = dict(
        resolution=5,
        num_slots=3,
        slot_dim=7,
        encoder_heads=1,
        decoder_heads=2,
        slot_width=10,
        slot_hidden=16,
        octaves=3,
    )
    sizes |= dict(query_width=12, query_hidden=9, output_hidden=(8,), channels=3) | overrides
    decoder = Decoder(SlotVAEConfig(**sizes)).double()
    for layer in decoder.transformer:
        torch.nn.init.normal_(layer.norm_q.bias)
        torch.nn.init.normal_(layer.norm_q.weight, 1, 0.3)
        layer.projections.to_q.weight.data *= 4
    return decoder


def draw_slots(decoder: Decoder, images: int = 2, K: int = 3) -> torch.Tensor:
    return torch.randn(images, K, decoder.slot_mlp[0].in_features, dtype=torch.float64)


def published_decoder(decoder: Decoder, slots: torch.Tensor, pixels=None, slot_mask=None) -> torch.Tensor:
    """slots [K, D] -> [pixels, C]."""

    def masked(q, k, v, scale):
        weights = (q @ k.transpose(-1, -2) * scale).masked_fill(~slot_mask, -torch.inf).softmax(-1)
        return weights @ v, weights

    attend = published.stored_weights if slot_mask is None else masked
    return published.decode(decoder, slots[None], attend, pixels)[0][0]


def published_jacobian(decoder: Decoder, slots: torch.Tensor, pixels=None, slot_mask=None) -> torch.Tensor:
    """vmap(jacfwd) -> [B, K, pixels]."""

    def one(z, mask):
        return torch.func.jacfwd(lambda s: published_decoder(decoder, s, pixels, mask))(z)  # [pixels, C, K, D]

    mask = torch.ones(slots.shape[:2], dtype=torch.bool) if slot_mask is None else slot_mask
    with torch.no_grad():
        return torch.func.vmap(one)(slots, mask).abs().sum((2, 4)).transpose(1, 2)


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()
