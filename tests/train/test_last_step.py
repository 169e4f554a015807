"""What fails after the last step takes nothing with it: weights and log are whole, and the run says what is missing."""

from __future__ import annotations

import io
import json

import pytest
from tiny import MODEL_16

from fastslots.models import SlotVAE
from fastslots.runs.log import read_metrics
from fastslots.train import TrainConfig, fit

BROKEN = {
    "pictures of slots": "fastslots.evaluation.grids.SlotPictures.grid",
    "the page": "fastslots.train.recorder.write_report",
    "the explorer": "fastslots.train.recorder.write_explorer",
    "one picture of the explorer": "fastslots.report.explorer.slot_jacobian",
    "scores of images": "fastslots.runs.log.MetricsLog.cost",
    "the last evaluation": "fastslots.train.loop.evaluate",
    "encoding a picture": "fastslots.train.recorder.encoded",
}


def config_of(**overrides) -> TrainConfig:
    few = dict(
        octaves=3, batch_size=4, steps=3, threads=1, eval_images=4, eval_every=0, checkpoint_every=0, log_every=1
    )
    return TrainConfig.preset("sprites-mini", **{**MODEL_16, **few, **overrides})


def fails(*_: object, **__: object) -> None:
    raise ZeroDivisionError("it is broken")


@pytest.mark.parametrize("part", BROKEN)
def test_a_broken_part_costs_no_weights(part, tmp_path, monkeypatch):
    monkeypatch.setattr(BROKEN[part], fails)
    said = io.StringIO()
    result = fit(config_of(), out=tmp_path / "run", stream=said)
    assert result.step == 3
    steps, evaluations = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in steps] == [1, 2, 3] and bool(evaluations) == (part != "the last evaluation")
    SlotVAE.from_run(tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints" / "step_00000003.safetensors").is_file()
    assert said.getvalue().count("it is broken") >= 1


def test_a_tracker_that_breaks_at_the_end_costs_no_weights(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.setattr("fastslots.runs.trackers.TensorBoard.close", fails)
    said = io.StringIO()
    assert fit(config_of(tensorboard=True), out=tmp_path / "run", stream=said).step == 3
    assert said.getvalue().count("warning   tensorboard has failed at its end (it is broken)") == 1
    SlotVAE.from_run(tmp_path / "run")


def test_a_callback_that_breaks_at_the_end_finds_all_on_the_disk(tmp_path):
    """It is the caller's code, so its exception is the caller's to see; nothing of the run is lost with it."""

    class Last:
        def on_end(self, folder) -> None:
            SlotVAE.from_run(folder)
            raise ZeroDivisionError("it is broken")

    with pytest.raises(ZeroDivisionError):
        fit(config_of(), out=tmp_path / "run", stream=io.StringIO(), callbacks=[Last()])
    assert json.loads((tmp_path / "run" / "explorer.json").read_text())["images"]
    assert fit(config_of(), out=tmp_path / "run", resume=True, stream=io.StringIO()).step == 3
