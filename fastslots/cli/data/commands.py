"""fastslots data check | pack | generate, and the parsers of features and get."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from fastslots.cli.common import Subparsers
from fastslots.cli.data import features, get
from fastslots.config.presets import preset_names
from fastslots.errors import UserError

GENERATED = {
    "sprites": ("coloured shapes on black, with occlusion", "2-4"),
    "sprites-textured": ("the same with patterns, before clouds of two colours", "2-4"),
    "scenes": ("rendered spheres, cubes and cylinders on a floor, in CLEVR's manner", "3-6"),
}
"""What ``generate`` makes: a description, and how many objects a scene has unless told otherwise."""


def add_parser(commands: Subparsers) -> None:
    parser = commands.add_parser("data", help="check, pack, generate or encode data sets")
    actions = parser.add_subparsers(metavar="ACTION", required=True, parser_class=type(parser))

    check = actions.add_parser("check", help="say what a data set is and what looks wrong")
    check.add_argument("path", metavar="PATH", help="file, folder, pattern, or URL of packed folders (s3://...)")
    _add_shape(check)
    _add_policy(check)
    check.add_argument("--preset", choices=preset_names(), help="its size, object filter and kind of input")
    check.add_argument("--quick", action="store_true", help="read the first scenes alone (default: all, kept decoded)")
    check.add_argument("--json", action="store_true", help="print one JSON object")
    check.add_argument("--picture", type=Path, metavar="PNG", help="draw some images above their masks, as understood")
    check.set_defaults(run=_check)

    pack = actions.add_parser("pack", help="decode any known format once, for training at memory speed")
    pack.add_argument("source", metavar="IN")
    pack.add_argument("out", metavar="OUT", type=local_folder, help="folder to make; a partial one is continued")
    _add_shape(pack)
    _add_policy(pack)
    pack.set_defaults(run=_pack)

    generate = actions.add_parser("generate", help="make a data set")
    kinds = "; ".join(f"{name}: {described}" for name, (described, _) in GENERATED.items())
    generate.add_argument("what", choices=tuple(GENERATED), help=kinds)
    generate.add_argument("out", metavar="OUT", type=local_folder, help="packed folder to make")
    generate.add_argument("--count", type=int, required=True, help="images")
    generate.add_argument("--size", type=int, default=64, help="side in pixels (default 64)")
    generate.add_argument("--seed", type=int, default=0)
    usual = ", ".join(f"{name} {objects}" for name, (_, objects) in GENERATED.items())
    generate.add_argument("--objects", metavar="A-B", help=f"objects of a scene (default: {usual})")
    generate.set_defaults(run=_generate)

    features.add_parser(actions)
    get.add_parser(actions)


def _add_shape(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max_objects", "--max-objects", type=int, help="keep scenes with at most so many")
    parser.add_argument("--size", type=int, help="side in pixels (default: 128 for CLEVR, else its own)")


def _add_policy(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--on_bad_record",
        "--on-bad-record",
        choices=("stop", "skip"),
        default="stop",
        help="stop at the first damaged record (default), or leave them out and say how many",
    )
    parser.add_argument(
        "--ignore_label", "--ignore-label", type=int, metavar="N", help="mask label of pixels that are not scored"
    )


def _unscored(args: argparse.Namespace) -> int | None:
    label: int | None = args.ignore_label
    if label is not None and not 0 <= label <= 255:
        raise UserError(f"--ignore_label must be from 0 to 255, got {label}")
    return label


def _shape(args: argparse.Namespace) -> dict[str, int | None]:
    if min(args.max_objects or 0, args.size or 0) < 0:
        raise UserError("--max_objects and --size must not be negative")
    return {"max_objects": args.max_objects or None, "size": args.size or None}


def _check(args: argparse.Namespace) -> int:
    from fastslots.data.check import check
    from fastslots.data.packed.features import check_features, is_features

    if args.preset:
        _as_preset(args)
    if is_features(args.path):
        found = check_features(args.path, args.max_objects or None)
        print(json.dumps(dataclasses.asdict(found)) if args.json else found)
        return 0
    unscored, options = _unscored(args), _shape(args) | {"on_bad_record": args.on_bad_record}
    report = check(args.path, **options, quick=args.quick, ignore_label=unscored)
    if args.picture:
        from fastslots.report.scenes import draw_scenes

        draw_scenes(args.path, args.picture, unscored, **options)
    print(json.dumps(dataclasses.asdict(report)) if args.json else report)
    return 0


def _as_preset(args: argparse.Namespace) -> None:
    """Ask of the data what ``train PRESET`` would, but for flags that are given."""
    from fastslots.config.run import TrainConfig
    from fastslots.data import to_float
    from fastslots.data.packed.features import is_features
    from fastslots.data.sources import check_shape, open_source

    given = {"max_objects": args.max_objects, "resolution": args.size or None}
    given = {name: value for name, value in given.items() if value is not None}
    config = TrainConfig.preset(args.preset, data=args.path, **given)
    if config.input == "features" or is_features(args.path):  # at what size they are is no choice
        train = open_source(config).splits["train"]
        check_shape(to_float(train[:1].read()[0]), config.channels, config.resolution)
    args.max_objects, args.size = config.max_objects, config.resolution


def _pack(args: argparse.Namespace) -> int:
    from fastslots.data.open import open_dataset, pack

    unscored = _unscored(args)
    _free(args.out)
    pack(args.source, args.out, **_shape(args), on_bad_record=args.on_bad_record, ignore_label=unscored)
    print(open_dataset(args.out).info)
    return 0


def _generate(args: argparse.Namespace) -> int:
    from fastslots.data.builtin.generate import make, pack
    from fastslots.data.packed.dataset import PackedDataset
    from fastslots.notices import Progress

    try:
        least, most = (int(part) for part in (args.objects or GENERATED[args.what][1]).split("-"))
    except ValueError:
        raise UserError(f"--objects is A-B, e.g. 2-4, got {args.objects!r}") from None
    settings = (args.seed, args.size, (least, most), args.count)
    make(args.what, *settings)
    _free(args.out)
    with Progress(lambda done: done / args.count) as progress:
        pack(args.what, args.out, *settings, progress=progress)
    print(PackedDataset(args.out).info)
    return 0


def local_folder(text: str) -> Path:
    """A URL would make a folder named "s3:"."""
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text} is a URL: make a local folder and upload it")
    return Path(text)


def _free(out: Path) -> None:
    if out.exists():
        raise UserError(f"{out} exists already: remove it or name another folder")
