"""fastslots report"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fastslots.errors import UserError


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "report", help="write report.html: curves, scores, slots and the slot explorer of a run"
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="one run, or several side by side")
    parser.add_argument("--out", type=Path, help="file to write (default: report.html in the first run)")
    parser.add_argument(
        "--no_explorer", "--no-explorer", action="store_true", help="decode no pictures: curves at once"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    for folder in args.runs:
        if not (folder / "config.json").is_file():
            raise UserError(
                f"{folder} is no run directory (no config.json in it): name what `fastslots train --out` wrote"
            )
    from fastslots.train.report import write_report

    def progress(done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{done}/{total} images decoded", end="" if done < total else "\n", file=sys.stderr, flush=True)

    print(write_report(args.runs, args.out, explorer=not args.no_explorer, progress=progress))
    return 0
