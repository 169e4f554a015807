"""Rewrites the launch table on the GPU at hand: every kernel, product and width class, timed over its candidates.

From the entry that serves so far, one field at a time is moved through its values, and the fastest kept, until a round
over all fields finds nothing faster: some 15 to 40 compilations an entry instead of all 144 combinations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import torch
import triton
import triton.testing
from torch import Tensor
from triton.errors import TritonError

from ..gpu import launch
from ..gpu.launch import Launch, LaunchConfig
from .shipped import OPS, PRECISIONS, SHAPES, Shape, inputs, matmul_precision, run_op, serves

FIELDS: dict[str, tuple[int, ...]] = {
    "block_l": (16, 32, 64, 128),
    "block_c": (16, 32, 64),
    "num_warps": (4, 8),
    "num_stages": (1, 2, 3),
    "block_d": (16, 32, 64),
}
HALVES = {"decoder_layer_fwd": {"block_f": (0, 16, 32, 64)}}
"""Further fields of single kernels."""

Measure = Callable[[Launch], float | None]
"""Milliseconds of a launch, or None where its configuration does not fit the device."""


def milliseconds(item: Launch) -> float | None:
    """Median time with a cold L2."""
    try:
        median: float = triton.testing.do_bench(
            lambda: launch.run(item.kernel, item.grid, item.args, item.constexprs, item.config, as_given=True),
            return_mode="median",
        )
        return median
    except (TritonError, RuntimeError):
        pass
    torch.cuda.synchronize()  # raises where the launch has broken the device, which would fail every later one too
    return None


def neighbours(kernel: str, config: LaunchConfig) -> Iterator[list[LaunchConfig]]:
    """For each field, ``config`` with every other value of it."""
    for field, values in (FIELDS | HALVES.get(kernel, {})).items():
        yield [replace(config, **{field: value}) for value in values if value != getattr(config, field)]


def descend(
    kernel: str, start: LaunchConfig, time_of: Callable[[LaunchConfig], float | None]
) -> tuple[LaunchConfig, float | None]:
    """-> the fastest configuration found from ``start`` and its time (None where nothing fits); each is timed once."""
    seen: dict[LaunchConfig, float] = {}

    def cost(config: LaunchConfig) -> float:
        if config not in seen:
            time = time_of(config)
            seen[config] = float("inf") if time is None else time
        return seen[config]

    best: LaunchConfig = start
    before: LaunchConfig | None = None
    while best != before:
        before = best
        for index in range(len(FIELDS) + len(HALVES.get(kernel, {}))):
            best = min([best, *list(neighbours(kernel, best))[index]], key=cost)
    return best, (None if cost(best) == float("inf") else cost(best))


@dataclass(frozen=True)
class Entry:
    """One line of the table: the launch it serves now, and how to record its op with another configuration."""

    shape: Shape
    precision: str
    key: str
    start: Launch
    recorded: Callable[[LaunchConfig | None], dict[str, Launch]]

    def record(self, config: LaunchConfig) -> Launch:
        return self.recorded(config)[self.start.name]

    def __str__(self) -> str:
        return f"{self.shape.name} {self.precision} {self.start.name}"


def entries(arch: str, presets: Sequence[str], precisions: Sequence[str], device: str) -> Iterator[Entry]:
    """Every entry once, by the first preset and op that reads it: in the loss before in a layer alone."""
    done: set[tuple[str, str]] = set()
    for shape, precision in product((SHAPES[name] for name in presets), precisions):
        tensors = inputs(shape, PRECISIONS[precision], device)
        for op in sorted(shape.ops or OPS, key=lambda op: (op != "decoder_loss", op != "decoder_layer")):
            with matmul_precision(precision), launch.record(arch):
                if not serves(op, shape, tensors):
                    continue

            launches = partial(_recorded, arch, op, precision, tensors)
            for name, start in launches(None).items():
                with matmul_precision(precision):
                    slots = shape.slots_of_table(name)
                    key = launch.table_key(PRECISIONS[precision], shape.row_width(name), slots)
                if (name, key) not in done:
                    done.add((name, key))
                    yield Entry(shape, precision, key, start, launches)


def _recorded(
    arch: str, op: str, precision: str, tensors: dict[str, Tensor], config: LaunchConfig | None
) -> dict[str, Launch]:
    """The launches of an op by their kernels' names, those that the table serves; with ``config`` in place of its
    own configurations."""
    served = launch.table()[launch.table_arch(arch)]
    forced = launch.override(config) if config else nullcontext()
    with matmul_precision(precision), launch.record(arch) as launches, forced:
        run_op(op, tensors)
    return {item.name: item for item in launches if item.name in served}


def _search(entry: Entry, measure: Measure) -> tuple[LaunchConfig, float | None]:
    return descend(entry.start.name, entry.start.config, lambda config: measure(entry.record(config)))


def tune(
    say: Callable[[str], None] = print,
    presets: Sequence[str] = tuple(SHAPES),
    precisions: Sequence[str] = ("bf16", "tf32", "fp32"),
    *,
    arch: str | None = None,
    device: str = "cuda",
    measure: Measure = milliseconds,
) -> str:
    """Search every entry of these presets and products, save the fastest in the table, return the architecture.

    fp16 takes what bf16 found: same element size, same instructions. ``arch``, ``device`` and ``measure`` are those of
    the GPU at hand; tests put in their own. The table is saved after every entry, so a search may be interrupted.
    """
    arch = arch or launch.arch_of(torch.empty(0, device=device))
    for entry in entries(arch, presets, precisions, device):
        best, time = _search(entry, measure)
        if time is None:
            say(f"{arch} {entry}: nothing fits, entry left as it was")
            continue
        table = launch.table()
        configs = table.setdefault(arch, launch.table()[launch.table_arch(arch)])[entry.start.name]
        for key in (entry.key, entry.key.replace("bf16", "fp16")):
            configs[key] = launch.as_dict(best)
        launch.save_table(table)
        say(f"{arch} {entry}: {1e3 * time:.1f} us with {launch.as_dict(best)}")
    return arch


def plan(say: Callable[[str], None], presets: Sequence[str], precisions: Sequence[str], arch: str) -> None:
    """Say what ``tune`` would start from on ``arch``; needs no GPU, times and writes nothing."""
    found = list(entries(arch, presets, precisions, "meta"))
    for entry in found:
        moves = sum(len(configs) for configs in neighbours(entry.start.name, entry.start.config))
        say(f"{arch} {entry} ({entry.key}): from {launch.as_dict(entry.start.config)}, {moves} moves a round")
    say(f"{len(found)} entries")
