"""Tables for people: by rich on a terminal, where it is installed; aligned plain text elsewhere."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence


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
