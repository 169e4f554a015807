"""Rates and weights by step, against tables written by hand from the published program's description."""

from __future__ import annotations

import dataclasses
import io
import json

import pytest
from tiny import MODEL_16

from fastslots.cli import main
from fastslots.config.presets import preset_names
from fastslots.config.run import LATER_FIELDS, read_config
from fastslots.errors import UserError
from fastslots.report import run_facts
from fastslots.train import TrainConfig, fit
from fastslots.train.schedule import alpha_at, beta_at, late_ramps, lr_at

DECADE = 0.1 ** (1 / 500_000)  # a step's decay


@pytest.mark.parametrize(
    "preset, table",
    [
        (
            "sprites",
            {
                1: 0.0,  # the rate is set after each update, so the first one has none
                2: 5e-4 / 10_000,
                5_001: 2.5e-4,
                10_001: 5e-4,
                30_000: 5e-4,
                30_001: 5e-4 * DECADE**20_000,  # for one update, the decay is counted from the end of the warm-up
                30_002: 1e-4 * DECADE,
                230_001: 1e-4 * 0.1**0.4,
                500_000: 1e-4 * DECADE**469_999,
            },
        ),
        ("clevr6", {1: 0.0, 1_251: 2.5e-4, 2_501: 5e-4, 30_001: 5e-4 * DECADE**27_500, 30_002: 1e-4 * DECADE}),
        ("clevrtex", {1: 0.0, 5_001: 2.5e-4, 10_001: 5e-4, 30_001: 5e-4 * DECADE**20_000, 260_001: 5e-4 * 0.1**0.5}),
    ],
)
def test_published_rates(preset, table):
    config = TrainConfig.preset(preset)
    for step, rate in table.items():
        assert lr_at(config, step) == pytest.approx(rate, rel=1e-12), step


def test_alpha_ramp_is_published():
    config = TrainConfig.preset("clevr6")
    expected = {1: 0.05 / 25_000, 12_500: 0.025, 25_000: 0.05, 400_000: 0.05}
    for step, alpha in expected.items():
        assert alpha_at(config, step) == pytest.approx(alpha, rel=1e-12)
    assert beta_at(config, 1) == 0.05


def test_cosine_constant_and_ramps():
    config = TrainConfig(schedule="cosine", steps=100, warmup=10, lr=1.0, beta=0.5, beta_start=20, beta_warmup=40)
    assert lr_at(config, 5) == pytest.approx(0.5, abs=0.01)
    assert lr_at(config, 51) == pytest.approx(0.5)
    assert 0 < lr_at(config, 100) < 0.001
    assert [beta_at(config, step) for step in (1, 20, 40, 60, 100)] == [0, 0, 0.25, 0.5, 0.5]
    ramp = TrainConfig(alpha=1.0, alpha_start=10, alpha_warmup=10, alpha_floor=0.2)
    assert [round(alpha_at(ramp, step), 12) for step in (1, 10, 15, 20, 30)] == [0.2, 0.2, 0.6, 1.0, 1.0]
    constant = TrainConfig(schedule="constant", warmup=0, lr=0.3)
    assert lr_at(constant, 1) == lr_at(constant, 10_000) == 0.3


@pytest.mark.parametrize("preset", preset_names())
def test_a_shorter_run_of_a_preset_trains_the_whole_recipe(preset):
    whole = TrainConfig.preset(preset)
    ratio = 5
    short = TrainConfig.preset(preset, steps=whole.steps // ratio)
    assert not late_ramps(whole) and not late_ramps(short) and not late_ramps(TrainConfig.preset(preset, steps=10))
    for step in (short.steps * percent // 100 for percent in (2, 5, 6, 10, 20, 50, 100)):
        long = step * ratio
        assert alpha_at(short, step) == pytest.approx(alpha_at(whole, long), rel=1e-6, abs=1e-9)
        assert beta_at(short, step) == pytest.approx(beta_at(whole, long), rel=1e-6, abs=1e-9)
    shift = 1 if whole.schedule.startswith("paper") else 0  # f(n - 1)
    for step in (short.steps * percent // 100 for percent in (1, 4, 9, 20, 50, 99)):
        expected = lr_at(whole, step * ratio + shift)
        assert lr_at(short, step + shift) == pytest.approx(expected, rel=0.01, abs=1e-4 * whole.lr)
    assert alpha_at(short, short.steps) == short.alpha and beta_at(short, short.steps) == short.beta


def test_a_length_is_steps_or_a_share_and_never_both():
    config = TrainConfig(
        steps=200, warmup="2.5 %", alpha_start="8%", alpha_warmup=24, beta_warmup="1_000", beta_start=1
    )
    lengths = [config.in_steps(name) for name in ("warmup", "alpha_start", "alpha_warmup", "beta_start", "beta_warmup")]
    assert lengths == [5, 16, 24, 1, 1000]
    assert (config.warmup, config.beta_warmup) == ("2.5%", 1000)  # the plainest form is what config.json has
    for wrong in (0.08, 1.0, "0.08", "101%", "-1%", "nan%", "%", "many", "", -1, True, None, 1 << 70, "9" * 40):
        with pytest.raises(
            UserError, match="alpha_warmup must be whole steps from 0 on, or a share of the run such as"
        ):
            TrainConfig(alpha_warmup=wrong)
    with pytest.raises(UserError, match="decay_steps must be at least one step for schedule paper, got 0"):
        TrainConfig(decay_steps=0)


def test_lengths_on_the_command_line(capsys):
    assert main(["train", "--alpha_warmup", "0.08"]) == 2
    assert "--alpha_warmup" in (said := capsys.readouterr().err) and "got '0.08'" in said


def test_old_config_files_keep_their_meaning(tmp_path):
    """A run's file of before: lengths in steps, whatever the run's; and none of the fields that came later."""
    old = {
        name: value
        for name, value in dataclasses.asdict(TrainConfig.preset("clevr6", preset_name="clevr6", steps=1_000)).items()
        if name not in LATER_FIELDS
    } | {"warmup": 2_500, "alpha_warmup": 25_000}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(old))
    for config in (read_config(path), read_config(path, preset="clevr6")):
        assert (config.plateau_end, config.decay_steps, config.queries, config.cnn_kernel) == (
            30_000,
            500_000,
            "learned",
            5,
        )
        assert lr_at(config, 1_000) == pytest.approx(5e-4 * 999 / 2_500)
        assert alpha_at(config, 1_000) == pytest.approx(0.05 / 25)
    path.write_text(json.dumps(old | {"preset_name": "sprites-mini"}))
    assert read_config(path, preset="sprites-mini").queries == "learned"
    path.write_text('{"alpha": 0.5}')  # of a few fields: the rest is the preset's of now
    assert read_config(path, preset="clevr6").plateau_end == "6%"
    assert read_config(path).plateau_end == 30_000


def test_ramps_that_end_after_the_run_are_said_before_it_and_in_its_report(tmp_path):
    few = dict(MODEL_16, batch_size=2, steps=3, threads=1, eval_images=2, eval_every=0)
    late = dict(warmup=4, alpha_start=1, alpha_warmup=3, beta_start="0%", beta_warmup=25_000)
    said = io.StringIO()
    fit(TrainConfig.preset("sprites-mini", **few, **late), out=tmp_path / "late", stream=said)
    lines = said.getvalue().splitlines()
    first = min(i for i, line in enumerate(lines) if line.startswith("step"))
    warned = [line.removeprefix("warning   ") for line in lines[:first] if line.startswith("warning")]
    assert [line.split(" is still rising")[0] for line in warned] == ["the learning rate", "alpha", "beta"]
    assert "its ramp ends at step 25,000; shorten --beta_warmup, or give it as a share" in warned[2]
    assert run_facts(tmp_path / "late")["warnings"] == warned
    assert all(line.split(";")[0] in (tmp_path / "late" / "report.html").read_text() for line in warned)
    fit(TrainConfig.preset("sprites-mini", **few), out=tmp_path / "whole", stream=io.StringIO())
    assert run_facts(tmp_path / "whole")["warnings"] == []
    off = TrainConfig.preset("sprites-mini", **few, **late, alpha=0.0, beta=0.0)
    assert [line.split(" is")[0] for line in late_ramps(off)] == ["the learning rate"]  # nothing else is in use
