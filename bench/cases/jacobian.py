"""Case ``jacobian``: the slot Jacobian of the decoder."""

from __future__ import annotations

import copy

import torch

from fastslots.bench import published
from fastslots.bench.case import Case, Options, Provider, Tensors, model_axes
from fastslots.metrics import slot_jacobian
from fastslots.models.decoder import Decoder


def jacobian_case(options: Options) -> Case:
    """Σ |∂x̂/∂z| over channels and slot width, of every pixel and slot."""
    config, B = options.config(), options.batch or 1
    torch.manual_seed(0)
    decoder = Decoder(config).to(options.device)
    slots = torch.randn(B, config.num_slots, config.slot_dim).to(options.device)
    route = {
        "published": lambda: published.slot_jacobian(decoder, slots),
        "published, 16 directions at once": lambda: published.slot_jacobian(decoder, slots, 16),
        "folded, forward mode": lambda: slot_jacobian(lambda z: decoder(z)[0], slots),
        "backward, plain PyTorch": lambda: slot_jacobian(decoder, slots, backend="reference"),
        "fastslots": lambda: slot_jacobian(decoder, slots),
    }

    def expected() -> Tensors:
        return {"jacobian": slot_jacobian(copy.deepcopy(decoder).double(), slots.double(), backend="reference")}

    providers = {
        name: Provider(lambda run=run: lambda: {"jacobian": run()})  # type: ignore[misc]
        for name, run in route.items()
    }
    return Case("jacobian", model_axes(config, B), providers, expected, items=B)
