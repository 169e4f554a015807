"""What a run's folder knows, as plain values for its page."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

from PIL import Image

from fastslots.files import read_file
from fastslots.report.pictures import data_uri
from fastslots.runs.curves import MetricsReader, evaluation_curves
from fastslots.runs.folder import RunFolder
from fastslots.runs.machine import PACKAGES, versions

GRIDS = 4  # pictures of evaluations a page holds: the first, the last, and some between
GRID_BYTES = 400_000  # of each; larger ones are stored lossily
ROWS = 12  # evaluations in the table: the last ones


def run_facts(run: Path, reader: MetricsReader | None = None) -> dict[str, Any]:
    """Everything a page says of a run, ready for JSON; ``reader``: one that has read its log before."""
    folder = RunFolder(run)
    reader = (reader or MetricsReader(folder.metrics)).update()
    costs = MetricsReader(folder.machine_log).update().training
    config, machine = folder.read_json(folder.config), folder.read_json(folder.machine)
    trained_with, fingerprint = machine.pop("versions", None), machine.pop("digest", "")
    warnings = machine.pop("warnings", [])
    return {
        "name": run.resolve().name,
        "step": reader.last.get("step", 0),
        "steps": config.get("steps", 0),
        "data": folder.described_data(),
        "fingerprint": fingerprint,
        "measured": folder.read_evaluations(),  # by `fastslots eval`
        "evaluations": reader.evaluations[-ROWS:],
        "count": len(reader.evaluations),
        "training": {name: curve.table() for name, curve in (reader.training | costs).items()},
        "scores": {name: curve.table() for name, curve in evaluation_curves(reader.evaluations).items()},
        "grids": _grids(folder),
        "explorer": folder.read_json(folder.explorer),
        "of_images": folder.read_json(folder.scores),
        "config": config,
        "stopped": "stopped" in reader.last,  # a resume cuts that line
        "machine": machine,
        "warnings": warnings if isinstance(warnings, list) else [],  # said before the first step
        "versions": trained_with or versions(PACKAGES),
        "versions_of": "trained the run" if trained_with else "wrote this page",
        "written": int(time.time()),
    }


def _grids(folder: RunFolder) -> list[dict[str, Any]]:
    files = folder.grids()
    if len(files) > GRIDS:
        files = [files[round(i * (len(files) - 1) / (GRIDS - 1))] for i in range(GRIDS)]
    grids = []
    for step, path in files:
        try:
            with Image.open(io.BytesIO(read_file(path)), formats=("PNG",)) as image:
                width, height = image.size
                picture = data_uri(image.convert("RGB"), GRID_BYTES)
        except (OSError, ValueError, Image.DecompressionBombError):  # torn: the page shows the others
            continue
        grids.append({"step": step, "width": width, "height": height, "uri": picture})
    return grids
