"""Models that train in a moment, for tests of something else, and whether two runs of them ended alike."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

MODEL_8 = dict(
    resolution=8, num_slots=2, slot_dim=2, octaves=2, cnn_channels=4, encoder_width=8, encoder_layers=1, query_width=8,
    query_hidden=8, slot_width=8, slot_hidden=8, decoder_heads=2, output_hidden=(8,), pixels_per_step=0,
)  # fmt: skip
MODEL_16 = dict(
    resolution=16, num_slots=3, slot_dim=4, cnn_channels=8, encoder_width=16, encoder_layers=1, query_width=16,
    query_hidden=16, slot_width=16, slot_hidden=16, decoder_heads=2, output_hidden=(16,), pixels_per_step=0,
)  # fmt: skip


def flags(fields: Mapping[str, object]) -> list[str]:
    """The same fields for a command."""
    texts = {name: ",".join(map(str, v)) if isinstance(v, tuple) else str(v) for name, v in fields.items()}
    return [word for name, text in texts.items() for word in (f"--{name}", text)]


def same_weights(a: Path, b: Path) -> bool:
    """Whether the weights of two runs' folders have the same bits."""
    x, y = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)
