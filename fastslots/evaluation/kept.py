"""What ``fastslots eval`` has measured of a run, kept in the run's folder."""

from __future__ import annotations

from typing import Any

from fastslots.runs.folder import RunFolder, write_json

KIND = ("split", "latent", "weights", "images", "fingerprint", "score_mode", "objects", "num_slots")
"""Two evaluations that agree in these are of one kind: the newer one replaces the older."""


def read_evaluations(folder: RunFolder) -> list[dict[str, Any]]:
    """The newest evaluation of each kind, the oldest first; none where there is no file, or it is damaged."""
    kept = folder.read_json(folder.evaluations).get("evaluations", [])
    return [entry for entry in kept if isinstance(entry, dict)] if isinstance(kept, list) else []


def keep_evaluation(folder: RunFolder, scores: dict[str, Any]) -> None:
    """Add the scores of an evaluation; what they say of its kind is among them. UserError where that fails."""
    kind = [scores.get(name) for name in KIND]
    others = [entry for entry in read_evaluations(folder) if [entry.get(name) for name in KIND] != kind]
    write_json(folder.evaluations, {"evaluations": [*others, scores]})
