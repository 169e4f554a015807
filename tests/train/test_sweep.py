"""Sweeps: which trials there are, how they run, restart and fail, and what the tables say."""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
import math
import statistics
from pathlib import Path
from xml.etree import ElementTree

import pytest
from tiny import MODEL_16, flags

from fastslots.cli import main
from fastslots.cli.common import aligned
from fastslots.cli.sweep import cell_of
from fastslots.config.run import TrainConfig
from fastslots.errors import UserError
from fastslots.sweep.tables import cells_of, csv_table, json_table, mean_and_std, plot, table_rows
from fastslots.sweep.trials import LOG, Trial, TrialResult, command, finished, make_trials

TINY = [*flags(MODEL_16), *"--batch_size 4 --steps 2 --eval_images 4".split()]


def test_a_sweep_survives_a_failing_trial_and_goes_on(tmp_path, capsys):
    out = tmp_path / "sweep"
    # A rate of 1e30 makes the loss infinite within the steps: that trial fails, its neighbour does not.
    sweep = ["sweep", *TINY, "--lr", "1e-3,1e30", "--schedule", "constant", "--warmup", "0", "--out", str(out)]
    sweep[sweep.index("--steps") + 1] = "6"
    assert main(sweep) == 1
    printed = capsys.readouterr()
    failure = printed.err.splitlines()[-2]
    assert failure.startswith("failed: lr_1e+30-seed_0: exit code 1: ") and "loss" in failure
    table = {row["lr"]: row for row in csv.DictReader((out / "sweep.csv").open())}
    assert table["0.001"]["trials"] == "1" and 0 <= float(table["0.001"]["mbo_mean"]) <= 1
    assert table["1e+30"]["trials"] == "0" and table["1e+30"]["failed"] == "1"
    assert "1 failed" in printed.out
    for metric in ("j_ari", "recon"):
        ElementTree.parse(out / f"{metric}.svg")

    # More steps, fewer rates: the trial is found again by its configuration and resumes.
    good = out / "lr_0.001-seed_0"
    again = [part if part != "1e-3,1e30" else "1e-3" for part in sweep]
    again[again.index("--steps") + 1] = "8"
    evaluated = [*again, "--eval=--split test --images 3"]
    assert main(evaluated) == 0
    assert "resumed at step 6" in (good / LOG).read_text()
    row = json.loads((out / "sweep.json").read_text())["trials"][0]
    assert row["scores"]["split"] == "test" and row["scores"]["images"] == 3 and row["scores"]["weights"] == "last"

    # The same again: nothing runs.
    written = {path: path.stat().st_mtime_ns for path in good.rglob("*")}
    assert main(evaluated) == 0
    assert {path: path.stat().st_mtime_ns for path in good.rglob("*")} == written
    (out / "seed_0").mkdir()
    (good / "config.json").rename(out / "seed_0" / "config.json")
    again[again.index("--batch_size") + 1] = "5"
    assert main(again) == 2
    assert "holds a run with another batch_size" in capsys.readouterr().err


def test_trials_are_all_combinations_with_all_seeds(tmp_path):
    varied = {"alpha": [0.0, 0.05], "output_hidden": [(8,), (8, 9)]}
    trials = make_trials("sprites-mini", varied, {"beta": 0.0}, [0, 1, 2], tmp_path)
    assert len(trials) == 12 and len({trial.folder for trial in trials}) == 12
    assert trials[-1].cell == {"alpha": 0.05, "output_hidden": (8, 9)}
    config = trials[-1].config
    assert (config.alpha, config.beta, config.output_hidden, config.seed) == (0.05, 0.0, (8, 9), 2)
    assert trials[0].name == "alpha_0-output_hidden_8-seed_0"
    with pytest.raises(UserError, match="given twice"):
        make_trials("sprites-mini", {"alpha": [0.0, 0.0]}, {}, [0], tmp_path)
    with pytest.raises(UserError, match="alpha must be at least 0"):
        make_trials("sprites-mini", {"alpha": [0.0, -1.0]}, {}, [0], tmp_path)


def test_cells_beside_the_grid(tmp_path):
    also = [cell_of("encoder=slot-attention,beta=0.2"), cell_of("output_hidden=8,9,decoder=broadcast")]
    assert also == [{"encoder": "slot-attention", "beta": 0.2}, {"output_hidden": (8, 9), "decoder": "broadcast"}]
    trials = make_trials("sprites-mini", {"alpha": [0.0, 2.0]}, {"beta": 0.3}, [0, 1], tmp_path, also)
    assert [trial.config.seed for trial in trials] == [0, 1] * 4
    cells = [trial.cell for trial in trials[::2]]
    preset = TrainConfig.preset("sprites-mini")
    usual = preset.alpha
    plain = {name: getattr(preset, name) for name in ("encoder", "output_hidden", "decoder")} | {"beta": 0.3}
    assert cells == [
        plain | {"alpha": 0.0},
        plain | {"alpha": 2.0},
        plain | {"alpha": usual, "encoder": "slot-attention", "beta": 0.2},
        plain | {"alpha": usual, "output_hidden": (8, 9), "decoder": "broadcast"},
    ]
    assert all(getattr(t.config, name) == value for t in trials for name, value in t.cell.items())


def test_the_command_of_a_trial_gives_its_configuration(tmp_path):
    from fastslots.cli import build_parser
    from fastslots.cli.train import config_of

    fixed = {"compile": True, "precision": "bf16", "steps": 7, "lr": 1e-30, "output_hidden": (8, 9)}
    [trial] = make_trials("clevr6", {}, fixed, [3], tmp_path)
    assert config_of(build_parser().parse_args(command(trial))) == trial.config


@pytest.mark.parametrize("stored, asked", [(Path.absolute, Path), (Path, Path.absolute), (Path, Path)])
def test_a_trial_is_found_whichever_way_its_data_are_named(tmp_path, monkeypatch, stored, asked):
    monkeypatch.chdir(tmp_path)
    fields = {"data": str(asked(Path("set.npz"))), "beta": 0.0}
    [trial] = make_trials("sprites-mini", {}, fields, [3], tmp_path / "sweep")
    (tmp_path / "sweep" / "other").mkdir(parents=True)
    kept = dataclasses.replace(trial.config, data=str(stored(Path("set.npz"))))
    (tmp_path / "sweep" / "other" / "config.json").write_text(kept.to_json())
    [found] = make_trials("sprites-mini", {}, fields, [3], tmp_path / "sweep")
    assert found.name == "other" and f"--data={tmp_path / 'set.npz'}" in command(found)


def test_finished_means_evaluated_and_saved_at_the_last_step(tmp_path):
    trial = Trial({}, TrainConfig.preset("sprites-mini", steps=6), tmp_path)
    (tmp_path / "checkpoints").mkdir()
    lines = [{"step": 3, "eval": "val"}, {"step": 6, "eval": "val"}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert not finished(trial)
    (tmp_path / "checkpoints" / "step_00000006.safetensors").touch()
    assert finished(trial)
    (tmp_path / "metrics.jsonl").write_text(json.dumps(lines[0]) + "\n")
    assert not finished(trial)


def results(*rows: tuple[float, dict]) -> list[TrialResult]:
    config = TrainConfig.preset("sprites-mini")
    return [
        TrialResult(Trial({"alpha": a}, config, Path(f"a_{a}-{i}")), scores, "" if scores else "exit code 1: killed")
        for i, (a, scores) in enumerate(rows)
    ]


def test_tables_against_hand_computed_figures():
    found = results(
        (0.0, {"j_ari": 0.5, "recon": 10.0, "latent": "mean", "step": 9}),
        (0.05, {"j_ari": 0.9, "recon": None}),
        (0.0, {"j_ari": 0.7, "recon": 14.0}),
        (0.05, {}),
    )
    cells = cells_of(found)
    assert [cell.values for cell in cells] == [{"alpha": 0.0}, {"alpha": 0.05}]
    assert cells[0].metrics == {"j_ari": [0.5, 0.7], "recon": [10.0, 14.0]}
    assert (cells[1].trials, cells[1].failed) == (1, 1)
    header, first, second = aligned(table_rows(cells)).splitlines()
    assert header.split() == ["alpha", "trials", "j_ari", "recon"]
    assert "0.600 ± 0.141" in first and "12.00 ± 2.83" in first
    assert second.split() == ["0.05", "1", "(1", "failed)", "0.900", "-"]
    rows = list(csv.DictReader(csv_table(cells).splitlines()))
    assert float(rows[0]["recon_std"]) == pytest.approx(statistics.stdev([10, 14]), rel=1e-5)
    assert rows[1]["j_ari_std"] == "" and rows[1]["recon_mean"] == ""
    record = json.loads(json_table(cells, found))
    assert record["cells"][1]["metrics"]["j_ari"] == {"mean": 0.9, "std": None, "values": [0.9]}
    assert [trial["error"] for trial in record["trials"]] == ["", "", "", "exit code 1: killed"]


def test_mean_and_std_of_few_values():
    assert mean_and_std([2.0, 4.0, 9.0]) == pytest.approx((5.0, statistics.stdev([2, 4, 9])))
    assert math.isnan(mean_and_std([])[0]) and math.isnan(mean_and_std([1.0])[1])


def test_a_plot_shows_every_trial_and_survives_odd_values():
    cells = cells_of(results((0.0, {"a": 1.0}), (0.0, {"a": 3.0}), (0.5, {"a": 2.0}), (1.0, {})))
    root = ElementTree.fromstring(plot("a", cells))
    circles = [float(e.get("cx", "nan")) for e in root.iter() if e.tag.endswith("circle")]
    assert len(circles) == 3 and circles[2] == pytest.approx((circles[0] + circles[1]) / 2, abs=0.1)
    ElementTree.fromstring(plot("a", cells_of(results((0.0, {"a": 0.0})))))  # one value, no width
    ElementTree.fromstring(plot("a", cells_of(results((0.0, {})))))  # no value at all


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--alpha", "0,x"], "argument --alpha: 'x' is no number"),
        (["--alpha", ","], "holds no value"),
        (["--seeds", "0"], "--seeds and --jobs must be at least 1"),
        (["--seeds", "2", "--seed", "1,2"], "--seeds or --seed, not both"),
        (["--decoder_heads", "8,7"], "multiple of decoder_heads 7"),
        (["--also", "encoder"], "--also 'encoder': expected FIELD=VALUE"),
        (["--also", "seed=1"], "fields other than seed"),
        (["--also", "decoderr=broadcast"], "unknown argument --decoderr: did you mean --decoder?"),
        (["--also", "beta=0.1"], "given twice"),
        (["clevr7"], "unknown preset 'clevr7'"),
    ],
)
def test_mistakes_are_found_before_the_first_trial(tmp_path, capsys, argv, words):
    assert main(["sweep", *argv, "--out", str(tmp_path / "out")]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_sweep_needs_a_folder(capsys):
    assert main(["sweep"]) == 2
    assert "--out" in capsys.readouterr().err


@pytest.fixture
def ray_cluster():
    ray = pytest.importorskip("ray", reason="needs ray (the extra 'ray')")
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.mark.long  # starting Ray and its worker takes most of a minute
def test_trials_on_a_ray_cluster(tmp_path, capsys, ray_cluster, monkeypatch):
    monkeypatch.chdir(tmp_path)  # nodes work elsewhere
    sweep = ["sweep", *TINY, "--lr", "1e-3,1e30", "--schedule", "constant", "--warmup", "0", "--out", "sweep"]
    sweep += ["--engine", "ray", "--threads", "1"]
    sweep[sweep.index("--steps") + 1] = "6"
    assert main(sweep) == 1  # one trial fails, its neighbour does not
    failed = [line for line in capsys.readouterr().err.splitlines() if line.startswith("failed: ")]
    assert len(failed) == 1 and failed[0].startswith("failed: lr_1e+30-seed_0: exit code 1: ")
    table = {row["lr"]: row for row in csv.DictReader((tmp_path / "sweep" / "sweep.csv").open())}
    assert table["0.001"]["trials"] == "1" and table["1e+30"]["failed"] == "1"

    # The same trials, here: what is finished is kept, and the table is the same.
    good = tmp_path / "sweep" / "lr_0.001-seed_0"
    written = {path: path.stat().st_mtime_ns for path in good.rglob("*")}
    again = [part if part != "1e-3,1e30" else "1e-3" for part in sweep]
    again[again.index("ray")] = "local"
    assert main(again) == 0
    assert {path: path.stat().st_mtime_ns for path in good.rglob("*")} == written
    row = next(csv.DictReader((tmp_path / "sweep" / "sweep.csv").open()))
    assert row["recon_mean"] == table["0.001"]["recon_mean"]


def test_a_ray_sweep_without_a_cluster(tmp_path, capsys, monkeypatch):
    pytest.importorskip("ray", reason="needs ray (the extra 'ray')")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    # whatever else runs on this machine
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", functools.cache(set))
    monkeypatch.setattr("ray._private.utils.read_ray_address", lambda *_: None)
    assert main(["sweep", *TINY, "--engine", "ray", "--out", str(tmp_path / "out")]) == 2
    assert "no Ray cluster is found" in capsys.readouterr().err


def test_scores_that_a_trial_holds_are_not_computed_again(tmp_path, monkeypatch, capsys):
    """The sweep kept its own copy, and scored anew what `fastslots eval` had scored by hand."""
    out = tmp_path / "sweep"
    sweep = ["sweep", *TINY, "--out", str(out)]
    assert main([*sweep, "--eval=--images 3 --wieghts last"]) == 2  # before anything is trained
    assert "unknown argument --wieghts: did you mean --weights?" in capsys.readouterr().err and not out.exists()
    assert main(sweep) == 0
    assert main(["eval", str(out / "seed_0"), "--weights", "last", "--split", "test", "--images", "3"]) == 0
    refused = lambda *_: pytest.fail("it was computed")  # noqa: E731
    monkeypatch.setattr("fastslots.sweep.trials.Processes.run", refused)
    assert main([*sweep, "--eval=--split test --images 3"]) == 0
    scores = json.loads((out / "sweep.json").read_text())["trials"][0]["scores"]
    assert (scores["split"], scores["images"]) == ("test", 3)
