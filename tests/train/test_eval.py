"""`fastslots eval`: on what images, by which weights, and how it says so."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from processes import as_torchrun
from tiny import MODEL_16

from fastslots.cli import main
from fastslots.config.run import read_config
from fastslots.data import to_float
from fastslots.data.sources import open_source
from fastslots.evaluation.kept import kept_scores
from fastslots.evaluation.of_run import Asked
from fastslots.metrics import JacobianMeter, slot_jacobian
from fastslots.models import SlotVAE
from fastslots.runs.folder import RunFolder
from fastslots.runs.log import read_metrics
from fastslots.train import TrainConfig, fit


def config_of(**overrides) -> TrainConfig:
    few = dict(octaves=3, batch_size=4, steps=2, threads=1, eval_images=4, checkpoint_every=0)
    return TrainConfig.preset("sprites-mini", **{**MODEL_16, **few, **overrides})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return fit(config_of(), out=tmp_path_factory.mktemp("runs") / "sprites").out


@pytest.fixture
def evaluated(capsys):
    def scores_of(*argv: str) -> tuple[dict, str]:
        capsys.readouterr()
        assert main(["eval", *map(str, argv), "--json"]) == 0
        printed = capsys.readouterr()
        return json.loads(printed.out), printed.err

    return scores_of


def write_npz(path, count: int, masks: bool = True) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    labels = rng.integers(0, 3, (count, 16, 16), dtype=np.uint8)
    np.savez(path, images, np.zeros((count, 1)), *([labels] if masks else []))


@pytest.mark.parametrize("split, sizes, counted", [("val", (50, 14), 12), ("test", (10,) * 6 + (4,), 10)])
def test_paper_mode_repeats_the_published_evaluation(run, evaluated, split, sizes, counted):
    """Validation: batches of 50, the Jacobian of the first 12 of each; test: batches of 10. It had taken all images."""
    model, meter, first = SlotVAE.from_run(run), JacobianMeter("paper"), 0
    held_out = open_source(read_config(run / "config.json")).splits[split]
    for size in sizes:
        images, masks = held_out[first : first + size][:counted].read()
        with torch.no_grad():
            slots = model(to_float(images), noise=torch.zeros(len(images), 3, 4)).slots
        meter.update(slot_jacobian(model.decoder, slots), masks.long())
        first += size
    scores, _ = evaluated(run, "--split", split, "--images", 64, "--score-mode", "paper")
    expected = meter.result()
    assert scores["j_ari"] == pytest.approx(expected.j_ari, rel=1e-4)
    assert scores["jis"] == pytest.approx(expected.jis, rel=1e-4)
    assert scores["images"] == 64 and scores["jacobian_images"] == expected.images == (24 if split == "val" else 64)
    said = {"val": "50, the first 12 of each", "test": "10"}[split]
    assert scores["score_batches"] == f"J-ARI and JIS: means over batches of {said}"
    pooled, _ = evaluated(run, "--split", split, "--images", 64)
    assert pooled["fg_ari"] == pytest.approx(scores["fg_ari"]) and pooled["jis"] != scores["jis"]


def test_scores_of_training_images_say_so(tmp_path, evaluated, monkeypatch):
    """Under 20 images none are set aside; `train` said it, `eval` did not."""
    monkeypatch.setenv("FASTSLOTS_CACHE", str(tmp_path / "cache"))
    for name, count in (("few", 12), ("many", 40)):
        write_npz(tmp_path / f"{name}.npz", count)
        run = fit(config_of(data=str(tmp_path / f"{name}.npz")), out=tmp_path / name).out
        scores, said = evaluated(run)
        assert scores["evaluated_on_training_images"] is (name == "few")
        assert scores["split_note"] in said and ("training images" in scores["split_note"]) is (name == "few")
    scores, said = evaluated(run, "--data", tmp_path / "few.npz")  # trained on others
    assert scores["evaluated_on_training_images"] is False and "few.npz" in said


def test_what_looks_wrong_with_the_data_is_said(run, tmp_path, evaluated, monkeypatch):
    monkeypatch.setenv("FASTSLOTS_CACHE", str(tmp_path / "cache"))
    images = np.zeros((40, 16, 16, 3), np.uint8)
    np.savez(tmp_path / "black.npz", images, np.zeros((40, 1)), np.zeros((40, 16, 16), np.uint8))
    _, said = evaluated(run, "--data", tmp_path / "black.npz")
    assert said.count("warning   ") >= 1


def test_scores_that_need_masks_are_null_without_them(run, tmp_path, evaluated, monkeypatch, capsys):
    monkeypatch.setenv("FASTSLOTS_CACHE", str(tmp_path / "cache"))
    write_npz(tmp_path / "bare.npz", 40, masks=False)
    scores, _ = evaluated(run, "--data", tmp_path / "bare.npz")
    assert all(scores[name] is None for name in ("j_ari", "jis", "fg_ari", "ari", "mbo", "miou"))
    assert main(["eval", str(run), "--data", str(tmp_path / "bare.npz")]) == 0
    assert "none: it needs masks" in capsys.readouterr().out


def test_the_weights_that_were_read_are_named(tmp_path, evaluated):
    """Where no evaluation has been the last ones stand for the best; they were called the best."""
    run = fit(config_of(), out=tmp_path / "run").out
    assert evaluated(run)[0]["weights"] == "best"
    RunFolder(run).best_weights.unlink()
    scores, said = evaluated(run)
    assert scores["weights"] == "last" and "no best weights yet: scoring the last ones" in said
    assert main(["report", str(run)]) == 0
    assert json.loads((run / "explorer.json").read_text())["weights"] == "last"


def test_a_run_is_evaluated_from_any_directory(tmp_path, monkeypatch, evaluated):
    """Its configuration kept the path of its data as it was given."""
    monkeypatch.setenv("FASTSLOTS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    write_npz("data.npz", 40)
    run = fit(config_of(data="data.npz", init_from=str(fit(config_of(steps=1), out="first").out)), out="run").out
    stored = read_config(run / "config.json")
    assert (stored.data, stored.init_from) == (str(tmp_path / "data.npz"), str(tmp_path / "first"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    scores, _ = evaluated(tmp_path / "run")
    assert scores["data"] == str(tmp_path / "data.npz")
    assert fit(stored, out=tmp_path / "run", resume=True).step == 2
    for data in ("", "sprites", "s3://bucket/set", "python:a list", "/there"):
        assert config_of(data=data).resolved().data == data


def test_a_run_stored_with_a_relative_path_goes_on(tmp_path, monkeypatch, capsys):
    """As runs were before: the same set by its absolute path is no other set, and no other trial."""
    monkeypatch.setenv("FASTSLOTS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    write_npz("data.npz", 40)
    run = fit(config_of(data="data.npz"), out="run").out
    for name in ("config.json", "data.txt"):
        text = (run / name).read_text()
        assert str(tmp_path / "data.npz") in text
        (run / name).write_text(text.replace(str(tmp_path / "data.npz"), "data.npz"))
    assert main(["train", "--resume", "--out", "run", "--steps", "3"]) == 0
    said = capsys.readouterr().err
    assert "resumed at step 2" in said and "other images" not in said
    assert read_config(run / "config.json").data == str(tmp_path / "data.npz")


def test_what_was_measured_is_kept_in_the_run_by_kind(tmp_path, evaluated, capsys):
    run = fit(config_of(), out=tmp_path / "run").out
    first, _ = evaluated(run, "--images", "3", "--device", "cpu", "--threads", "1")
    again, _ = evaluated(run, "--images", "3")
    sampled, _ = evaluated(run, "--images", "3", "--latent", "sample")
    kept = RunFolder(run).read_evaluations()
    assert [entry["latent"] for entry in kept] == ["mean", "sample"] and again["recon"] == first["recon"]
    assert kept[1]["recon"] == sampled["recon"] and kept[0]["j_ari"] == first["j_ari"]
    for wrong, message in [
        (["--device", "warp"], "device 'warp' cannot be used"),
        (["--threads", "-1"], "--threads must"),
    ]:
        assert main(["eval", str(run), *wrong]) == 2
        assert message in capsys.readouterr().err


FLAGS = (
    "--images 60 --batch_size 7 --attributes --recombination --interaction-order",
    "--images 33 --batch_size 8 --score-mode paper --latent sample",
)


@pytest.mark.parametrize("flags", FLAGS)
def test_two_processes_share_the_images_and_have_the_scores_of_one(run, flags, commands, tmp_path):
    """`torchrun ... fastslots eval` scored all images in each process, and each printed and wrote the scores."""
    alone, together = (shutil.copytree(run, tmp_path / name) for name in ("alone", "together"))
    flags = [*flags.split(), "--threads", "1", "--json"]
    one = commands.start(["eval", str(alone), *flags], tmp_path / "err", stdout=tmp_path / "out")
    assert one.wait() == 0, one.said()
    two = as_torchrun(commands, 2, ["eval", str(together), *flags], tmp_path)
    assert [process.wait() for process in two] == [0, 0], [process.said() for process in two]
    assert (tmp_path / "out_1").read_text() == two[1].said() == ""
    first, shared = (json.loads((tmp_path / name).read_text()) for name in ("out", "out_0"))
    assert first.keys() == shared.keys() and shared["images"] == int(flags[1])
    for name, value in first.items():
        if name != "seconds":
            assert shared[name] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value), name
    assert RunFolder(together).read_evaluations()[-1].items() >= shared.items()


REFUSED = [
    ("bare", ["--attributes"], "has no masks, which match slots to objects: leave --attributes out"),
    ("masked", ["--attributes"], "has no factors of its objects to predict: leave --attributes out"),
    ("masked", ["--recombination", "--images", "1"], "--recombination needs at least two images"),
    ("masked", ["--composition"], "the run held no combination out"),
    ("masked", ["--device", "cuda:7"], "device 'cuda:7' cannot be used"),
]


@pytest.mark.parametrize("data, flags, message", REFUSED)
def test_what_cannot_be_had_is_refused_before_anything_is_computed(
    run, data, flags, message, tmp_path, monkeypatch, capsys
):
    """The masks, and factors, that --attributes needs were missed after all images had been scored."""
    monkeypatch.setenv("FASTSLOTS_CACHE", str(tmp_path / "cache"))
    write_npz(tmp_path / "data.npz", 40, masks=data == "masked")
    monkeypatch.setattr("fastslots.evaluation.of_run.evaluate", lambda *_, **__: pytest.fail("it was computed"))
    assert main(["eval", str(run), "--data", str(tmp_path / "data.npz"), *flags]) == 2
    said = capsys.readouterr().err.splitlines()
    assert message in said[-1] and sum("error" in line for line in said) == 1


def test_what_an_earlier_evaluation_measured_besides_stays_with_the_same_weights(tmp_path, evaluated):
    run = fit(config_of(), out=tmp_path / "run").out
    evaluated(run, "--images", "30", "--recombination")
    evaluated(run, "--images", "30")
    (entry,) = RunFolder(run).read_evaluations()
    assert entry["recombination_error"] > 0 and entry["asked"]["recombination"]
    folder, asked = RunFolder(run), Asked(images=30)
    assert kept_scores(folder, asked) == kept_scores(folder, replace(asked, recombination=True)) == entry
    assert kept_scores(folder, replace(asked, attributes=True)) is None
    fit(read_config(run / "config.json", steps=3), out=run, resume=True)
    RunFolder(run).best_weights.write_bytes(RunFolder(run).last_weights.read_bytes())  # other weights
    assert kept_scores(folder, asked) is None
    evaluated(run, "--images", "30")
    (entry,) = folder.read_evaluations()
    assert "recombination_error" not in entry


def test_a_label_that_is_not_scored_may_be_named(run, tmp_path, evaluated, monkeypatch):
    """Only data whose reader found one had such a label."""
    monkeypatch.setenv("FASTSLOTS_CACHE", str(tmp_path / "cache"))
    write_npz(tmp_path / "data.npz", 40)  # labels 0, 1, 2
    masks = open_source(config_of(data=str(tmp_path / "data.npz"))).splits["val"].read()[1]
    everything, _ = evaluated(run, "--data", tmp_path / "data.npz")
    named, _ = evaluated(run, "--data", tmp_path / "data.npz", "--ignore_label", "2")
    assert everything["foreground_pixels"] == (masks > 0).sum() and "ignore_label" not in everything
    assert named["foreground_pixels"] == (masks == 1).sum() and named["ignore_label"] == 2
    trained = fit(config_of(data=str(tmp_path / "data.npz"), ignore_label=2), out=tmp_path / "run")
    assert trained.scores["foreground_pixels"] == (masks[:4] == 1).sum()
    again, _ = evaluated(tmp_path / "run")
    assert again["foreground_pixels"] == named["foreground_pixels"]  # the run keeps it


def test_one_slot_has_no_jis(evaluated, tmp_path, capsys):
    """JIS is rescaled by 1 − 1/K, which is 0; a run reported 1, and took its best weights by it."""
    out = fit(config_of(num_slots=1, eval_every=1), out=tmp_path / "run").out
    assert "num_slots 1: JIS is not defined" in capsys.readouterr().err
    evaluations = read_metrics(RunFolder(out).metrics)[1]
    assert len(evaluations) == 2 and all("j_ari" in line and "jis" not in line for line in evaluations)
    scores, _ = evaluated(out, "--images", "4")
    assert scores["jis"] is None and scores["j_ari"] is not None and scores["weights"] == "best"
    assert main(["eval", str(out), "--images", "4"]) == 0
    assert "none: it needs two slots" in capsys.readouterr().out
