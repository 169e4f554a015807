"""A run's directory: the name of every file in it, how it starts, and how it goes on.

Whoever writes or reads a file of a run asks a ``RunFolder`` for its path, and does it through ``fastslots.files``.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastslots.config.run import TrainConfig, read_config
from fastslots.errors import UserError
from fastslots.files import PARTIAL, read_file, refuse_special, write_atomic

WEIGHTS = ("best", "last")
_CHECKPOINT = re.compile(r"step_(\d+)\.safetensors")
_GRID = re.compile(r"step_(\d+)\.png")


class RunFolder:
    """Paths of a run; ``create`` makes them and keeps other processes out until ``release``, or until this one ends.

    next_of: the preset of a run that takes the next free folder; None: ``path`` it is, whatever is there.
    """

    def __init__(self, path: Path, next_of: str | None = None):
        self._next_of = next_of
        self._lock: int | None = None
        self.locate(path)

    def locate(self, path: Path) -> None:
        """Have the run at ``path``: of several processes one makes the folder, and the others learn where."""
        self.path = path
        self.config = path / "config.json"  # the resolved configuration
        self.data = path / "data.txt"  # what the images are, and their split
        self.evaluations = path / "evaluations.json"  # what `fastslots eval` measured, the newest of each kind
        self.code = path / "code.json"  # code that is not ours, by its names (``runs.own_code``)
        self.machine = path / "machine.json"  # the device, how memory and energy are counted, versions
        self.metrics = path / "metrics.jsonl"  # a line a training step; evaluation lines carry "eval"
        self.machine_log = path / "machine.jsonl"  # memory, power and energy every log_every steps
        self.checkpoints = path / "checkpoints"  # step_NNNNNNNN.safetensors, best.safetensors
        self.best_weights = self.checkpoints / "best.safetensors"  # those of the evaluation with the best scores
        self.last_weights = path / "model.safetensors"
        self.images = path / "images"  # step_NNNNNNNN.png, a grid an evaluation
        self.scores = path / "scores.json"  # J-ARI and FG-ARI of each image of the newest evaluation
        self.explorer = path / "explorer.json"  # pictures of the slot explorer, when all steps are done
        self.report = path / "report.html"  # curves, grids, scores, explorer

    def checkpoint(self, step: int) -> Path:
        """What a resume after ``step`` needs."""
        return self.checkpoints / f"step_{step:08d}.safetensors"

    def grid(self, step: int) -> Path:
        """The picture of the evaluation after ``step``."""
        return self.images / f"step_{step:08d}.png"

    def bad_batch(self, rank: int) -> Path:
        """The images on which process ``rank`` got a loss that is not finite."""
        return self.path / f"nan_batch{f'_{rank}' if rank else ''}.safetensors"

    def tracker(self, package: str) -> Path:
        """By which identity a hosted tracker knows the run."""
        return self.path / f"{package}.json"

    def checkpoint_files(self) -> list[tuple[int, Path]]:
        """Steps and paths of the checkpoints, the oldest first; other files there are none of ours."""
        return _numbered(self.checkpoints, _CHECKPOINT)

    def grids(self) -> list[tuple[int, Path]]:
        """Steps and paths of the pictures of evaluations, the oldest first."""
        return _numbered(self.images, _GRID)

    # ---- beginning and going on

    @classmethod
    def next_free(cls, preset: str, root: Path = Path("runs")) -> RunFolder:
        """runs/PRESET-N, the first that is free."""
        number = 1
        while (root / f"{preset or 'run'}-{number}").exists():
            number += 1
        return cls(root / f"{preset or 'run'}-{number}", preset)

    def claim(self, resume: bool) -> None:
        """UserError where a run must not be written here."""
        state = (self.config, self.metrics, self.last_weights, *(path for _, path in self.checkpoint_files()))
        if not resume and any(os.path.lexists(file) for file in state):
            raise UserError(f"{self.path} already holds a run: add --resume to go on with it, or name another --out")
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file: name a folder for --out")
        parent = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
        if not os.access(parent, os.W_OK):
            raise UserError(f"{parent} cannot be written: name another --out")

    def create(self) -> bytes:
        """Make the folders, take the lock and remove what a kill left half written -> the path, as bytes.

        Raises UserError where the folder cannot be written, another process writes it, or links stand in it.
        """
        try:
            self._make()
            self._lock = lock = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"{self.path} cannot be written ({error.strerror}): name another --out") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise UserError(
                f"{self.path} is being written by another process: let it end, or name another --out"
            ) from None
        except OSError:  # a file system without locks
            pass
        for folder in (self.path, self.checkpoints, self.images):
            for torn in folder.glob(f".*{PARTIAL}"):
                with contextlib.suppress(OSError):
                    torn.unlink()
        return os.fsencode(self.path)

    def _make(self) -> None:
        while (preset := self._next_of) is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self.path.mkdir()
                self._next_of = None
            except FileExistsError:  # another run has taken it meanwhile
                self.locate(RunFolder.next_free(preset, self.path.parent).path)
        for entry in self._entries():
            refuse_special(entry)
        for folder in (self.checkpoints, self.images):
            folder.mkdir(parents=True, exist_ok=True)

    def _entries(self) -> Iterator[Path]:
        """What a run would write over."""
        yield from (self.checkpoints, self.images, self.config, self.data, self.machine, self.metrics, self.machine_log)
        yield from (self.last_weights, self.scores, self.explorer, self.report, self.evaluations)
        trackers = ("wandb*", "trackio*", "events.out.*")
        for pattern in ("code.json", "nan_batch*", "checkpoints/*", "images/*", *trackers):
            yield from self.path.glob(pattern)

    def remake(self, config: str) -> None:
        """Make the folders anew, with this config.json, where somebody has removed them. UserError where that fails."""
        self.release()
        self.create()
        write_atomic(self.config, config.encode())

    def release(self) -> None:
        """Let other processes write here."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    # ---- reading

    def check(self) -> None:
        """UserError where the folder holds no run."""
        if not self.config.is_file():
            raise UserError(
                f"{self.path} is no run directory (no config.json in it): name what `fastslots train --out` wrote"
            )

    def read_config(self, **overrides: Any) -> TrainConfig:
        """The run's configuration. UserError where it is damaged."""
        config: TrainConfig = read_config(self.config, **overrides)
        return config

    def weights(self, which: str) -> Path:
        """The file of the "best" weights (the last ones where no evaluation has been) or of the "last".

        Raises UserError where the folder is no run, or holds no weights yet.
        """
        if which not in WEIGHTS:
            raise UserError(f"weights must be best or last, got {which!r}")
        self.check()
        for path in (self.best_weights, self.last_weights) if which == "best" else (self.last_weights,):
            if path.is_file():
                return path
        raise UserError(f"{self.path} holds no weights yet: wait for its first evaluation, or resume it")

    def which_weights(self, path: Path) -> str:
        """ "best" or "last": which ``weights`` has returned."""
        return "best" if path == self.best_weights else "last"

    def described_data(self) -> str:
        """What the run's images were; "" where nothing says so."""
        return read_file(self.data).decode(errors="replace").strip() if self.data.is_file() else ""

    def read_evaluations(self) -> list[dict[str, Any]]:
        """The newest evaluation of each kind, the oldest first; none where there is no file, or it is damaged."""
        kept = self.read_json(self.evaluations).get("evaluations", [])
        return [entry for entry in kept if isinstance(entry, dict)] if isinstance(kept, list) else []

    def read_json(self, path: Path) -> dict[str, Any]:
        """The JSON object in one of the run's files; {} where there is none, or it is torn or edited by hand."""
        try:
            values = json.loads(read_file(path)) if path.is_file() else {}
        except (OSError, ValueError, RecursionError):
            return {}
        return values if isinstance(values, dict) else {}


def write_json(path: Path, values: dict[str, Any]) -> None:
    """UserError where the disk is full or the folder cannot be written."""
    write_atomic(path, json.dumps(values).encode())


def _numbered(folder: Path, pattern: re.Pattern[str]) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        return []
    return sorted((int(match[1]), path) for path in folder.iterdir() if (match := pattern.fullmatch(path.name)))
