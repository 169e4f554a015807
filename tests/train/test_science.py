"""The tables of alpha, beta and queries: scores of each run's three sets of images, means, and paired tests."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from tiny import MODEL_16

from fastslots.data.sources import open_source, unseen
from fastslots.evaluation.evaluate import evaluate
from fastslots.models import SlotVAE
from fastslots.train import TrainConfig, fit

RULE = "shape=square,hue=0.5:0.75"


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).parents[2] / "scripts" / "science_tables.py"
    spec = importlib.util.spec_from_file_location("science_tables", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_runs_are_scored_on_what_they_saw_on_what_they_did_not_and_on_more(script, tmp_path):
    few = dict(MODEL_16, batch_size=2, steps=1, threads=1, eval_images=2, holdout=RULE)
    for queries, alpha in (("seeded", 0.0), ("seeded", 2.0), ("learned", 2.0)):
        config = TrainConfig.preset("sprites-mini", **few, queries=queries, alpha=alpha, seed=4)
        fit(config, out=tmp_path / "sweep" / f"{queries}-{alpha:g}")
    shown = script.main(tmp_path / "sweep", 6, "4-5", tmp_path / "out.json")
    made = json.loads((tmp_path / "out.json").read_text())
    assert [(r["queries"], r["alpha"], r["more_slots"]) for r in made["runs"]] == [
        ("seeded", 0.0, 6),
        ("seeded", 2.0, 6),
        ("learned", 2.0, 3),
    ]
    assert len(made["cells"]) == 3 and "| seeded | 2 | 0.1 | 1 |" in shown and not made["paired"]  # one seed is no test
    run, model = made["runs"][1], SlotVAE.from_run(tmp_path / "sweep" / "seeded-2", "last")
    config = TrainConfig.preset("sprites-mini", **few, alpha=2.0, seed=4)
    several = TrainConfig.preset("sprites-mini", **few, objects="4-5")
    for name, scorer, split in (
        ("seen", model, open_source(config).splits["test"][:6]),
        ("unseen", model, unseen(config, 6)),
        ("more", model.with_slots(6), open_source(several).splits["test"][:6]),
    ):
        expected = evaluate(scorer, split).scores()
        for score in ("j_ari", "jis", "recon"):
            assert run[name][score] == pytest.approx(expected[score], rel=1e-3, abs=1e-4)


def of(script, seed: int, alpha: float, beta: float, j_ari: float) -> dict:
    scores = {name: {"j_ari": j_ari, "jis": 1 - j_ari, "recon": 1.0} for name in script.SETS}
    return {"queries": "seeded", "alpha": alpha, "beta": beta, "seed": seed} | scores


def test_differences_are_paired_by_seed(script):
    runs = [of(script, seed, 0.0, 0.1, 0.5 + seed / 10) for seed in (1, 2, 3)]
    runs += [of(script, seed, 2.0, 0.1, 0.5 + seed / 10 + gain) for seed, gain in ((3, 0.03), (1, 0.01), (2, 0.02))]
    runs += [of(script, 9, 2.0, 0.1, 0.9)]  # a seed that the other cell has not
    tests = {(t["effect"], t["set"], t["score"]): t for t in script.paired(runs)}
    found = tests["alpha, beside beta", "unseen", "j_ari"]
    assert (found["seeds"], found["same_sign"]) == (3, 3)
    assert found["difference"] == pytest.approx(0.02) and found["deviation"] == pytest.approx(0.01)
    # t = 0.02 / (0.01 / √3) = 2√3 at 2 degrees of freedom: p = 1 − t / √(t² + 2)
    assert found["p"] == pytest.approx(1 - 12**0.5 / 14**0.5)
    assert tests["alpha, beside beta", "seen", "jis"]["difference"] == pytest.approx(-0.02)
    assert {effect for effect, _, _ in tests} == {"alpha, beside beta"}
    rows = script.cell_rows(runs)
    assert rows[0]["seen"]["j_ari"] == pytest.approx([0.7, 0.1])
    assert "+0.020 (p 0.074, 3 of 3)" in script.tables(rows, script.paired(runs))
