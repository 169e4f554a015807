"""How long one launch takes by its machine code: executed instructions, tensor-core time and bytes. A model, not a run.

A launch executes ``warps x (straight code + Σ trips x loop)`` instructions; loops and their lengths are read from the
disassembly, trips follow from the launch. A multiprocessor's four schedulers issue at most one a cycle each; ``ISSUED``
is what kernels of this kind reach, whose few warps wait for one another. Tensor-core time is not hidden behind them:
with one or two blocks a multiprocessor, the warps that would hide it are the warps that wait for it. So

    time = max(bytes / bandwidth, instructions / (ISSUED · 4 · multiprocessors · clock) + tensor FLOPs / rate)

with the last wave of blocks as long as the others. Roofs are what an H100 80GB gave (3.0 TB/s read and written, 798
TFLOP/s of bf16 in 8192³ on random data); other devices are taken to reach the same shares of their published peaks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import NamedTuple

import triton

from ..gpu.launch import Launch, options
from .compile import MULTIPROCESSORS, _disassemble, _occupancy, source, target
from .cost import DEVICES, launch_cost

ISSUED = 0.6
"""Instructions a cycle and scheduler."""
BANDWIDTH_SHARE, PRODUCT_SHARE = 3.0e12 / 3.35e12, 798e12 / 989e12
"""What an H100 reached of its published peaks."""
NARROW = 32
"""A product of a warpgroup (HGMMA) with fewer columns takes as long as one with these: it waits for its rows."""


@dataclass(frozen=True)
class Machine:
    """Rates of one device: what it reaches, not its published peaks."""

    name: str
    arch: str
    processors: int  # multiprocessors
    clock: float  # cycles/s under load
    bandwidth: float  # bytes/s
    products: dict[str, float]  # FLOP/s by kind of product

    def issue_seconds(self, instructions: float) -> float:
        return instructions / (ISSUED * 4 * self.processors * self.clock)


_PROCESSORS = {"sm_80": (108, 1.41e9), "sm_90": (132, 1.755e9), "sm_100": (148, 1.85e9)}


@cache
def machine(arch: str) -> Machine:
    """The device that stands for an architecture. KeyError where there is none: sm_80, sm_90 and sm_100 have one."""
    device = next((d for d in DEVICES if d.arch == arch), None)
    if device is None:
        raise KeyError(arch)
    peak = {kind: rate * PRODUCT_SHARE for kind, rate in device.peak.items()}
    return Machine(device.name, arch, *_PROCESSORS[arch], device.bandwidth * BANDWIDTH_SHARE, peak)


class Loop(NamedTuple):
    """A loop of the source that a launch runs: how often, and the loops inside it."""

    trips: int
    inner: tuple[Loop, ...] = ()


def source_loops(launch: Launch) -> tuple[Loop, ...]:
    """The loops of a kernel that are not unrolled, in the order of its source; those of one trip are none."""
    c, args, name = launch.constexprs, launch.args, launch.name
    groups = Loop(c["COLUMNS"] // c["BLOCK_C"]) if "COLUMNS" in c else None
    if name == "folded_attention_dx":
        assert groups is not None
        loops: tuple[Loop, ...] = (Loop(args["images"], _several(groups)),) if args["images"] > 1 else (groups,)
    elif args.get("heads", 1) > 1:  # of one tile
        loops = (Loop(args["heads"]),)
    elif name == "slot_map_loss":
        loops = ()
    elif "blocks" in args:
        loops = (Loop(args["blocks"]),)
    elif "parts" in args:
        loops = (Loop(args["parts"]),)
    elif name.startswith("joint_norm"):
        loops = ()
    else:
        units = c["UNITS"] // c.get("BLOCK_F", c["BLOCK_C"]) if "UNITS" in c else 1
        loops = (*((groups,) if groups else ()), Loop(units))
    return _several(*loops)


def _several(*loops: Loop) -> tuple[Loop, ...]:
    return tuple(loop for loop in loops if loop.trips > 1)


class Code(NamedTuple):
    """Opcodes in order, and the loops among them as (first, last) instruction."""

    opcodes: list[str]
    loops: list[tuple[int, int]]


_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.x]*)")
_WORK = re.compile(r"HMMA|HGMMA|UTCHMMA|FFMA|LDG|LDGSTS|MUFU")


def read_code(sass: str) -> Code:
    """Loops are the stretches from a label to a branch back to it. Those without work only wait (for a barrier)."""
    labels: dict[str, int] = {}
    opcodes: list[str] = []
    ends: dict[int, int] = {}
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(opcodes)
        elif instruction := _INSTRUCTION.match(line):
            branch = re.search(r"\bBRA\b.*`\((\.L_\w+)\)", line)
            if branch and branch[1] in labels:
                ends[labels[branch[1]]] = len(opcodes)
            opcodes.append(instruction[1])
    loops = [(start, end) for start, end in ends.items() if any(map(_WORK.match, opcodes[start : end + 1]))]
    return Code(opcodes, sorted(loops))


def times_executed(code: Code, loops: Sequence[Loop], products: int) -> list[int]:
    """How often each instruction runs in one warp.

    A loop of the source whose trips the compiler has unrolled is missing from the code: of the ways to lay the loops of
    the one on those of the other, in order, the one is taken that executes about ``products`` tensor-core FLOPs.
    """
    outer = [
        loop for loop in code.loops if not any(o[0] <= loop[0] and loop[1] <= o[1] for o in code.loops if o != loop)
    ]
    fewer = min(len(outer), len(loops))
    ways = [
        _laid(code, chosen, wanted) for chosen in combinations(outer, fewer) for wanted in combinations(loops, fewer)
    ]
    return min(ways, key=lambda times: abs(tensor_flops(code.opcodes, times) - products))


def _laid(code: Code, found: Sequence[tuple[int, int]], loops: Sequence[Loop]) -> list[int]:
    times = [1] * len(code.opcodes)
    for (start, end), loop in zip(found, loops, strict=True):
        inside = [at for at in code.loops if start <= at[0] and at[1] <= end and at != (start, end)]
        for at in range(start, end + 1):
            times[at] *= loop.trips
        for (first, last), inner in zip(inside, loop.inner, strict=False):
            for at in range(first, last + 1):
                times[at] *= inner.trips
    return times


def _flops(opcode: str, narrowest: int = 0) -> int:
    """Of one tensor-core instruction, a warp's share; one of few columns counted as if it had ``narrowest``."""
    if shape := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", opcode):
        m, n, k = map(int, shape.groups())
        return 2 * m * max(n, narrowest) * k // 4
    if shape := re.match(r"HMMA\.(16)(8)(16|8|4)\b", opcode):
        m, n, k = map(int, shape.groups())
        return 2 * m * n * k
    return 0


def tensor_flops(opcodes: Sequence[str], times: Sequence[int], narrowest: int = 0) -> int:
    """Tensor-core FLOPs of one warp; of UTCHMMA, whose shape is in no opcode, none."""
    return sum(_flops(opcode, narrowest) * n for opcode, n in zip(opcodes, times, strict=True))


class Executed(NamedTuple):
    """What the machine code of one launch does, all blocks together."""

    instructions: float  # of warps; the last wave counted in full
    tensor_flops: float  # as long as they take: narrow products count as wide ones
    bytes: int
    loop_spills: int  # instructions on local memory inside loops, in the code
    spilled: int  # those executed by one warp
    blocks_a_processor: int

    def seconds(self, machine: Machine, precision: str) -> dict[str, float]:
        """By what binds: bytes, issue, tensor."""
        return {
            "bytes": self.bytes / machine.bandwidth,
            "issue": machine.issue_seconds(self.instructions),
            "tensor": self.tensor_flops / machine.products[precision],
        }


def total_seconds(seconds: dict[str, float]) -> float:
    """Of ``Executed.seconds``."""
    return max(seconds["bytes"], seconds["issue"] + seconds["tensor"])


def executed(launch: Launch, arch: str) -> Executed:
    """Compile one recorded launch for ``arch`` (sm_80, sm_90, sm_100) and count."""
    kernel = triton.compile(source(launch), target=target(arch), options=options(launch.config))
    sass, registers, _ = _disassemble(kernel.asm["cubin"])
    warps, blocks, issued = launch.config.num_warps, math.prod(launch.grid), launch_cost(launch).issued
    tmem = getattr(kernel.metadata, "tmem_size", 0) or 0
    share = _occupancy(arch, registers, kernel.metadata.shared, warps, tmem)
    resident = max(1, round((share or 0) * MULTIPROCESSORS[arch].warps / warps))
    code = read_code(sass)
    times = times_executed(code, source_loops(launch), issued // (warps * blocks))
    slots = machine(arch).processors * resident
    waves = math.ceil(blocks / slots) * slots / blocks if blocks > slots else 1.0
    instructions = sum(times) * warps * blocks * waves
    # Fewer blocks than processors: those that have none issue nothing.
    instructions *= max(1.0, machine(arch).processors / blocks)
    flops = float(tensor_flops(code.opcodes, times, NARROW)) * warps * blocks
    if any(opcode.startswith("UTCHMMA") for opcode in code.opcodes):
        flops = issued * (1 if launch.config.block_l >= 128 else 2)  # 64 rows take as long as 128
    local = [at for at, opcode in enumerate(code.opcodes) if re.match(r"LDL|STL", opcode)]
    inside = sum(any(start <= at <= end for start, end in code.loops) for at in local)
    return Executed(
        instructions, flops * waves, launch_cost(launch).bytes, inside, sum(times[at] for at in local), resident
    )
