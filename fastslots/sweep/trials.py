"""Sweeps: every combination of some fields' values, each with several seeds, as processes on this machine.

A trial is a ``fastslots train`` of its own, in a folder of its own, so that one that fails takes no other with it and
an interrupted sweep goes on where it was: finished trials are kept, started ones resume from their checkpoints.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fastslots.config.run import TrainConfig
from fastslots.errors import UserError
from fastslots.evaluation.kept import kept_scores
from fastslots.evaluation.of_run import Asked
from fastslots.files import open_log, refuse_special
from fastslots.runs.folder import RunFolder
from fastslots.runs.log import read_metrics
from fastslots.threads import COUNT, asked, usable_processors

LOG = "sweep.log"  # what a trial printed
EARLIER_SCORES = "sweep_scores.json"  # where sweeps kept what `fastslots eval` gave, before runs kept it themselves
MAY_DIFFER = {"steps", "device", "threads", "log_every", "keep_checkpoints", "checkpoint_every"}
"""Fields that a restarted sweep may change without making finished trials into something else."""
EVALUATED = ("--weights", "last")  # of `fastslots eval`, unless --eval says otherwise
PATIENCE = 60.0  # seconds that interrupted trials get for their last checkpoint


@dataclass(frozen=True)
class Trial:
    """One run of a sweep: ``cell`` holds the values that vary between cells, the seed aside."""

    cell: dict[str, Any]
    config: TrainConfig
    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name


@dataclass(frozen=True)
class Scoring:
    """How finished trials are scored: ``arguments`` of `fastslots eval`, and what they ask for."""

    arguments: tuple[str, ...]
    asked: Asked


@dataclass
class TrialResult:
    """``scores`` of a finished trial; else ``error``, one line that says why there are none."""

    trial: Trial
    scores: dict[str, Any]
    error: str = ""


def make_trials(
    preset: str,
    varied: dict[str, Sequence[Any]],
    fixed: dict[str, Any],
    seeds: Sequence[int],
    out: Path,
    also: Sequence[dict[str, Any]] = (),
) -> list[Trial]:
    """All combinations of ``varied`` with all seeds, cell by cell; then the cells ``also``.

    also: fields in which a cell differs from ``fixed`` and the preset; it does not follow ``varied``. Every cell of the
    table has every field that any cell sets.
    A trial that ``out`` already holds keeps its folder, whatever its name: grids may grow and shrink.

    Raises UserError where a combination is no configuration, or a folder holds a run that is not this trial.
    """
    runs = [RunFolder(path) for path in sorted(out.glob("*")) if RunFolder(path).config.is_file()]
    there = {_identity(run.read_config()): run.path for run in runs}
    columns = list(dict.fromkeys([*varied, *(name for cell in also for name in cell)]))
    grid = [dict(zip(varied, values, strict=True)) for values in itertools.product(*varied.values())]
    trials = []
    for given in (*grid, *also):
        for seed in seeds:
            config = TrainConfig.preset(preset, **{**fixed, **given, "seed": seed})
            cell = {name: getattr(config, name) for name in columns}
            parts = [f"{field}_{_slug(value)}" for field, value in (cell | {"seed": seed}).items()]
            trials.append(Trial(cell, config, there.get(_identity(config), out / "-".join(parts))))
    if len({trial.folder for trial in trials}) != len(trials):
        raise UserError("the same value is given twice for a field or seed: name each once")
    for trial in trials:
        _check_folder(trial)
    return trials


def run_trials(
    trials: Sequence[Trial],
    jobs: int = 1,
    scoring: Scoring | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> list[TrialResult]:
    """Train what is not finished, ``jobs`` at once, each with its share of the cores -> results, in order.

    scoring: of each finished trial whose folder does not hold those scores yet; None: the scores are those of the
    run's own last evaluation. An exception here (Ctrl-C) asks the running trials to stop at a checkpoint, and waits for
    them.
    """
    processes = Processes(max(1, usable_processors() // jobs))
    results: dict[str, TrialResult] = {}
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(run_trial, trial, scoring, processes) for trial in trials]
        try:
            for done in as_completed(futures):
                result = done.result()
                results[result.trial.name] = result
                say(progress_line(result, len(results), len(trials)))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            processes.stop()
            raise
    return [results[trial.name] for trial in trials]


def finished(trial: Trial) -> bool:
    """Whether the trial's last step has been evaluated and saved."""
    return (
        RunFolder(trial.folder).checkpoint(trial.config.steps).is_file()
        and _last_evaluation(trial).get("step") == trial.config.steps
    )


def command(trial: Trial) -> list[str]:
    """What trains a trial, in any working directory: only fields that differ from the preset are named."""
    config = trial.config.resolved()
    plain = TrainConfig.preset(config.preset_name)
    flags = []
    for field in fields(config):
        value = getattr(config, field.name)
        # A resumed run takes its fields from its folder: what may change is always said.
        if value != getattr(plain, field.name) or field.name in MAY_DIFFER:
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            flags.append(f"--{field.name}={text}")
    return ["train", config.preset_name, *flags, "--out", str(trial.folder), "--resume"]


class Processes:
    """The running ``fastslots`` processes, so that all can be asked to stop."""

    def __init__(self, threads: int):
        # PYTHONSAFEPATH: a checkout in the working directory must not hide the installed package.
        self._environment = {**os.environ, COUNT: asked() or str(threads), "PYTHONSAFEPATH": "1"}
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopping = False

    def run(self, arguments: Iterable[str], stdout: Any, stderr: Any) -> int:
        if self._stopping:
            return 143
        # Its own session: a Ctrl-C in the terminal reaches the sweep alone, which then asks each trial once.
        process = subprocess.Popen(
            [sys.executable, "-m", "fastslots", *arguments],
            stdout=stdout,
            stderr=stderr,
            env=self._environment,
            start_new_session=True,
        )
        self._running.add(process)
        if self._stopping:  # asked to between the check and the start
            process.terminate()
        code = process.wait()
        self._running.discard(process)
        return code

    def stop(self) -> None:
        self._stopping = True
        for process in list(self._running):
            process.terminate()
        for process in list(self._running):
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()


def run_trial(trial: Trial, scoring: Scoring | None, processes: Processes) -> TrialResult:
    """Train it unless it is finished, and score it; what goes wrong with it is in the result."""
    try:
        trial.folder.mkdir(parents=True, exist_ok=True)
        if not finished(trial):
            with open_log(trial.folder / LOG) as log:
                code = processes.run(command(trial), log, log)
            if code or not finished(trial):
                return TrialResult(trial, {}, _reason(trial, code))
        scores = _evaluated(trial, scoring, processes) if scoring else _last_evaluation(trial)
    except (OSError, ValueError) as error:
        return TrialResult(trial, {}, " ".join(str(error).split()))
    return TrialResult(trial, scores)


def _evaluated(trial: Trial, scoring: Scoring, processes: Processes) -> dict[str, Any]:
    """The scores of ``fastslots eval``, which the trial's folder may hold."""
    if scores := kept_scores(RunFolder(trial.folder), scoring.asked):
        return scores
    with contextlib.suppress(OSError, ValueError, KeyError):
        kept: dict[str, Any] = json.loads((trial.folder / EARLIER_SCORES).read_text())
        if (kept["arguments"], kept["step"]) == (list(scoring.arguments), trial.config.steps):
            return dict(kept["scores"])
    output, errors = trial.folder / ".eval.out", trial.folder / LOG
    refuse_special(output)
    with open(output, "wb") as out, open_log(errors) as log:
        own = ["--model", trial.config.model] if trial.config.model else []  # named on the sweep's command line
        flags = [*EVALUATED, "--allow-remote", *own, *scoring.arguments, "--json"]
        code = processes.run(["eval", str(trial.folder), *flags], out, log)
    text = output.read_text()
    output.unlink()
    if code:
        raise UserError(_reason(trial, code))
    found: dict[str, Any] = json.loads(text.splitlines()[-1])
    return found


def _last_evaluation(trial: Trial) -> dict[str, Any]:
    evaluations = read_metrics(RunFolder(trial.folder).metrics)[1]
    return evaluations[-1] if evaluations else {}


def _identity(config: TrainConfig) -> tuple[Any, ...]:
    """What makes two runs the same trial."""
    config = config.resolved()
    return tuple(getattr(config, field.name) for field in fields(config) if field.name not in MAY_DIFFER)


def _check_folder(trial: Trial) -> None:
    folder = RunFolder(trial.folder)
    if not folder.config.is_file():
        return
    there, asked = folder.read_config().resolved(), trial.config.resolved()
    names = (f.name for f in fields(TrainConfig) if f.name not in MAY_DIFFER)
    different = [name for name in names if getattr(there, name) != getattr(asked, name)]
    if different:
        raise UserError(f"{trial.folder} holds a run with another {', '.join(different)}: name another --out")


def _reason(trial: Trial, code: int) -> str:
    path = trial.folder / LOG
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return f"exit code {code}: {lines[-1].strip() if lines else 'nothing was printed'} ({path})"


def progress_line(result: TrialResult, done: int, total: int) -> str:
    scores = result.scores
    shown = (name for name in ("j_ari", "jis", "fg_ari", "recon") if isinstance(scores.get(name), int | float))
    state = "  ".join(f"{name} {scores[name]:.4g}" for name in shown)
    return f"[{done}/{total}] {result.trial.name}: " + (f"failed: {result.error}" if result.error else state)


def show(value: Any, between: str = ",") -> str:
    """A field's value for people; ``between``: what stands between several widths."""
    if isinstance(value, tuple):
        return between.join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _slug(value: Any) -> str:
    return re.sub(r"[^A-Za-z0-9.+]+", "_", show(value, "x"))[-40:]
