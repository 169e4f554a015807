"""Where a run's numbers and pictures also go, for those who live there: TensorBoard, Weights & Biases, trackio.

Each gets the same names: train/loss, val/j_ari, ..., and the picture val/slots of an evaluation.
"""

from __future__ import annotations

import importlib
import secrets
from types import ModuleType
from typing import Any

import numpy as np

from fastslots.errors import UserError
from fastslots.runs.folder import RunFolder, write_json


def open_trackers(names: list[str], folder: RunFolder, last_step: int, config: dict[str, Any]) -> list[Any]:
    """A tracker for each name, going on after ``last_step``; UserError where a package is missing."""
    return [TensorBoard(folder, last_step) if name == "tensorboard" else Hosted(name, folder, config) for name in names]


class TensorBoard:
    """Event files in the run's folder; what a resume repeats replaces what was there."""

    name = "tensorboard"

    def __init__(self, folder: RunFolder, last_step: int):
        writer = _package("torch.utils.tensorboard", "tensorboard").SummaryWriter
        self._events = writer(str(folder.path), purge_step=last_step + 1)

    def numbers(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def picture(self, name: str, picture: np.ndarray, step: int) -> None:
        """uint8 [height, width, 3]"""
        self._events.add_image(name, picture, step, dataformats="HWC")

    def close(self) -> None:
        self._events.close()


class Hosted:
    """wandb, or trackio, which has the same functions. A resume goes on with the run; project "fastslots".

    The run's identity is kept in its folder: NAME.json. Their own variables hold, e.g. WANDB_MODE=offline.
    """

    def __init__(self, package: str, folder: RunFolder, config: dict[str, Any]):
        self.name, self._module = package, _package(package, package)
        path = folder.tracker(package)
        if not path.exists():
            write_json(path, {"id": secrets.token_hex(4)})
        identity = folder.read_json(path).get("id")
        if not isinstance(identity, str):
            raise UserError(f"{path} is damaged: remove it, and {package} begins a run of its own")
        options: dict[str, Any] = {"project": "fastslots", "config": config, "resume": "allow"}
        if package == "wandb":
            options |= {"id": identity, "name": folder.path.resolve().name, "dir": str(folder.path)}
        else:  # a run of trackio is known by its name
            options |= {"name": f"{folder.path.resolve().name}-{identity}"}
        self._run = self._module.init(**options)

    def numbers(self, values: dict[str, float], step: int) -> None:
        self._module.log(values, step=step)

    def picture(self, name: str, picture: np.ndarray, step: int) -> None:
        """uint8 [height, width, 3]"""
        self._module.log({name: self._module.Image(picture)}, step=step)

    def close(self) -> None:
        self._module.finish()


def _package(module: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError:
        mend = f"pip install 'fastslots[{extra}]'"
        raise UserError(f"--log_to {extra} needs the package {extra}: {mend}") from None
