"""Rates and weights by step, against tables written by hand from the published program's description."""

from __future__ import annotations

import pytest

from fastslots.train import TrainConfig
from fastslots.train.schedule import alpha_at, beta_at, lr_at

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
