"""What was compiled, as rows, a markdown table and a roofline: machine code read, bytes and floors modelled."""

from __future__ import annotations

from typing import Any

import triton
from torch import Tensor

from ..gpu.launch import Launch, as_dict
from . import cost
from .compile import compile_launch
from .shipped import Shape
from .spills import spill_table

Row = dict[str, Any]


def compile_row(name: str, launch: Launch, arch: str, shape: Shape, precision: str) -> tuple[Row, dict[str, Any]]:
    """Compile one launch -> its row (JSON) and its code by kind."""
    compiled = compile_launch(launch, arch)
    model = cost.launch_cost(launch)
    row = {
        "kernel": name, "preset": shape.name, "precision": precision, "target": arch, "grid": list(launch.grid),
        "triton": triton.__version__,
        "config": as_dict(launch.config),
        "constexprs": dict(launch.constexprs),
        "arguments": {k: list(v.shape) if isinstance(v, Tensor) else v for k, v in launch.args.items()},
        "registers": compiled.registers, "spills": compiled.spills, "loop_spills": compiled.loop_spills,
        "stack_bytes": compiled.stack_bytes,
        "shared_bytes": compiled.shared_bytes, "occupancy": compiled.occupancy,
        "tensor_cores": compiled.tensor_cores, "atomics": compiled.atomics, "unwritten": compiled.unwritten,
        "global_loads": compiled.global_loads, "global_stores": compiled.global_stores,
        "tma_loads": compiled.tma_loads,
        "model": {
            "what": "not measured: each tensor moved once, every product once, at the published peaks of the device",
            "bytes": model.bytes, "bytes_requested": model.requested, "flops": model.flops,
            "flops_issued": model.issued,
            "floor_us": {
                d.name: round(d.floor_us(model.bytes, model.flops, precision), 1)
                for d in cost.DEVICES if d.arch == arch
            },
        },
    }  # fmt: skip
    return row, compiled.asm


def one_line(row: Row) -> str:
    cores = " ".join(f"{n} {op}" for op, n in row["tensor_cores"].items()) or "no tensor cores"
    inside = f" ({row['loop_spills']} inside loops)" if row["loop_spills"] else ""
    wrong = f", MISCOMPILED: {row['unwritten']} reads of registers that nothing wrote" if row["unwritten"] else ""
    return (
        f"{row['target']} {row['preset']} {row['precision']} {row['kernel']}: {row['registers']} registers, "
        f"{row['spills']} spills{inside}, {row['shared_bytes'] / 1024:.0f} KiB shared, {cores}{wrong}"
    )


def markdown(rows: list[Row]) -> str:
    """The table of compiled launches."""
    lines = [
        "# Compiled kernels",
        "",
        "Registers, local-memory instructions (spills), shared memory, occupancy and instruction counts are read",
        "from the machine code. MB, GFLOP and floors are a **model** (each tensor moved once, published peaks).",
        "",
        "| target | preset | product | kernel | rows x columns | warps | registers | spills | shared KiB | occupancy "
        "| tensor-core instructions | loads by width | MB | GFLOP | floor µs |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        config, model = row["config"], row["model"]
        occupancy = "" if row["occupancy"] is None else f"{row['occupancy']:.0%}"
        columns = next(row["constexprs"][key] for key in ("BLOCK_C", "KP", "BLOCK_M") if key in row["constexprs"])
        cells = [
            row["target"], row["preset"], row["precision"], row["kernel"], f"{config['block_l']} x {columns}",
            config["num_warps"], row["registers"], row["spills"], f"{row['shared_bytes'] / 1024:.0f}", occupancy,
            ", ".join(f"{n} {op}" for op, n in row["tensor_cores"].items()) or "none",
            ", ".join(f"{n} x {width}" for width, n in row["global_loads"].items()),
            f"{model['bytes'] / 1e6:.0f}", f"{model['flops'] / 1e9:.1f}",
            ", ".join(f"{us:g}" for us in model["floor_us"].values()),
        ]  # fmt: skip
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join([*lines, "", "## Local memory", "", *spill_table(rows), ""])
