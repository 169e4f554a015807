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
from fastslots.runs.pretrained import shipped_names

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
            if flag == "--preset" and any(action.dest == "preset" for action in self._actions):
                meant = unknown[0].partition("=")[2] or (unknown[1:] or [parsed.preset or "clevr6"])[0]
                hint = f": the preset has no flag: `{self.prog} {meant}`"
            raise UserError(f"unknown argument {flag}{hint}")
        return parsed, unknown


RUN_HELP = (
    f"folder that `fastslots train --out` wrote, or the name of a model that ships ({', '.join(shipped_names())})"
)


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


Rows: TypeAlias = Sequence[Sequence[str]]
Columns: TypeAlias = list[tuple[int, int]]
"""Of a table: the number of each in the rows, and its width."""
CAPS = (1 << 30, 24, 12)
"""Columns at which long texts are folded, the widest first, until a table fits."""
SHORT = 16  # characters of a text that is never folded: 0.8686 ± 0.0123
EDGE, BETWEEN = 2, 3  # blanks that rich puts around a table, and between its columns


def show_table(rows: Rows, title: str = "", plain_head: bool = True, keys: int = 1) -> None:
    """Print a table; the first row is the head.

    keys: columns that name the rows. Where not all of the others fit beside them, they follow in tables of their own.
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

    console = Console(highlight=False)
    for number, columns in enumerate(blocks(rows, console.width, keys)):
        table = Table(
            title=(title or None) if not number else None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
        )
        for place, (column, width) in enumerate(columns):
            head = Text(rows[0][column])
            table.add_column(head, justify="right" if place >= keys else "left", overflow="fold", width=width)
        for row in rows[1:]:
            table.add_row(*(Text(row[column]) for column, _ in columns))
        console.print(table)


def blocks(rows: Rows, width: int, keys: int = 1) -> list[Columns]:
    """The columns of each table, the first ``keys`` of ``rows`` in all of them: as few tables as fit into ``width``,
    then as wide columns as these allow."""
    found = [_blocks(rows, width, keys, cap) for cap in CAPS]
    fitting = [tables for tables in found if all(_wide(columns) <= width for columns in tables)]
    return min(fitting or found[-1:], key=len)


def _blocks(rows: Rows, width: int, keys: int, cap: int) -> list[Columns]:
    lengths = [[len(row[i]) for row in rows] for i in range(len(rows[0]))]
    widths = [max(n if n <= SHORT else min(n, cap) for n in column) for column in lengths]
    columns = list(enumerate(widths))
    tables = [columns[:keys]]
    for column in columns[keys:]:
        if len(tables[-1]) > keys and _wide([*tables[-1], column]) > width:
            tables.append(columns[:keys])
        tables[-1] = [*tables[-1], column]
    return tables


def _wide(columns: Columns) -> int:
    return EDGE + sum(width for _, width in columns) + BETWEEN * (len(columns) - 1)


def aligned(rows: Rows) -> str:
    """Rows of texts as columns, two blanks between them; the first row is the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)
