"""A run's directory: what is in it, how it starts, and how it goes on.

config.json           the resolved configuration
data.txt              what the images are, and their split
machine.json          the device, how memory and energy are counted, versions
metrics.jsonl         a line a training step; evaluation lines carry "eval"
checkpoints/          step_NNNNNNNN.safetensors, best.safetensors
model.safetensors     the last weights
images/               a grid an evaluation
scores.json           J-ARI and FG-ARI of each image of the newest evaluation
explorer.json         pictures of the slot explorer, when all steps are done
report.html           curves, grids, scores, explorer
"""

from __future__ import annotations

import os
from pathlib import Path

from fastslots.errors import UserError
from fastslots.train.config import TrainConfig
from fastslots.train.files import write_atomic


def next_run(preset: str, root: Path = Path("runs")) -> Path:
    """runs/PRESET-N, the first that is free."""
    number = 1
    while (root / f"{preset or 'run'}-{number}").exists():
        number += 1
    return root / f"{preset or 'run'}-{number}"


def claim(path: Path, resume: bool) -> Path:
    """``path``, unless a run must not be written there: UserError."""
    if (path / "config.json").exists() and not resume:
        raise UserError(f"{path} already holds a run: add --resume to go on with it, or name another --out")
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file: name a folder for --out")
    parent = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not os.access(parent, os.W_OK):
        raise UserError(f"{parent} cannot be written: name another --out")
    return path


class RunFolder:
    """Paths of a run; ``create`` makes them, when all else is good."""

    def __init__(self, path: Path):
        self.path = path

    def create(self, config: TrainConfig) -> None:
        """Make the folders and store the configuration (of a resumed run: the one it goes on with)."""
        try:
            for folder in (self.checkpoints, self.images):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.path} cannot be written ({error.strerror}): name another --out") from None
        write_atomic(self.path / "config.json", f"{config.to_json()}\n".encode())

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def images(self) -> Path:
        return self.path / "images"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"
