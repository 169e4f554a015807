"""The evaluation of a run: what may be asked of one, and all its scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fastslots.config.run import TrainConfig
from fastslots.data.dataset import Split
from fastslots.distributed import Group
from fastslots.evaluation import analyses
from fastslots.evaluation.evaluate import PAPER, WITH_MASKS, Metric, Scoring, evaluate
from fastslots.models import SlotVAE

BATCH = 10
"""Images that are computed at once, unless something else is asked for."""


@dataclass(frozen=True)
class Asked:
    """What ``fastslots eval`` is asked for: with the run's weights it says what the scores are."""

    data: str = ""  # "": the run's own
    split: str = "val"
    latent: str = "mean"
    weights: str = "best"
    images: int = 0  # the first so many; 0: all of the split
    batch_size: int = 0  # 0: BATCH, or what the score mode has
    score_mode: str = "pooled"
    interaction_order: bool = False
    attributes: bool = False
    recombination: bool = False
    composition: bool = False
    objects: str = ""  # of built-in scenes; "": the run's
    slots: int = 0  # K of the model; 0: the run's
    ignore_label: int = -1  # -1: what the data say


def score(
    asked: Asked,
    model: SlotVAE,
    config: TrainConfig,
    split: Split,
    metrics: Mapping[str, Metric],
    group: Group | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Everything that is asked for of a model on a split; the same in all processes of the group.

    Arguments as of ``preconditions.check_evaluation``, which has been asked before. A score that needs masks, or a slot
    map, is None where there is none, and so is one that is no finite number.
    """
    paper_batch, counted = PAPER[asked.split] if asked.score_mode == "paper" else (0, 0)
    size = asked.batch_size or BATCH
    batch = asked.batch_size or paper_batch or BATCH
    scoring = Scoring(asked.latent, config.seed, asked.score_mode, counted, metrics)
    scores = evaluate(model, split, batch, scoring, group, progress).scores()
    scores |= {name: None for name in WITH_MASKS if name not in scores}
    if asked.interaction_order:
        scores |= analyses.order_scores(model, split, size, group=group)
    if asked.attributes:
        scores |= analyses.attribute_scores(model, split, size, group)
    if asked.recombination:
        scores |= analyses.recombination_scores(model, split, size, group=group)
    if asked.composition:
        scores |= analyses.composition_scores(model, config, asked.images, size, group)
    if counted:
        first = f", the first {counted} of each" if counted < batch else ""
        scores |= {"score_mode": "paper", "score_batches": f"J-ARI and JIS: means over batches of {batch}{first}"}
    return {name: value if _sayable(value) else None for name, value in scores.items()}


def _sayable(value: object) -> bool:
    return not isinstance(value, float) or math.isfinite(value)
