"""fastslots eval"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastslots.cli.common import (
    RUN_HELP,
    Parser,
    Subparsers,
    add_allow_remote,
    add_code,
    code_named,
    progress_of,
    show_table,
)
from fastslots.errors import UserError
from fastslots.runs.folder import RunFolder
from fastslots.runs.own_code import OwnCode

if TYPE_CHECKING:
    from fastslots.evaluation.of_run import Asked

NO_HOLDOUT = "the run held no combination out: train with --holdout shape=square,hue=0.5:0.75, say"


def add_parser(commands: Subparsers) -> None:
    parser = commands.add_parser("eval", help="score a trained run on held-out images")
    _add_flags(parser)
    parser.set_defaults(run=run)


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="RUN", type=Path, help=RUN_HELP)
    parser.add_argument("--data", help="another data set (default: the run's own)")
    add_allow_remote(parser)
    parser.add_argument("--split", choices=("val", "test"), default="val", help="default: val")
    parser.add_argument(
        "--ignore_label",
        "--ignore-label",
        type=int,
        help="mask label of pixels that are not scored (default: the run's)",
    )
    parser.add_argument("--objects", metavar="A-B", default="", help="of built-in scenes: with so many objects instead")
    parser.add_argument(
        "--slots", type=int, help="with another number of slots than was trained (queries seeded or sampled)"
    )
    parser.add_argument("--latent", choices=("mean", "sample"), default="mean", help="z: its mean, or drawn")
    parser.add_argument("--weights", choices=("best", "last"), default="best", help="default: best")
    parser.add_argument("--images", type=int, default=0, help="how many (0, the default: all of the split)")
    parser.add_argument("--batch_size", "--batch-size", type=int, help="images at once (default: 10)")
    parser.add_argument(
        "--score-mode",
        "--score_mode",
        choices=("pooled", "paper"),
        default="pooled",
        help="J-ARI and JIS over all images (pooled, the default), or as published (paper): the mean of batches' "
        "values, on val of the first 12 images of batches of 50, on test of batches of 10",
    )
    parser.add_argument(
        "--interaction-order",
        "--interaction_order",
        action="store_true",
        help="also second derivatives across slots against those within, on at most 32 images",
    )
    parser.add_argument(
        "--attributes", action="store_true", help="also R² and accuracy of probes from slots to the data's factors"
    )
    parser.add_argument(
        "--recombination", action="store_true", help="also the error of encoding decoded and recombined slots again"
    )
    parser.add_argument(
        "--composition",
        action="store_true",
        help="also scores of test images with and without the combination that the run's --holdout kept from it",
    )
    parser.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda:1 (default: auto)")
    parser.add_argument("--threads", type=int, default=0, help="threads of torch on a CPU (default 0: torch's own)")
    add_code(parser)
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object (null: a score that needs masks, or a slot map)"
    )


def run(args: argparse.Namespace) -> int:
    _check_numbers(args)
    import torch

    from fastslots.data.packed.urls import check_allowed
    from fastslots.data.sources import open_source
    from fastslots.distributed import Group
    from fastslots.evaluation.kept import keep_evaluation
    from fastslots.evaluation.of_run import score
    from fastslots.evaluation.preconditions import check_evaluation
    from fastslots.models import SlotVAE
    from fastslots.runs.pretrained import hidden_by, is_shipped, run_folder
    from fastslots.train.step import Precision

    asked = asked_of(args)
    folder = RunFolder(run_folder(args.run_folder))
    path = folder.weights(asked.weights)
    recorded = folder.read_config(device=args.device)
    if asked.composition and not recorded.holdout:
        raise UserError(NO_HOLDOUT)
    config = replace(recorded, data=args.data, objects="") if args.data else recorded
    if args.ignore_label is not None:
        config = replace(config, ignore_label=args.ignore_label)
    if args.objects:
        config = replace(config, objects=args.objects)
    check_allowed(config.data, folder.config, args.allow_remote or bool(args.data))
    device = recorded.torch_device()
    Precision("fp32", device)  # on a GPU torch would take TF32 in convolutions
    named = code_named(args, folder)
    if args.threads:
        torch.set_num_threads(args.threads)
    with contextlib.ExitStack() as stack:
        group = Group.join(device)
        stack.callback(group.leave)
        model = SlotVAE.from_file(path, named or None, args.trust_code)
        if args.slots is not None:
            model = model.with_slots(args.slots)
        model.to(group.device(device))
        metrics, left_out = OwnCode.read(folder).load_metrics(folder)
        source = open_source(config, few=True)
        split = source.splits[asked.split][: asked.images or None]
        weights = folder.which_weights(path)
        notes = [hidden_by(folder.path), *source.warnings, *left_out]
        if weights != asked.weights and not is_shipped(folder.path):
            notes.append(f"no evaluation has been, so there are no best weights yet: scoring the {weights} ones")
        if group.first:
            say(f"data      {source.description}")
            for note in filter(None, notes):
                say(f"warning   {note}")
        check_evaluation(asked, config, split, model, metrics)
        progress = progress_of("images") if group.first else None
        scores = score(asked, model, config, split, metrics, group, progress)
        group.barrier()
    group.close()
    if not group.first:
        return 0
    scores |= {"split": asked.split, "weights": weights, "data": config.data, "split_note": source.split_note}
    scores |= {"ignore_label": split.ignore_label} if split.ignore_label is not None else {}
    scores |= {"objects": args.objects} if args.objects else {}
    scores |= {"num_slots": args.slots} if args.slots is not None else {}
    own = config.resolved().data == recorded.resolved().data
    scores["evaluated_on_training_images"] = own and source.on_training_images(asked.split)
    scores["fingerprint"] = source.digest
    if not is_shipped(folder.path):
        try:
            keep_evaluation(folder, scores, asked, path)
        except (UserError, OSError) as error:
            say(f"warning   {error}; the scores are not kept in the run")
    if args.json:
        print(json.dumps(scores))
    else:
        show_table(rows_of(scores), plain_head=False)
    return 0


def _check_numbers(args: argparse.Namespace) -> None:
    if args.threads < 0:
        raise UserError("--threads must be at least 0")
    if args.images < 0 or (args.batch_size is not None and args.batch_size < 1):
        raise UserError("--images must be at least 0 and --batch_size at least 1")


def asked_of(args: argparse.Namespace) -> Asked:
    """What the flags of ``eval`` ask for."""
    from fastslots.evaluation.of_run import Asked

    values = {field.name: getattr(args, field.name, None) for field in fields(Asked)}
    return Asked(**{name: value for name, value in values.items() if value is not None})


def asked_by(arguments: list[str]) -> Asked:
    """The same of a command line of ``eval``. UserError where it is none."""
    parser = Parser(prog="fastslots eval")
    _add_flags(parser)
    args = parser.parse_args(arguments)
    _check_numbers(args)
    return asked_of(args)


def rows_of(scores: dict[str, Any]) -> list[list[str]]:
    """A row a score, after the head."""
    from fastslots.evaluation.evaluate import WITH_MASKS

    lacks = "a slot map" if scores["images_with_masks"] else "masks"
    rows = [["score", "value"]]
    for name, value in scores.items():
        if value is None:
            needs = "two slots" if name == "jis" and scores["j_ari"] is not None else lacks
            value = f"none: it needs {needs}" if name in WITH_MASKS else "none: it is no finite number"
        rows.append([name, f"{value:.5g}" if isinstance(value, float) else str(value)])
    return rows


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
