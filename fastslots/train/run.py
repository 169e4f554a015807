"""A run's directory: what is in it, how it starts, and how it goes on.

config.json           the resolved configuration
data.txt              what the images are, and their split
metrics.jsonl         a line a training step; evaluation lines carry "eval"
checkpoints/          step_NNNNNNNN.safetensors, best.safetensors
model.safetensors     the last weights
images/               a grid a evaluation
report.html           curves, grids, scores
"""

from __future__ import annotations

import os
from pathlib import Path

from fastslots.errors import UserError
from fastslots.train.config import TrainConfig


def next_run(preset: str, root: Path = Path("runs")) -> Path:
    """runs/PRESET-N, the first that is free."""
    number = 1
    while (root / f"{preset or 'run'}-{number}").exists():
        number += 1
    return root / f"{preset or 'run'}-{number}"


class RunFolder:
    """Paths of a run, made ready to write."""

    def __init__(self, path: Path, config: TrainConfig, resume: bool):
        self.path = path
        holds_run = (path / "config.json").exists()
        if holds_run and not resume:
            raise UserError(f"{path} already holds a run: add --resume to go on with it, or name another --out")
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file: name a folder for --out")
        try:
            for folder in (self.checkpoints, self.images):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror}): name another --out") from None
        if not os.access(path, os.W_OK):
            raise UserError(f"{path} cannot be written: name another --out")
        if not holds_run:
            (path / "config.json").write_text(config.to_json() + "\n")

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def images(self) -> Path:
        return self.path / "images"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"
