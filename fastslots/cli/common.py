"""What several commands do alike."""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeAlias

from fastslots.config.code import check_name, check_trusted, trust
from fastslots.errors import UserError
from fastslots.runs.folder import RunFolder
from fastslots.runs.own_code import OwnCode

Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""What a command's ``add_parser`` puts its parser into; argparse has no public name for it."""


class Parser(argparse.ArgumentParser):
    """Errors in one line that names the flag and the nearest one that exists."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    # argparse's signature is overloaded on the type of the namespace, which callers here never bring
    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown and self.prog.count(" "):  # a subcommand: its own flags are the candidates
            known = [option for action in self._actions for option in action.option_strings]
            flag = unknown[0].split("=")[0]
            near = difflib.get_close_matches(flag, known, 1)
            hint = f": did you mean {near[0]}?" if near else f": see `{self.prog} --help`"
            if flag.replace(".", "").isdigit():
                hint = ": a list is given with commas, as in --output_hidden 64,64"
            raise UserError(f"unknown argument {flag}{hint}")
        return parsed, unknown


RUN_HELP = "folder that `fastslots train --out` wrote, or the name of a model that ships (sprites-mini)"


def add_allow_remote(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allow-remote",
        "--allow_remote",
        action="store_true",
        help="open data at a URL that the configuration names, once; afterwards this machine knows the URL",
    )


def add_code(parser: argparse.ArgumentParser) -> None:
    """--model and --trust-code, of a command on a run; see ``code_named``."""
    parser.add_argument(
        "--model",
        metavar="PACKAGE.MODULE:BUILD",
        default="",
        help="what builds the run's model, where it has one of its own: build(config) gives a SlotVAE",
    )
    add_trust(parser)


def add_trust(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trust-code",
        "--trust_code",
        action="store_true",
        help="import the code that the run's files name (a model, losses, metrics); else only what you name yourself",
    )


def code_named(args: argparse.Namespace, folder: RunFolder) -> str:
    """What builds the run's model, "" for ours, once it is known to be trusted. UserError where it is not."""
    own = OwnCode.read(folder)
    if args.trust_code:
        trust_all(own)
    if args.model:
        check_name("--model", args.model)
        trust(args.model)
    name = args.model or own.model.name
    check_trusted(name, folder.path)
    return name


def trust_all(code: OwnCode) -> None:
    for name in code.names():
        trust(name)


def progress_of(what: str) -> Callable[[int, int], None]:
    """(done, total) -> one line on stderr that counts up, where that is a terminal."""

    def show(done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{done}/{total} {what}", end="" if done < total else "\n", file=sys.stderr, flush=True)

    return show


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of texts as columns, two blanks between them; the first row is the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def show_table(rows: Sequence[Sequence[str]], title: str = "", plain_head: bool = True) -> None:
    """Print a table on stdout; the first row is the head, the first column names the others.

    plain_head: False leaves the head out of plain text.
    """
    if not (sys.stdout.isatty() and importlib.util.find_spec("rich")):
        text = aligned(rows if plain_head else rows[1:])
        print(f"{title}\n{text}" if title else text)
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for place, head in enumerate(rows[0]):
        table.add_column(Text(head), justify="right" if place else "left", overflow="fold")
    for row in rows[1:]:
        table.add_row(*map(Text, row))
    Console(highlight=False).print(table)
