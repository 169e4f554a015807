"""Files of weights that hold their configuration: what a run writes, and ``SlotVAE.from_file`` reads.

They come from other people, so a small file may not have a large model made of it: ``model_budget``.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastslots.config.code import Code
from fastslots.config.model import SlotVAEConfig
from fastslots.errors import UserError, first_line
from fastslots.files import read_file

MOST_BYTES = 8 << 30
"""Bytes of a weights file: those of a model of two billion parameters."""
MOST_TABLES = 1 << 30
"""Bytes of tables of its grid's positions that a model makes for itself: 0.6 GB at 2048 pixels a side and 8 octaves."""
SLACK = 16 << 20  # bytes that a model's parts may take while they are made


def weights_bytes(
    config: SlotVAEConfig,
    state: Mapping[str, Tensor],
    scores: dict[str, object] | None = None,
    code: Code | None = None,
) -> bytes:
    """A model's state_dict as a safetensors file that also holds its configuration; and scores, and what built it,
    where there are some."""
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(SlotVAEConfig)}
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    metadata = {"fastslots.config": json.dumps(fields)}
    if scores:
        metadata["fastslots.scores"] = json.dumps(scores)
    if code and code.name:
        metadata["fastslots.code"] = json.dumps(dataclasses.asdict(code))
    data = save(tensors, metadata=metadata)
    return data if len(metadata) == 1 else _ordered(data)


def _ordered(data: bytes) -> bytes:
    """A safetensors file with its metadata in order: the library writes several entries in any, and the same model
    would give other bytes each time."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[end:]


def read_weights(path: Path) -> tuple[SlotVAEConfig, Code, dict[str, Tensor]]:
    """Configuration, what built the model and state_dict of a file that ``weights_bytes`` made; nothing is imported.

    Raises UserError where it is none, or damaged.
    """
    try:
        data = read_file(path, MOST_BYTES)
        state = load(data)
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
        code = Code(**json.loads(metadata.get("fastslots.code", "{}")))
        return SlotVAEConfig(**json.loads(metadata["fastslots.config"])), code, state
    except KeyError:
        raise UserError(f"{path} holds no configuration: name weights that fastslots wrote") from None
    except UserError as error:  # of a field
        raise UserError(f"{path}: {error}") from None
    except (OSError, SafetensorError, RuntimeError, ValueError, TypeError, MemoryError, RecursionError) as error:
        raise unreadable(path, error) from None


def unreadable(path: Path, error: BaseException) -> UserError:
    """What is said of a weights file that cannot be used."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
    return UserError(f"{path} cannot be read as weights ({reason})")


def model_budget(config: SlotVAEConfig, state: Mapping[str, Tensor]) -> Budget:
    """A context in which a model may take the bytes of its weights, and little more. UserError where it must."""
    tables = 4 * config.resolution**2 * (4 * config.octaves + 8)  # of the grid's positions
    if tables > MOST_TABLES:
        raise UserError(
            f"resolution {config.resolution} with {config.octaves} octaves takes tables of {tables:,} bytes, over the "
            f"{MOST_TABLES:,} that weights may ask for: name other weights"
        )
    return Budget(sum(value.nbytes for value in state.values()) + 4 * tables + SLACK)  # tables are made in a few parts


class Budget(TorchFunctionMode):
    """Inside, tensors may be made of at most so many bytes together: UserError before the one that goes beyond."""

    MAKERS = (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.arange, torch.linspace)
    LEAST = 1024  # bytes that a tensor takes at least, with all that belongs to it

    def __init__(self, size: int):
        super().__init__()
        self._size = self._left = size

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.MAKERS:
            sizes = args[0] if args and isinstance(args[0], tuple | list) else args
            self._left -= max(self.LEAST, 4 * math.prod(n for n in sizes if isinstance(n, int) and n > 0))
            if self._left < 0:
                raise UserError(
                    f"its configuration is of a larger model than it has weights for ({self._size:,} bytes): name "
                    f"weights that fastslots wrote"
                )
        return func(*args, **(kwargs or {}))
