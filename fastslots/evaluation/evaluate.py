"""Evaluation on held-out images: losses, Jacobian scores, segmentation scores of the slot map."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastslots.data import to_float
from fastslots.data.dataset import Split
from fastslots.data.map_style import SOME_MASKS
from fastslots.data.sampling import Purpose, step_seed
from fastslots.distributed import Group
from fastslots.errors import UserError
from fastslots.metrics import JacobianMeter, SegmentationMeter, slot_jacobian
from fastslots.models import SlotVAE
from fastslots.models.outputs import SlotVAEOutput

LOSSES = ("recon", "kl", "interaction")
OF_AN_IMAGE = ("j_ari", *SegmentationMeter.SCORES)  # scores that are means over images
WITH_MASKS = (*OF_AN_IMAGE, "jis")  # scores that there are only where the data has masks
SHOWN = ("j_ari", "fg_ari")  # those that are also given image by image

PAPER = {"val": (50, 12), "test": (10, 10)}
"""Images of a batch, and how many of them, the first, have their Jacobian scored, as the authors evaluate a split."""

# Called after each batch: images [B, C, R, R] on the model's device, what the model made of them, and the slot
# Jacobian [B, K, R, R] on the CPU, None where there are no masks to score it by
See = Callable[[Tensor, SlotVAEOutput, Tensor | None], None]

Metric = Callable[[SlotVAEOutput, Tensor, Tensor | None], float]
"""A metric of one's own: (result, images [b, C, R, R], masks [b, H, W] int64 or None) -> its mean over these images."""


@dataclass(frozen=True)
class Scoring:
    """How images are scored.

    latent: "mean" (z is the posterior mean) or "sample" (drawn, from ``seed`` and an image's number alone).
    mode: of ``JacobianMeter``; "paper" averages the means of batches, and then depends on their size.
    jacobian_images: J-ARI and JIS look at the first so many images of each batch; 0: at all.
    metrics: further scores by name, means over images.
    """

    latent: str = "mean"
    seed: int = 0
    mode: str = "pooled"
    jacobian_images: int = 0
    metrics: Mapping[str, Metric] = field(default_factory=dict)


class Evaluation:
    """Scores of a model, gathered batch by batch: ``update`` with each, then ``reduce`` once, then ``scores``.

    Several processes each update with their share of the images, and have the same scores after ``reduce``.

    Attributes:
        of_images: after ``reduce``, J-ARI and FG-ARI of every image in their order; {} without masks, or where
            ``Scoring.jacobian_images`` leaves images out.
    """

    def __init__(self, model: SlotVAE, scoring: Scoring = Scoring(), ignore_label: int | None = None):
        self._model, self._scoring, self._start = model, scoring, time.perf_counter()
        side = model.config.resolution
        self._by_jacobian = JacobianMeter(scoring.mode, ignore_label)
        self._by_map = SegmentationMeter(ignore_label, (side, side))
        self._means = (*LOSSES, *scoring.metrics)
        self._of_images = dict.fromkeys(self._means, 0.0)
        self._images = self._masked = 0
        self._totals: dict[str, float] = {}
        self.of_images: dict[str, list[float]] = {}

    @torch.no_grad()
    def update(self, images: Tensor, masks: Tensor | None, first: int) -> tuple[SlotVAEOutput, Tensor | None]:
        """Score a batch: images [B, C, R, R] on the model's device, masks [B, H, W]; ``first``: its first number.

        Returns what the model makes of it, and the slot Jacobian [B, K, R, R] on the CPU, None without masks.

        Raises UserError where some of the images have a mask and others none.
        """
        if self._images and (masks is None) != (self._masked == 0):
            raise UserError(SOME_MASKS)
        model, scoring, count = self._model, self._scoring, len(images)
        result = model(images, latent_noise(model, count, scoring.latent, scoring.seed, first, images.device))
        terms = model.loss(result, images)
        for name in LOSSES:
            self._of_images[name] += getattr(terms, name).item() * count
        for name, metric in scoring.metrics.items():
            labels = None if masks is None else masks.long().to(images.device)
            self._of_images[name] += one_number(name, metric(result, images, labels)) * count
        self._images += count
        if masks is None:
            return result, None
        self._masked += count
        masks, scored = masks.long(), scoring.jacobian_images or count
        jacobian = slot_jacobian(model.decoder, result.slots[:scored]).cpu()
        self._by_jacobian.update(jacobian, masks[:scored])
        if result.slot_map is not None:
            self._by_map.update(result.slot_map.cpu(), masks)
        return result, jacobian

    def reduce(self, group: Group, images: int, share: range) -> None:
        """Add up over the processes of ``group``, each of which has scored its ``share`` of the images."""
        local = self._sums()
        each = torch.zeros(len(SHOWN), images, dtype=torch.float64)
        if self._masked and not self._scoring.jacobian_images:
            each[0, share.start : share.stop] = torch.tensor(self._by_jacobian.of_images, dtype=each.dtype)
            if self._by_map.images:
                each[1, share.start : share.stop] = torch.tensor(self._by_map.of_images["fg_ari"], dtype=each.dtype)
        summed = group.sum([*local.values(), *each.flatten().tolist()])
        self._totals = dict(zip(local, summed, strict=False))
        if self._totals["masked"] and not self._scoring.jacobian_images:
            each = torch.tensor(summed[len(local) :], dtype=each.dtype).view_as(each)
            self.of_images = dict(zip(self._shown(SHOWN), each.tolist(), strict=False))

    def _sums(self) -> dict[str, float]:
        """Sums rather than means, so that those of all processes can be added."""
        sums = self._of_images | dict.fromkeys((*OF_AN_IMAGE, "foreground"), 0.0)
        if self._by_map.images:
            sums |= {name: mean * self._masked for name, mean in self._by_map.result().items()}
        if self._masked:
            sums["foreground"] = self._by_jacobian.result().pixels
        sums |= dict(zip(("j_ari", "j_ari_of", "jis", "jis_of"), self._by_jacobian.sums(), strict=True))
        counts = {"images": self._images, "masked": self._masked, "mapped": self._by_map.images}
        return sums | counts | {"scored": len(self._by_jacobian.of_images)}

    def _shown(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Those of ``names`` that there are: without a slot map, J-ARI alone."""
        return names if self._totals["mapped"] else ("j_ari",)

    def scores(self) -> dict[str, Any]:
        """After ``reduce``: recon = Σ(x − x̂)²/image, kl, interaction (R) and interaction_normalized (R/H²), each a mean
        over images; with masks also j_ari (a mean over images), of at least two slots jis (pooled over all foreground
        pixels), and of a decoder with a slot map fg_ari, ari, mbo and miou (means over images); ``Scoring.metrics``;
        the counts, ``latent`` and seconds.
        """
        totals = self._totals
        scores: dict[str, Any] = {name: totals[name] / max(totals["images"], 1) for name in self._means}
        scores["interaction_normalized"] = scores["interaction"] / self._model.slot_decoder.heads**2
        if totals["masked"]:
            scores |= {name: totals[name] / totals["masked"] for name in self._shown(OF_AN_IMAGE)}
            scores["j_ari"] = totals["j_ari"] / totals["j_ari_of"]
            if self._model.config.num_slots > 1:  # it is rescaled by 1 − 1/K
                scores["jis"] = totals["jis"] / max(totals["jis_of"], 1)
        scores |= {"images": int(totals["images"]), "images_with_masks": int(totals["masked"])}
        scores["foreground_pixels"] = int(totals["foreground"])
        if self._scoring.jacobian_images:
            scores["jacobian_images"] = int(totals["scored"])
        return scores | {"latent": self._scoring.latent, "seconds": time.perf_counter() - self._start}


@torch.no_grad()
def evaluate(
    model: SlotVAE,
    split: Split,
    batch_size: int = 10,
    scoring: Scoring = Scoring(),
    group: Group | None = None,
    progress: Callable[[int, int], None] | None = None,
    see: See | None = None,
) -> Evaluation:
    """The ``Evaluation`` of a model on all images of a split, reduced.

    progress: called with (images done, images) after each batch, ``see`` as ``See`` says, both on this process's share.

    Raises UserError where some of the images have a mask and others none.
    """
    group, device = group or Group(), next(model.parameters()).device
    share, training = group.share(len(split)), model.training
    if scoring.mode == "paper":  # the mean of the batches' values: they must be those of one process
        share = whole_batches(group, len(split), batch_size)
    evaluation = Evaluation(model, scoring, split.ignore_label)
    model.eval()
    for first in range(share.start, share.stop, batch_size):
        stop = min(first + batch_size, share.stop)
        raw, masks = split[first:stop].read()
        images = to_float(raw.to(device))
        result, jacobian = evaluation.update(images, masks, first)
        if see:
            see(images, result, jacobian)
        if progress:
            progress(stop - share.start, len(share))
    model.train(training)
    evaluation.reduce(group, len(split), share)
    return evaluation


def whole_batches(group: Group, images: int, batch_size: int) -> range:
    """This process's share of the images where one process's batches are to stay together."""
    batches = group.share(-(-images // batch_size))
    return range(min(batches.start * batch_size, images), min(batches.stop * batch_size, images))


def one_number(name: str, value: object) -> float:
    """What a metric gives, as a float. UserError where it is none."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        raise UserError(f"metric {name!r} gives a {type(value).__name__}, expected one number") from None


def latent_noise(model: SlotVAE, count: int, latent: str, seed: int, first: int, device: torch.device) -> Tensor:
    """[count, K, D]: zeros for the mean; for a sample, noise that depends on (seed, image) alone."""
    shape = (model.config.num_slots, model.config.slot_dim)
    if latent == "mean":
        return torch.zeros(count, *shape, device=device)
    generators = (torch.Generator().manual_seed(step_seed(seed, first + i, Purpose.EVALUATION)) for i in range(count))
    return torch.stack([torch.randn(*shape, generator=g) for g in generators]).to(device)
