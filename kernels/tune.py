"""Rewrites the launch table on the GPU at hand: every kernel, product and width class, timed over its candidates."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import triton
import triton.testing

from . import launch
from .launch import Launch, LaunchConfig
from .shipped import OPS, PRECISIONS, PRESETS, Shape, inputs, matmul_precision, run_op

_ROWS = (16, 32, 64, 128)
_COLUMNS = (16, 32, 64)
_WARPS = (4, 8)
_STAGES = (1, 2, 3)
_CHUNKS = (16, 64)


def candidates() -> Iterator[LaunchConfig]:
    """Every combination worth trying; those that do not fit the device fail to launch and are passed over."""
    for rows in _ROWS:
        for columns in _COLUMNS:
            for warps in _WARPS:
                for stages in _STAGES:
                    for chunk in _CHUNKS:
                        yield LaunchConfig(rows, columns, warps, stages, chunk)


def _launches(arch: str, shape: Shape, precision: str, config: LaunchConfig) -> list[Launch]:
    """One launch of every kernel with this configuration, on real tensors."""
    found: dict[str, Launch] = {}
    tensors = inputs(shape, PRECISIONS[precision], "cuda")
    for op in OPS:
        with launch.override(config), launch.record(arch) as launches:
            run_op(op, tensors)
        found |= {item.name: item for item in launches if item.config == config}  # others are not in the table
    return list(found.values())


def _milliseconds(item: Launch) -> float | None:
    """Median time with a cold L2, or None where the configuration does not fit the device."""
    try:
        return triton.testing.do_bench(
            lambda: launch.run(item.kernel, item.grid, item.args, item.constexprs, item.config), return_mode="median"
        )
    except (triton.runtime.errors.OutOfResources, triton.CompilationError, RuntimeError):
        return None


def tune(say: Callable[[str], None] = print, precisions: tuple[str, ...] = ("bf16", "tf32", "fp32")) -> str:
    """Time every candidate on the current device, save the fastest in the table, return the architecture.

    fp16 takes what bf16 found: same element size, same instructions.
    """
    arch = launch.arch_of(torch.empty(0, device="cuda"))
    table = launch.table()
    entries = table.setdefault(arch, launch.table()[launch.table_arch(arch)])
    for shape in PRESETS.values():
        for precision in precisions:
            best: dict[str, tuple[float, LaunchConfig]] = {}
            with matmul_precision(precision):
                for config in candidates():
                    for item in _launches(arch, shape, precision, config):
                        time = _milliseconds(item)
                        if time is not None and time < best.get(item.name, (float("inf"),))[0]:
                            best[item.name] = (time, config)
            for kernel, (time, config) in sorted(best.items()):
                width = shape.row_width(kernel)
                with matmul_precision(precision):
                    key = launch.table_key(PRECISIONS[precision], width)
                entries.setdefault(kernel, {})[key] = launch.as_dict(config)
                if precision == "bf16":
                    entries[kernel][key.replace("bf16", "fp16")] = launch.as_dict(config)
                say(f"{arch} {shape.name} {precision} {kernel}: {1e3 * time:.1f} us with {config}")
    launch.save_table(table)
    return arch
