"""fastslots data features"""

from __future__ import annotations

import argparse
from pathlib import Path

from fastslots.cli.common import Subparsers
from fastslots.errors import UserError


def add_parser(actions: Subparsers) -> None:
    parser = actions.add_parser(
        "features",
        help="encode every image by a frozen ViT, once, for preset clevrtex",
        description="Encode every image of a data set by a frozen ViT and keep the features, for `fastslots train "
        "clevrtex --data DIR`. A stop is no loss: the same command goes on.",
    )
    parser.add_argument("source", metavar="DATA", help="data set of any known format")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="FILE",
        help="weights of a plain ViT with timm's names (e.g. vit_base_patch8_224.dino), .safetensors or .pth",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make")
    parser.add_argument("--grid", type=int, default=16, help="tokens along a side (default 16, as clevrtex decodes)")
    parser.add_argument("--size", type=int, default=128, help="side of images and masks (default 128); masks stay so")
    parser.add_argument("--heads", type=int, default=0, help="of the ViT (default: its width over 64)")
    parser.add_argument(
        "--scale", choices=("imagenet", "half"), default="imagenet", help="of the ViT's pixels: DINO's, or AugReg's"
    )
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16", help="as which they are kept")
    parser.add_argument("--max_objects", "--max-objects", type=int, default=0, help="keep scenes with at most so many")
    parser.add_argument("--batch_size", "--batch-size", type=int, default=32, help="images at once")
    parser.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda, ...")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.out.exists():
        raise UserError(f"{args.out} exists already: remove it or name another folder")
    if min(args.grid, args.size, args.batch_size) < 1 or min(args.heads, args.max_objects) < 0:
        raise UserError("--grid, --size and --batch_size must be at least 1, --heads and --max_objects at least 0")
    from fastslots.config.run import TrainConfig
    from fastslots.data.packed.features import FeatureDataset
    from fastslots.features import Encoding, VitFile, make_features

    device = TrainConfig(device=args.device).torch_device()
    make_features(
        args.source,
        VitFile(args.checkpoint, args.heads, args.scale),
        args.out,
        Encoding(args.grid, args.size, args.dtype, args.batch_size),
        max_objects=args.max_objects or None,
        device=device,
    )
    print(FeatureDataset(args.out).info)
    return 0
