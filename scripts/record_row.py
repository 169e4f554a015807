"""A row of docs/records.md from a run: how long it trained until its held-out images reached a score.

    fastslots train --eval_every 250 --eval_images 1000 --out runs/record
    python scripts/record_row.py runs/record

Time is that of training steps alone (evaluations, which such a run has many of, are left out), from the first step to
the one after which an evaluation first had the J-ARI. The run's folder says the processor; the commit is that of the
checkout.
"""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path

from fastslots.config.run import read_config
from fastslots.report import run_facts
from fastslots.runs.log import read_metrics

LEVELS = (0.85, 0.90)


def seconds_to(run: Path, level: float, batch_size: int) -> tuple[float, int] | None:
    """Seconds of training, and the step, at the first evaluation with at least this J-ARI; None where there is none."""
    steps, evaluations = read_metrics(run / "metrics.jsonl")
    reached = next((line["step"] for line in evaluations if line.get("j_ari", 0) >= level), None)
    if reached is None:
        return None
    return sum(batch_size / line["images_per_s"] for line in steps if line["step"] <= reached), reached


def row(run: Path, commit: str) -> str:
    """The row in Markdown: commit, processor and threads, recipe, time to each level, final scores."""
    config, facts = read_config(run / "config.json"), run_facts(run)
    times = [seconds_to(run, level, config.batch_size) for level in LEVELS]
    shown = [f"{found[0]:.0f} s ({found[1]:,} steps)" if found else "not reached" for found in times]
    last = facts["evaluations"][-1]
    recipe = f"{config.preset_name}, {config.steps:,} steps, queries {config.queries}, seed {config.seed}"
    scores = f"{last['j_ari']:.3f} / {last['jis']:.3f}"
    return f"| {commit} | {facts['machine'].get('machine', 'unknown')} | {recipe} | {' | '.join(shown)} | {scores} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    asked = parser.parse_args()
    described = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    print(row(asked.run, described.stdout.strip() or "unknown"))
