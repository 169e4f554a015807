"""A run's directory: what is in it, how it starts, and how it goes on.

config.json           the resolved configuration
data.txt              what the images are, and their split
machine.json          the device, how memory and energy are counted, versions
metrics.jsonl         a line a training step; evaluation lines carry "eval"
machine.jsonl         memory, power and energy every log_every steps
checkpoints/          step_NNNNNNNN.safetensors, best.safetensors
model.safetensors     the last weights
images/               a grid an evaluation
scores.json           J-ARI and FG-ARI of each image of the newest evaluation
explorer.json         pictures of the slot explorer, when all steps are done
report.html           curves, grids, scores, explorer
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from fastslots.errors import UserError

EXPLORER = "explorer.json"
MACHINE = "machine.json"
MACHINE_LOG = "machine.jsonl"
OF_IMAGES = "scores.json"


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
    """Paths of a run; ``create`` makes them and keeps other processes out until ``release``, or until this one ends."""

    def __init__(self, path: Path):
        self.path = path
        self._lock: int | None = None

    def create(self) -> None:
        try:
            for folder in (self.checkpoints, self.images):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.path} cannot be written ({error.strerror}): name another --out") from None
        self._lock = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise UserError(
                f"{self.path} is being written by another process: let it end, or name another --out"
            ) from None
        except OSError:  # a file system without locks
            pass

    def release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def images(self) -> Path:
        return self.path / "images"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"
