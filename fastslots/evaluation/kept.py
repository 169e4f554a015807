"""What ``fastslots eval`` has measured of a run, kept in the run's folder."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastslots.evaluation.of_run import Asked
from fastslots.files import read_file
from fastslots.runs.folder import RunFolder, write_json

ANALYSES = ("interaction_order", "attributes", "recombination", "composition")
"""Fields of ``Asked`` that add scores and change none."""
KIND = (
    "split",
    "latent",
    "weights",
    "images",
    "data",
    "fingerprint",
    "score_mode",
    "ignore_label",
    "objects",
    "num_slots",
)
"""Two evaluations that agree in these are of one kind: the newer one replaces the older."""


def keep_evaluation(folder: RunFolder, scores: dict[str, Any], asked: Asked, weights: Path) -> None:
    """Add the scores of an evaluation of ``weights``; what they say of its kind is among them.

    What an earlier one of that kind measured besides of the same weights (attributes, say) stays. UserError where
    writing fails.
    """
    entry = scores | {"asked": asdict(asked), "digest_of_weights": digest_of(weights)}
    kept = folder.read_evaluations()
    alike = [other for other in kept if _kind(other) == _kind(entry)]
    for other in alike:
        if other.get("digest_of_weights") == entry["digest_of_weights"]:
            analysed = {name: True for name in ANALYSES if other.get("asked", {}).get(name)}
            entry = other | entry | {"asked": entry["asked"] | analysed}
    write_json(folder.evaluations, {"evaluations": [*(e for e in kept if e not in alike), entry]})


def kept_scores(folder: RunFolder, asked: Asked) -> dict[str, Any] | None:
    """What was measured when this, and perhaps more, was asked of the weights that the run has now; else None."""
    wanted = {name: value for name, value in asdict(asked).items() if value or name not in ANALYSES}
    entry: dict[str, Any]
    for entry in reversed(folder.read_evaluations()):
        of_entry = entry.get("asked")
        if isinstance(of_entry, dict) and wanted.items() <= of_entry.items():
            if entry.get("digest_of_weights") == digest_of(folder.weights(asked.weights)):
                return entry
    return None


def digest_of(weights: Path) -> str:
    return hashlib.sha256(read_file(weights)).hexdigest()[:16]


def _kind(entry: dict[str, Any]) -> list[Any]:
    return [entry.get(name) for name in KIND]
