"""What ``fastslots eval`` measures on request, beyond the scores of every evaluation.

Several processes share the batches, which stay those of one process, and have the same scores.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastslots.config.run import TrainConfig
from fastslots.data import to_float
from fastslots.data.dataset import Split
from fastslots.data.factors import factor_format, object_factors
from fastslots.data.sources import open_source, unseen
from fastslots.distributed import Group
from fastslots.errors import UserError
from fastslots.evaluation.evaluate import evaluate, whole_batches
from fastslots.metrics import interaction_order, slot_jacobian
from fastslots.metrics.attributes import DECAY, circular, match_slots, probe
from fastslots.metrics.interaction_order import InteractionOrder
from fastslots.models import SlotVAE
from fastslots.models.jacobian import slot_share

ORDER_IMAGES = 32
"""Images of the interaction order: its cost is that of many decodings, and one number comes of all of them."""
PERIODS = {"hue": 1.0, "orientation": 2 * np.pi}  # factors that end where they begin
SWAP_SHARE = 0.5
NO_FACTORS = "the data has no factors of its objects to predict: leave --attributes out"
NO_MASKS = "the data has no masks, which match slots to objects: leave --attributes out"
NOTHING_TO_SWAP = "--recombination needs at least two images, and slots that are not all the same"
COMPOSITION = ("recon", "j_ari", "jis", "fg_ari", "mbo")


@torch.no_grad()
def order_scores(
    model: SlotVAE, split: Split, batch_size: int = 10, seed: int = 0, group: Group | None = None
) -> dict[str, Any]:
    """``interaction_order`` (its ratio) of the decoder at the mean slots of the first images, at most 32."""
    split, group = split[:ORDER_IMAGES], group or Group()
    squares = [torch.empty(0, 2, dtype=torch.float64)]
    for first, (slots, _) in _encoded(model, split, batch_size, group):
        part = interaction_order(model.decoder, slots, seed=seed + first)
        squares.append(torch.stack([part.cross, part.within], 1).cpu())
    cross, within = group.gather(torch.cat(squares)).unbind(1)
    whole = InteractionOrder(cross, within, model.config.num_slots)
    return {"interaction_order": whole.ratio, "interaction_order_images": len(split)}


@torch.no_grad()
def attribute_scores(model: SlotVAE, split: Split, batch_size: int = 10, group: Group | None = None) -> dict[str, Any]:
    """R² and accuracy of probes from the mean slots to the data's factors; fitted on the first half of the images.

    Returns attribute_r2_PROBE and attribute_accuracy_PROBE (means over factors), each factor's own with its name after
    them, and attribute_objects, the matched objects. Raises UserError where the data has no masks or no factors, or
    too few objects.
    """
    group, factors = group or Group(), object_factors(split)
    if not factors:
        raise UserError(NO_FACTORS)
    start = factor_format(split.dataset).first_label
    objects = min(len(values[0]) for values in factors.values())
    slots, ignore = [next(model.parameters()).new_empty(0, model.config.slot_dim).cpu()], split.ignore_label
    matches = [torch.empty(0, 2, dtype=torch.int64)]  # image and place among its objects, of each slot
    for first, (z, masks) in _encoded(model, split, batch_size, group):
        if masks is None:
            raise UserError(NO_MASKS)
        slot_map, side = _slot_map(model, z).cpu(), model.config.resolution
        image, label, slot = match_slots(slot_map, masks.long(), ignore, (side, side))
        known = (label >= start) & (label - start < objects)
        image, label, slot = image[known], label[known], slot[known]
        slots.append(z.cpu()[image, slot])
        matches.append(torch.stack([image + first, label - start], 1))
    z, matched = group.gather(torch.cat(slots)), group.gather(torch.cat(matches))
    probed: dict[str, Any] = json.loads(
        group.on_first(lambda: json.dumps(_probed(z, matched, factors, len(split))).encode())
    )
    return probed


def _probed(slots: Tensor, matched: Tensor, factors: dict[str, np.ndarray], images: int) -> dict[str, Any]:
    """slots: [n, D], ``matched``: [n, 2], the image of each and the place in its factors, name -> [images, ...]."""
    owner, place = matched.unbind(1)
    targets = {
        name: _target(name, torch.from_numpy(np.ascontiguousarray(values))[owner, place])
        for name, values in factors.items()
    }
    out: dict[str, Any] = {"attribute_objects": len(owner)}
    for kind in DECAY:
        try:
            probed = probe(slots, targets, owner >= images // 2, kind)
        except ValueError as error:
            raise UserError(f"--attributes: {error}") from None
        for score, values in (("r2", probed.r2), ("accuracy", probed.accuracy)):
            if values:
                out[f"attribute_{score}_{kind}"] = sum(values.values()) / len(values)
            out |= {f"attribute_{score}_{kind}_{name}": value for name, value in values.items()}
    return out


def composition_scores(
    model: SlotVAE, config: TrainConfig, images: int = 0, batch_size: int = 10, group: Group | None = None
) -> dict[str, Any]:
    """Compositional generalisation: the scores of test images without the combination that ``config.holdout`` kept
    from the run (seen_...), and of as many with an object that has it (unseen_...). Raises UserError: see ``unseen``.
    """
    test = open_source(config).splits["test"]
    held_out = unseen(config, min(images or len(test), len(test)))
    out: dict[str, Any] = {"composition_images": len(held_out)}
    for name, split in {"unseen": held_out, "seen": test[: len(held_out)]}.items():
        scores = evaluate(model, split, batch_size, group=group).scores()
        out |= {f"{name}_{score}": scores[score] for score in COMPOSITION if score in scores}
    return out


@torch.no_grad()
def recombination_scores(
    model: SlotVAE, split: Split, batch_size: int = 10, seed: int = 0, group: Group | None = None
) -> dict[str, Any]:
    """Whether slots mean the same in other company: decode, encode again, and compare with what was decoded.

    ``reencoding_error``: mean over slots of |z'' − z|² relative to the mean |z − z̄|² of all slots, slots matched
    one-to-one; 0 is perfect, 1 as far as slots are from their mean. ``recombination_error``: the same where half of
    each image's slots, drawn at random, come from another image.
    """
    from scipy.optimize import linear_sum_assignment  # kept out of the import of fastslots

    group, K, D = group or Group(), model.config.num_slots, model.config.slot_dim
    parameter = next(model.parameters())
    encoded = [parameter.new_empty(0, K, D), *(z for _, (z, _) in _encoded(model, split, batch_size, group))]
    slots = group.gather(torch.cat(encoded)).to(parameter.device)
    own = whole_batches(group, len(split), batch_size)
    spread = (slots - slots.mean((0, 1))).square().sum(-1).mean().item()
    if len(slots) < 2 or not spread:
        raise UserError(NOTHING_TO_SWAP)
    generator = torch.Generator().manual_seed(seed)
    foreign = torch.rand(slots.shape[:2], generator=generator)[..., None].to(slots.device) < SWAP_SHARE
    mixed = torch.where(foreign, slots.roll(1, 0), slots)

    def error(decoded: Tensor) -> float:
        total = 0.0
        for part in decoded[own.start : own.stop].split(batch_size):
            if not len(part):  # more processes than batches
                break
            picture = model.decode(part).recon
            if model.config.input == "pixels":
                picture = picture.clamp(0, 1)
            again = _mean_slots(model, picture)
            for distance in torch.cdist(part, again).square().cpu().numpy():
                total += float(distance[linear_sum_assignment(distance)].mean())
        return group.sum([total])[0] / len(decoded) / spread

    return {"reencoding_error": error(slots), "recombination_error": error(mixed)}


def _mean_slots(model: SlotVAE, images: Tensor) -> Tensor:
    zeros = torch.zeros(len(images), model.config.num_slots, model.config.slot_dim, device=images.device)
    return model.encode(images, zeros).slots


def _slot_map(model: SlotVAE, slots: Tensor) -> Tensor:
    """Who shows a pixel, [B, R·R, K]: by the slot map, or where there is none by the Jacobian, at a higher price."""
    slot_map = model.decode(slots).slot_map
    return slot_share(slot_jacobian(model.decoder, slots)).flatten(2).mT if slot_map is None else slot_map


def _encoded(
    model: SlotVAE, split: Split, batch_size: int, group: Group
) -> Iterator[tuple[int, tuple[Tensor, Tensor | None]]]:
    """(first, (mean slots [b, K, D], masks or None)) of each batch of this process, in evaluation mode."""
    training, device = model.training, next(model.parameters()).device
    own = whole_batches(group, len(split), batch_size)
    model.eval()
    for first in range(own.start, own.stop, batch_size):
        raw, masks = split[first : min(first + batch_size, own.stop)].read()
        slots = _mean_slots(model, to_float(raw.to(device)))
        yield first, (slots, masks)
    model.train(training)


def _target(name: str, values: Tensor) -> Tensor:
    if name in PERIODS and values.ndim == 1:
        return circular(values, PERIODS[name])
    return values if values.is_floating_point() else values.long()
