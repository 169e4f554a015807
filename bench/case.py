"""What a benchmark is made of: options, a case, its providers, and the check that each must pass before it is timed."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastslots.models import SlotVAEConfig
from fastslots.testing import errors

OURS = ("fastslots, one graph", "fastslots, triton", "fastslots, cpu", "fastslots", "folded, tiled")
"""The provider that ratios are taken to: the first of these that a case could time."""

BOUNDS = {"fp32": 1e-3, "tf32": 3e-2, "bf16": 1e-1}
"""Largest RMS error of any value or gradient, relative to the RMS of the float64 one."""

Tensors = dict[str, Tensor]
Run = Callable[[], Any]


@dataclass(frozen=True)
class Options:
    """How a case is set up. Everything is plain data, so that a process of its own can build the same case."""

    preset: str = "clevr6"
    batch: int = 0  # 0: 4 on a CPU, the preset's on a GPU
    threads: int = 1
    rounds: int = 5
    tiny: bool = False
    device: str = "cpu"
    precision: str = "fp32"
    memory: bool = True
    only: str = ""  # providers whose names hold one of these words, separated by |
    skip: str = ""  # those that hold one of these are left out
    overrides: dict[str, int] = field(default_factory=dict)  # of SlotVAEConfig

    def config(self) -> SlotVAEConfig:
        """The preset; tiny keeps every width and takes 16 pixels a side at most."""
        config = SlotVAEConfig.preset(self.preset, **self.overrides)
        if self.tiny and config.resolution > 16:
            config = dataclasses.replace(config, resolution=16)
        return config

    def images(self) -> int:
        if self.batch:
            return self.batch
        if self.tiny:
            return 2
        if self.device == "cpu":
            return 4
        from fastslots.config.presets import PRESETS

        return int(PRESETS[self.preset]["batch_size"])

    def wants(self, provider: str) -> bool:
        if self.skip and any(word in provider for word in self.skip.split("|")):
            return False
        return not self.only or any(word in provider for word in self.only.split("|"))

    @contextlib.contextmanager
    def math(self) -> Iterator[None]:
        """How precise fp32 matrix products are while a case runs."""
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = self.precision == "tf32"
        yield

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """Around one call: autocast keeps what it has cast of the weights until it is left."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16")


@dataclass
class Provider:
    """One way to do a case's work.

    make: builds what is timed; it, or the first call, raises ``CannotServeError`` where it can't do the work.
    What the timed call returns is, by ``view``, values and gradients by name, all that the case's ``expected`` names
    among them.
    expected: in place of the case's, of a provider that does less work than the others, which its name then says.
    view: in place of the case's. own_precision: it enters autocast itself. how: after the first call, how the work is
    done, for its row.
    """

    make: Callable[[], Run]
    flops: float | None = None
    bytes: float | None = None
    expected: Callable[[], Tensors] | None = None
    view: Callable[[Any], Mapping[str, Tensor]] | None = None
    own_precision: bool = False
    how: Callable[[], str] | None = None

    def built(self, options: Options) -> Run:
        """What is timed, in the precision of the options."""

        def around() -> contextlib.AbstractContextManager[None]:
            return contextlib.nullcontext() if self.own_precision else options.autocast()

        with around():
            run = self.make()

        def call() -> Any:
            with around():
                return run()

        return call


@dataclass
class Case:
    name: str
    axes: dict[str, int]
    providers: dict[str, Provider]
    expected: Callable[[], Tensors]  # in float64; made once
    view: Callable[[Any], Mapping[str, Tensor]] = lambda result: result  # what the check sees of a call's result
    clock: str = "cpu"  # the clock that counts on a CPU
    items: int = 0  # images a call
    bounds: Mapping[str, float] = field(default_factory=dict)  # in place of ``BOUNDS``, by precision
    row: int = 1  # calls of one sample on a GPU, one right after the other


def check(actual: Mapping[str, Tensor], expected: Tensors) -> tuple[float, str]:
    """Largest RMS error over all tensors, relative to the RMS of what was expected, and where it is."""
    worst, place = 0.0, ""
    for name, tensor in expected.items():
        if name not in actual:
            return float("inf"), f"{name} is missing"
        error = errors(actual[name].detach(), tensor)[1]
        if not error <= worst:
            worst, place = error, name
    return worst, place


def model_axes(config: SlotVAEConfig, images: int) -> dict[str, int]:
    """B images, R pixels a side, K slots, H heads, d head width, D query width, F feed-forward width, N layers."""
    H, D = config.decoder_heads, config.query_width
    sizes = {"B": images, "R": config.resolution, "K": config.num_slots, "H": H, "d": config.slot_width // H}
    return {**sizes, "D": D, "F": 2 * D, "N": config.decoder_layers}
