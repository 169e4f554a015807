"""The command line. Exit codes: 0 done, 1 stopped on NaN, 2 bad input or usage, 129/130/143 after a signal."""

from __future__ import annotations

import argparse
import errno
import io
import os
import sys
import warnings
from collections.abc import Sequence
from typing import TextIO

from fastslots import threads
from fastslots.errors import UserError, first_line, is_out_of_memory, print_error

OUT_OF_MEMORY = (
    "out of memory: lower --batch_size, --eval_batch or --resolution, or end other programs; a run's checkpoints are "
    "kept, and --resume goes on from the newest"
)
NEEDED = ("torch", "numpy", "scipy", "PIL", "safetensors", "fsspec")
"""Imported when a command runs, never before: a help and a wrong flag answer at once."""


def build_parser() -> argparse.ArgumentParser:
    from fastslots import __version__
    from fastslots.cli import bench, compare, data, doctor, evaluate, explore, kernels, report, sweep, train
    from fastslots.cli.common import Parser

    parser = Parser(prog="fastslots", description="Train the Transformer VAE of Interaction Asymmetry, fast.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Parser)
    for module in (train, sweep, evaluate, data, report, compare, explore, bench, kernels, doctor):
        module.add_parser(commands)
    return parser


def _say_warnings() -> None:
    """Warnings of our own in a line each, as commands say them; others as Python does."""
    from fastslots.config.code import CodeWarning

    warnings.simplefilter("always", CodeWarning)
    python = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, CodeWarning):
            print(f"warning   {message}", file=sys.stderr, flush=True)
        else:
            python(message, category, filename, lineno, file, line)

    warnings.showwarning = show


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command -> exit code."""
    on_terminal = sys.stdout is not None and sys.stdout.isatty()
    threads.prepare()  # before torch, which commands import as they run
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path that is printed may be no text
        sys.stdout.reconfigure(errors="surrogateescape")
    try:
        args = build_parser().parse_args(argv)
        with warnings.catch_warnings():
            _say_warnings()
            code: int = args.run(args)
        sys.stdout.flush()  # here, where a reader that has gone is no error
        return code
    except UserError as error:
        print_error(error)
        return 2
    except KeyboardInterrupt:
        return 130
    except ImportError as error:
        if (error.name or "").split(".")[0] not in NEEDED:  # a bug, whose place is to be seen
            raise
        mend = "pip install fastslots (in a checkout: pip install -c constraints.txt .) brings what it needs"
        print_error(UserError(f"can't start with {sys.executable}: {error}: {mend}"))
        return 2
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print_error(UserError(f"{OUT_OF_MEMORY} ({first_line(error)[:200]})"))
        return 2
    except OSError as error:
        gone = isinstance(error, BrokenPipeError)  # `fastslots ... | head`
        if not gone and not (error.errno == errno.EIO and on_terminal and not sys.stdout.isatty()):  # a closed window
            raise
        # What the interpreter flushes at its end must not raise once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
