"""``fastslots kernels``: compile the Triton kernels for a GPU that is not there, report, and tune on one that is."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from fastslots.cli.common import Subparsers
from fastslots.errors import UserError

TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
MODELLED = ("sm_80", "sm_90", "sm_100")
"""Architectures for which the step's model has a device: A100, H100, B200."""


def add_parser(commands: Subparsers) -> None:
    parser = commands.add_parser("kernels", help="compile, report on and tune the Triton kernels")
    actions = parser.add_subparsers(dest="kernels_command", metavar="ACTION", required=True)

    compile_ = actions.add_parser("compile", help="compile every shipped launch, without a GPU")
    compile_.add_argument("--target", choices=TARGETS, required=True, help="architecture to compile for")
    compile_.add_argument("--out", type=Path, required=True, help="machine code, PTX and JSON go to OUT/TARGET")
    compile_.add_argument(
        "--all", action="store_true", help="every preset, shapes of other models and fp16 too, not clevr6 alone"
    )
    compile_.set_defaults(run=_compile)

    report = actions.add_parser(
        "report", help="model of a whole training step (--preset), or table and roofline of what `compile` wrote (DIR)"
    )
    report.add_argument("dir", type=Path, nargs="?", help="the folder given to `compile`")
    report.add_argument("--out", type=Path, help="folder for report.md and roofline-*.svg (default: DIR)")
    report.add_argument("--preset", help="model one training step of this preset, by machine code; nothing is run")
    report.add_argument("--batch", type=int, help="images of the step (default: the preset's)")
    report.add_argument("--precision", choices=("bf16", "fp16", "tf32", "fp32"), default="bf16")
    report.add_argument("--target", choices=MODELLED, default="sm_90", help="architecture (default: %(default)s)")
    report.add_argument("--json", action="store_true", help="the step as JSON")
    report.set_defaults(run=_report)

    tune = actions.add_parser("tune", help="time the candidates on this GPU and rewrite the launch table")
    tune.add_argument("--preset", action="append", help="only the entries of this preset (may be repeated)")
    tune.add_argument("--precision", action="append", choices=("bf16", "tf32", "fp32"), help="only these products")
    tune.add_argument("--dry", action="store_true", help="say what would be timed; needs no GPU, writes nothing")
    tune.add_argument("--target", choices=TARGETS, default="sm_90", help="architecture of --dry (default: %(default)s)")
    tune.set_defaults(run=_tune)


def _compile(args: argparse.Namespace) -> int:
    _need_triton()
    from fastslots.kernels.gpu import _tiles
    from fastslots.kernels.tools import shipped
    from fastslots.kernels.tools import tables as report

    if _tiles.INTERPRETED.value:
        raise UserError("TRITON_INTERPRET is set, so there is nothing to compile: unset it")
    presets = shipped.SHAPES.values() if args.all else [shipped.PRESETS["clevr6"]]
    precisions = list(shipped.PRECISIONS) if args.all else ["bf16", "tf32", "fp32"]
    if args.target == "gfx942":  # CDNA3 has no TF32 products that Triton would emit
        precisions.remove("tf32")
    out = args.out / args.target
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {args.out}: {error.strerror}: name a folder that can be written") from None
    rows = []
    for shape in presets:
        for precision in precisions:
            for name, launch in shipped.record_shipped(args.target, shape, precision):
                row, asm = report.compile_row(name, launch, args.target, shape, precision)
                stem = out / f"{shape.name}-{precision}-{name}"
                for kind in ("cubin", "ptx", "hsaco", "amdgcn"):
                    code = asm.get(kind)
                    if code is not None:
                        stem.with_suffix(f".{kind}").write_bytes(code if isinstance(code, bytes) else code.encode())
                stem.with_suffix(".json").write_text(json.dumps(row, indent=1) + "\n")
                rows.append(row)
                print(report.one_line(row), flush=True)
    spilled = [row for row in rows if row["spills"] or row["stack_bytes"]]
    names = [
        f"{row['precision']} {row['kernel']}" for row in spilled if row["loop_spills"] or row["loop_spills"] is None
    ]
    inside = f", inside loops: {', '.join(names)}" if names else ", none inside a loop"
    print(f"{len(rows)} launches in {out}; {len(spilled)} use local memory" + (inside if spilled else ""))
    return 0


def _step_report(args: argparse.Namespace) -> int:
    from fastslots.bench.gpu_step.report import preset_report
    from fastslots.config.presets import PRESETS
    from fastslots.kernels.gpu import _tiles

    if args.preset not in PRESETS:
        raise UserError(f"--preset {args.preset}: there is {', '.join(PRESETS)}")
    if args.batch is not None and args.batch < 1:
        raise UserError(f"--batch {args.batch}: give at least 1")
    if _tiles.INTERPRETED.value:
        raise UserError("TRITON_INTERPRET is set, so there is no machine code to read: unset it")
    batch = args.batch or PRESETS[args.preset]["batch_size"]
    report = preset_report(args.preset, batch, args.precision, args.target)
    print(report.as_json() if args.json else report.as_text())
    return 0


def _report(args: argparse.Namespace) -> int:
    _need_triton()
    if args.preset is not None:
        return _step_report(args)
    if args.dir is None:
        raise UserError("name a preset (--preset clevr6) or the folder that `fastslots kernels compile` wrote")
    from fastslots.kernels.tools import roofline
    from fastslots.kernels.tools import tables as report

    files = sorted(args.dir.rglob("*.json")) if args.dir.is_dir() else []
    rows = [row for row in (json.loads(file.read_text()) for file in files) if "tensor_cores" in row]
    if not rows:
        raise UserError(f"{args.dir} holds no compiled kernels: run `fastslots kernels compile --out {args.dir}` first")
    out = args.out or args.dir
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.md").write_text(report.markdown(rows))
    for arch in sorted({row["target"] for row in rows}):
        svg = roofline.roofline_svg(rows, arch)
        if svg is not None:
            (out / f"roofline-{arch}.svg").write_text(svg)
    print(f"wrote {out / 'report.md'} ({len(rows)} launches)")
    return 0


def _tune(args: argparse.Namespace) -> int:
    import torch

    if not args.dry and not torch.cuda.is_available():
        raise UserError(
            "`fastslots kernels tune` times kernels on a GPU, and torch sees none here: run it on a GPU, or add --dry"
        )
    _need_triton()
    from fastslots.kernels.gpu import launch
    from fastslots.kernels.tools import shipped, tune

    presets = args.preset or list(shipped.SHAPES)
    unknown = [name for name in presets if name not in shipped.SHAPES]
    if unknown:
        raise UserError(f"--preset {unknown[0]}: there is {', '.join(shipped.SHAPES)}")
    precisions = args.precision or ["bf16", "tf32", "fp32"]

    def say(line: str) -> None:
        print(line, flush=True)

    if args.dry:
        tune.plan(say, presets, precisions, args.target)
        return 0
    arch = tune.tune(say, presets, precisions)
    print(f"rewrote the {arch} entries of {launch.TABLE}")
    return 0


def _need_triton() -> None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise UserError(f"triton can't be imported ({error}): install it (it is made for Linux)") from None
