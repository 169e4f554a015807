"""fastslots train"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from fastslots.cli.common import Subparsers, add_allow_remote, add_trust, trust_all
from fastslots.cli.fields import DEFAULT_PRESET, add_fields, add_help
from fastslots.config.code import check_trusted
from fastslots.config.presets import preset_names
from fastslots.config.run import TrainConfig, read_config
from fastslots.errors import UserError, print_error
from fastslots.runs.folder import RunFolder
from fastslots.runs.own_code import OwnCode

CONFIG_HELP = "fields from a run's config.json; what it leaves out is PRESET's, or without one a default of its own"
PRINT_HELP = "print the configuration as JSON, which --config takes, and train nothing"
RESTART_HELP = "with --resume: begin at step 0 where no checkpoint can be read, and set all aside"


def add_parser(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "train",
        help="train a model",
        description=f"Train a model. Without PRESET: {DEFAULT_PRESET}, on images made on the fly.",
        usage="fastslots train [PRESET] [--out FOLDER] [--FIELD VALUE ...]",
        add_help=False,
    )
    add_preset(parser)
    add_help(parser)
    parser.add_argument("--out", metavar="FOLDER", type=Path, help="of the run (default: the next free one in runs/)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out, or start it")
    parser.add_argument("--restart", action="store_true", help=RESTART_HELP)
    parser.add_argument("--config", type=Path, metavar="FILE", help=CONFIG_HELP)
    parser.add_argument("--print-config", "--print_config", action="store_true", help=PRINT_HELP)
    add_allow_remote(parser)
    add_trust(parser)
    add_fields(parser)
    parser.set_defaults(run=run)


def config_of(args: argparse.Namespace) -> TrainConfig:
    """Preset or --config (or the run that is resumed), then the explicit flags over it."""
    explicit = {key.removeprefix("field_"): value for key, value in vars(args).items() if key.startswith("field_")}
    resumed = RunFolder(args.out).config if args.out and args.resume else None
    preset = preset_of(args.preset)
    if args.config:
        return allowed(read_config(args.config, preset=args.preset, **explicit), args.config, args)
    if resumed is not None and resumed.is_file():
        config = read_config(resumed, **explicit)
        if args.preset and config.preset_name != args.preset:
            raise UserError(
                f"{resumed.parent} was not started from preset {args.preset!r}: leave the preset out to resume it"
            )
        return allowed(config, resumed, args)
    return TrainConfig.preset(preset, **explicit)


def allowed(config: TrainConfig, path: Path, args: argparse.Namespace) -> TrainConfig:
    """``config``, read from ``path``, unless its data lie at a URL, or its model in code, that only the file names:
    UserError."""
    from fastslots.data.packed.urls import check_allowed

    check_allowed(config.data, path, args.allow_remote or "field_data" in vars(args))
    if "field_model" not in vars(args) and not args.trust_code:
        check_trusted(config.model, path)
    return config


def stored_extras(folder: RunFolder, trusted: bool) -> dict[str, Any]:
    """The losses and metrics that Python code gave to the run that is resumed: UserError where a loss cannot be had."""
    own = OwnCode.read(folder)
    if trusted:
        trust_all(own)
    losses = own.load_losses(folder)
    metrics, reasons = own.load_metrics(folder)
    for reason in reasons:
        print(f"warning   {reason}", file=sys.stderr)
    return {"losses": losses, "metrics": metrics}


def add_preset(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("preset", metavar="PRESET", nargs="?", help=f"one of {', '.join(preset_names())}")


def preset_of(given: str | None) -> str:
    """The PRESET, where the second value of a list without commas (``--alpha 0 0.05``) ends up too: UserError."""
    if given and given not in preset_names() and given.replace(".", "").isdigit():
        raise UserError(f"unknown preset {given!r}: a list is given with commas, as in --output_hidden 64,64")
    return given or DEFAULT_PRESET


def run(args: argparse.Namespace) -> int:
    config = config_of(args)
    if args.print_config:
        print(config.to_json())
        return 0
    if args.resume and args.out is None:
        raise UserError("--resume needs --out, the folder of the run to go on with")
    if args.restart and not args.resume:
        raise UserError("--restart goes with --resume: without it a run begins at step 0 in a folder of its own")
    from fastslots.distributed import LostProcessError
    from fastslots.train import NonFiniteLossError, fit

    extras = stored_extras(RunFolder(args.out), args.trust_code) if args.resume else {}
    try:
        result = fit(config, out=args.out, resume=args.resume, restart=args.restart, **extras)
    except NonFiniteLossError as error:
        print(f"fastslots: stopped: {error}", file=sys.stderr)
        return 1
    except LostProcessError as error:
        # The way out of the interpreter takes seconds on a busy machine, and NCCL may wait there for the lost one.
        print_error(error)
        sys.stderr.flush()
        os._exit(2)
    if result.stopped_by:
        return 128 + result.stopped_by
    if result.first:
        print(f"{result.out}: {result.step:,} steps done; look at {result.out / 'report.html'}")
    return 0
