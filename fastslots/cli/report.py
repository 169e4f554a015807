"""fastslots report"""

from __future__ import annotations

import argparse
from pathlib import Path

from fastslots.cli.common import Subparsers, add_allow_remote, add_code, code_named, progress_of
from fastslots.runs.folder import RunFolder


def add_parser(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "report", help="write report.html: curves, scores, slots and the slot explorer of a run"
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="one run, or several side by side")
    parser.add_argument("--out", type=Path, help="file to write (default: report.html in the first run)")
    parser.add_argument(
        "--no_explorer", "--no-explorer", action="store_true", help="decode no pictures: curves at once"
    )
    add_allow_remote(parser)
    add_code(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from fastslots.report.write import write_report

    for folder in args.runs:
        RunFolder(folder).check()
        if not args.no_explorer:
            code_named(args, RunFolder(folder))
    explorer, progress = not args.no_explorer, progress_of("images decoded")
    print(write_report(args.runs, args.out, explorer, progress, args.allow_remote, args.model))
    return 0
