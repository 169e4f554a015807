"""The parts of a training step by time, as a table that a person reads or as JSON."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastslots.bench.gpu_step.operators import Work
from fastslots.bench.gpu_step.walk import Noted, Walked, walk_published, walk_step
from fastslots.config.run import TrainConfig
from fastslots.kernels.gpu.launch import Launch
from fastslots.kernels.tools.executed import Executed, Machine, executed, machine, total_seconds

NODE_SECONDS = 2e-6
"""A launch of a Triton kernel in a CUDA graph takes no less; ``rates.RATES`` has that of PyTorch's kernels."""
FROM = {
    "sm_90": "shares of them by kind of kernel, as measured on an H100",
    "sm_80": "shares of them as an H100 showed, extrapolated: nobody measured this device",
}
FROM["sm_100"] = FROM["sm_80"]


@dataclass(frozen=True)
class Part:
    """A Triton kernel, or an operator of PyTorch, all its launches of a step together."""

    name: str  # "decoder: feed_forward_dx", "encoder: aten.convolution"
    ms: float
    bound: str  # what takes longest: bytes, issue, tensor (of kernels issue and tensor add up), flops, waits, or launch
    launches: int
    triton: bool
    seconds: dict[str, float]  # each bound alone, ms
    kinds: dict[str, tuple[float, int]]  # of its kernels: ms, launches
    loop_spills: int = 0


class Timed(NamedTuple):
    """One kernel of a step, or several alike."""

    kind: str  # the Triton kernel's name, or one of rates.RATES
    total: float  # seconds
    seconds: dict[str, float]  # by what binds
    launches: int
    loop_spills: int = 0


def parts_of(walked: Walked, machine_: Machine, precision: str, count: Callable[[Launch], Executed]) -> list[Part]:
    """Longest first."""
    groups: dict[tuple[str, bool], list[Timed]] = {}
    for noted in walked.noted:
        triton = isinstance(noted.work, Launch)
        name = f"{noted.region}: {noted.name if triton else 'aten.' + noted.name}"
        groups.setdefault((name, triton), []).extend(_timed(noted, machine_, precision, count))
    parts = []
    for (name, triton), rows in groups.items():
        bounds = {key: 1e3 * sum(row.seconds.get(key, 0) for row in rows) for key in rows[0].seconds}
        took: dict[str, float] = {}
        kinds: dict[str, tuple[float, int]] = {}
        for row in rows:  # a part's bound is that of most of its time
            longest = max(row.seconds, key=row.seconds.__getitem__)
            took[longest] = took.get(longest, 0) + row.total
            ms, launches = kinds.get(row.kind, (0.0, 0))
            kinds[row.kind] = ms + 1e3 * row.total, launches + row.launches
        bound = max(took, key=took.__getitem__)
        ms, launches = 1e3 * sum(row.total for row in rows), sum(row.launches for row in rows)
        spills = sum(row.loop_spills for row in rows)
        parts.append(Part(name, ms, bound, launches, triton, bounds, kinds, spills))
    return sorted(parts, key=lambda part: -part.ms)


def kinds_of(parts: Iterable[Part]) -> dict[str, tuple[float, int]]:
    """Milliseconds and launches of each kind of kernel, all parts together, longest first."""
    kinds: dict[str, tuple[float, int]] = {}
    for part in parts:
        for kind, (ms, launches) in part.kinds.items():
            before = kinds.get(kind, (0.0, 0))
            kinds[kind] = before[0] + ms, before[1] + launches
    return dict(sorted(kinds.items(), key=lambda item: -item[1][0]))


def _timed(noted: Noted, machine_: Machine, precision: str, count: Callable[[Launch], Executed]) -> Iterable[Timed]:
    if isinstance(noted.work, Work):
        rate = _products(noted, machine_, precision)
        for kernel in noted.work.kernels:
            seconds = kernel.seconds(machine_.bandwidth, rate, machine_.processors)
            yield Timed(kernel.kind, max(seconds.values()), seconds, kernel.launches)
        return
    done = count(noted.work)
    kind = "tf32" if precision == "tf32" else {torch.float32: "fp32"}.get(_dtype(noted.work), precision)
    seconds = done.seconds(machine_, kind)
    total = max(total_seconds(seconds), NODE_SECONDS)
    yield Timed(noted.name, total, seconds | {"launch": NODE_SECONDS}, 1, done.loop_spills)


def _dtype(item: Launch) -> torch.dtype:
    """Of the rows that a launch works on."""
    rows: Tensor = next(
        t
        for name in ("x_ptr", "n_ptr", "u_ptr", "tokens_ptr", "gathered_ptr", "y_ptr", "maps_ptr", "u2_ptr")
        if (t := item.args.get(name)) is not None
    )
    return rows.dtype


def _products(noted: Noted, machine_: Machine, precision: str) -> float:
    """FLOP/s of an operator's products."""
    wide = torch.float32 in noted.dtypes[:2]
    return machine_.products[precision if not wide or precision in ("fp32", "tf32") else "fp32"]


@dataclass(frozen=True)
class StepReport:
    """The modelled step and the published algorithm's, both on the same machine."""

    preset: str
    batch: int
    precision: str
    machine: Machine
    nodes: int
    decoder_nodes: int
    parts: list[Part]
    published: list[Part]

    @property
    def step_ms(self) -> float:
        return sum(part.ms for part in self.parts)

    @property
    def published_ms(self) -> float:
        return sum(part.ms for part in self.published)

    def as_json(self) -> str:
        parts = [
            {"name": p.name, "ms": round(p.ms, 4), "bound": p.bound, "launches": p.launches} for p in self.parts
        ]  # fmt: skip
        kinds, theirs = (
            [{"kind": k, "ms": round(ms, 4), "launches": n} for k, (ms, n) in kinds_of(of).items()]
            for of in (self.parts, self.published)
        )
        out = {
            "step_ms": round(self.step_ms, 3), "published_ms": round(self.published_ms, 3), "nodes": self.nodes,
            "decoder_nodes": self.decoder_nodes, "preset": self.preset, "batch": self.batch,
            "precision": self.precision, "machine": asdict(self.machine), "parts": parts,
            "kinds": kinds, "published_kinds": theirs,
        }  # fmt: skip
        return json.dumps(out, indent=1)

    def as_text(self, least: float = 0.01) -> str:
        """A table; parts of less than ``least`` of the step are summed up."""
        m = self.machine
        lines = [
            f"{self.preset}, batch {self.batch}, {self.precision}, one training step on {m.name} ({m.arch}): a model, "
            "nothing was run",
            f"roofs: {m.bandwidth / 1e12:.2f} TB/s, {m.products[self.precision] / 1e12:.0f} TFLOP/s, {m.processors} "
            f"multiprocessors at {m.clock / 1e9:.2f} GHz; {FROM[m.arch]}",
            "",
            f"{'ms':>8} {'share':>6} {'launches':>8}  {'bound':7} {'part'}",
        ]
        shown = [part for part in self.parts if part.ms >= least * self.step_ms]
        for part in shown:
            alone = ", ".join(f"{key} {ms:.2f}" for key, ms in part.seconds.items() if ms >= 0.005)
            spills = f", {part.loop_spills} spilled in loops" if part.loop_spills else ""
            mark = f" [{alone}{spills}]" if part.triton else ""
            lines.append(
                f"{part.ms:8.3f} {part.ms / self.step_ms:6.1%} {part.launches:8}  {part.bound:7} {part.name}{mark}"
            )
        rest = [part for part in self.parts if part not in shown]
        if rest:
            ms, launches = sum(part.ms for part in rest), sum(part.launches for part in rest)
            lines.append(f"{ms:8.3f} {ms / self.step_ms:6.1%} {launches:8}  {'':7} {len(rest)} smaller parts")
        lines += [
            f"{self.step_ms:8.3f}        {self.nodes:8}  the step ({self.decoder_nodes} launches in the decoder)",
            f"{self.published_ms:8.3f}        {sum(p.launches for p in self.published):8}  the published algorithm: "
            f"{self.published_ms / self.step_ms:.1f} times as long",
        ]
        return "\n".join(lines)


@contextlib.contextmanager
def _switches_kept() -> Iterator[None]:
    """``train.Precision`` sets torch's switches of the whole process."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def step_report(config: TrainConfig, arch: str, count: Callable[[Launch], Executed] | None = None) -> StepReport:
    """Walk a step of ours and one of the published algorithm, and time their parts.

    arch: sm_80, sm_90 or sm_100. count: of a launch; None compiles it (seconds each, once for every distinct launch).
    """
    known: dict[Any, Executed] = {}

    def counted(item: Launch) -> Executed:
        sizes = tuple(tuple(v.shape) if isinstance(v, torch.Tensor) else v for v in item.args.values())
        types = tuple(v.dtype for v in item.args.values() if isinstance(v, torch.Tensor))
        key = (item.name, item.grid, item.config, tuple(item.constexprs.items()), sizes, types)
        if key not in known:
            known[key] = executed(item, arch) if count is None else count(item)
        return known[key]

    on = machine(arch)
    with _switches_kept():
        ours, theirs = walk_step(config, arch), walk_published(config, arch)
        parts = parts_of(ours, on, config.precision, counted)
    published = parts_of(theirs, on, config.precision, counted)
    return StepReport(
        config.preset_name,
        config.batch_size,
        config.precision,
        on,
        ours.nodes(),
        ours.nodes("decoder"),
        parts,
        published,
    )


def preset_report(preset: str, batch: int, precision: str, arch: str) -> StepReport:
    """``step_report`` of a preset."""
    return step_report(TrainConfig.preset(preset, batch_size=batch, precision=precision, preset_name=preset), arch)
