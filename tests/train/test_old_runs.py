"""What fastslots wrote at commit db47fb6 still works: a run goes on, is scored and reported, a packed set is read.

``data_files/run_of_db47fb6`` holds both, the program that made them, and the numbers that it printed.
Numbers of another processor differ in their last bits; what is read from the files does not.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastslots.cli import main
from fastslots.config.run import read_config
from fastslots.data import open_dataset
from fastslots.models import SlotVAE
from fastslots.report import run_facts
from fastslots.runs.folder import RunFolder
from fastslots.runs.log import read_metrics
from fastslots.train.loop import Trainer

FILES = Path(__file__).parent.parent / "data_files" / "run_of_db47fb6"
EXPECTED = json.loads((FILES / "expected.json").read_text())


@pytest.fixture
def run(tmp_path) -> Path:
    return Path(shutil.copytree(FILES / "run", tmp_path / "run"))


def assert_same(actual: dict, expected: dict, but: tuple[str, ...] = ()) -> None:
    """Every value that the old version gave; numbers within 1e-4 of them."""
    for name in expected.keys() - set(but):
        value = expected[name]
        if isinstance(value, float):
            assert actual[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
        else:
            assert actual[name] == value, name


def sum_of_scores(line: dict) -> float:
    return line["j_ari"] + line["jis"]


def test_a_checkpoint_is_loaded_exactly_and_its_run_goes_on(run):
    kept = load_file(run / "checkpoints" / "step_00000004.safetensors")
    folder = RunFolder(run)
    with contextlib.ExitStack() as stack:
        stack.callback(folder.release)
        trainer = Trainer(read_config(run / "config.json"), None, folder, stack)
        loaded = {f"model.{name}": value for name, value in trainer.model.state_dict().items()}
        loaded |= {f"optimizer.{name}": value for name, value in trainer.optimizers.state()[0].items()}
        assert trainer.step == 4 and trainer.best == max(
            sum_of_scores(line) for line in read_metrics(folder.metrics)[1]
        )
    assert kept.keys() == loaded.keys()
    assert all(torch.equal(loaded[name], value) and loaded[name].dtype == value.dtype for name, value in kept.items())
    assert main(["train", "--out", str(run), "--resume", "--steps=8"]) == 0
    training, evaluations = read_metrics(run / "metrics.jsonl")
    expected = EXPECTED["resumed"]
    assert [line["step"] for line in training] == list(range(1, 9))
    for actual, old in zip(training, [line for line in expected if "eval" not in line], strict=True):
        assert_same(actual, old, but=("images_per_s",))
    for actual, old in zip(evaluations, [line for line in expected if "eval" in line], strict=True):
        assert_same(actual, old, but=("seconds",))


def test_a_run_is_scored_as_before(run, capsys):
    assert main(["eval", str(run), "--images", "8", "--json"]) == 0
    assert_same(json.loads(capsys.readouterr().out), EXPECTED["best"], but=("seconds",))
    arguments = ["--data", str(FILES / "packed"), "--weights", "last", "--split", "test", "--json"]
    assert main(["eval", str(run), *arguments]) == 0
    assert_same(json.loads(capsys.readouterr().out), EXPECTED["last_on_packed"], but=("seconds", "data"))


def test_a_run_is_reported_as_before(run):
    assert main(["report", str(run)]) == 0
    facts = run_facts(run)
    for name, value in EXPECTED["facts"].items():
        assert facts[name] == value, name
    assert [grid["step"] for grid in facts["grids"]] == [2, 4]
    assert facts["explorer"]["weights"] == "best" and len(facts["explorer"]["images"]) == 6
    assert (run / "report.html").stat().st_size > 20_000


def test_the_weights_of_a_run_are_loaded_exactly(run):
    for name, path in (("best", "checkpoints/best.safetensors"), ("last", "model.safetensors")):
        state = SlotVAE.from_run(run, name).state_dict()
        kept = load_file(run / path)
        assert kept.keys() == state.keys() and all(torch.equal(state[key], kept[key]) for key in kept)


def test_a_packed_set_is_read(run):
    packed = open_dataset(FILES / "packed")
    packed.verify()
    images, masks = packed.batch(np.arange(len(packed)))
    assert images.tobytes() == (FILES / "packed" / "images.u8").read_bytes()
    assert masks.tobytes() == (FILES / "packed" / "masks.u8").read_bytes()
    assert packed.info.digest == "94eb94d3456f93dadae77ca6e1ec9425" and len(packed.factors()) == 7
