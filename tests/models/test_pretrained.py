"""Models by name: those that ship, folders, files, the Hub."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import MODEL_16

from fastslots.cli import main
from fastslots.config.run import BUILTIN, read_config
from fastslots.data.sources import open_source
from fastslots.errors import UserError
from fastslots.evaluation.evaluate import evaluate
from fastslots.models import SlotVAE
from fastslots.runs import pretrained
from fastslots.runs.pretrained import SHIPPED, run_folder, shipped_names
from fastslots.train import TrainConfig, fit


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = TrainConfig.preset("sprites-mini", **MODEL_16, batch_size=2, steps=1, threads=1, eval_images=2)
    with open("/dev/null", "w") as silence:
        return fit(config, out=tmp_path_factory.mktemp("run") / "own", stream=silence).out


def same(model: SlotVAE, path) -> bool:
    expected = load_file(path)
    return all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", shipped_names())
def test_a_model_that_ships_is_small_and_has_its_scores(name, tmp_path, monkeypatch):
    folder = SHIPPED / name
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 2_000_000
    scores = json.loads((folder / "seeds.json").read_text())
    first, *others = [*scores["seeds"], *scores.get("earlier", [])]
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["fastslots.scores"]) == first
    assert others
    config = read_config(folder / "config.json")
    assert config.seed == first["seed"] and config.steps == first["steps"] and config.data in ("", *BUILTIN)
    model = SlotVAE.from_pretrained(name)
    assert not model.training and same(model, folder / "model.safetensors")
    if config.data:
        monkeypatch.setenv("FASTSLOTS_CACHE", str(tmp_path))  # nothing is made for it beforehand
        scores = evaluate(model, open_source(config, few=True).splits["test"][:100]).scores()
        assert not list(tmp_path.iterdir())
        expected = first.get("mix_test", first["test"])  # of the built-in data, where others trained it too
        assert scores["j_ari"] == pytest.approx(expected["j_ari"], abs=0.05)
        assert scores["jis"] == pytest.approx(expected["jis"], abs=0.03)


def test_sprites_mini_ships_and_is_scored_by_its_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "sprites-mini" in shipped_names()
    for name in ("sprites-mini", "shipped:sprites-mini"):
        assert main(["eval", name, "--split", "test", "--images", "20", "--json"]) == 0
        said = capsys.readouterr()
        assert json.loads(said.out)["j_ari"] > 0.7 and "warning" not in said.err
    assert main(["eval", "shipped:sprites"]) == 2
    assert "no model 'sprites' ships: choose one of" in capsys.readouterr().err


def test_a_runs_folder_of_that_name_comes_first_and_is_said(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sprites-mini").mkdir()
    assert run_folder("sprites-mini") == SHIPPED / "sprites-mini"  # a folder that is no run
    (tmp_path / "sprites-mini").rmdir()
    (tmp_path / "sprites-mini").symlink_to(run)
    assert str(run_folder("sprites-mini")) == "sprites-mini" and run_folder("shipped:sprites-mini").parent == SHIPPED
    assert main(["eval", "sprites-mini", "--images", "2", "--json"]) == 0
    assert "the model of this name that ships is shipped:sprites-mini" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"both a folder here and a model that ships: write ./sprites-mini or shipped:"):
        SlotVAE.from_pretrained("sprites-mini")
    assert SlotVAE.from_pretrained("./sprites-mini").config.resolution == 16
    assert SlotVAE.from_pretrained("shipped:sprites-mini").config.resolution == 32


def test_folders_and_files(run, tmp_path):
    model = SlotVAE.from_pretrained(run, "last")
    assert same(model, run / "model.safetensors")
    assert same(SlotVAE.from_pretrained(str(run)), run / "checkpoints" / "best.safetensors")
    assert same(SlotVAE.from_pretrained(run / "model.safetensors"), run / "model.safetensors")
    model.save_pretrained(tmp_path / "new" / "folder")
    again = SlotVAE.from_pretrained(tmp_path / "new" / "folder")
    assert again.config == model.config and same(again, run / "model.safetensors")
    (tmp_path / "file").write_text("no weights")
    with pytest.raises(UserError, match="file cannot be written"):
        model.save_pretrained(tmp_path / "file")
    with pytest.raises(UserError, match="cannot be read as weights"):
        SlotVAE.from_pretrained(tmp_path / "file")
    with pytest.raises(UserError, match="is no run directory"):
        SlotVAE.from_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"nothing is neither a folder, nor a model that ships \(.*sprites-mini.*\)"):
        SlotVAE.from_pretrained("nothing")


def test_the_hub(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"to fetch it from the Hugging Face Hub: pip install 'fastslots\[hub\]'"):
        SlotVAE.from_pretrained("someone/slots")
    asked = []

    def download(repository: str, filename: str) -> str:
        asked.append((repository, filename))
        if repository == "someone/nothing":
            raise RuntimeError("404: no such repository\nmore lines")
        return str(run / "model.safetensors")

    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(hf_hub_download=download))
    assert same(SlotVAE.from_pretrained("someone/slots"), run / "model.safetensors")
    with pytest.raises(UserError, match=r"someone/nothing cannot be fetched from the Hugging Face Hub \(404: no such"):
        SlotVAE.from_pretrained("someone/nothing")
    assert asked == [("someone/slots", "model.safetensors"), ("someone/nothing", "model.safetensors")]


def test_clevr6_mini_ships_and_is_scored_by_its_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTSLOTS_CACHE", str(tmp_path / "cache"))
    assert main(["eval", "clevr6-mini", "--split", "test", "--images", "10", "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["j_ari"] > 0.7 and "warning" not in said.err
    assert SlotVAE.from_pretrained("clevr6-mini").config.num_slots == 7


def the_script() -> ModuleType:
    path = Path(__file__).parents[2] / "scripts" / "make_shipped.py"
    spec = importlib.util.spec_from_file_location("make_shipped", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_the_script_makes_what_ships(tmp_path, monkeypatch):
    script = the_script()
    few = dict(MODEL_16, batch_size=2, steps=2, eval_images=2, eval_every=1)
    made = []
    for attempt in ("a", "b"):
        (tmp_path / attempt / "sprites-mini").mkdir(parents=True)
        made.append(
            script.main("sprites-mini", [3, 4], tmp_path / f"runs_{attempt}", tmp_path / attempt, images=4, **few)
        )
    for name in ("config.json", "seeds.json", "model.safetensors"):
        assert (made[0] / name).read_bytes() == (made[1] / name).read_bytes()  # from a seed, bit for bit
    seeds = json.loads((made[0] / "seeds.json").read_text())["seeds"]
    script.main("sprites-mini", [4], tmp_path / "runs_a", tmp_path / "b", images=4, **few)
    kept = json.loads((made[1] / "seeds.json").read_text())
    assert [run["seed"] for run in kept["seeds"]] == [4] and [run["seed"] for run in kept["earlier"]] == [3]
    assert [line["seed"] for line in seeds] == [3, 4] and [p["step"] for p in seeds[0]["validation"]] == [1, 2]
    monkeypatch.setattr(pretrained, "SHIPPED", tmp_path / "a")
    assert SlotVAE.from_pretrained("sprites-mini").config.resolution == 16
    assert np.isfinite(seeds[0]["test"]["recon"])


def test_what_was_mixed_in_is_the_data_of_a_model_whose_own_do_not_ship(tmp_path):
    script = the_script()
    np.savez(tmp_path / "own.npz", arr_0=np.random.default_rng(0).integers(0, 255, (30, 16, 16, 3), np.uint8),
             arr_2=np.ones((30, 16, 16), np.uint8))  # fmt: skip
    few = dict(MODEL_16, batch_size=2, steps=2, eval_images=2, eval_every=1)
    (tmp_path / "sprites-mini").mkdir()
    given = {"data": str(tmp_path / "own.npz"), "mix": "sprites"}
    folder = script.main("sprites-mini", [3], tmp_path / "runs", tmp_path, images=4, **given, **few)
    config = read_config(folder / "config.json")
    assert (config.data, config.mix) == ("sprites", "") and str(tmp_path) not in (folder / "config.json").read_text()
    (run,) = json.loads((folder / "seeds.json").read_text())["seeds"]
    assert run["test"]["images"] == 1 and run["mix_test"]["images"] == 4
