"""Evaluation on held-out images: losses, Jacobian scores, segmentation scores of the slot map."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastslots.data import read_batch, to_float
from fastslots.data.given import SOME_MASKS
from fastslots.data.items import ignore_label
from fastslots.data.sampling import Purpose, step_seed
from fastslots.distributed import Group
from fastslots.errors import UserError
from fastslots.metrics import JacobianMeter, SegmentationMeter, slot_jacobian
from fastslots.models import SlotVAE
from fastslots.models.vae import SlotVAEOutput

_OF_AN_IMAGE = ("j_ari", *SegmentationMeter.SCORES)  # scores that are means over images
WITH_MASKS = (*_OF_AN_IMAGE, "jis")  # scores that there are only where the data has masks
SHOWN = ("j_ari", "fg_ari")  # those that are also given image by image

PAPER = {"val": (50, 12), "test": (10, 10)}
"""Images of a batch, and how many of them, the first, have their Jacobian scored, as the authors evaluate a split."""

# Called after each batch: images [B, C, R, R] on the model's device, what the model made of them, and the slot
# Jacobian [B, K, R, R] on the CPU, None where there are no masks to score it by
See = Callable[[Tensor, SlotVAEOutput, Tensor | None], None]


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
    see: See | None = None,
    of_images: bool = False,
    jacobian_images: int = 0,
) -> dict[str, Any]:
    """Scores of a model on the first ``images`` rows (0: all) of a data set.

    Returns recon = Σ(x − x̂)²/image, kl, interaction (R) and interaction_normalized (R/H²), each a mean over images;
    with masks also j_ari (a mean over images) and jis (pooled over all foreground pixels), and of a decoder with a slot
    map fg_ari, ari, mbo and miou (means over images); the counts, ``latent`` ("mean": z is the posterior mean;
    "sample": drawn) and seconds. Several processes take a share of the rows each and return the same scores.
    ``score_mode``: of ``JacobianMeter``; "paper" averages batch means, and
    then depends on ``batch_size``. ``progress`` is called with (images done, images), ``see`` as ``See``
    says. ``of_images``: also "of_images", J-ARI and FG-ARI of every image in the order of rows ({} without masks).
    ``jacobian_images``: J-ARI and JIS look at the first so many images of each batch (0: all), and "jacobian_images"
    says at how many in all; not together with ``of_images``.

    Raises UserError where some of the images have a mask and others none.
    """
    if of_images and jacobian_images:
        raise ValueError("of_images needs the Jacobian of every image: leave jacobian_images at 0")
    group, device = group or Group(), next(model.parameters()).device
    rows = rows[: images or None]
    own = group.share(len(rows))
    training, start = model.training, time.perf_counter()
    model.eval()
    sums = dict.fromkeys(("recon", "kl", "interaction"), 0.0)
    ignore, side, masked = ignore_label(dataset), model.config.resolution, 0
    by_jacobian, by_map = JacobianMeter(score_mode, ignore), SegmentationMeter(ignore, (side, side))
    for first in range(own.start, own.stop, batch_size):
        raw, masks = read_batch(dataset, np.asarray(rows[first : min(first + batch_size, own.stop)]))
        if first > own.start and (masks is None) != (masked == 0):
            raise UserError(SOME_MASKS)
        x = to_float(raw.to(device))
        result = model(x, latent_noise(model, len(x), latent, seed, first, device))
        terms = model.loss(result, x)
        for name in sums:
            sums[name] += getattr(terms, name).item() * len(x)
        jacobian = None
        if masks is not None:
            masks, seen, masked = masks.long(), jacobian_images or len(x), masked + len(x)
            jacobian = slot_jacobian(model.decoder, result.slots[:seen]).cpu()
            by_jacobian.update(jacobian, masks[:seen])
            if result.slot_map is not None:
                by_map.update(result.slot_map.cpu(), masks)
        if see:
            see(x, result, jacobian)
        if progress:
            progress(min(first + batch_size, own.stop) - own.start, len(own))
    model.train(training)
    found: dict[str, float] = {}
    pixels = 0.0
    if masked:
        found["j_ari"], found["jis"], _, pixels = by_jacobian.result()
        found |= by_map.result() if by_map.images else {}
    # Sums rather than means, so that those of all processes can be added; an image's own score counts in one of them
    each = torch.zeros(len(SHOWN), len(rows), dtype=torch.float64)
    if masked and of_images:
        each[0, own.start : own.stop] = torch.tensor(by_jacobian.of_images, dtype=each.dtype)
        if by_map.images:
            each[1, own.start : own.stop] = torch.tensor(by_map.of_images["fg_ari"], dtype=each.dtype)
    local = [*sums.values(), *(found.get(name, 0.0) * masked for name in _OF_AN_IMAGE)]
    local += [found.get("jis", 0.0) * pixels, by_map.images, masked, len(by_jacobian.of_images), pixels]
    summed = group.sum([*local, *each.flatten().tolist()])
    *totals, jis, mapped, all_masked, scored, pixels = summed[: len(local)]
    out: dict[str, Any] = {name: total / max(len(rows), 1) for name, total in zip(sums, totals, strict=False)}
    out["interaction_normalized"] = out["interaction"] / model.slot_decoder.heads**2
    if all_masked:
        names = _OF_AN_IMAGE if mapped else ("j_ari",)
        scores = zip(names, totals[len(sums) :], strict=False)
        out |= {name: total / all_masked for name, total in scores} | {"jis": jis / max(pixels, 1)}
    out |= {"images": len(rows), "images_with_masks": int(all_masked), "foreground_pixels": int(pixels)}
    out |= {"jacobian_images": int(scored)} if jacobian_images else {}
    if of_images:
        rest = torch.tensor(summed[len(local) :], dtype=each.dtype).view_as(each)
        shown = SHOWN if mapped else ("j_ari",)
        out["of_images"] = dict(zip(shown, rest.tolist(), strict=False)) if all_masked else {}
    return out | {"latent": latent, "seconds": time.perf_counter() - start}


def latent_noise(model: SlotVAE, count: int, latent: str, seed: int, first: int, device: torch.device) -> Tensor:
    """[count, K, D]: zeros for the mean; for a sample, noise that depends on (seed, image) alone."""
    shape = (model.config.num_slots, model.config.slot_dim)
    if latent == "mean":
        return torch.zeros(count, *shape, device=device)
    generators = (torch.Generator().manual_seed(step_seed(seed, first + i, Purpose.EVALUATION)) for i in range(count))
    return torch.stack([torch.randn(*shape, generator=g) for g in generators]).to(device)
