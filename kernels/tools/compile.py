"""Kernels to machine code for a GPU that is not there, and what the disassembly says about it.

Takes recorded launches (``launch.record``), so exactly what ships is compiled: same constexprs, same block sizes, same
argument specialisation as the just-in-time path. Machine code is read with the disassembler that Triton bundles.
"""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..gpu import assembler
from ..gpu.launch import Launch, options
from .registers import unwritten_registers

_POINTERS = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip
_TENSOR_CORE = re.compile(r"^(HMMA|HGMMA|UTCHMMA|UTCQMMA|v_mfma)")
_GLOBAL_LOAD = re.compile(r"^(LDG|LDGSTS|UTMALDG|global_load|buffer_load)")
_ATOMIC = re.compile(r"^(ATOMG?\b|RED\b|global_atomic|buffer_atomic)")
_AMD_USAGE = ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
_WIDTHS = {
    "64": 8, "128": 16, "U8": 1, "S8": 1, "U16": 2, "S16": 2, "ubyte": 1, "ushort": 2, "short": 2,
    "dwordx2": 8, "dwordx4": 16,
}  # fmt: skip

RESERVED = 1024
"""Bytes of shared memory that the driver keeps for itself in every block."""


@dataclass(frozen=True)
class Multiprocessor:
    """What one multiprocessor has (CUDA's table of compute capabilities). A block may use all shared memory but the
    reserved part."""

    shared_bytes: int
    warps: int
    blocks: int
    tmem_columns: int | None = None
    registers: int = 65536


MULTIPROCESSORS = {
    "sm_80": Multiprocessor(164 * 1024, 64, 32),  # A100
    "sm_86": Multiprocessor(100 * 1024, 48, 16),  # RTX 30
    "sm_89": Multiprocessor(100 * 1024, 48, 24),  # RTX 40, L4, L40
    "sm_90": Multiprocessor(228 * 1024, 64, 32),  # H100
    "sm_100": Multiprocessor(228 * 1024, 64, 32, 512),  # B200
    "sm_120": Multiprocessor(100 * 1024, 48, 24),  # RTX 50
}


@dataclass(frozen=True)
class Compiled:
    """One kernel's machine code and what was read from it. Absent figures (AMD) are None."""

    asm: dict[str, str | bytes]  # "ptx", "cubin", ... as Triton names them
    registers: int | None  # per thread
    spills: int | None  # local-memory instructions (LDL, STL); None where they can't be read
    loop_spills: int | None  # those of them inside a loop, which run once a trip
    stack_bytes: int | None  # per thread
    shared_bytes: int  # per block
    tensor_cores: dict[str, int]  # instruction -> count
    global_loads: dict[str, int]  # "16 B" -> instructions of that width
    global_stores: dict[str, int]
    tma_loads: int
    atomics: int  # none: every reduction has a fixed order
    unwritten: int | None  # instructions that read a register that nothing has written: miscompiled where there are any
    occupancy: float | None  # resident warps of those a multiprocessor has room for; 0: does not fit


def target(arch: str) -> GPUTarget:
    if arch.startswith("sm_"):
        return GPUTarget("cuda", int(arch[3:]), 32)
    return GPUTarget("hip", arch, 64)


def source(launch: Launch) -> ASTSource:
    """The launch as the just-in-time path would specialise it: 16-byte pointers, multiples of 16, ones folded."""
    signature: dict[str, str] = {}
    constexprs: dict[str, Any] = dict(launch.constexprs)
    attrs: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, name in enumerate(launch.kernel.arg_names):
        if name in launch.constexprs:
            signature[name] = "constexpr"
            continue
        value = launch.args[name]
        if isinstance(value, Tensor):
            signature[name] = _POINTERS[value.dtype]
            attrs[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1:
            signature[name] = "constexpr"
            constexprs[name] = 1
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attrs[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constexprs, attrs)


def compile_launch(launch: Launch, arch: str) -> Compiled:
    """Compile one recorded launch for ``arch`` and read its machine code."""
    assembler.choose()
    kernel = triton.compile(source(launch), target=target(arch), options=options(launch.config))
    shared = kernel.metadata.shared
    if arch.startswith("sm_"):
        sass, used, stack = _disassemble(kernel.asm["cubin"])
        opcodes = _opcodes(sass)
        spills = spilled(sass)
        tmem = getattr(kernel.metadata, "tmem_size", 0) or 0
        occupancy = _occupancy(arch, used, shared, launch.config.num_warps, tmem)
        unwritten = len(unwritten_registers(sass))
        return _compiled(kernel.asm, opcodes, used, spills, stack, shared, occupancy, unwritten)
    text = kernel.asm["amdgcn"]
    opcodes = Counter(re.findall(r"^\s+([a-z]\w+)", text, re.M))
    vgprs, local, private = (_number(rf"\.{name}:\s+(\d+)", text) for name in _AMD_USAGE)
    return _compiled(kernel.asm, opcodes, vgprs, (local, None), private, shared, None, None)


def _compiled(
    asm: Mapping[str, str | bytes],
    opcodes: Counter[str],
    registers: int | None,
    spills: tuple[int | None, int | None],
    stack: int | None,
    shared: int,
    occupancy: float | None,
    unwritten: int | None,
) -> Compiled:
    return Compiled(
        asm=dict(asm),
        registers=registers,
        spills=spills[0],
        loop_spills=spills[1],
        stack_bytes=stack,
        shared_bytes=shared,
        tensor_cores=dict(sorted(_count(opcodes, _TENSOR_CORE).items())),
        global_loads=_by_width(opcodes, _GLOBAL_LOAD),
        global_stores=_by_width(opcodes, re.compile(r"^(STG|global_store|buffer_store)")),
        tma_loads=sum(n for op, n in opcodes.items() if op.startswith("UTMALDG")),
        atomics=sum(n for op, n in opcodes.items() if _ATOMIC.match(op)),
        occupancy=occupancy,
        unwritten=unwritten,
    )


def _number(pattern: str, text: str) -> int | None:
    found = re.search(pattern, text)
    return int(found.group(1)) if found else None


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _disassemble(cubin: bytes) -> tuple[str, int, int]:
    """SASS, registers and stack bytes a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        sass = subprocess.run([_tool("nvdisasm"), file.name], capture_output=True, text=True, check=True).stdout
        usage = subprocess.run(
            [_tool("cuobjdump"), "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = _number(r"REG:(\d+)", usage), _number(r"STACK:(\d+)", usage)
    if registers is None or stack is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {usage[:200]!r}")
    return sass, registers, stack


def _opcodes(sass: str) -> Counter[str]:
    return Counter(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.x]+)", sass, re.M))


def spilled(sass: str) -> tuple[int, int]:
    """Instructions on local memory, and those of them inside loops: between a label and a branch back to it."""
    labels: dict[str, int] = {}
    local: list[int] = []
    loops: list[tuple[int, int]] = []
    for at, line in enumerate(sass.splitlines()):
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = at
        elif re.search(r"\*/\s+(?:@!?U?P\w+\s+)?(?:LDL|STL)\b", line):
            local.append(at)
        elif (branch := re.search(r"\bBRA\b.*`\((\.L_\w+)\)", line)) and branch[1] in labels:
            loops.append((labels[branch[1]], at))
    return len(local), sum(any(start < at < end for start, end in loops) for at in local)


def _count(opcodes: Counter[str], pattern: re.Pattern[str]) -> Counter[str]:
    """Counts by instruction and its first two modifiers: HGMMA.64x32x16, HMMA.16816.F32."""
    out: Counter[str] = Counter()
    for op, n in opcodes.items():
        if pattern.match(op):
            out[".".join(op.split(".")[:2])] += n
    return out


def _by_width(opcodes: Counter[str], pattern: re.Pattern[str]) -> dict[str, int]:
    widths: Counter[int] = Counter()
    for op, n in opcodes.items():
        if pattern.match(op) and not op.startswith("UTMA"):
            widths[next((_WIDTHS[p] for p in re.split(r"[._]", op)[1:] if p in _WIDTHS), 4)] += n
    return {f"{width} B": widths[width] for width in sorted(widths)}


def _occupancy(arch: str, registers: int, shared: int, warps: int, tmem: int) -> float | None:
    """By registers (in units of 8 a thread), shared memory, warps, blocks and tensor memory."""
    has = MULTIPROCESSORS.get(arch)
    if has is None:
        return None
    blocks = min(has.blocks, has.warps // warps, has.registers // (math.ceil(registers / 8) * 8 * 32 * warps))
    blocks = min(blocks, has.shared_bytes // (shared + RESERVED))
    if has.tmem_columns and tmem:
        blocks = min(blocks, has.tmem_columns // tmem)
    return blocks * warps / has.warps
