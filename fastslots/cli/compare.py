"""fastslots compare"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from fastslots.cli.common import Subparsers, show_table
from fastslots.errors import UserError
from fastslots.runs.folder import RunFolder

PAGE = Path("compare.html")


def add_parser(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "compare",
        help="several runs beside each other: differing fields, scores, curves",
        description="Print the fields in which runs differ and their scores, and write a page with their curves over "
        "each other. Scores are what `fastslots eval` has measured of all of them alike (test before val, many images "
        "before few), or else those of each run's own last evaluation.",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="folders that `fastslots train` wrote")
    parser.add_argument("--split", choices=("val", "test"), default="", help="only evaluations of this split")
    parser.add_argument("--latent", choices=("mean", "sample"), default="", help="only evaluations with this z")
    parser.add_argument("--out", type=Path, help=f"the page (default: {PAGE} here; with --json none)")
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the table")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if len(args.runs) < 2:
        raise UserError("compare takes two runs or more")
    from fastslots.sweep.compare import compare, groups_table, table, write_page
    from fastslots.sweep.trials import show

    folders = [RunFolder(path) for path in args.runs]
    comparison = compare(folders, args.split, args.latent)
    if args.json:
        print(json.dumps(asdict(comparison), allow_nan=False))
    else:
        show_table(table(comparison, show), f"scores on {comparison.kind}")
        if comparison.groups:
            groups = groups_table(comparison, show)
            show_table(groups, "\nby setting, over seeds", keys=groups[0].index("runs") + 1)
    for note in comparison.notes:
        print(f"note      {note}", file=sys.stderr)
    if args.out or not args.json:
        write_page(folders, comparison, args.out or PAGE)
        print(f"page      {args.out or PAGE}", file=sys.stderr)
    return 0
