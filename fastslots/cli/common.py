"""What several commands do alike."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from fastslots.data.packed.urls import ALLOW_HELP


def add_allow_remote(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--allow-remote", "--allow_remote", action="store_true", help=ALLOW_HELP)


def progress_of(what: str) -> Callable[[int, int], None]:
    """(done, total) -> one line on stderr that counts up, where that is a terminal."""

    def show(done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{done}/{total} {what}", end="" if done < total else "\n", file=sys.stderr, flush=True)

    return show
