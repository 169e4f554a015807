"""`fastslots compare`: which scores of runs are set beside each other, and what is said of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastslots.cli import main
from fastslots.runs.folder import RunFolder
from fastslots.sweep.compare import run_names
from fastslots.train import TrainConfig


def write_run(folder: Path, j_ari: float, measured=(), images: int = 8, data: str = "sprites", **fields) -> Path:
    """A run's files without the training."""
    folder.mkdir(parents=True)
    config = TrainConfig.preset("sprites-mini", preset_name="sprites-mini", steps=12, **fields)
    (folder / "config.json").write_text(config.to_json())
    (folder / "data.txt").write_text(data)
    lines = [{"step": n, "loss": 9.0 / n, "recon": 5.0 / n} for n in range(1, 13)]
    lines += [{"step": n, "eval": "val", "j_ari": j_ari * n / 12, "images": images, "latent": "mean"} for n in (6, 12)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "evaluations.json").write_text(json.dumps({"evaluations": list(measured)}))
    return folder


def entry(j_ari: float, split: str = "test", images: int = 100, **other) -> dict:
    fixed = {"latent": "mean", "weights": "best", "data": "sprites", "fingerprint": "", "recon": None}
    return {"j_ari": j_ari, "split": split, "images": images, **fixed, **other}


@pytest.fixture
def compared(capsys):
    def scores_of(*argv) -> dict:
        assert main(["compare", *map(str, argv), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return scores_of


def test_scores_are_of_one_kind_that_all_runs_have(tmp_path, compared):
    first = write_run(tmp_path / "a", 0.5, [entry(0.61), entry(0.7, images=500), entry(0.4, "val", 500)], seed=0)
    second = write_run(tmp_path / "b", 0.6, [entry(0.9, "val", 500), entry(0.8), entry(0.1, latent="sample")], seed=1)
    found = compared(first, second)  # test comes before val; the 500 test images are the first run's alone
    assert found["scores"] == {"j_ari": [0.61, 0.8]} and found["kind"] == "test, 100 images, z mean, best weights"
    assert found["differing"] == {"seed": [0, 1]} and found["runs"] == ["a", "b"]
    assert compared(first, second, "--split", "val")["scores"] == {"j_ari": [0.4, 0.9]}
    (group,) = found["groups"]
    assert group["runs"] == [0, 1] and group["scores"]["j_ari"]["mean"] == pytest.approx(0.705)


def test_evaluations_of_other_data_are_not_set_beside_each_other(tmp_path, compared, capsys):
    first = write_run(tmp_path / "a", 0.5, [entry(0.6, fingerprint="1111")])
    second = write_run(tmp_path / "b", 0.6, [entry(0.8, fingerprint="2222")], images=9, data="others")
    found = compared(first, second)
    assert found["scores"] == {"j_ari": [0.5, 0.6]} and "last evaluation" in found["kind"]
    assert found["notes"] == [
        "the runs' last evaluations are not of the same images (8, 9)",
        "the runs were trained on different images",
    ]
    assert main(["compare", str(first), str(second), "--split", "test"]) == 2
    assert "run `fastslots eval RUN --split test` for each first" in capsys.readouterr().err


def test_the_table_has_the_differing_fields_then_the_scores(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folders = [write_run(tmp_path / name / "run", 0.5 + n / 10, alpha=n, threads=n) for n, name in enumerate("ab")]
    assert main(["compare", *map(str, folders)]) == 0
    printed = capsys.readouterr()
    lines = [line.split() for line in printed.out.splitlines()]
    assert lines[1:] == [
        ["a/run", "b/run", "difference"],
        ["alpha", "0", "1"],
        ["j_ari", "0.5", "0.6", "+0.1"],
    ]
    assert "page      compare.html" in printed.err
    page = (tmp_path / "compare.html").read_text()
    facts = json.loads(page.split("id=facts>")[1].split("</script>")[0])
    assert [run["name"] for run in facts["runs"]] == ["a/run", "b/run"]
    assert facts["compare"]["differing"] == {"alpha": [0.0, 1.0], "threads": [0, 1]}


def test_seeds_are_taken_together(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cells = [(alpha, seed) for alpha in (0.0, 2.0) for seed in (0, 1, 2)]
    runs = [write_run(tmp_path / f"r{n}", 0.1 * n, alpha=a, seed=s) for n, (a, s) in enumerate(cells)]
    assert main(["compare", *map(str, runs)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].split() == ["0", "3", "0.100", "±", "0.100"] and lines[-1].split() == [
        "2",
        "3",
        "0.400",
        "±",
        "0.100",
    ]


def test_what_is_no_comparison_is_refused(tmp_path, capsys):
    run = write_run(tmp_path / "a", 0.5)
    for argv, message in (
        ([run], "two runs or more"),
        ([run, tmp_path], "is no run directory"),
        ([run, run], "are the same run: name each once"),
    ):
        assert main(["compare", *map(str, argv)]) == 2
        assert message in capsys.readouterr().err


def test_runs_are_named_by_what_tells_them_apart(tmp_path):
    paths = ["x/one/run", "x/two/run", "y/two/run"]
    assert run_names([RunFolder(tmp_path / path) for path in paths]) == paths
    assert run_names([RunFolder(tmp_path / "a"), RunFolder(tmp_path / "b")]) == ["a", "b"]
