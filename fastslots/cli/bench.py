"""``fastslots bench``: time and memory against peers that were checked first, reports, comparisons."""

from __future__ import annotations

import argparse
import os
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from fastslots.cli.common import Subparsers
from fastslots.config.presets import preset_names
from fastslots.config.run import MOST_THREADS
from fastslots.errors import UserError

CASES = ("op", "block", "layer", "step", "jacobian", "loader", "map", "slots")
AXES = ("resolution", "slots", "batch", "heads", "threads")
RESULTS = Path("bench/results")
MEMORY_RESOLUTIONS = (64, 128, 256)


def add_parser(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "bench",
        help="time and memory against other ways to do the same",
        description="WHAT: "
        "op (attention and penalty), block (a decoder layer), layer (a decoder training step), step (a training step "
        "of the whole model), jacobian, loader, map (attention to 77 tokens with its map), slots (slot "
        "attention, three iterations), memory (of the decoder step, on a GPU of the whole one), scaling; "
        "or `report [FOLDER or FILE ...]` (tables and plots from rows), or `compare A B` (exit code 1 where ours "
        "became slower beyond noise).",
    )
    parser.add_argument("what", metavar="WHAT", nargs="*", help="what to measure (default: op layer step jacobian)")
    parser.add_argument("--preset", choices=preset_names(), help="sizes (default clevr6; jacobian: sprites)")
    parser.add_argument("--batch", type=_at_least(1), default=0, help="images (default: 4 on a CPU, 1 for jacobian)")
    parser.add_argument("--resolution", type=_at_least(1), help="pixels a side, in place of the preset's")
    parser.add_argument("--slots", type=_at_least(1), help="slots, in place of the preset's")
    parser.add_argument(
        "--threads", type=_at_least(1, MOST_THREADS), default=1, help="threads of torch on a CPU (default 1)"
    )
    parser.add_argument("--rounds", type=_at_least(1), default=5, help="interleaved rounds (default 5)")
    parser.add_argument("--tiny", action="store_true", help="16 pixels a side: that everything runs, not how fast")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU, if any")
    parser.add_argument("--precision", choices=("fp32", "tf32", "bf16"), default="fp32", help="of matrix products")
    parser.add_argument("--only", default="", metavar="A|B", help="providers whose names hold one of these")
    parser.add_argument("--skip", default="", metavar="A|B", help="leave out those whose names hold one of these")
    parser.add_argument("--axis", action="append", choices=AXES, help="of scaling (default: all; may be repeated)")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory (a process a provider)")
    parser.add_argument("--profile", action="store_true", help="also write profiles, kernel by kernel")
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"folder for rows (default {RESULTS})")
    parser.add_argument("--into", type=Path, default=Path("."), help="checkout whose tables `report` writes")
    parser.set_defaults(run=run)


def _at_least(least: int, most: float = float("inf")) -> Callable[[str], int]:
    def whole(text: str) -> int:
        if not text.isdigit() or not least <= int(text) <= most:
            limit = f" and at most {most}" if most < float("inf") else ""
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}{limit}, got {text!r}")
        return int(text)

    return whole


def run(args: argparse.Namespace) -> int:
    if args.what[:1] == ["report"]:
        return _report([Path(path) for path in args.what[1:]] or [args.out], args.into)
    if args.what[:1] == ["compare"]:
        return _compare([Path(path) for path in args.what[1:]])
    known = (*CASES, "memory", "scaling")
    wanted = args.what or ["op", "layer", "step", "jacobian"]
    for name in wanted:
        if name not in known:
            raise UserError(f"bench has no {name!r}: choose of {', '.join(known)}, or report, or compare")
    return _measure(wanted, args)


def _measure(wanted: list[str], args: argparse.Namespace) -> int:
    import torch

    from fastslots.bench import profile
    from fastslots.bench.case import Options
    from fastslots.bench.reporting import rows as files
    from fastslots.bench.reporting.tables import for_people
    from fastslots.bench.run import measure, memory_rows
    from fastslots.bench.scaling import sweep

    device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here: use --device cpu")
    if args.precision == "tf32" and device == "cpu":
        raise UserError("--precision tf32 is a GPU's: use fp32")

    def say(line: str) -> None:
        print(line, flush=True)

    failed = False
    for name in wanted:
        preset = args.preset or ("sprites" if name == "jacobian" else "clevr6")
        options = Options(
            preset=preset,
            batch=args.batch,
            threads=args.threads,
            rounds=args.rounds,
            tiny=args.tiny,
            device=device,
            precision=args.precision,
            memory=not args.no_memory,
            only=args.only,
            skip=args.skip,
            overrides={k: v for k, v in (("resolution", args.resolution), ("num_slots", args.slots)) if v},
        )
        slug = re.sub(r"[^a-z0-9]+", "-", files.device_name(device).lower()).strip("-")
        stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
        file = f"{name}-{preset}-{args.precision}-{slug}-{stamp}"
        write = partial(files.write, folder=args.out, name=file)
        if name == "scaling":
            axes = args.axis or list(AXES)
            measured = [row for axis in axes for row in sweep(axis, options, os.cpu_count() or 1, say)]
        elif name == "memory":
            sides = (args.resolution,) if args.resolution else (8, 16) if args.tiny else MEMORY_RESOLUTIONS
            measured = memory_rows(options, sides, say)
        else:
            measured = measure(name, options, say, write)
        if not measured:
            raise UserError(f"--only {args.only}: no provider of {name} has such a name")
        path = write(measured)
        say(for_people(measured))
        say(f"wrote {path}")
        if args.profile and name in ("layer", "step"):
            for written in profile.write(name, options, measured, path):
                say(f"wrote {written}")
        failed |= any(row.status == "wrong" for row in measured)
    return int(failed)


def _report(paths: list[Path], into: Path) -> int:
    from fastslots.bench.reporting import pages, rows

    for path in pages.write(rows.read(paths), into):
        print(f"wrote {path}")
    return 0


def _compare(paths: list[Path]) -> int:
    from fastslots.bench.reporting import compare, rows

    if len(paths) != 2:
        raise UserError(f"bench compare takes two files or folders of rows, got {len(paths)}")
    changes = compare.compare(*(rows.read([path]) for path in paths))
    if not changes:
        raise UserError(f"{paths[0]} and {paths[1]} have no setting in common: run the same command twice")
    print(compare.table(changes))
    return int(any(c.verdict == "slower" and c.provider.startswith("fastslots") for c in changes))
