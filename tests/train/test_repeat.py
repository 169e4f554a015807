"""A resume proves itself: what the log held beyond its checkpoint is repeated, and compared."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny import MODEL_8

from fastslots.cli import main
from fastslots.data.open import pack
from fastslots.runs.log import read_metrics
from fastslots.train import TrainConfig, fit, recorder

TINY = dict(MODEL_8, batch_size=2, threads=1, eval_every=3, eval_images=2, checkpoint_every=2, keep_checkpoints=5)


def config_of(**overrides) -> TrainConfig:
    return TrainConfig.preset("sprites-mini", **{**TINY, **overrides})


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return fit(config_of(steps=9), out=tmp_path_factory.mktemp("repeat") / "run").out


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """As a kill at step 9 would leave it: its newest checkpoint is of step 4."""
    run = shutil.copytree(finished, tmp_path / "run")
    for path in (run / "checkpoints").glob("step_*"):
        if int(path.stem.removeprefix("step_")) > 4:
            path.unlink()
    return run


def resumed(run: Path, **overrides) -> str:
    said = io.StringIO()
    fit(config_of(steps=9, **overrides), out=run, resume=True, stream=said)
    return said.getvalue()


def verdicts(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith("repeated") or "differs from before" in line]


def test_a_resume_says_that_it_repeats(run):
    assert verdicts(resumed(run)) == ["repeated  steps 5 to 9 repeat bit for bit what the log held of them"]
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl")[0]] == list(range(1, 10))
    assert verdicts(resumed(run)) == []  # nothing is left to repeat


def test_the_resume_of_a_resume(run, finished):
    """Twice, with evaluations and rotation between: as the run that was never stopped, to the last bit."""
    for at in (6, 2):
        resumed(run)
        for path in (run / "checkpoints").glob("step_*"):
            if int(path.stem.removeprefix("step_")) > at:
                path.unlink()
    resumed(run, keep_checkpoints=1)
    lines = [
        [{k: v for k, v in line.items() if k not in ("images_per_s", "seconds")} for line in (*both[0], *both[1])]
        for both in (read_metrics(at / "metrics.jsonl") for at in (run, finished))
    ]
    assert lines[0] == lines[1]
    assert (run / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()


def alter(run: Path, step: int, **values: object) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["step"] == step and "eval" not in line:
            line.update(values)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_first_difference_is_named(run):
    alter(run, 7, loss=1.5)
    alter(run, 8, loss=2.5)
    (verdict,) = verdicts(resumed(run))
    assert verdict.startswith("warning   step 7 differs from before the resume: loss was 1.5, is ")
    assert "nothing that is recorded has changed" in verdict


def test_what_has_changed_is_named(run):
    machine = json.loads((run / "machine.json").read_text())
    machine["versions"]["torch"] = "1.0"
    (run / "machine.json").write_text(json.dumps(machine | {"processes": 4, "machine": "another, 64 threads"}))
    (verdict,) = verdicts(resumed(run, lr=2e-3))
    assert verdict.startswith("warning   step 5 differs") or verdict.startswith("warning   step 6 differs")
    for words in ("lr 0.0", "torch '1.0' -> ", "processes 4 -> 1", "machine 'another, 64 threads' -> "):
        assert words in verdict


def test_an_evaluation_that_differs_is_named(run):
    text = (run / "metrics.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in text]
    for line in lines:
        if line.get("eval") and line["step"] == 6:
            line["recon"] += 1
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (verdict,) = verdicts(resumed(run))
    assert "step 6 differs from before the resume: recon was " in verdict


@pytest.mark.parametrize(
    "line", [b"", b"{", b"[]\n", b"[" * 100_000 + b"\n", b'{"step": "x"}\n', b'{"step": 7, "a": 1}\n']
)
def test_lines_that_are_none_are_passed_over(run, line):
    with open(run / "metrics.jsonl", "ab") as log:
        log.write(line)
    assert len(verdicts(resumed(run))) == 1


def test_other_pictures_under_the_same_path_are_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(recorder, "same_images", lambda *_: True)
    rng = np.random.default_rng(0)
    said = ""
    for steps in (2, 4):
        np.savez(tmp_path / "a.npz", arr_0=rng.integers(0, 256, (40, 8, 8, 3), np.uint8))
        shutil.rmtree(tmp_path / "packed", ignore_errors=True)
        pack(tmp_path / "a.npz", tmp_path / "packed")
        stream = io.StringIO()
        config = config_of(steps=steps, data=str(tmp_path / "packed"))
        fit(config, out=tmp_path / "run", resume=True, stream=stream)
        said += stream.getvalue()
    assert said.count("other images than before from here on: their fingerprint was ") == 1


def test_the_page_of_such_a_run_is_written(run):
    resumed(run)
    assert main(["report", str(run), "--no_explorer"]) == 0
