"""Checkpoints: one safetensors file each, no pickle; written whole or not at all, verified by checksum when read."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fastslots.errors import UserError
from fastslots.train.files import write_atomic

PATTERN = "step_*.safetensors"


@dataclass
class Checkpoint:
    """All that a resume needs; batches, noise and pixel subsets follow from (seed, step)."""

    step: int  # the last finished one
    tensors: dict[str, Tensor]  # "model.*" and "optimizer.*"
    numbers: dict[str, float]  # the optimiser's plain numbers
    extra: dict[str, Any]  # JSON: best score so far, loss scaler


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write step_NNNNNNNN.safetensors into ``folder`` and drop all but the newest ``keep``."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in checkpoint.tensors.items()}
    header = {"step": checkpoint.step, "numbers": checkpoint.numbers, "extra": checkpoint.extra}
    metadata = {"header": json.dumps(header), "digest": _digest(tensors, header)}
    path = folder / f"step_{checkpoint.step:08d}.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(path, save(tensors, metadata=metadata))
    for old in sorted(folder.glob(PATTERN))[:-keep]:
        old.unlink()
    return path


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and verify; UserError where the file is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        header = json.loads(metadata["header"])
        if metadata["digest"] != _digest(tensors, header):
            raise ValueError("checksum differs")
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error})") from None
    return Checkpoint(header["step"], tensors, header["numbers"], header["extra"])


def latest_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies, and what was said of newer ones that do not."""
    damaged: list[str] = []
    for path in sorted(folder.glob(PATTERN), reverse=True):
        try:
            return load_checkpoint(path), damaged
        except UserError as error:
            damaged.append(str(error))
    return None, damaged


def _digest(tensors: dict[str, Tensor], header: dict) -> str:
    digest = hashlib.blake2b(json.dumps(header, sort_keys=True).encode(), digest_size=16)
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
