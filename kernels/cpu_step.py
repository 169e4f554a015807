"""A whole training step of the ``cpu`` backend: loss and gradients in one call, and the update in another."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastslots.step_records import StepDraws, StepModel

from . import cpu_calls
from .cpu_calls import binding, isa, plain


class TrainStep:
    """As ``ops.backends.StepFunction``; see ``kernels/cpu/train_step.h``."""

    def __init__(self, model: StepModel, channels: int, resolution: int):
        self._dtype = next(iter(model.decoder.values())).dtype
        images = torch.empty(1, channels, resolution, resolution, dtype=self._dtype)
        self._step = binding("TrainStep", self._dtype)(
            encoder={**model.encoder, "images": images},
            decoder=dict(model.decoder),
            grads=dict(model.grads),
            **model.settings,
            quantiles=model.quantiles,
            winograd=os.environ.get("FASTSLOTS_WINOGRAD", "1") != "0",
        )

    def run(
        self,
        images: Tensor,
        draws: StepDraws,
        weights: tuple[float, float, float],
        seeds: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[float, float, float]:
        noise, pixels, pixel_weight, keys, first, count = draws
        picks, seen = seeds or (None, None)
        recon, kl, interaction = weights
        terms: tuple[float, float, float] = self._step.run(
            images=plain(images, self._dtype),
            noise=None if noise is None else plain(noise, self._dtype),
            pixels=None if pixels is None else pixels.contiguous(),
            pixel_weight=None if pixel_weight is None else plain(pixel_weight, self._dtype),
            picks=None if picks is None else picks.contiguous(),
            seen=None if seen is None else plain(seen, self._dtype),
            keys=keys,
            first_image=first,
            count=count,
            recon_weight=recon,
            kl_weight=kl,
            interaction_weight=interaction,
            isa=isa(),
            threads=cpu_calls.threads(),
        )
        return terms


def train_step(model: StepModel, channels: int, resolution: int) -> TrainStep:
    """As ``ops.backends.StepBackend.train_step``."""
    return TrainStep(model, channels, resolution)


class StepUpdate:
    """As ``ops.backends.UpdateFunction``; see ``kernels/cpu/update.h``."""

    def __init__(self, matrices: Sequence[tuple[Tensor, ...]], rest: Sequence[tuple[Tensor, ...]]):
        dtype = (*matrices, *rest)[0][0].dtype
        # The largest first, so that no thread is left with one at the end; AdamW does not look at shapes.
        matrices = sorted(matrices, key=lambda of: -of[0].numel() * min(of[0].shape))
        flat = [tuple(t.detach().view(-1) for t in of) for of in sorted(rest, key=lambda of: -of[0].numel())]
        self._update = binding("StepUpdate", dtype)(
            matrices=[tuple(t.detach() for t in of) for of in matrices], rest=flat
        )

    def run(self, muon: dict[str, Any], adamw: dict[str, Any], largest_norm: float, update: bool) -> float:
        beta1, beta2 = adamw["betas"]
        norm: float = self._update.run(
            muon=(muon["lr"], muon["momentum"], muon["weight_decay"]),
            coefficients=muon["coefficients"],
            iterations=muon["iterations"],
            adamw=(adamw["lr"], beta1, beta2, adamw["eps"], adamw["weight_decay"]),
            largest_norm=largest_norm,
            update=update,
            isa=isa(),
            threads=cpu_calls.threads(),
        )
        return norm


def step_update(matrices: Sequence[tuple[Tensor, ...]], rest: Sequence[tuple[Tensor, ...]]) -> StepUpdate:
    """As ``ops.backends.StepBackend.step_update``."""
    return StepUpdate(matrices, rest)
