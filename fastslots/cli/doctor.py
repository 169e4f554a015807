"""fastslots doctor: what this installation can do, what it cannot, and the mend for each problem."""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fastslots.cli.common import Subparsers
from fastslots.cli.installation import Findings, check_compiled, check_gpus, check_packages, check_triton
from fastslots.errors import UserError, first_line

if TYPE_CHECKING:
    import torch

TRAIN_STEPS = 40
LITTLE_DATA = 4 << 20  # bytes that are read too soon to time
READ_BYTES, READ_SECONDS = 1 << 28, 1.5
SCENE_BYTES = 4 * 128 * 128  # image and mask of a packed CLEVR scene
LITTLE_SPACE = 2 << 30  # bytes: a long run's checkpoints and its report fit


def add_parser(commands: Subparsers) -> None:
    parser = commands.add_parser("doctor", help="what this installation can do, and the mend for what it cannot")
    parser.add_argument("data", metavar="DATA", nargs="?", type=Path, help="a data set whose folder's speed to measure")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.data and not args.data.exists():
        raise UserError(f"{args.data}: no such file or folder")
    found = Findings()
    check_packages(found)
    check_triton(found)
    _processors(found)
    check_gpus(found)
    check_compiled(found)
    _backends(found)
    _folders(found)
    if args.data:
        _reading(found, args.data)
    broken = _self_check(found)
    found.summary()
    return 1 if broken else 0


def _processors(found: Findings) -> None:
    import torch

    from fastslots.threads import asked, chosen, usable_cores, usable_processors, waits_asleep

    usable, count, choice = usable_processors(), torch.get_num_threads(), chosen()
    text = f"{os.cpu_count()} processors, {usable} for this process, torch uses {count} threads"
    text += f": {choice.why}" if choice else ""
    if count > usable:
        found.problem("cpu", text, f"more threads than processors slow each other down: --threads {usable}")
    elif asked() and count < min(usable, usable_cores()):
        mend = f"OMP_NUM_THREADS is {asked()}: unset it, or --threads {usable}, if no one else"
        found.problem("cpu", text, f"{mend} needs them")
    else:
        found.say("cpu", text)
    asleep = "wait for one another asleep" if waits_asleep() else "spin while they wait for one another"
    found.say("threads", asleep + ("" if waits_asleep() else ", on a busy machine at the others' cost"))


def _backends(found: Findings) -> None:
    import torch

    from fastslots.ops import explain
    from fastslots.ops.backends import OPS, Explanation

    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        print(f"\non {device}:")
        rows, tokens = torch.empty(1, 28, 128, device=device), torch.empty(1, 4096, 128, device=device)  # as at clevr6
        alike: dict[
            tuple[str, tuple[tuple[str, str], ...]], list[str]
        ] = {}  # ops that one backend serves, for the same reasons
        for op in OPS:
            found_for = explain(rows, *([tokens] if op == "token_attention" else []), op=op)
            alike.setdefault((found_for.backend, tuple(found_for.reasons.items())), []).append(op)
        for (name, reasons), ops in alike.items():
            print(Explanation(", ".join(ops), name, dict(reasons)))
        if device == "cuda":
            print(f"a training step: {_step(torch.device(device))}")
    print()


def _step(device: torch.device) -> str:
    """How a step of a run goes whose model, losses and optimiser are ours."""
    from fastslots import capture

    reason = capture.why_not(device)
    if reason:
        return f"no CUDA graph ({reason}): operator by operator, losses read a step late"
    return (
        "one CUDA graph, losses read a step late; operator by operator with losses, encoders or decoders of your own, "
        "several processes, fp16, the Jacobian's penalty, or another optimiser than adam, adamw and muon (a run's "
        "first lines say which)"
    )


def _folders(found: Findings) -> None:
    """The places that fastslots writes to."""
    from fastslots.data.packed.cache import cache_root

    places = [("runs", Path("runs").absolute(), "--out")]
    try:
        places.insert(0, ("cache", cache_root(), "FASTSLOTS_CACHE"))
    except UserError as error:
        text, _, mend = str(error).partition(": ")
        found.problem("cache", text, mend)
    for name, folder, flag in places:
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(existing).free
        text = f"{folder}, {free / 2**30:.1f} GiB free"
        if not os.access(existing, os.W_OK):
            found.problem(name, f"{folder} cannot be written", f"name another place with {flag}")
        elif free < LITTLE_SPACE:
            found.problem(name, text, f"free some space, or name another place with {flag}")
        else:
            found.say(name, text)


def _reading(found: Findings, data: Path) -> None:
    """Sequential reading, from the disk rather than from what the system remembers of it, where it lets us ask."""
    files = sorted(path for path in data.rglob("*") if path.is_file()) if data.is_dir() else [data]
    if not files:
        raise UserError(f"{data} holds no files")
    done, seconds = 0, 1e-9
    for block in _blocks(files):
        start = time.perf_counter()
        done += len(block())
        seconds += time.perf_counter() - start
        if done >= READ_BYTES or seconds >= READ_SECONDS:
            break
    speed = done / seconds
    text = f"{speed / 1e6:,.0f} MB/s from {data}, {speed / SCENE_BYTES:,.0f} packed scenes of 128 x 128 a second"
    if done < LITTLE_DATA:
        found.say("reading", f"{data} is too small to time")
    elif speed < 5e7:
        found.problem("reading", text, "copy the data to a local disk, or fastslots data pack them there")
    else:
        found.say("reading", text)


def _blocks(files: list[Path]) -> Iterator[Callable[[], bytes]]:
    for path in files:
        with open(path, "rb", buffering=0) as file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            for _ in range(-(-path.stat().st_size // (1 << 22))):
                yield partial(file.read, 1 << 22)


def _self_check(found: Findings) -> bool:
    """The backends of this machine against the float64 reference, then a short training; True if broken."""
    import torch

    from fastslots.ops import cross_attention, decoder_layer
    from fastslots.records import FeedForward, FoldedProjections
    from fastslots.testing import SHAPES, errors, random_layer, random_qkv

    device = "cuda" if torch.cuda.is_available() else "cpu"
    worst = {}
    q, k, v = (t.to(device) for t in random_qkv(SHAPES["clevr6"], torch.float32))
    exact = cross_attention(q.double(), k.double(), v.double(), backend="reference")
    pairs = zip(cross_attention(q, k, v), exact, strict=True)
    worst["cross_attention"] = max(errors(a.cpu(), b.cpu())[0] for a, b in pairs)
    x, folded, ff = random_layer(SHAPES["clevr6"], torch.float32)
    x, folded = x.to(device), FoldedProjections(*(t.to(device) for t in folded))
    ff = FeedForward(*(t.to(device) for t in ff))
    wide, wide_ff = FoldedProjections(*(t.double() for t in folded)), FeedForward(*(t.double() for t in ff))
    exact = decoder_layer(x.double(), wide, wide_ff, backend="reference")
    pairs = zip(decoder_layer(x, folded, ff), exact, strict=True)
    worst["decoder_layer"] = max(errors(a.cpu(), b.cpu())[0] for a, b in pairs)
    text = ", ".join(f"{op} {error:.0e}" for op, error in worst.items())
    good = max(worst.values()) < 1e-4
    text = f"{'passed' if good else 'FAILED'}: largest relative errors on {device}: {text}"
    mend = "do not train with this: send the output of this command to the issue tracker"
    found.say("self-check", text) if good else found.problem("self-check", text, mend)
    speed, reason = _train_a_little()
    if reason:
        found.problem("training", reason, mend)
    else:
        found.say("training", f"{speed:,.0f} images/s, preset sprites-mini, on {device}")
    return not good or bool(reason)


def _train_a_little() -> tuple[float, str]:
    """(images a second, what went wrong) of a short run of the smallest preset."""
    from fastslots.runs.curves import MetricsReader
    from fastslots.runs.folder import RunFolder
    from fastslots.train import TrainConfig, fit

    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as silence:
        config = TrainConfig.preset("sprites-mini", steps=TRAIN_STEPS, eval_every=0, eval_images=1)
        try:
            fit(config, out=Path(folder) / "run", stream=silence)
        except (RuntimeError, UserError) as error:
            return 0.0, f"FAILED: {first_line(error)}"
        curves = MetricsReader(RunFolder(Path(folder) / "run").metrics).update().training
    # The loss itself rises with the weights of its terms, which go from 0 to all in so few steps.
    errors, speeds = curves["recon"].table()["mean"], sorted(curves["images_per_s"].table()["mean"])
    falls = sum(errors[-5:]) < 0.9 * sum(errors[:5])
    return speeds[len(speeds) // 2], "" if falls else "FAILED: the reconstruction error does not fall"
