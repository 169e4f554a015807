"""fastslots eval"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from fastslots.cli.common import progress_of
from fastslots.errors import UserError
from fastslots.train.config import read_config


def add_parser(commands) -> None:
    parser = commands.add_parser("eval", help="score a trained run on held-out images")
    parser.add_argument("run_folder", metavar="RUN", type=Path, help="folder that `fastslots train --out` wrote")
    parser.add_argument("--data", help="another data set (default: the run's own)")
    parser.add_argument("--split", choices=("val", "test"), default="val", help="default: val")
    parser.add_argument("--latent", choices=("mean", "sample"), default="mean", help="z: its mean, or drawn")
    parser.add_argument("--weights", choices=("best", "last"), default="best", help="default: best")
    parser.add_argument("--images", type=int, default=0, help="how many (0, the default: all of the split)")
    parser.add_argument("--batch_size", "--batch-size", type=int, default=10, help="images at once")
    parser.add_argument(
        "--score-mode",
        "--score_mode",
        choices=("pooled", "paper"),
        default="pooled",
        help="J-ARI and JIS over all images (pooled, the default), or as the mean of the batches' values (paper)",
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
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.images < 0 or args.batch_size < 1:
        raise UserError("--images must be at least 0 and --batch_size at least 1")
    from fastslots.models.storage import load_run
    from fastslots.train import analysis
    from fastslots.train.evaluate import evaluate
    from fastslots.train.sources import open_source

    model = load_run(args.run_folder, args.weights)
    config = read_config(args.run_folder / "config.json", device="auto", **({"data": args.data} if args.data else {}))
    dataset, rows = open_source(config).splits[args.split]
    model.to(config.torch_device())
    asked = (model, dataset, rows, args.images, args.batch_size)
    scores = evaluate(
        *asked,
        latent=args.latent,
        seed=config.seed,
        progress=progress_of("images"),
        score_mode=args.score_mode,
    )
    if args.interaction_order:
        scores |= analysis.order_scores(*asked)
    if args.attributes:
        scores |= analysis.attribute_scores(*asked)
    if args.recombination:
        scores |= analysis.recombination_scores(*asked)
    if args.composition:
        scores |= analysis.composition_scores(model, config, args.images, args.batch_size)
    scores |= {"score_mode": args.score_mode} if args.score_mode != "pooled" else {}
    scores |= {"split": args.split, "weights": args.weights, "data": config.data}
    if args.json:
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in scores.items()}
        print(json.dumps(clean))
        return 0
    width = max(map(len, scores))
    for name, value in scores.items():
        print(f"{name:<{width}}  {value:.5g}" if isinstance(value, float) else f"{name:<{width}}  {value}")
    return 0
