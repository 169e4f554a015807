"""The examples run as printed, on a small run; the Python blocks of docs/op.md run one after another."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastslots.bench import published
from fastslots.models import SlotVAE
from fastslots.train import TrainConfig, fit

ROOT = Path(__file__).parents[1]


def example(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("example") / "run"
    with open(os.devnull, "w") as silence, pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastslots.report.explorer.PIXELS", 0)  # the smallest slot explorer there is
        fit(TrainConfig.preset("sprites-mini", steps=2, eval_images=4, threads=1), out=folder, stream=silence)
    return folder


def test_own_slot_model_learns(capsys):
    last = example("own_slot_model").main(40)
    first = float(re.search(r"step 20: error ([\d.]+)", capsys.readouterr().out)[1])
    assert last < first


def test_slot_attention_parts_kinds_that_nobody_told_it():
    assert example("slot_attention").main(150) > 0.75  # seen: 0.9 after 150 steps, 0.33 where one slot owns all


def test_entropy_penalty_is_that_of_the_stored_attention(tmp_path):
    given = example("entropy_penalty")
    config = TrainConfig.preset("sprites-mini", steps=100, alpha_start=0, alpha_warmup=0)
    model, slots = SlotVAE(config), torch.randn(3, 4, config.slot_dim)
    torch.manual_seed(5)
    found = given.EntropyPenalty(model, config)(SimpleNamespace(slots=slots), torch.empty(0))
    torch.manual_seed(5)
    pixels = torch.randint(config.resolution**2, (64,))
    _, weights = published.decode(model.decoder, slots, pixels=pixels)
    expected = torch.stack([-(a * a.log()).sum(-1).mean() for a in weights]).mean()
    assert torch.allclose(found, expected, rtol=1e-4)
    result = given.main(out=tmp_path / "run", steps=2, eval_images=4, batch_size=2, threads=1, alpha_start=0)
    last = json.loads((result.out / "metrics.jsonl").read_text().splitlines()[1])
    assert last["step"] == 2 and last["alpha"] == 0 < last["entropy"] < math.log(4)


def test_masks_from_slot_map(run, tmp_path):
    assert -0.5 <= example("masks_from_slot_map").main(run, tmp_path / "masks") <= 1
    assert len(list((tmp_path / "masks").glob("*.png"))) == 8


def test_export_decoder(run, tmp_path):
    assert example("export_decoder").main(run, tmp_path / "decoder.pt2") < 1e-4


@pytest.mark.parametrize("page", sorted(path.name for path in (ROOT / "docs").glob("*.md")))
def test_python_blocks_of_the_documentation_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTSLOTS_CACHE", str(tmp_path / "cache"))
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.S):
        exec(compile(block, page, "exec"), names)
