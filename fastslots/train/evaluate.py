"""Evaluation on held-out images: losses, Jacobian scores, segmentation scores of the slot map."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastslots.data import read_batch, to_float
from fastslots.data.sampling import step_seed
from fastslots.metrics import JacobianMeter, SegmentationMeter, slot_jacobian
from fastslots.models import SlotVAE

_NOISE = 21


@torch.no_grad()
def evaluate(
    model: SlotVAE,
    dataset: Any,
    rows: Any,
    images: int = 0,
    batch_size: int = 10,
    latent: str = "mean",
    seed: int = 0,
    progress: Any = None,
) -> dict[str, Any]:
    """Scores of a model on the first ``images`` rows (0: all) of a data set.

    Returns recon = Σ(x − x̂)²/image, kl, interaction (R) and interaction_normalized (R/H²), each a mean over images;
    with masks also j_ari, fg_ari, ari, mbo, miou (means over images) and jis (pooled over all foreground pixels); the
    counts, ``latent`` ("mean": z is the posterior mean; "sample": drawn) and seconds.
    """
    device = next(model.parameters()).device
    rows = rows[: images or None]
    training, start = model.training, time.perf_counter()
    model.eval()
    sums = dict.fromkeys(("recon", "kl", "interaction"), 0.0)
    by_jacobian, by_map = JacobianMeter(), SegmentationMeter()
    for first in range(0, len(rows), batch_size):
        raw, masks = read_batch(dataset, np.asarray(rows[first : first + batch_size]))
        x = to_float(raw.to(device))
        result = model(x, latent_noise(model, len(x), latent, seed, first, device))
        terms = model.loss(result, x)
        for name in sums:
            sums[name] += getattr(terms, name).item() * len(x)
        if masks is not None:
            masks = masks.long()
            by_jacobian.update(slot_jacobian(model.decoder, result.slots).cpu(), masks)
            by_map.update(result.slot_map.cpu(), masks)
        if progress:
            progress(min(first + batch_size, len(rows)), len(rows))
    model.train(training)
    out: dict[str, Any] = {name: value / max(len(rows), 1) for name, value in sums.items()}
    out["interaction_normalized"] = out["interaction"] / model.config.decoder_heads**2
    pixels = 0
    if by_map.images:
        out["j_ari"], out["jis"], _, pixels = by_jacobian.result()
        out |= by_map.result()
    counts = {"images": len(rows), "images_with_masks": by_map.images, "foreground_pixels": pixels}
    return out | counts | {"latent": latent, "seconds": time.perf_counter() - start}


def latent_noise(model: SlotVAE, count: int, latent: str, seed: int, first: int, device: torch.device) -> Tensor:
    """[count, K, D]: zeros for the mean; for a sample, noise that depends on (seed, image) alone."""
    shape = (model.config.num_slots, model.config.slot_dim)
    if latent == "mean":
        return torch.zeros(count, *shape, device=device)
    generators = (torch.Generator().manual_seed(step_seed(seed, first + i, _NOISE)) for i in range(count))
    return torch.stack([torch.randn(*shape, generator=g) for g in generators]).to(device)
