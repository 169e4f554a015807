"""Made the files beside it: run in an empty folder by fastslots at db47fb6, torch 2.13.0, on one thread."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import torch

from fastslots.cli import main
from fastslots.report import run_facts

MODEL = dict(
    resolution=8, num_slots=3, slot_dim=2, octaves=2, cnn_channels=4, encoder_width=8, encoder_layers=1, query_width=8,
    query_hidden=8, slot_width=8, slot_hidden=8, decoder_heads=2, output_hidden="8", pixels_per_step=32,
    pixel_sampling="foreground",
)  # fmt: skip
RUN = dict(
    steps=4, batch_size=4, threads=1, device="cpu", eval_every=2, eval_images=8, checkpoint_every=4, warmup=2,
    keep_checkpoints=1, alpha_start=0, alpha_warmup=4, beta_start=0, seed=5, optimizer="muon", schedule="cosine",
)  # fmt: skip


def command(*words: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main([*words]) == 0, words
    return out.getvalue()


flags = [f"--{name}={value}" for name, value in (MODEL | RUN).items()]
command("train", "sprites-mini", *flags, "--out", "run")
command("data", "generate", "sprites", "packed", "--count", "40", "--size", "8", "--objects", "1-3")
best = json.loads(command("eval", "run", "--images", "8", "--json"))
last = json.loads(command("eval", "run", "--data", "packed", "--weights", "last", "--split", "test", "--json"))
command("report", "run")
facts = run_facts(Path("run"))
del facts["explorer"], facts["written"], facts["grids"], facts["config"]
shutil.copytree("run", "more")
command("train", "--out", "more", "--resume", "--steps=8")
lines = [json.loads(line) for line in (Path("more") / "metrics.jsonl").read_text().splitlines()]
(Path("run") / "report.html").unlink()
shutil.rmtree("more")
expected = {"best": best, "last_on_packed": last, "facts": facts, "resumed": lines, "torch": torch.__version__}
Path("expected.json").write_text(json.dumps(expected, indent=1) + "\n")
