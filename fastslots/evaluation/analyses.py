"""What ``fastslots eval`` measures on request, beyond the scores of every evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastslots.config.run import TrainConfig
from fastslots.data import read_batch, to_float
from fastslots.data.factors import counts_from_one, object_factors
from fastslots.data.items import ignore_label
from fastslots.data.sources import open_source, unseen
from fastslots.errors import UserError
from fastslots.evaluation.evaluate import evaluate
from fastslots.metrics import interaction_order, slot_jacobian
from fastslots.metrics.attributes import DECAY, circular, match_slots, probe
from fastslots.models import SlotVAE
from fastslots.models.jacobian import slot_share

ORDER_IMAGES = 32
"""Images of the interaction order: its cost is that of many decodings, and one number comes of all of them."""
PERIODS = {"hue": 1.0, "orientation": 2 * np.pi}  # factors that end where they begin
SWAP_SHARE = 0.5
COMPOSITION = ("recon", "j_ari", "jis", "fg_ari", "mbo")


@torch.no_grad()
def order_scores(
    model: SlotVAE, dataset: Any, rows: Any, images: int = 0, batch_size: int = 10, seed: int = 0
) -> dict[str, Any]:
    """``interaction_order`` (its ratio) of the decoder at the mean slots of the first images, at most 32."""
    count = min(images or ORDER_IMAGES, ORDER_IMAGES, len(rows))
    parts = [
        interaction_order(model.decoder, slots, seed=seed + first)
        for first, (slots, _) in _encoded(model, dataset, rows[:count], batch_size)
    ]
    whole = parts[0]
    for part in parts[1:]:
        whole = type(whole)(torch.cat([whole.cross, part.cross]), torch.cat([whole.within, part.within]), whole.slots)
    return {"interaction_order": whole.ratio, "interaction_order_images": count}


@torch.no_grad()
def attribute_scores(model: SlotVAE, dataset: Any, rows: Any, images: int = 0, batch_size: int = 10) -> dict[str, Any]:
    """R² and accuracy of probes from the mean slots to the data's factors; fitted on the first half of the images.

    Returns attribute_r2_PROBE and attribute_accuracy_PROBE (means over factors), each factor's own with its name after
    them, and attribute_objects, the matched objects. Raises UserError where the data has no masks or no factors, or
    too few objects.
    """
    rows = rows[: images or None]
    factors = object_factors(dataset, rows)
    if not factors:
        raise UserError("the data has no factors of its objects to predict: leave --attributes out")
    start = 1 if counts_from_one(dataset) else 0  # the mask label of the factors' first row
    objects = min(len(values[0]) for values in factors.values())
    slots, owners, places, ignore = [], [], [], ignore_label(dataset)
    for first, (z, masks) in _encoded(model, dataset, rows, batch_size):
        if masks is None:
            raise UserError("the data has no masks, which match slots to objects: leave --attributes out")
        slot_map, side = _slot_map(model, z).cpu(), model.config.resolution
        image, label, slot = match_slots(slot_map, masks.long(), ignore, (side, side))
        known = (label >= start) & (label - start < objects)
        image, label, slot = image[known], label[known], slot[known]
        slots.append(z.cpu()[image, slot])
        owners.append(image + first)
        places.append(label - start)
    owner, place = torch.cat(owners), torch.cat(places)
    targets = {
        name: _target(name, torch.from_numpy(np.ascontiguousarray(values))[owner, place])
        for name, values in factors.items()
    }
    out: dict[str, Any] = {"attribute_objects": len(owner)}
    for kind in DECAY:
        try:
            found = probe(torch.cat(slots), targets, owner >= len(rows) // 2, kind)
        except ValueError as error:
            raise UserError(f"--attributes: {error}") from None
        for score, values in (("r2", found.r2), ("accuracy", found.accuracy)):
            if values:
                out[f"attribute_{score}_{kind}"] = sum(values.values()) / len(values)
            out |= {f"attribute_{score}_{kind}_{name}": value for name, value in values.items()}
    return out


def composition_scores(model: SlotVAE, config: TrainConfig, images: int = 0, batch_size: int = 10) -> dict[str, Any]:
    """Compositional generalisation: the scores of test images without the combination that ``config.holdout`` kept
    from the run (seen_...), and of as many with an object that has it (unseen_...). Raises UserError: see ``unseen``.
    """
    seen, rows = open_source(config).splits["test"]
    held_out = unseen(config, min(images or len(rows), len(rows)))
    count = len(held_out[1])
    out: dict[str, Any] = {"composition_images": count}
    for name, (dataset, own) in {"unseen": held_out, "seen": (seen, rows[:count])}.items():
        scores = evaluate(model, dataset, own, batch_size=batch_size)
        out |= {f"{name}_{score}": scores[score] for score in COMPOSITION if score in scores}
    return out


@torch.no_grad()
def recombination_scores(
    model: SlotVAE, dataset: Any, rows: Any, images: int = 0, batch_size: int = 10, seed: int = 0
) -> dict[str, Any]:
    """Whether slots mean the same in other company: decode, encode again, and compare with what was decoded.

    ``reencoding_error``: mean over slots of |z'' − z|² relative to the mean |z − z̄|² of all slots, slots matched
    one-to-one; 0 is perfect, 1 as far as slots are from their mean. ``recombination_error``: the same where half of
    each image's slots, drawn at random, come from another image.
    """
    from scipy.optimize import linear_sum_assignment  # kept out of the import of fastslots

    rows = rows[: images or None]
    slots = torch.cat([z for _, (z, _) in _encoded(model, dataset, rows, batch_size)])
    spread = (slots - slots.mean((0, 1))).square().sum(-1).mean().item()
    if len(slots) < 2 or not spread:
        raise UserError("--recombination needs at least two images, and slots that are not all the same")
    generator = torch.Generator().manual_seed(seed)
    foreign = torch.rand(slots.shape[:2], generator=generator)[..., None].to(slots.device) < SWAP_SHARE
    mixed = torch.where(foreign, slots.roll(1, 0), slots)

    def error(given: Tensor) -> float:
        total = 0.0
        for part in given.split(batch_size):
            picture = model.decode(part).recon
            if model.config.input == "pixels":
                picture = picture.clamp(0, 1)
            again = _mean_slots(model, picture)
            for distance in torch.cdist(part, again).square().cpu().numpy():
                total += float(distance[linear_sum_assignment(distance)].mean())
        return total / len(given) / spread

    return {"reencoding_error": error(slots), "recombination_error": error(mixed)}


def _mean_slots(model: SlotVAE, images: Tensor) -> Tensor:
    zeros = torch.zeros(len(images), model.config.num_slots, model.config.slot_dim, device=images.device)
    return model.encode(images, zeros).slots


def _slot_map(model: SlotVAE, slots: Tensor) -> Tensor:
    """Who shows a pixel, [B, R·R, K]: by the slot map, or where there is none by the Jacobian, at a higher price."""
    slot_map = model.decode(slots).slot_map
    return slot_share(slot_jacobian(model.decoder, slots)).flatten(2).mT if slot_map is None else slot_map


def _encoded(
    model: SlotVAE, dataset: Any, rows: Sequence[int], batch_size: int
) -> Iterator[tuple[int, tuple[Tensor, Tensor | None]]]:
    """(first, (mean slots [b, K, D], masks or None)) of each batch, in evaluation mode."""
    training, device = model.training, next(model.parameters()).device
    model.eval()
    for first in range(0, len(rows), batch_size):
        raw, masks = read_batch(dataset, np.asarray(rows[first : first + batch_size]))
        slots = _mean_slots(model, to_float(raw.to(device)))
        yield first, (slots, masks)
    model.train(training)


def _target(name: str, values: Tensor) -> Tensor:
    if name in PERIODS and values.ndim == 1:
        return circular(values, PERIODS[name])
    return values if values.is_floating_point() else values.long()
