"""How training scales with processes on one machine: ``python -m fastslots.bench.processes --processes 1 2``.

Each number of processes trains the same run (the same global batch: strong scaling) under torchrun, one thread each, in
turn, ``--rounds`` times. Printed: images a second (median over steps, best round), the efficiency against as many times
one process, and the relative difference of the final weights from those of the first in the list. Meaningful on a
machine that does nothing else; with more processes than cores it says nothing of scaling.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from fastslots.runs.folder import RunFolder

WARM_UP = 10  # steps that are not counted: caches, the first allocations, processes that wait for the last to start


def rate(log: Path) -> float:
    """Images a second of a run: the median over its steps."""
    values = [json.loads(line) for line in log.read_text().splitlines()]
    return statistics.median(float(v["images_per_s"]) for v in values if "eval" not in v and v["step"] > WARM_UP)


def difference(a: Path, b: Path) -> float:
    """|a - b| / |a| of all weights of two runs."""
    import torch
    from safetensors.torch import load_file

    x, y = (load_file(RunFolder(run).last_weights) for run in (a, b))
    squares = [((x[name] - y[name]).square().sum(), x[name].square().sum()) for name in x]
    above, below = (torch.stack(part).sum().sqrt().item() for part in zip(*squares, strict=True))
    return above / below


def train(processes: int, out: Path, flags: list[str]) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    settings = ["--threads=1", "--eval_every=0", "--eval_images=1", "--checkpoint_every=0", f"--out={out}"]
    run = subprocess.run(
        [sys.executable, *torchrun, "fastslots", "train", *flags, *settings],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if run.returncode:
        sys.exit(f"{processes} processes ended with {run.returncode}:\n{run.stderr[-2000:]}")


def table(rates: dict[int, float], differences: dict[int, float]) -> str:
    """rates: processes -> images a second."""
    lines = ["| processes | images/s | efficiency | difference of weights |", "| --- | --- | --- | --- |"]
    for count, value in rates.items():
        share = f"{value / rates[1] / count:.0%}" if 1 in rates else "-"
        lines.append(f"| {count} | {value:.1f} | {share} | {differences.get(count, 0):.1e} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    args, flags = parser.parse_known_args()
    flags = [*(flags or ["sprites-mini"]), f"--steps={args.steps}"]
    rates: dict[int, float] = dict.fromkeys(args.processes, 0.0)
    differences: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(args.rounds):
            for count in args.processes:
                out = Path(folder) / f"{count}-{turn}"
                train(count, out, flags)
                rates[count] = max(rates[count], rate(RunFolder(out).metrics))
                differences[count] = difference(Path(folder) / f"{args.processes[0]}-0", out)
    print(f"{' '.join(flags)}, {os.cpu_count()} cores, {args.rounds} rounds, threads 1 a process\n")
    print(table(rates, differences))


if __name__ == "__main__":
    main()
