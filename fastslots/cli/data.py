"""fastslots data check | pack | generate | features"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from fastslots.cli import features
from fastslots.config.presets import preset_names
from fastslots.errors import UserError


def add_parser(commands) -> None:
    parser = commands.add_parser("data", help="check, pack, generate or encode data sets")
    actions = parser.add_subparsers(metavar="ACTION", required=True, parser_class=type(parser))

    check = actions.add_parser("check", help="say what a data set is and what looks wrong")
    check.add_argument("path", metavar="PATH", help="file, folder, pattern, or URL of packed folders (s3://...)")
    _add_shape(check)
    _add_policy(check)
    check.add_argument("--preset", choices=preset_names(), help="its size, object filter and kind of input")
    check.add_argument("--quick", action="store_true", help="read the first scenes alone (default: all, kept decoded)")
    check.add_argument("--json", action="store_true", help="print one JSON object")
    check.set_defaults(run=_check)

    pack = actions.add_parser("pack", help="decode any known format once, for training at memory speed")
    pack.add_argument("source", metavar="IN")
    pack.add_argument("out", metavar="OUT", type=local_folder, help="folder to make; a partial one is continued")
    _add_shape(pack)
    _add_policy(pack)
    pack.set_defaults(run=_pack)

    generate = actions.add_parser("generate", help="make a data set")
    generate.add_argument("what", choices=("sprites",), help="sprites: coloured shapes on black, with occlusion")
    generate.add_argument("out", metavar="OUT", type=local_folder, help="packed folder to make")
    generate.add_argument("--count", type=int, required=True, help="images")
    generate.add_argument("--size", type=int, default=64, help="side in pixels (default 64)")
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--objects", default="2-4", metavar="A-B", help="shapes of a scene (default 2-4)")
    generate.set_defaults(run=_generate)

    features.add_parser(actions)


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
    report = check(args.path, **_shape(args), quick=args.quick, on_bad_record=args.on_bad_record)
    print(json.dumps(dataclasses.asdict(report)) if args.json else report)
    return 0


def _as_preset(args: argparse.Namespace) -> None:
    """Ask of the data what ``train PRESET`` would, but for flags that are given."""
    from fastslots.config.run import TrainConfig
    from fastslots.data import read_batch, to_float
    from fastslots.data.packed.features import is_features
    from fastslots.data.sources import check_shape, open_source

    given = {"max_objects": args.max_objects, "resolution": args.size or None}
    given = {name: value for name, value in given.items() if value is not None}
    config = TrainConfig.preset(args.preset, preset_name=args.preset, data=args.path, **given)
    if config.input == "features" or is_features(args.path):  # at what size they are is no choice
        dataset, rows = open_source(config).splits["train"]
        check_shape(config, to_float(read_batch(dataset, rows[:1])[0]))
    args.max_objects, args.size = config.max_objects, config.resolution


def _pack(args: argparse.Namespace) -> int:
    from fastslots.data.open import open_dataset, pack

    _free(args.out)
    pack(args.source, args.out, **_shape(args), on_bad_record=args.on_bad_record)
    print(open_dataset(args.out).info)
    return 0


def _generate(args: argparse.Namespace) -> int:
    from fastslots.data.open import Progress
    from fastslots.data.packed.dataset import PackedDataset
    from fastslots.data.packed.writer import write_packed
    from fastslots.data.readers.scene import Scene
    from fastslots.data.sprites import SpritesDataset

    try:
        least, most = (int(part) for part in args.objects.split("-"))
        dataset = SpritesDataset(args.seed, args.size, (least, most), args.count)
    except ValueError as error:
        raise UserError(f"--count, --size or --objects: {error} (--objects is A-B, e.g. 2-4)") from None
    _free(args.out)

    at_once = max(1, min(256, (1 << 22) // args.size**2))  # a few hundred MB while they are painted

    def scenes(done: int):
        for start in range(done, args.count, at_once):
            images, masks, factors = dataset.scenes(range(start, min(start + at_once, args.count)))
            for i in range(len(images)):
                objects = int((factors["shape"][i] > 0).sum())
                yield Scene(images[i], masks[i], objects, {name: values[i] for name, values in factors.items()})

    settings = {"seed": args.seed, "size": args.size, "objects": args.objects, "count": args.count}
    with Progress(lambda done: done / args.count) as progress:
        write_packed(args.out, scenes, "generated sprites", f"seed {args.seed}", settings, progress=progress)
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
