"""Evaluation on held-out images: losses, Jacobian scores, segmentation scores of the slot map."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastslots.data import read_batch, to_float
from fastslots.data.sampling import step_seed
from fastslots.metrics import adjusted_rand_index, mean_best_overlap, mean_iou, slot_jacobian
from fastslots.metrics.jacobian_scores import interaction_score_sums, jacobian_ari_per_image, rescale_interaction_score
from fastslots.models import SlotVAE

_NOISE = 21
PER_IMAGE = ("j_ari", "fg_ari", "ari", "mbo", "miou")


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
) -> dict[str, float | int | str]:
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
    scores: dict[str, list[Tensor]] = {name: [] for name in PER_IMAGE}
    share, pixels, with_masks = 0.0, 0, 0
    for first in range(0, len(rows), batch_size):
        raw, masks = read_batch(dataset, np.asarray(rows[first : first + batch_size]))
        x = to_float(raw.to(device))
        result = model(x, latent_noise(model, len(x), latent, seed, first, device))
        terms = model.loss(result, x)
        for name in sums:
            sums[name] += getattr(terms, name).item() * len(x)
        if masks is not None:
            masks = masks.long()
            jacobian = slot_jacobian(model.decoder, result.slots).cpu()
            scores["j_ari"].append(jacobian_ari_per_image(jacobian, masks))
            part, count = interaction_score_sums(jacobian, masks)
            share, pixels, with_masks = share + part, pixels + count, with_masks + len(x)
            for name, values in segmentation_scores(result.slot_map, masks).items():
                scores[name].append(values)
        if progress:
            progress(min(first + batch_size, len(rows)), len(rows))
    model.train(training)
    out: dict[str, float | int | str] = {name: value / max(len(rows), 1) for name, value in sums.items()}
    out["interaction_normalized"] = out["interaction"] / model.config.decoder_heads**2
    if with_masks:
        for name, values in scores.items():
            out[name] = torch.cat(values).nanmean().item()
        out["jis"] = rescale_interaction_score(share / pixels, model.config.num_slots) if pixels else math.nan
    counts = {"images": len(rows), "images_with_masks": with_masks, "foreground_pixels": pixels}
    return out | counts | {"latent": latent, "seconds": time.perf_counter() - start}


def latent_noise(model: SlotVAE, count: int, latent: str, seed: int, first: int, device: torch.device) -> Tensor:
    """[count, K, D]: zeros for the mean; for a sample, noise that depends on (seed, image) alone."""
    shape = (model.config.num_slots, model.config.slot_dim)
    if latent == "mean":
        return torch.zeros(count, *shape, device=device)
    generators = (torch.Generator().manual_seed(step_seed(seed, first + i, _NOISE)) for i in range(count))
    return torch.stack([torch.randn(*shape, generator=g) for g in generators]).to(device)


def segmentation_scores(slot_map: Tensor, masks: Tensor) -> dict[str, Tensor]:
    """fg_ari, ari, mbo, miou of argmax_k of the slot map [B, R·R, K], at the masks' resolution: each float64 [B]."""
    side = math.isqrt(slot_map.shape[1])
    maps = slot_map.transpose(1, 2).unflatten(-1, (side, side)).cpu()
    if side != masks.shape[-1]:
        maps = torch.nn.functional.interpolate(maps, masks.shape[1:], mode="bilinear", align_corners=False)
    segments = maps.argmax(1)
    return {
        "fg_ari": adjusted_rand_index(masks, segments, foreground=True),
        "ari": adjusted_rand_index(masks, segments),
        "mbo": mean_best_overlap(masks, segments),
        "miou": mean_iou(masks, segments),
    }
