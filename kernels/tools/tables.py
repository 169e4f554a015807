"""What was compiled, as rows, a markdown table and a roofline: machine code read, bytes and floors modelled."""

from __future__ import annotations

from typing import Any

import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..gpu.launch import Launch, as_dict, record
from . import cost
from .compile import compile_launch
from .shipped import PRECISIONS, PRESETS, Shape, inputs, matmul_precision, run_op
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
        "tensor_cores": compiled.tensor_cores, "atomics": compiled.atomics,
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
    return (
        f"{row['target']} {row['preset']} {row['precision']} {row['kernel']}: {row['registers']} registers, "
        f"{row['spills']} spills{inside}, {row['shared_bytes'] / 1024:.0f} KiB shared, {cores}"
    )


def markdown(rows: list[Row]) -> str:
    """The table of compiled launches, then the floors of a training step."""
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
    return "\n".join([*lines, "", "## Local memory", "", *spill_table(rows), "", *step_floors(), ""])


def step_floors(preset: str = "clevr6", layers: int = 2, encoder_layers: int = 5) -> list[str]:
    """Bytes, FLOPs and floors of one training step by method: the decoder's Transformer and the encoder's tokens."""
    shape = PRESETS[preset]
    return [
        f"## The {preset} decoder Transformer, one training step (model)",
        "",
        f"{layers} layers, forward and backward, B = {shape.B}, {shape.L} pixels. Published and folded: every",
        "operation of eager PyTorch reads and writes its tensors. Fused: the launches, and what torch does around them",
        "(packing, sums of partials). A floor is the longer of bytes at the published bandwidth and FLOPs at the peak.",
        "",
        *_floor_table(step_costs(shape, layers)),
        "",
        f"## The {preset} encoder's cross-attention, one training step (model)",
        "",
        f"{encoder_layers} layers, forward and backward, B = {shape.B}, {shape.T} tokens of {shape.S}: what is done to",
        f"every token. Published: each layer norms and projects them. Folded and fused: normed once, {shape.M} rows",
        "attend to them.",
        "",
        *_floor_table(encoder_costs(shape, encoder_layers)),
    ]


Method = tuple[str, float, float, str]
"""Label, bytes, FLOPs, kind of product."""


def _floor_table(methods: list[Method]) -> list[str]:
    lines = [
        "| method | GB | GFLOP | " + " | ".join(f"{d.name} ms" for d in cost.DEVICES) + " |",
        "|---|---|---|" + "---|" * len(cost.DEVICES),
    ]
    for label, bytes_, flops, precision in methods:
        floors = " | ".join(f"{d.floor_us(bytes_, flops, precision) / 1e3:.2f}" for d in cost.DEVICES)
        lines.append(f"| {label} | {bytes_ / 1e9:.2f} | {flops / 1e9:.0f} | {floors} |")
    return lines


EAGER = (("published", 4, "fp32"), ("published", 2, "bf16"), ("folded", 2, "bf16"))
FUSED = ("fp32", "tf32", "bf16")


def step_costs(shape: Shape, layers: int) -> list[Method]:
    """One training step of the decoder's layers; the first has the same queries for every image."""
    out: list[Method] = []
    for method, element, precision in EAGER:
        layer = cost.eager_ops(method, shape.D, shape.F, shape.H, shape.d, shape.K)
        bytes_, flops = cost.eager_cost(layer, shape.B * shape.L, element)
        out.append((f"{method}, {precision}", layers * bytes_, layers * flops, precision))
    for precision in FUSED:
        costs = [_recorded_cost("decoder_layer", shape, precision, shared=layer == 0) for layer in range(layers)]
        out.append((f"fused, {precision}", sum(c[0] for c in costs), sum(c[1] for c in costs), precision))
    return out


def encoder_costs(shape: Shape, layers: int) -> list[Method]:
    """One training step of the encoder's cross-attentions, the tokens' side. The norm before the first is in all."""
    sizes = (shape.B * shape.T, shape.S, shape.M, shape.K, layers)
    out: list[Method] = []
    for method, element, precision in EAGER:
        out.append((f"{method}, {precision}", *cost.eager_token_cost(method, *sizes, element), precision))
    for precision in FUSED:
        bytes_, flops = _recorded_cost("token_attention", shape, precision)
        norm = cost.eager_token_cost("folded", *sizes[:4], 0, PRECISIONS[precision].itemsize)
        out.append((f"fused, {precision}", layers * bytes_ + norm[0], layers * flops + norm[1], precision))
    return out


class _Traffic(TorchDispatchMode):
    """Bytes that torch's own operations inside read and write: packing of weights, sums of partials, bias gradients."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not is_view and "empty" not in func.name():
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
            self.bytes += sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())
        return out


def _recorded_cost(op: str, shape: Shape, precision: str, shared: bool = False) -> tuple[int, int]:
    """Bytes and FLOPs of one op, forward and backward: its launches, and the bytes of what torch does around them."""
    tensors = inputs(shape, PRECISIONS[precision], shared=shared)
    with matmul_precision(precision), record("sm_90") as launches, _Traffic() as around:
        run_op(op, tensors)
    costs = [cost.launch_cost(item) for item in launches]
    return sum(c.bytes for c in costs) + around.bytes, sum(c.flops for c in costs)
