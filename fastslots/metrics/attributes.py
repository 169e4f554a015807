"""What a slot knows of its object: factors predicted from slots by a linear and a small nonlinear probe.

Slots and objects are matched by the overlap of the slot map with the true masks (``match_slots``). A probe is fitted on
one half of the images and scored on the other, so that nothing of an image is on both sides::

    R² = 1 − Σ (y − ŷ)² / Σ (y − ȳ)²      of a factor that is a number (ȳ the mean of the scored half)
    accuracy                               of a factor that is a class

0 and the share of the commonest class are chance; 1 is perfect. Both probes minimise the same loss (mean squared error
of standardised numbers, cross-entropy of classes, and a little weight decay) by L-BFGS on all pairs at once, factor by
factor, from the same start: no step size to choose, the same scores every time.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fastslots.metrics.segmentation import Grid, slot_overlaps

HIDDEN = 128  # width of the nonlinear probe
DECAY = {"linear": 1e-5, "mlp": 1e-3}
ITERATIONS = 200
FEW = 20  # pairs of slot and object on each side, below which no probe is fitted


class Scores(NamedTuple):
    """By factor; a factor that does not vary is left out."""

    r2: dict[str, float]
    accuracy: dict[str, float]


def match_slots(
    slot_map: Tensor, masks: Tensor, ignore: int | None = None, grid: Grid | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Each object's own slot: the one-to-one matching of largest total IoU (Hungarian).

    Arguments as in ``fastslots.metrics.ari``. Returns image, label and slot of each pair, int64 [pairs]; objects beyond
    the number of slots, or without any overlap, are left out.
    """
    from scipy.optimize import linear_sum_assignment  # kept out of the import of fastslots

    overlap, is_object, labels, slots = slot_overlaps(slot_map, masks, ignore=ignore, grid=grid)
    found: list[tuple[int, int, int]] = []
    for image, scores in enumerate(overlap.cpu()):
        rows = is_object[image].nonzero()[:, 0].cpu()
        for row, column in zip(*linear_sum_assignment(scores[rows].numpy(), maximize=True), strict=True):
            if scores[rows[row], column] > 0:
                found.append((image, int(labels[rows[row]]), int(slots[column])))
    columns = torch.tensor(found, dtype=torch.long).reshape(-1, 3)
    return columns[:, 0], columns[:, 1], columns[:, 2]


def probe(slots: Tensor, factors: dict[str, Tensor], held_out: Tensor, kind: str = "linear") -> Scores:
    """Fit a probe on some pairs and score it on the others.

    Args:
        slots: [n, D], one row for each matched object.
        factors: by name, [n] or [n, m] float (numbers) or [n] integer (classes).
        held_out: [n] bool, the pairs that are scored.
        kind: "linear", or "mlp" with one hidden layer.

    Raises:
        ValueError: an unknown kind, or fewer than 20 pairs on a side.
    """
    if kind not in DECAY:
        raise ValueError(f"kind must be linear or mlp, got {kind!r}")
    fit, test = ~held_out, held_out
    if min(int(fit.sum()), int(test.sum())) < FEW:
        sizes = f"{int(fit.sum())} and {int(test.sum())}"
        raise ValueError(f"a probe needs {FEW} objects to fit and {FEW} to score, got {sizes}: take more images")
    x = _standardised(slots.double(), fit)
    scores = Scores({}, {})
    for name, values in factors.items():
        if values.is_floating_point():
            y = values.double().reshape(len(values), -1)
            if (y[test].std(0) > 0).all() and (y[fit].std(0) > 0).all():
                target = _standardised(y, fit)
                predicted = _predict(x, target, fit, kind)[test]
                residual, spread = (predicted - target[test]).square().sum(), target[test] - target[test].mean(0)
                scores.r2[name] = 1 - (residual / spread.square().sum()).item()
        else:
            classes, index = values.unique(return_inverse=True)
            if len(classes) > 1:
                predicted = _predict(x, index, fit, kind, len(classes))[test]
                scores.accuracy[name] = (predicted.argmax(1) == index[test]).double().mean().item()
    return scores


def circular(values: Tensor, period: float) -> Tensor:
    """An angle-like factor [n] as a point on the unit circle [n, 2], where 0 and ``period`` are the same."""
    angle = values.double() * (2 * math.pi / period)
    return torch.stack([angle.cos(), angle.sin()], 1)


def _standardised(values: Tensor, fit: Tensor) -> Tensor:
    """To mean 0 and deviation 1 on the fitted half; columns that do not vary become 0."""
    mean, std = values[fit].mean(0), values[fit].std(0)
    return torch.where(std > 0, (values - mean) / std.masked_fill(std == 0, 1), 0.0)


def _predict(x: Tensor, target: Tensor, fit: Tensor, kind: str, classes: int = 0) -> Tensor:
    """Outputs of a probe fitted on ``fit``, for all rows. target: [n, m] numbers, or [n] classes."""
    width = classes or target.shape[1]
    network = _network(kind, x.shape[1], width, x)
    parameters = list(network.parameters())
    optimizer = torch.optim.LBFGS(parameters, max_iter=ITERATIONS, line_search_fn="strong_wolfe")
    inputs, wanted = x[fit], target[fit]

    def loss() -> Tensor:
        optimizer.zero_grad()
        out = network(inputs)
        error = F.cross_entropy(out, wanted) if classes else F.mse_loss(out, wanted)
        total = error + DECAY[kind] * sum((p.square().sum() for p in parameters if p.ndim == 2), out.new_zeros(()))
        total.backward()
        return total

    with torch.enable_grad():
        optimizer.step(loss)
    with torch.no_grad():
        predicted: Tensor = network(x)
        return predicted


def _network(kind: str, fan_in: int, fan_out: int, like: Tensor) -> nn.Module:
    """The same initial weights every time, whatever the global generator's state."""
    generator = torch.Generator().manual_seed(0)

    def linear(i: int, o: int) -> nn.Linear:
        layer = nn.Linear(i, o, dtype=like.dtype)
        nn.init.normal_(layer.weight, std=i**-0.5, generator=generator)
        nn.init.zeros_(layer.bias)
        return layer

    if kind == "linear":
        return linear(fan_in, fan_out).to(like.device)
    return nn.Sequential(linear(fan_in, HIDDEN), nn.GELU(), linear(HIDDEN, fan_out)).to(like.device)
