"""Losses that a change of numbers must change: 20 steps of each preset, per backend and instruction set.

``python tests/golden.py [PRESET ...]`` writes golden.json, of all presets or of some, on the paths that this machine
has. A commit that changes the file says why its numbers are others.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from fastslots.config.presets import preset_names
from fastslots.data import SpritesDataset
from fastslots.models import SlotVAE
from fastslots.ops import backends
from fastslots.records import describe
from fastslots.runs.machine import name_of
from fastslots.train import TrainConfig
from fastslots.train.optim import Optimizers
from fastslots.train.step import Precision, training_step

STEPS = 20
FILE = Path(__file__).with_name("golden.json")
SMALL = dict(batch_size=2, threads=1, precision="fp32", steps=1_000, data="sprites", max_objects=0)


def ways() -> list[str]:
    """The names "reference", and "cpu ISA" for each instruction set that is here."""
    if backends.why_not("cpu", describe("decoder_loss", [torch.empty(1)])) is not None:
        return ["reference"]
    from fastslots.kernels import cpu_backend

    return ["reference", *(f"cpu {isa}" for isa in cpu_backend.ISAS)]


@contextmanager
def computed_by(way: str) -> Iterator[None]:
    choose, threads = backends._choose, torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if way == "reference":
            backends._choose = lambda call, backend: ("reference", {})
        else:
            from fastslots.kernels import cpu_backend

            cpu_backend.set_isa(way.removeprefix("cpu "))
        yield
    finally:
        backends._choose = choose
        torch.set_num_threads(threads)
        if way != "reference":
            cpu_backend.set_isa(None)


def losses(preset: str, way: str) -> list[list[float]]:
    """[loss, gradient norm] of each step: the preset's widths, two images of 16 pixels a side (its features)."""
    features = preset == "clevrtex"
    config = TrainConfig.preset(preset, **SMALL, **({} if features else {"resolution": 16}))
    if config.pixels_per_step:
        config = TrainConfig.preset(preset, **SMALL, resolution=16, pixels_per_step=64)
    torch.manual_seed(0)
    model = SlotVAE(config).train()
    optimizers, precision = (
        Optimizers(model, config.optimizer, config.lr, config.weight_decay),
        Precision("fp32", torch.device("cpu")),
    )
    if features:
        images = torch.rand(STEPS, 2, config.channels, 16, 16, generator=torch.Generator().manual_seed(1))
    else:
        drawn = SpritesDataset(0, 16, (2, 3), 2 * STEPS).batch(np.arange(2 * STEPS))[0]
        images = torch.from_numpy(drawn).permute(0, 3, 1, 2).float().div(255).unflatten(0, (STEPS, 2))
    values = []
    with computed_by(way):
        for step in range(STEPS):
            of_step = training_step(model, optimizers, precision, config, step + 1, images[step])
            values.append([of_step["loss"], of_step["grad_norm"]])
    return values


def machine() -> str:
    """What bits may depend on besides the program: torch's own products follow the processor."""
    return f"{name_of(torch.device('cpu')).rsplit(',', 1)[0]}, torch {torch.__version__}, {platform.machine()}"


def main(presets: list[str]) -> None:
    known = json.loads(FILE.read_text()) if FILE.exists() else {}
    for preset in presets or preset_names():
        for way in ways():
            print(preset, way, file=sys.stderr)
            known.setdefault(preset, {})[way] = {"machine": machine(), "losses": losses(preset, way)}
    write(known)


def write(known: dict) -> None:
    """A line a preset and path."""
    presets = []
    for preset, paths in sorted(known.items()):
        rows = (f"{json.dumps(way)}: {json.dumps(one)}" for way, one in sorted(paths.items()))
        presets.append(f"{json.dumps(preset)}: {{\n" + ",\n".join(rows) + "}")
    FILE.write_text("{" + ",\n".join(presets) + "}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
