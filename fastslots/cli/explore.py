"""fastslots explore"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fastslots.cli.common import RUN_HELP, Subparsers, add_allow_remote, add_code, code_named
from fastslots.errors import UserError
from fastslots.runs.folder import RunFolder

if TYPE_CHECKING:
    from torch import Tensor

    from fastslots.config.run import TrainConfig

IMAGES = 12


def add_parser(commands: Subparsers) -> None:
    parser = commands.add_parser("explore", help="decode any latent of a run's slots live, in the browser")
    parser.add_argument("run_folder", metavar="RUN", type=Path, help=RUN_HELP)
    parser.add_argument("--weights", choices=("best", "last"), default="best", help="default: best")
    add_allow_remote(parser)
    add_code(parser)
    parser.add_argument("--port", type=int, default=8000, help="on 127.0.0.1 (default 8000; 0: a free one)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if not 0 <= args.port < 65_536:
        raise UserError("--port must be between 0 and 65535")
    if not importlib.util.find_spec("flask"):
        raise UserError("explore needs Flask: pip install 'fastslots[explore]'")
    from fastslots.models import SlotVAE
    from fastslots.report.live import Session
    from fastslots.report.server import serve
    from fastslots.runs.pretrained import hidden_by, run_folder

    folder = RunFolder(run_folder(args.run_folder))
    named = code_named(args, folder)
    model = SlotVAE.from_run(folder.path, args.weights, named or None, args.trust_code)
    config = folder.read_config(device="auto")
    if note := hidden_by(folder.path):
        print(note, file=sys.stderr)
    if config.input != "pixels" or config.channels != 3:
        raise UserError(f"{folder.path} decodes features, not images: there is nothing to look at")
    session = Session(
        model.to(config.torch_device()),
        held_out(folder, config, args.allow_remote),
        folder.path.resolve().name,
    )
    try:
        server = serve(session, args.port)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise UserError(f"port {args.port} cannot be used ({reason}): name another --port") from None
    print(f"{server.address}  (only this machine can open it, and who knows the address; Ctrl-C ends)", flush=True)
    try:
        server.serve_forever()
    finally:
        server.server_close()
    return 0


def held_out(folder: RunFolder, config: TrainConfig, allow_remote: bool = False) -> Tensor:
    """The first held-out images of a run, float [n, 3, R, R]; none where its data are not at hand."""
    import torch

    from fastslots.data import to_float
    from fastslots.data.packed.urls import check_allowed
    from fastslots.report.write import held_out_images

    try:
        check_allowed(config.data, folder.config, allow_remote)
        images = held_out_images(folder, config)[:IMAGES].read()[0]
    except UserError as error:
        print(f"no images of the run to start from: {error}", file=sys.stderr)
        return torch.empty(0, config.channels, config.resolution, config.resolution)
    return to_float(images)
