"""fastslots eval"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

from fastslots.cli.common import RUN_HELP, Subparsers, add_allow_remote, add_code, code_named, progress_of
from fastslots.errors import UserError
from fastslots.runs.folder import RunFolder
from fastslots.runs.own_code import OwnCode


def add_parser(commands: Subparsers) -> None:
    parser = commands.add_parser("eval", help="score a trained run on held-out images")
    parser.add_argument("run_folder", metavar="RUN", type=Path, help=RUN_HELP)
    parser.add_argument("--data", help="another data set (default: the run's own)")
    add_allow_remote(parser)
    parser.add_argument("--split", choices=("val", "test"), default="val", help="default: val")
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
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.threads < 0:
        raise UserError("--threads must be at least 0")
    if args.images < 0 or (args.batch_size is not None and args.batch_size < 1):
        raise UserError("--images must be at least 0 and --batch_size at least 1")
    import torch

    from fastslots.data.packed.urls import check_allowed
    from fastslots.data.sources import open_source
    from fastslots.evaluation import analyses
    from fastslots.evaluation.evaluate import PAPER, WITH_MASKS, Scoring, evaluate
    from fastslots.evaluation.kept import keep_evaluation
    from fastslots.models import SlotVAE
    from fastslots.runs.pretrained import hidden_by, is_shipped, run_folder

    folder = RunFolder(run_folder(args.run_folder))
    path = folder.weights(args.weights)
    named = code_named(args, folder)
    model, weights = SlotVAE.from_file(path, named or None, args.trust_code), folder.which_weights(path)
    if args.slots is not None:
        model = model.with_slots(args.slots)
    metrics, left_out = OwnCode.read(folder).load_metrics(folder)
    recorded = folder.read_config(device=args.device)
    device = recorded.torch_device()
    if args.threads:
        torch.set_num_threads(args.threads)
    if note := hidden_by(folder.path):
        say(f"warning   {note}")
    config = replace(recorded, data=args.data, objects="") if args.data else recorded
    if args.objects:
        config = replace(config, objects=args.objects)
    check_allowed(config.data, folder.config, args.allow_remote or bool(args.data))
    source = open_source(config, few=True)
    split = source.splits[args.split][: args.images or None]
    say(f"data      {source.description}")
    for warning in source.warnings:
        say(f"warning   {warning}")
    for reason in left_out:
        say(f"warning   {reason}")
    if weights != args.weights and not is_shipped(folder.path):
        say(f"warning   no evaluation has been, so there are no {args.weights} weights yet: scoring the {weights} ones")
    model.to(device)
    paper_batch, counted = PAPER[args.split] if args.score_mode == "paper" else (0, 0)
    batch = args.batch_size or paper_batch or 10
    scoring = Scoring(args.latent, config.seed, args.score_mode, counted, metrics)
    scores = evaluate(model, split, batch, scoring, progress=progress_of("images")).scores()
    scores |= {name: None for name in WITH_MASKS if name not in scores}
    if args.interaction_order:
        scores |= analyses.order_scores(model, split, args.batch_size or 10)
    if args.attributes:
        scores |= analyses.attribute_scores(model, split, args.batch_size or 10)
    if args.recombination:
        scores |= analyses.recombination_scores(model, split, args.batch_size or 10)
    if args.composition:
        scores |= analyses.composition_scores(model, config, args.images, args.batch_size or 10)
    if counted:
        first = f", the first {counted} of each" if counted < batch else ""
        scores |= {"score_mode": "paper", "score_batches": f"J-ARI and JIS: means over batches of {batch}{first}"}
    scores |= {"split": args.split, "weights": weights, "data": config.data, "split_note": source.split_note}
    scores |= {"objects": args.objects} if args.objects else {}
    scores |= {"num_slots": args.slots} if args.slots is not None else {}
    own = config.resolved().data == recorded.resolved().data
    scores["evaluated_on_training_images"] = own and source.on_training_images(args.split)
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in scores.items()}
    if not is_shipped(folder.path):
        try:
            keep_evaluation(folder, clean | {"fingerprint": source.digest})
        except (UserError, OSError) as error:
            say(f"warning   {error}; the scores are not kept in the run")
    if args.json:
        print(json.dumps(clean))
        return 0
    width = max(map(len, scores))
    for name, value in scores.items():
        lacks = "a slot map" if scores["images_with_masks"] else "masks"
        shown = f"none: it needs {lacks}" if value is None else f"{value:.5g}" if isinstance(value, float) else value
        print(f"{name:<{width}}  {shown}")
    return 0


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
