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
from fastslots.train.distributed import Group

_NOISE = 21
_OF_AN_IMAGE = ("j_ari", *SegmentationMeter.SCORES)  # scores that are means over images


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
    group: Group | None = None,
    score_mode: str = "pooled",
) -> dict[str, Any]:
    """Scores of a model on the first ``images`` rows (0: all) of a data set.

    Returns recon = Σ(x − x̂)²/image, kl, interaction (R) and interaction_normalized (R/H²), each a mean over images;
    with masks also j_ari, fg_ari, ari, mbo, miou (means over images) and jis (pooled over all foreground pixels); the
    counts, ``latent`` ("mean": z is the posterior mean; "sample": drawn) and seconds. Several processes take a share of
    the rows each and return the same scores. ``score_mode``: of ``JacobianMeter``; "paper" averages batch means, and
    then depends on ``batch_size``.
    """
    group, device = group or Group(), next(model.parameters()).device
    rows = rows[: images or None]
    own = group.share(len(rows))
    training, start = model.training, time.perf_counter()
    model.eval()
    sums = dict.fromkeys(("recon", "kl", "interaction"), 0.0)
    by_jacobian, by_map = JacobianMeter(score_mode), SegmentationMeter()
    for first in range(own.start, own.stop, batch_size):
        raw, masks = read_batch(dataset, np.asarray(rows[first : min(first + batch_size, own.stop)]))
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
            progress(min(first + batch_size, own.stop) - own.start, len(own))
    model.train(training)
    found: dict[str, float] = {}
    pixels = 0
    if by_map.images:
        found["j_ari"], found["jis"], _, pixels = by_jacobian.result()
        found |= by_map.result()
    # Sums rather than means, so that those of all processes can be added
    local = [*sums.values(), *(found.get(name, 0.0) * by_map.images for name in _OF_AN_IMAGE)]
    *totals, jis, masked, pixels = group.sum([*local, found.get("jis", 0.0) * pixels, by_map.images, pixels])
    out: dict[str, Any] = {name: total / max(len(rows), 1) for name, total in zip(sums, totals, strict=False)}
    out["interaction_normalized"] = out["interaction"] / model.config.decoder_heads**2
    if masked:
        scores = zip(_OF_AN_IMAGE, totals[len(sums) :], strict=True)
        out |= {name: total / masked for name, total in scores} | {"jis": jis / max(pixels, 1)}
    out |= {"images": len(rows), "images_with_masks": int(masked), "foreground_pixels": int(pixels)}
    return out | {"latent": latent, "seconds": time.perf_counter() - start}


def latent_noise(model: SlotVAE, count: int, latent: str, seed: int, first: int, device: torch.device) -> Tensor:
    """[count, K, D]: zeros for the mean; for a sample, noise that depends on (seed, image) alone."""
    shape = (model.config.num_slots, model.config.slot_dim)
    if latent == "mean":
        return torch.zeros(count, *shape, device=device)
    generators = (torch.Generator().manual_seed(step_seed(seed, first + i, _NOISE)) for i in range(count))
    return torch.stack([torch.randn(*shape, generator=g) for g in generators]).to(device)
