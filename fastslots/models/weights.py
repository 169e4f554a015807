"""Weights with their configuration, the models of run directories, and others' weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from fastslots.config.model import SlotVAEConfig
from fastslots.errors import UserError, first_line
from fastslots.models.vae import SlotVAE

WEIGHTS = {"best": Path("checkpoints/best.safetensors"), "last": Path("model.safetensors")}


def weights_bytes(model: SlotVAE) -> bytes:
    """The model's state_dict as a safetensors file that also holds its configuration."""
    config = {f.name: getattr(model.config, f.name) for f in dataclasses.fields(SlotVAEConfig)}
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    return save(state, metadata={"fastslots.config": json.dumps(config)})


def load_weights(path: Path) -> SlotVAE:
    """The model of a weights file that ``weights_bytes`` made, in evaluation mode, on the CPU."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        if "fastslots.config" not in metadata:
            raise UserError(f"{path} holds no configuration: name weights that fastslots wrote")
        model = SlotVAE(SlotVAEConfig(**json.loads(metadata["fastslots.config"])))
        model.load_state_dict(load_file(path))
    except UserError:
        raise
    except (OSError, SafetensorError, RuntimeError, ValueError, TypeError, MemoryError) as error:
        raise UserError(f"{path} cannot be read as weights ({first_line(error)})") from None
    return model.eval()


def check_run(run: Path) -> None:
    """UserError where the folder holds no run."""
    if not (run / "config.json").is_file():
        raise UserError(f"{run} is no run directory (no config.json in it): name what `fastslots train --out` wrote")


def weights_path(run: Path, weights: str) -> Path:
    """The weights file of a run: "best" (the last ones where no evaluation has been) or "last"."""
    if weights not in WEIGHTS:
        raise UserError(f"weights must be best or last, got {weights!r}")
    check_run(run)
    for name in (weights, "last"):
        if (run / WEIGHTS[name]).is_file():
            return run / WEIGHTS[name]
    raise UserError(f"{run} holds no weights yet: wait for its first evaluation, or resume it")


def weights_name(run: Path, path: Path) -> str:
    """Which of a run's weights ``weights_path`` has found."""
    return next(name for name, place in WEIGHTS.items() if run / place == path)


def load_run(run: Path, weights: str = "best") -> SlotVAE:
    return load_weights(weights_path(run, weights))


def read_state(path: Path) -> dict[str, Tensor]:
    """Others' weights: a flat state_dict from safetensors or a ``weights_only`` torch file."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers raise half a dozen types on bad bytes
        raise UserError(
            f"{path} cannot be read as weights ({first_line(error)}): give a state_dict (.pth or .safetensors)"
        ) from None
    for wrapper in ("model_state_dict", "state_dict", "model"):  # a checkpoint that also holds the optimiser
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} holds no flat state_dict of tensors")
    return {name.removeprefix("module."): value for name, value in state.items()}
