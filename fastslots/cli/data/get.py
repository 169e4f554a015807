"""fastslots data get: where published sets live, and fetching them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fastslots.cli.common import Subparsers
from fastslots.errors import UserError


def add_parser(actions: Subparsers) -> None:
    parser = actions.add_parser("get", help="say where a published set lives, fetch it and check it")
    parser.add_argument("name", nargs="?", metavar="NAME", help="without one: list the sets that are known")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for its files (default: data/NAME)")
    parser.add_argument("--from", dest="mirror", metavar="URL", help="fetch the files from this folder of a mirror")
    parser.add_argument("--dry-run", "--dry_run", action="store_true", help="say where it lives, fetch nothing")
    parser.set_defaults(run=_get)


def _get(args: argparse.Namespace) -> int:
    from fastslots.data.storage.fetch import fetch
    from fastslots.data.storage.published import PUBLISHED

    if not args.name:
        for name, known in PUBLISHED.items():
            print(f"{name:<16} {known.title}")
        return 0
    if args.name not in PUBLISHED:
        raise UserError(f"no set is known as {args.name!r}: there are {', '.join(PUBLISHED)}")
    published = PUBLISHED[args.name]
    print(published)
    if args.dry_run:
        return 0
    out = args.out or Path("data") / args.name
    for file in published.files:
        url = f"{args.mirror.rstrip('/')}/{file.name}" if args.mirror else file.url
        fetch(url, out / file.name, file.md5, _Progress(file.name))
    whole = out / published.files[0].name if len(published.files) == 1 else out
    print(f"{'fetched':<12} {whole}")
    _look(whole)
    print(f"{'train':<12} fastslots train {published.use} --data {whole}")
    return 0


def _look(path: Path) -> None:
    """Read its first scenes; of an archive nothing, which would be unpacked whole."""
    from fastslots.data.check import check
    from fastslots.data.storage.archives import is_archive

    first = path if path.is_file() else next(iter(sorted(p for p in path.iterdir() if p.is_file())))
    if is_archive(first):
        print(f"{'check':<12} fastslots data check {path}   (unpacks it first)")
    else:
        print(check(path, quick=True))


class _Progress:
    """A line that is written again and again on a terminal; elsewhere one for each tenth."""

    def __init__(self, name: str):
        self._name, self._tenth, self._live = name, 0, sys.stderr.isatty()

    def __call__(self, done: int, total: int) -> None:
        share = done / total if total else 0.0
        end = "\r" if self._live else "\n"
        if self._live or (total and int(10 * share) > self._tenth):
            self._tenth = int(10 * share)
            of = f" of {total / 1e9:,.2f} GB, {share:4.0%}" if total else " GB"
            print(f"{self._name}: {done / 1e9:,.2f}{of}", end=end, file=sys.stderr, flush=True)
