"""How kernels are launched: block sizes from a committed table, and a recorder that stands in for a GPU.

Every launcher calls ``run`` with its tensors and constexprs. On a GPU (or in Triton's interpreter) that launches;
inside ``record(arch)`` it appends a ``Launch`` instead, so the compiler front end, the cost tests and the command line
see exactly the launches that ship. The table ``launches.json`` maps architecture, kernel, product and width class to
block sizes; ``fastslots kernels tune`` rewrites it on a real GPU.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from . import assembler

TABLE = Path(__file__).with_name("launches.json")
DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
Table = dict[str, dict[str, dict[str, dict[str, int]]]]
"""Architecture, kernel, dtype and width class -> fields of a ``LaunchConfig``."""
WIDTH_CLASSES = (64, 192, 384)
"""Largest row width of each class of the table: a tile holds whole rows, so the width sets its register use."""
MANY_SLOTS = 64
"""Above so many slots of a head the table has entries of their own."""


@dataclass(frozen=True)
class LaunchConfig:
    """Block sizes of one kernel on one architecture."""

    block_l: int  # rows (pixels) of a tile
    block_c: int  # hidden columns taken at once: heads x padded slots, or feed-forward units
    num_warps: int
    num_stages: int
    block_d: int = 64  # columns of a chunk of a row
    block_f: int = 0  # feed-forward units at once, in a kernel that has both halves; 0: block_c


@dataclass(frozen=True)
class Launch:
    """One recorded launch: what the compiler needs and what the cost model is held against."""

    kernel: Any
    grid: tuple[int, ...]
    args: Mapping[str, Any]
    constexprs: Mapping[str, Any]
    config: LaunchConfig

    @property
    def name(self) -> str:
        return kernel_name(self.kernel)


@dataclass
class Recorder:
    arch: str
    launches: list[Launch]


_recorder: ContextVar[Recorder | None] = ContextVar("fastslots_launch_recorder", default=None)
_override: ContextVar[LaunchConfig | None] = ContextVar("fastslots_launch_override", default=None)


@contextlib.contextmanager
def record(arch: str) -> Iterator[list[Launch]]:
    """Collect launches for ``arch`` ("sm_90") instead of launching; call launchers with tensors on ``meta``."""
    recorder = Recorder(arch, [])
    token = _recorder.set(recorder)
    try:
        yield recorder.launches
    finally:
        _recorder.reset(token)


@contextlib.contextmanager
def override(config: LaunchConfig) -> Iterator[None]:
    """Use ``config`` for every kernel inside: what the tuner and tests of odd block sizes need."""
    token = _override.set(config)
    try:
        yield
    finally:
        _override.reset(token)


def kernel_name(kernel: Any) -> str:
    """``_folded_attention_fwd_kernel`` -> ``folded_attention_fwd``."""
    name: str = kernel.fn.__name__
    return name.removeprefix("_").removesuffix("_kernel")


@cache
def _table() -> Table:
    table: Table = json.loads(TABLE.read_text())
    return table


def reload_table() -> None:
    """Forget the table read so far (the tuner has rewritten it)."""
    _table.cache_clear()


def save_table(table: Table) -> None:
    """Write the table, one configuration a line."""
    lines = ["{"]
    for arch, kernels in sorted(table.items()):
        lines.append(f'  "{arch}": {{')
        for kernel, entries in sorted(kernels.items()):
            rows = [f'      "{key}": {json.dumps(entry)}' for key, entry in sorted(entries.items())]
            lines += [f'    "{kernel}": {{', ",\n".join(rows), "    },"]
        lines[-1] = "    }"
        lines.append("  },")
    lines[-1] = "  }"
    TABLE.write_text("\n".join([*lines, "}", ""]))
    reload_table()


def table() -> Table:
    """The table, as a copy that may be changed and saved."""
    return copy.deepcopy(_table())


@cache
def device_arch(index: int) -> str:
    if torch.version.hip:
        return torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{10 * major + minor}"


def arch_of(tensor: Tensor) -> str:
    """The architecture that a launch on this tensor would run on."""
    recorder = _recorder.get()
    if recorder is not None:
        return recorder.arch
    return device_arch(tensor.device.index or 0) if tensor.is_cuda else "interpreter"


def table_key(dtype: torch.dtype, width: int, slots: int = 1) -> str:
    """``bf16/192``: kind of product (fp16, bf16, tf32, fp32) and width class; ``bf16/192 many slots``."""
    fits = [limit for limit in WIDTH_CLASSES if width <= limit]
    if not fits:
        raise ValueError(f"width {width} is above {WIDTH_CLASSES[-1]}, the widest row a tile holds")
    many = " many slots" if slots > MANY_SLOTS else ""
    return f"{'tf32' if precision(dtype) == 'tf32' else DTYPES[dtype]}/{fits[0]}{many}"


def table_arch(arch: str) -> str:
    """The table's architecture that serves ``arch``: itself, or the newest NVIDIA one that is not newer.

    sm_86 has 99 KiB of shared memory a block, like sm_89 and sm_12x, whose products are of its kind too. The entries of
    sm_80 serve whatever is older or not NVIDIA's.
    """
    if arch in _table():
        return arch
    known = sorted(int(name[3:]) for name in _table() if name.startswith("sm_"))
    number = int(arch[3:]) if arch.startswith("sm_") else known[0]
    number = 89 if number >= 120 else number
    return f"sm_{max([value for value in known if value <= number], default=known[0])}"


def has_entries(like: Tensor, width: int, kernels: tuple[str, ...], slots: int = 1) -> bool:
    """Whether the table has block sizes for all kernels whose names start so; a tile that fits no memory has none."""
    key = table_key(like.dtype, width, slots)
    entries = _table()[table_arch(arch_of(like))]
    return all(key in found for name, found in entries.items() if name.startswith(kernels))


def select(kernel: Any, like: Tensor, width: int, slots: int = 1) -> LaunchConfig:
    """Block sizes for ``kernel`` on rows of ``width`` elements of the dtype and device of ``like``, and so many slots a
    head where a tile holds them all."""
    forced = _override.get()
    if forced is not None:
        return forced
    entries = _table()[table_arch(arch_of(like))]
    return LaunchConfig(**entries[kernel_name(kernel)][table_key(like.dtype, width, slots)])


def allows_tf32() -> bool:
    """Whether torch's own fp32 products on a GPU may use TF32.

    Asked of the setting behind both of torch's interfaces: ``get_float32_matmul_precision`` raises in a program that
    has used the newer one.
    """
    setting = getattr(torch.backends.cuda.matmul, "fp32_precision", None)  # since PyTorch 2.9
    return torch.get_float32_matmul_precision() != "highest" if setting is None else setting == "tf32"


def precision(dtype: torch.dtype) -> str:
    """``input_precision`` of fp32 products: TF32 exactly where the user lets torch's own products use it."""
    return "tf32" if dtype == torch.float32 and allows_tf32() else "ieee"


def options(config: LaunchConfig) -> dict[str, Any]:
    """What the compiler is told beside the block sizes. FP fusion (a·b + c in one instruction) by name, since its
    default changes in Triton 3.10: the code that runs is the code that was compiled and read here."""
    return {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}


def run(
    kernel: Any,
    grid: tuple[int, ...],
    args: Mapping[str, Any],
    constexprs: Mapping[str, Any],
    config: LaunchConfig,
    as_given: bool = False,
) -> None:
    """Launch, or record. An empty grid launches nothing.

    Where the shared memory of a device is too small, the kernel's loops run with fewer tiles in flight (the same sums
    in the same order); ``as_given`` raises instead.
    """
    recorder = _recorder.get()
    if recorder is not None:
        recorder.launches.append(Launch(kernel, grid, dict(args), dict(constexprs), config))
        return
    if 0 in grid:
        return
    device = next(a.device for a in args.values() if isinstance(a, Tensor))
    if device.type == "cuda":
        assembler.choose()
    guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    types = tuple(a.dtype for a in args.values() if isinstance(a, Tensor))
    key = (kernel_name(kernel), types, tuple(constexprs.items()), config, device)
    with guard:
        for stages in range(_stages_that_fit.get(key, config.num_stages), 0, -1):
            try:
                kernel[grid](**args, **constexprs, **options(replace(config, num_stages=stages)))
            except OutOfResources as error:
                if as_given:
                    raise
                if stages == 1:
                    raise RuntimeError(
                        f"{kernel_name(kernel)} does not fit this GPU ({error}): run `fastslots kernels tune` on it, "
                        "or ask for backend='reference'"
                    ) from error
                _stages_that_fit[key] = stages - 1
            else:
                return


_stages_that_fit: dict[tuple[Any, ...], int] = {}
"""Launches that had to give up stages, so that each asks once."""


def split(rows: int, block_l: int, programs: int, target: int = 512) -> tuple[int, int]:
    """Parts into which a reduction over ``rows`` is cut, and tiles of ``block_l`` in each: about ``target`` programs.

    A function of the shape and the table alone: the order of the sums, and so the bits, never depend on the load.
    """
    tiles = max(1, -(-rows // block_l))
    blocks = -(-tiles // min(tiles, -(-target // max(programs, 1))))
    return -(-tiles // blocks), blocks


def as_dict(config: LaunchConfig) -> dict[str, int]:
    """As in the table: what has its default is left out."""
    return {f.name: value for f in fields(config) if (value := getattr(config, f.name)) != f.default}
