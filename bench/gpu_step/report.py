"""The parts of a training step by time, as a table that a person reads or as JSON."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fastslots.bench.gpu_step.operators import Work
from fastslots.bench.gpu_step.walk import Noted, Walked, walk_published, walk_step
from fastslots.config.run import TrainConfig
from fastslots.kernels.gpu.launch import Launch
from fastslots.kernels.tools.executed import Executed, Machine, executed, machine, total_seconds

NODE_SECONDS = 2e-6
"""A node of a CUDA graph takes no less; launched one by one by the host it takes more."""


@dataclass(frozen=True)
class Part:
    """A Triton kernel, or an operator of PyTorch, all its launches of a step together."""

    name: str  # "decoder: feed_forward_dx", "encoder: aten.convolution"
    ms: float
    bound: str  # what takes longest: bytes, issue, tensor (of kernels issue and tensor add up), flops, or launch
    launches: int
    triton: bool
    seconds: dict[str, float]  # each bound alone, ms
    loop_spills: int = 0


def parts_of(walked: Walked, machine_: Machine, precision: str, count: Callable[[Launch], Executed]) -> list[Part]:
    """Longest first."""
    groups: dict[tuple[str, bool], list[tuple[float, dict[str, float], int, int]]] = {}
    for noted in walked.noted:
        triton = isinstance(noted.work, Launch)
        name = f"{noted.region}: {noted.name if triton else 'aten.' + noted.name}"
        groups.setdefault((name, triton), []).append(_timed(noted, machine_, precision, count))
    parts = []
    for (name, triton), rows in groups.items():
        bounds = {key: 1e3 * sum(row[1].get(key, 0) for row in rows) for key in rows[0][1]}
        took: dict[str, float] = {}
        for total, seconds, _, _ in rows:  # a part's bound is that of most of its time
            longest = max(seconds, key=seconds.__getitem__)
            took[longest] = took.get(longest, 0) + total
        bound = max(took, key=took.__getitem__)
        ms, launches, spills = sum(row[0] for row in rows), sum(row[2] for row in rows), sum(row[3] for row in rows)
        parts.append(Part(name, 1e3 * ms, bound, launches, triton, bounds, spills))
    return sorted(parts, key=lambda part: -part.ms)


def _timed(
    noted: Noted, machine_: Machine, precision: str, count: Callable[[Launch], Executed]
) -> tuple[float, dict[str, float], int, int]:
    if isinstance(noted.work, Work):
        seconds = _operator_seconds(noted, noted.work, machine_, precision)
        return max(seconds.values()), seconds, noted.work.launches, 0
    done = count(noted.work)
    kind = "tf32" if precision == "tf32" else {torch.float32: "fp32"}.get(_dtype(noted.work), precision)
    seconds = done.seconds(machine_, kind)
    return max(total_seconds(seconds), NODE_SECONDS), seconds | {"launch": NODE_SECONDS}, 1, done.loop_spills


def _dtype(item: Launch) -> torch.dtype:
    """Of the rows that a launch works on."""
    rows: Tensor = next(
        t
        for name in ("x_ptr", "n_ptr", "u_ptr", "tokens_ptr", "gathered_ptr", "y_ptr")
        if (t := item.args.get(name)) is not None
    )
    return rows.dtype


def _operator_seconds(noted: Noted, cost: Work, machine_: Machine, precision: str) -> dict[str, float]:
    share = min(1.0, cost.processors / machine_.processors)
    wide = torch.float32 in noted.dtypes[:2]
    rate = machine_.products[precision if not wide or precision in ("fp32", "tf32") else "fp32"]
    return {
        "bytes": cost.bytes / (machine_.bandwidth * share), "flops": cost.flops / rate,
        "launch": NODE_SECONDS * cost.launches,
    }  # fmt: skip


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
        out = {
            "step_ms": round(self.step_ms, 3), "published_ms": round(self.published_ms, 3), "nodes": self.nodes,
            "decoder_nodes": self.decoder_nodes, "preset": self.preset, "batch": self.batch,
            "precision": self.precision, "machine": asdict(self.machine), "parts": parts,
        }  # fmt: skip
        return json.dumps(out, indent=1)

    def as_text(self, least: float = 0.01) -> str:
        """A table; parts of less than ``least`` of the step are summed up."""
        m = self.machine
        lines = [
            f"{self.preset}, batch {self.batch}, {self.precision}, one training step on {m.name} ({m.arch}): a model, "
            "nothing was run",
            f"roofs: {m.bandwidth / 1e12:.2f} TB/s, {m.products[self.precision] / 1e12:.0f} TFLOP/s, {m.processors} "
            f"multiprocessors at {m.clock / 1e9:.2f} GHz; a launch takes at least {1e6 * NODE_SECONDS:g} us",
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
