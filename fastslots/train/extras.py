"""What Python code adds to a run: further losses, further metrics, and callbacks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fastslots.errors import UserError
from fastslots.evaluation.evaluate import Metric
from fastslots.models.outputs import TrainingOutput
from fastslots.models.vae import SlotVAE

Loss = Callable[[Any, Tensor], Tensor]
"""(result, images [b, C, R, R]) -> 0-d tensor; ``result`` has the attributes of ``SlotVAEOutput``."""
CALLBACKS = ("on_step", "on_evaluation", "on_end")
TAKEN = {
    *("step", "eval", "loss", "recon", "kl", "interaction", "interaction_normalized", "grad_norm", "lr", "alpha"),
    *("beta", "loss_scale", "images_per_s", "stopped", "j_ari", "jis", "fg_ari", "ari", "mbo", "miou", "images"),
    *(
        "images_with_masks",
        "foreground_pixels",
        "jacobian_images",
        "latent",
        "seconds",
        "of_images",
        "split",
        "weights",
    ),
    *("data", "split_note", "score_mode", "score_batches", "evaluated_on_training_images"),
}
"""Names that lines of a run's log and scores have already."""


@dataclass(frozen=True)
class Extras:
    """What is handed to ``fit`` besides configuration and data.

    losses: name -> (weight, fn), added to the total; logged unweighted under their names.
    metrics: name -> fn, in evaluation lines and in ``fastslots eval``; means over images.
    callbacks: objects with any of on_step(step, terms), on_evaluation(step, scores), on_end(folder), called in this
    order in every process.
    model: the one to train, in place of what the configuration says.

    Raises UserError that names what is wrong.
    """

    losses: Mapping[str, tuple[float, Loss]] = field(default_factory=dict)
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    callbacks: Sequence[Any] = ()
    model: SlotVAE | None = None

    def __post_init__(self) -> None:
        for kind, functions in (("losses", self.losses), ("metrics", self.metrics)):
            if not isinstance(functions, Mapping):
                raise UserError(f"{kind} must be a dict of functions by name, got a {type(functions).__name__}")
            for name in functions:
                if not isinstance(name, str) or not name or name in TAKEN:
                    raise UserError(f"{kind} has the name {name!r}, which is taken or no text: choose another")
        for name, pair in self.losses.items():
            if not (isinstance(pair, tuple | list) and len(pair) == 2 and callable(pair[1])):
                raise UserError(f"loss {name!r} must be a pair (weight, function), got {pair!r}")
            if isinstance(pair[0], bool) or not isinstance(pair[0], int | float) or not math.isfinite(pair[0]):
                raise UserError(f"loss {name!r} must have a finite number as its weight, got {pair[0]!r}")
        for name, function in self.metrics.items():
            if not callable(function):
                raise UserError(f"metric {name!r} must be a function, got a {type(function).__name__}")
        for callback in self.callbacks:
            if not any(callable(getattr(callback, name, None)) for name in CALLBACKS):
                raise UserError(f"callback {type(callback).__name__} has none of {', '.join(CALLBACKS)}")

    def on_step(self, step: int, terms: dict[str, float]) -> None:
        self._tell("on_step", step, dict(terms))

    def on_evaluation(self, step: int, scores: dict[str, Any]) -> None:
        self._tell("on_evaluation", step, dict(scores))

    def on_end(self, folder: Path) -> None:
        self._tell("on_end", folder)

    def _tell(self, name: str, *given: Any) -> None:
        for callback in self.callbacks:
            if (method := getattr(callback, name, None)) is not None:
                method(*given)


class FurtherLosses:
    """The losses of a part of a batch, for ``SlotVAE.training_loss(also=...)``; ``values`` [n] remembers them.

    images: [b, C, R, R]. Raises UserError where one gives no 0-d tensor.
    """

    def __init__(self, losses: Mapping[str, tuple[float, Loss]], images: Tensor):
        self._losses, self._images = losses, images
        self.values: list[Tensor] = []

    def __call__(self, result: TrainingOutput) -> Tensor:
        total = result.kl.new_zeros(())
        for name, (weight, function) in self._losses.items():
            value = function(result, self._images)
            if not isinstance(value, Tensor) or value.ndim:
                got = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
                raise UserError(f"loss {name!r} gives {got}, expected a 0-d tensor: take its mean or sum")
            total = total + weight * value
            self.values.append(value.detach().float())
        return total
