"""What a run's folder knows, as plain values for its page."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from PIL import Image

from fastslots.report.pictures import data_uri
from fastslots.runs.curves import MetricsReader, evaluation_curves
from fastslots.runs.folder import EXPLORER, MACHINE, MACHINE_LOG, OF_IMAGES
from fastslots.runs.machine import PACKAGES, versions

GRIDS = 4  # pictures of evaluations a page holds: the first, the last, and some between
GRID_BYTES = 400_000  # of each; larger ones are stored lossily
ROWS = 12  # evaluations in the table: the last ones


def run_facts(run: Path, reader: MetricsReader | None = None) -> dict[str, Any]:
    """Everything a page says of a run, ready for JSON; ``reader``: one that has read its log before."""
    reader = (reader or MetricsReader(run / "metrics.jsonl")).update()
    costs = MetricsReader(run / MACHINE_LOG).update().training
    config = _json(run / "config.json")
    machine = _json(run / MACHINE)
    trained_with, fingerprint = machine.pop("versions", None), machine.pop("digest", "")
    warnings = machine.pop("warnings", [])
    return {
        "name": run.resolve().name,
        "step": reader.last.get("step", 0),
        "steps": config.get("steps", 0),
        "data": _text(run / "data.txt"),
        "fingerprint": fingerprint,
        "evaluations": reader.evaluations[-ROWS:],
        "count": len(reader.evaluations),
        "training": {name: curve.table() for name, curve in (reader.training | costs).items()},
        "scores": {name: curve.table() for name, curve in evaluation_curves(reader.evaluations).items()},
        "grids": _grids(run / "images"),
        "explorer": _json(run / EXPLORER),
        "of_images": _json(run / OF_IMAGES),
        "config": config,
        "stopped": "stopped" in reader.last,  # a resume cuts that line
        "machine": machine,
        "warnings": warnings if isinstance(warnings, list) else [],  # said before the first step
        "versions": trained_with or versions(PACKAGES),
        "versions_of": "trained the run" if trained_with else "wrote this page",
        "written": int(time.time()),
    }


def _grids(folder: Path) -> list[dict[str, Any]]:
    paths = sorted(path for path in folder.glob("step_*.png") if path.stem.split("_")[1].isdecimal())
    if len(paths) > GRIDS:
        paths = [paths[round(i * (len(paths) - 1) / (GRIDS - 1))] for i in range(GRIDS)]
    grids = []
    for path in paths:
        try:
            with Image.open(path, formats=("PNG",)) as image:
                width, height = image.size
                picture = data_uri(image.convert("RGB"), GRID_BYTES)
        except (OSError, ValueError, Image.DecompressionBombError):  # torn: the page shows the others
            continue
        grids.append({"step": int(path.stem.split("_")[1]), "width": width, "height": height, "uri": picture})
    return grids


def _text(path: Path) -> str:
    return path.read_text(errors="replace").strip() if path.is_file() else ""


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text()) if path.is_file() else {}
    except (OSError, ValueError, RecursionError):  # torn, or edited by hand: the page says what the rest knows
        return {}
    return values if isinstance(values, dict) else {}
