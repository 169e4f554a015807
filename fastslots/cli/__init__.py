"""The command line. Exit codes: 0 done, 1 stopped on NaN, 2 bad input or usage, 130/143 after a signal."""

from __future__ import annotations

import argparse
import difflib
import io
import os
import sys
from collections.abc import Sequence

from fastslots import threads
from fastslots.errors import UserError, print_error


class Parser(argparse.ArgumentParser):
    """Errors in one line that names the flag and the nearest one that exists."""

    def error(self, message: str):
        raise UserError(message)

    def parse_known_args(self, args=None, namespace=None):
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown and self.prog.count(" "):  # a subcommand: its own flags are the candidates
            known = [option for action in self._actions for option in action.option_strings]
            flag = unknown[0].split("=")[0]
            near = difflib.get_close_matches(flag, known, 1)
            hint = f": did you mean {near[0]}?" if near else f": see `{self.prog} --help`"
            if flag.replace(".", "").isdigit():
                hint = ": a list is given with commas, as in --output_hidden 64,64"
            raise UserError(f"unknown argument {flag}{hint}")
        return namespace, unknown


def build_parser() -> argparse.ArgumentParser:
    from fastslots import __version__
    from fastslots.cli import bench, data, doctor, evaluate, explore, kernels, report, sweep, train

    parser = Parser(prog="fastslots", description="Train the Transformer VAE of Interaction Asymmetry, fast.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Parser)
    for module in (train, sweep, evaluate, data, report, explore, bench, kernels, doctor):
        module.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command -> exit code."""
    threads.prepare()  # before torch, which the commands import
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path that is printed may be no text
        sys.stdout.reconfigure(errors="surrogateescape")
    try:
        args = build_parser().parse_args(argv)
        code = args.run(args)
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
