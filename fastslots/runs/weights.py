"""Files of weights that hold their configuration: what a run writes, and ``SlotVAE.from_file`` reads."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from fastslots.config.model import SlotVAEConfig
from fastslots.errors import UserError, first_line


def weights_bytes(config: SlotVAEConfig, state: Mapping[str, Tensor]) -> bytes:
    """A model's state_dict as a safetensors file that also holds its configuration."""
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(SlotVAEConfig)}
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    return save(tensors, metadata={"fastslots.config": json.dumps(fields)})


def read_weights(path: Path) -> tuple[SlotVAEConfig, dict[str, Tensor]]:
    """Configuration and state_dict of a file that ``weights_bytes`` made. UserError where it is none, or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        if "fastslots.config" not in metadata:
            raise UserError(f"{path} holds no configuration: name weights that fastslots wrote")
        return SlotVAEConfig(**json.loads(metadata["fastslots.config"])), load_file(path)
    except UserError:
        raise
    except (OSError, SafetensorError, RuntimeError, ValueError, TypeError, MemoryError) as error:
        raise unreadable(path, error) from None


def unreadable(path: Path, error: BaseException) -> UserError:
    """What is said of a weights file that cannot be used."""
    return UserError(f"{path} cannot be read as weights ({first_line(error)})")
