"""The command line. Exit codes: 0 done, 1 stopped on NaN, 2 bad input or usage, 130/143 after a signal."""

from __future__ import annotations

import argparse
import io
import os
import sys
import warnings
from collections.abc import Sequence
from typing import TextIO

from fastslots import threads
from fastslots.cli.common import Parser
from fastslots.config.code import CodeWarning
from fastslots.errors import UserError, print_error


def build_parser() -> argparse.ArgumentParser:
    from fastslots import __version__
    from fastslots.cli import bench, data, doctor, evaluate, explore, kernels, report, sweep, train

    parser = Parser(prog="fastslots", description="Train the Transformer VAE of Interaction Asymmetry, fast.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Parser)
    for module in (train, sweep, evaluate, data, report, explore, bench, kernels, doctor):
        module.add_parser(commands)
    return parser


def _say_warnings() -> None:
    """Warnings of our own in a line each, as commands say them; others as Python does."""
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
    threads.prepare()  # before torch, which the commands import
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
    except BrokenPipeError:  # `fastslots ... | head`: what the interpreter flushes at its end must not raise once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
