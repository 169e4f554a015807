"""What is checked of an evaluation before anything is computed, so that nothing fails after minutes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastslots.config.run import TrainConfig
from fastslots.data import to_float
from fastslots.data.dataset import Split
from fastslots.data.factors import object_factors
from fastslots.data.sources import check_shape, unseen
from fastslots.errors import UserError, first_line
from fastslots.evaluation.analyses import NO_FACTORS, NO_MASKS, NOTHING_TO_SWAP
from fastslots.evaluation.evaluate import Metric, one_number
from fastslots.evaluation.of_run import Asked
from fastslots.metrics import interaction_order, slot_jacobian
from fastslots.models import SlotDecoder, SlotVAE
from fastslots.models.slot_decoder import check_forward_derivative


def check_evaluation(
    asked: Asked, config: TrainConfig, split: Split, model: SlotVAE, metrics: Mapping[str, Metric]
) -> None:
    """UserError where data or model cannot give what is asked for; reads one image.

    config: the run's, with the data that are scored. split: what is scored of them. model: on its device.
    """
    if asked.recombination and len(split) < 2:
        raise UserError(NOTHING_TO_SWAP)
    raw, mask = split[:1].read()
    if asked.attributes and mask is None:
        raise UserError(NO_MASKS)
    if asked.attributes and not object_factors(split[:1]):
        raise UserError(NO_FACTORS)
    if asked.composition:
        unseen(config, 1)
    image = to_float(raw.to(next(model.parameters()).device))
    check_shape(image, config.channels, config.resolution)
    if model.code.name or metrics:
        slots = try_once(model, metrics, image, None if mask is None else mask.long().to(image.device))
        if asked.interaction_order:
            try:
                interaction_order(model.decoder, slots, samples=1)
            except (RuntimeError, NotImplementedError) as error:
                decoder = type(model.decoder).__name__
                raise UserError(
                    f"{decoder} has no second derivatives ({first_line(error)}): leave --interaction-order out"
                ) from None


@torch.no_grad()
def try_once(model: SlotVAE, metrics: Mapping[str, Metric], images: Tensor, masks: Tensor | None) -> Tensor:
    """One image through all that an evaluation will ask of parts that are not ours -> its slots [1, K, D].

    images: [1, C, R, R] on the model's device; masks: [1, R, R]. Raises UserError for shapes that do not fit, a metric
    that is no number, or a decoder whose Jacobian cannot be had.
    """
    training = model.training
    model.eval()
    noise = images.new_zeros(1, model.config.num_slots, model.config.slot_dim)
    result = model(images, noise)
    for name, metric in metrics.items():
        one_number(name, metric(result, images, masks))
    decoder = model.slot_decoder
    if type(decoder).jacobian is SlotDecoder.jacobian:
        check_forward_derivative(decoder, result.slots)
    else:
        pixels = torch.zeros(1, 1, dtype=torch.int64, device=images.device)
        try:
            slot_jacobian(decoder, result.slots, pixels=pixels)
        except RuntimeError as error:
            raise UserError(f"the Jacobian of {type(decoder).__name__} fails: {first_line(error)}") from error
    model.train(training)
    slots: Tensor = result.slots
    return slots
