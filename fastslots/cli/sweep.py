"""fastslots sweep"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastslots.cli.common import Parser, Subparsers, show_table
from fastslots.cli.evaluate import asked_by
from fastslots.cli.fields import DEFAULT_PRESET, add_fields, add_help
from fastslots.cli.train import add_preset, preset_of
from fastslots.errors import UserError


def add_parser(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "sweep",
        help="train every combination of some fields' values, with several seeds",
        description="Train every combination of the fields that are given a comma list (--alpha 0,0.05), with several "
        "seeds, and write one table and one plot a metric. The same command again keeps finished trials, resumes "
        f"interrupted ones and tries failed ones anew. Without PRESET: {DEFAULT_PRESET}.",
        usage="fastslots sweep [PRESET] --out FOLDER [--seeds N] [--FIELD VALUE,VALUE ...]",
        add_help=False,
    )
    add_preset(parser)
    add_help(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder of the sweep: a folder a trial, the tables")
    parser.add_argument("--seeds", type=int, help="seeds 0 .. N-1 (default 1); or name them with --seed 3,5,8")
    parser.add_argument("--jobs", type=int, default=1, help="trials at once, each with its share of the cores")
    parser.add_argument("--engine", choices=("local", "ray"), default="local", help="here, or on a Ray cluster's nodes")
    parser.add_argument("--trial_cpus", "--trial-cpus", type=float, default=1, help="of a trial, with --engine ray")
    parser.add_argument("--trial_gpus", "--trial-gpus", type=float, default=0, help="of a trial, with --engine ray")
    parser.add_argument(
        "--also",
        metavar="FIELD=VALUE,...",
        action="append",
        default=[],
        help="one more cell beside the combinations, e.g. --also encoder=slot-attention,alpha=0; may be repeated",
    )
    parser.add_argument(
        "--eval",
        dest="eval_arguments",
        metavar="ARGUMENTS",
        default="",
        help="also run `fastslots eval RUN ARGUMENTS` on each trial (its last weights) and table those scores, e.g. "
        "--eval='--split test'; else those of the run's last evaluation",
    )
    add_fields(parser, each=comma_list)
    parser.set_defaults(run=run)


def comma_list(field_type: str, convert: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """A converter of one value -> of several: at commas, or at semicolons where a value has commas itself."""
    separator = ";" if field_type.startswith("tuple") else ","

    def values(text: str) -> list[Any]:
        found = [convert(part.strip()) for part in text.split(separator) if part.strip()]
        if not found:
            raise argparse.ArgumentTypeError(f"{text!r} holds no value")
        return found

    return values


def cell_of(text: str) -> dict[str, Any]:
    """``field=value,field=value`` -> the values, converted; a part without "=" belongs to the value before it."""
    parts: list[str] = []
    for part in text.split(","):
        if "=" in part or not parts:
            parts.append(part)
        else:
            parts[-1] += f",{part}"
    parser = Parser(prog="fastslots sweep --also", add_help=False, allow_abbrev=False)
    add_fields(parser)
    values = {}
    if all("=" in part for part in parts):
        found = parser.parse_args([f"--{part.strip()}" for part in parts])
        values = {key.removeprefix("field_"): value for key, value in vars(found).items()}
    if not values or "seed" in values:
        raise UserError(f"--also {text!r}: expected FIELD=VALUE,... of fields other than seed")
    return values


def run(args: argparse.Namespace) -> int:
    given = {key.removeprefix("field_"): value for key, value in vars(args).items() if key.startswith("field_")}
    seeds = given.pop("seed", None)
    if seeds and args.seeds:
        raise UserError("give --seeds or --seed, not both")
    if (args.seeds is not None and args.seeds < 1) or args.jobs < 1:
        raise UserError("--seeds and --jobs must be at least 1")
    if args.trial_cpus <= 0 or args.trial_gpus < 0:
        raise UserError("--trial_cpus must be above 0, --trial_gpus at least 0")
    from fastslots.data.sources import check_named
    from fastslots.sweep.ray import run_on_ray
    from fastslots.sweep.tables import write_sweep
    from fastslots.sweep.trials import EVALUATED, Scoring, make_trials, run_trials

    try:
        arguments = tuple(shlex.split(args.eval_arguments))
    except ValueError as error:
        raise UserError(f"--eval {args.eval_arguments!r}: {str(error).lower()}") from None
    scoring = Scoring(arguments, asked_by(["RUN", *EVALUATED, *arguments])) if arguments else None
    varied = {name: values for name, values in given.items() if len(values) > 1}
    fixed = {name: values[0] for name, values in given.items() if len(values) == 1}
    also = [cell_of(text) for text in args.also]
    out = args.out.absolute()  # a Ray node has another working directory
    trials = make_trials(preset_of(args.preset), varied, fixed, seeds or range(args.seeds or 1), out, also)
    for trial in trials:
        check_named(trial.config)
    if args.engine != "ray":  # the cluster's nodes may have devices that this machine has not
        for config in {trial.config.device: trial.config for trial in trials}.values():
            config.torch_device()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {args.out}: {error.strerror}: name a folder that can be written") from None
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        if args.engine == "ray":
            say(f"{len(trials)} trials in {args.out}, on Ray")
            results = run_on_ray(trials, args.trial_cpus, args.trial_gpus, scoring, say)
        else:
            say(f"{len(trials)} trials in {args.out}, {args.jobs} at once")
            results = run_trials(trials, args.jobs, scoring, say)
    finally:
        signal.signal(signal.SIGTERM, before)
    rows = write_sweep(results, args.out)
    show_table(rows, keys=rows[0].index("trials") + 1)
    failures = [result for result in results if result.error]
    for result in failures:
        say(f"failed: {result.trial.name}: {result.error}")
    say(f"tables and plots: {args.out}/sweep.csv, sweep.json, *.svg")
    return 1 if failures else 0


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _terminated(*_: object) -> None:
    raise SystemExit(143)
