"""Losses that a change of numbers must change: 20 steps of each preset, per backend and instruction set.

Each preset is there twice: two images of 16 pixels a side, and, as "PRESET whole", one image of the preset's own size
with as many drawn pixels as it says (clevrtex, whose features are of 16 x 16 patches anyway, is there once).
``python tests/golden.py [NAME ...]`` writes golden.json, of all or of some, on the paths that this machine has: three
minutes. A commit that changes the file says why its numbers are others.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
SMALL: dict[str, Any] = dict(batch_size=2, threads=1, precision="fp32", steps=1_000, data="sprites", max_objects=0)


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


WHOLE = " whole"


def names() -> list[str]:
    """Of the file: presets, and those of other sizes than 16 pixels a side as they are."""
    return [*preset_names(), *(f"{preset}{WHOLE}" for preset in preset_names() if preset != "clevrtex")]


def losses(name: str, way: str) -> list[list[float]]:
    """[loss, gradient norm] of each step: the preset's widths, two images of 16 pixels a side (its features); or all
    of a preset's sizes, one image."""
    preset, features = name.removesuffix(WHOLE), name == "clevrtex"
    sizes: dict[str, Any] = {"batch_size": 1} if name.endswith(WHOLE) else {} if features else {"resolution": 16}
    if "resolution" in sizes and TrainConfig.preset(preset).pixels_per_step:
        sizes["pixels_per_step"] = 64
    config = TrainConfig.preset(preset, **SMALL | sizes)
    torch.manual_seed(0)
    model = SlotVAE(config).train()
    optimizers, precision = (
        Optimizers(model, config.optimizer, config.lr, config.weight_decay),
        Precision("fp32", torch.device("cpu")),
    )
    if features:
        images = torch.rand(STEPS, 2, config.channels, 16, 16, generator=torch.Generator().manual_seed(1))
    else:
        count = config.batch_size * STEPS
        drawn = SpritesDataset(0, config.resolution, (2, 3), count).batch(np.arange(count))[0]
        images = torch.from_numpy(drawn).permute(0, 3, 1, 2).float().div(255).unflatten(0, (STEPS, config.batch_size))
    values = []
    with computed_by(way):
        for step in range(STEPS):
            of_step = training_step(model, optimizers, precision, config, step + 1, images[step])
            values.append([of_step["loss"], of_step["grad_norm"]])
    return values


def machine() -> str:
    """What bits may depend on besides the program: torch's own products follow the processor."""
    return f"{name_of(torch.device('cpu')).rsplit(',', 1)[0]}, torch {torch.__version__}, {platform.machine()}"


def main(chosen: list[str]) -> None:
    known = json.loads(FILE.read_text()) if FILE.exists() else {}
    for name in chosen or names():
        for way in ways():
            print(name, way, file=sys.stderr)
            known.setdefault(name, {})[way] = {"machine": machine(), "losses": losses(name, way)}
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
