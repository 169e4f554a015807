"""kill -9 at random moments of the first command: resumed each time, it ends with the bits of a run that nobody killed.

A chain of kills runs along one training: start, kill at a random moment, look at what lies in the folder, resume, kill
again, until the run gets to its end before its moment comes. Then the next chain begins. After each kill every file of
the run is whole or absent, and once a checkpoint was there, one can be read.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import MODEL_8, flags

from fastslots.runs.curves import Line
from fastslots.runs.folder import RunFolder
from fastslots.runs.log import read_metrics
from fastslots.runs.repeat import NOT_OF_THE_SEED
from fastslots.train.checkpoint import latest_checkpoint

TINY = dict(
    MODEL_8, pixels_per_step=40, batch_size=2, threads=2, steps=100, checkpoint_every=5, eval_every=40, eval_images=2
)
WAYS = ("steps", "start", "steps", "write")
"""In turn: after some steps, while it starts, after some steps, inside the next write of a checkpoint. Where an
evaluation is near, every other of these is inside that."""


class Process:
    """``python -m fastslots``, with the methods of what ``Commands.start`` gives."""

    def __init__(self, argv: list[str], stderr: Path):
        self._stderr = stderr
        with open(stderr, "ab") as err:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "fastslots", *argv], stdout=subprocess.DEVNULL, stderr=err
            )

    def kill(self, number: int) -> None:
        self._process.send_signal(number)

    def wait(self, seconds: float = 120) -> int:
        return self._process.wait(seconds)

    def running(self) -> bool:
        return self._process.poll() is None

    def said(self) -> str:
        return self._stderr.read_text()


Start = Callable[[list[str], Path], Process]


def latest_step(out: Path) -> int:
    """That of the newest checkpoint, by its name."""
    return max((step for step, _ in RunFolder(out).checkpoint_files()), default=0)


def everything_is_whole(out: Path, saved: bool) -> bool:
    """Whether a checkpoint can be read; AssertionError where a file is torn, or none can be and one was ``saved``."""
    newest, damaged = latest_checkpoint(RunFolder(out)) if (out / "checkpoints").is_dir() else (None, {})
    assert not damaged, damaged
    assert newest or not saved, f"no checkpoint can be read: {sorted(out.rglob('*'))}"
    for path in out.rglob("[!.]*.safetensors"):
        load_file(path)
    for path in out.rglob("[!.]*.json"):
        json.loads(path.read_text())
    for path in out.glob("*.jsonl"):
        for line in path.read_bytes().split(b"\n")[:-1]:  # after the last newline there may be a part of a line
            json.loads(line)
    return newest is not None


@dataclass
class Chain:
    """A run that is killed over and over, until it ends or was killed often enough; then it is left to end.

    reach: the most steps that a process does before its moment comes; eval_every: of the run.
    """

    start: Start
    argv: list[str]
    out: Path
    rng: random.Random
    reach: int
    eval_every: int
    seconds_to_start: float = 5.0
    torn: frozenset[Path] = frozenset()  # what earlier kills have left half written
    lines: int = 0  # of the log when the process was started, and the step of its checkpoint
    resumed: int = 0
    places: Counter[str] = field(default_factory=Counter)

    def run(self, most: int) -> Counter[str]:
        """-> where it was killed."""
        saved = False
        while True:
            self.torn, self.lines, self.resumed = self._partial(), len(self._steps()), latest_step(self.out)
            process = self.start(
                [*self.argv, "--out", str(self.out), *(["--resume"] if self.places else [])], self._err
            )
            number = self.places.total()
            if number == most or not self._moment(process, WAYS[number % len(WAYS)]):
                break
            process.kill(signal.SIGKILL)
            if (code := process.wait()) != -signal.SIGKILL:  # it has ended in the meantime
                assert code == 0, process.said()
                return self.places
            self.places[self._place()] += 1
            saved = everything_is_whole(self.out, saved)
            print(f"{self.out.name}, kill {number + 1}, step {self._last()}: {dict(self.places)}", flush=True)
        assert process.wait(7200) == 0, process.said()
        return self.places

    @property
    def _err(self) -> Path:
        return self.out.with_suffix(".err")

    def _moment(self, process: Process, way: str) -> bool:
        """Whether the process still runs when its moment has come."""
        rng, began, first, resumed = self.rng, time.monotonic(), self._last(), self.resumed
        if way == "start":
            return self._wait(process, lambda: True, rng.uniform(0, self.seconds_to_start))
        goal = resumed + rng.randrange(1, self.reach + 1)
        evaluation = (resumed // self.eval_every + 1) * self.eval_every
        if evaluation - resumed <= self.reach and rng.random() < 0.5:
            goal = evaluation
        # Its log is cut to the checkpoint when it has started; until then it may hold the goal from before.
        alive = self._wait(process, lambda: first <= resumed or self._last() < first, 0)
        if first > resumed:
            self.seconds_to_start = time.monotonic() - began
        pause = rng.uniform(0, 1.0 if goal == evaluation else 0.02)
        if alive and way == "write" and goal != evaluation:
            return self._wait(process, self._is_writing, rng.choice((0, pause / 4)))
        return alive and self._wait(process, lambda: self._last() >= goal, pause)

    def _wait(self, process: Process, true: Callable[[], bool], pause: float) -> bool:
        while process.running() and not true():
            time.sleep(0.001)
        time.sleep(pause)
        return process.running()

    def _is_writing(self) -> bool:
        """A checkpoint."""
        return any(path.name.startswith(".step") for path in self._partial() - self.torn)

    def _partial(self) -> frozenset[Path]:
        return frozenset(self.out.rglob(".*.partial"))

    def _steps(self) -> list[Line]:
        return read_metrics(self.out / "metrics.jsonl")[0]

    def _last(self) -> int:
        """The newest step of the log, from its end alone."""
        path = self.out / "metrics.jsonl"
        if not path.exists():
            return 0
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - 4096))
            lines = file.read().split(b"\n")[:-1]
        return json.loads(lines[-1])["step"] if lines and lines[-1].startswith(b"{") else 0

    def _place(self) -> str:
        """What the run was doing when it was killed."""
        new = self._partial() - self.torn
        if self._is_writing():
            return "inside a checkpoint's write"
        if new:
            return "inside another file's write"
        trained, evaluated = read_metrics(self.out / "metrics.jsonl")
        last = trained[-1]["step"] if trained else 0
        if len(trained) == self.lines or last == self.resumed:
            return "while starting"
        if last % self.eval_every == 0 and last not in [line["step"] for line in evaluated]:
            return "in an evaluation"
        return "between steps"


def same_bits(out: Path, whole: Path) -> None:
    """Weights, the best ones, the log, each image's scores and pictures; and no resume saw a step that differs."""
    said = out.with_suffix(".err").read_text()
    assert "differs" not in said and "Traceback" not in said and "damaged" not in said, said
    for name in ("model.safetensors", "checkpoints/best.safetensors"):
        x, y = load_file(out / name), load_file(whole / name)
        assert x.keys() == y.keys() and all(torch.equal(x[key], y[key]) for key in x), name
    logs = [
        [
            {k: v for k, v in line.items() if k not in NOT_OF_THE_SEED}
            for lines in read_metrics(run / "metrics.jsonl")
            for line in lines
        ]
        for run in (out, whole)
    ]
    assert logs[0] == logs[1]
    assert (out / "scores.json").read_bytes() == (whole / "scores.json").read_bytes()
    grids = [{path.name: path.read_bytes() for path in (run / "images").iterdir()} for run in (out, whole)]
    assert grids[0] == grids[1]


def kill_until(start: Start, argv: list[str], folder: Path, kills: int, reach: int, seed: int) -> Counter[str]:
    """A run without kills, then chains until there were ``kills``. reach: see ``Chain``.

    Prints each kill as it comes, and the sum of each chain, which counts once its bits have been compared.
    """
    whole = folder / "whole"
    process = start([*argv, "--out", str(whole)], whole.with_suffix(".err"))
    assert process.wait(7200) == 0, process.said()
    eval_every, total = RunFolder(whole).read_config().eval_every, Counter[str]()
    for number in range(kills):
        out = folder / f"chain-{number}"
        rng = random.Random(f"{seed} {number}")
        total += Chain(start, argv, out, rng, reach, eval_every).run(kills - total.total())
        same_bits(out, whole)
        resumes = out.with_suffix(".err").read_text().count("repeat bit for bit")
        print(
            f"after {out.name}: {total.total()} kills {dict(total)}, 0 bits differ, {resumes} resumes said so",
            flush=True,
        )
        if total.total() >= kills:
            break
    return total


def test_kills_on_two_threads_change_nothing(commands, tmp_path):
    """The test itself, on a model that trains in seconds."""
    argv = ["train", *flags(TINY)]
    places = kill_until(commands.start, argv, tmp_path, kills=4, reach=12, seed=1)
    assert places.total() == 4


@pytest.mark.long
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("as_it_is", [True, False], ids=["as it is", "checkpoints more often"])
def test_the_first_command_outlives_kills(commands, tmp_path, as_it_is):
    """The first command itself, as processes of their own; and with 200 steps, a checkpoint every five and an
    evaluation every 50, so that a kill costs seconds of work in place of a minute.

    FASTSLOTS_KILLS: of both (200), a tenth as it is. FASTSLOTS_KILLS_SEED: of the moments (0).
    """
    kills = int(os.environ.get("FASTSLOTS_KILLS", "200"))
    seed = int(os.environ.get("FASTSLOTS_KILLS_SEED", "0"))
    if as_it_is:
        kill_until(Process, ["train"], tmp_path, max(1, kills // 10), reach=1500, seed=seed)
    else:
        argv = ["train", "--steps=200", "--checkpoint_every=5", "--eval_every=50"]
        kill_until(commands.start, argv, tmp_path, kills - max(1, kills // 10), reach=12, seed=seed)
