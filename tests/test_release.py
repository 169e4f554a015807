"""What a release ships: one version everywhere, types for users' programs, pins that the README repeats."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastslots

ROOT = Path(__file__).parents[1]
PROGRAM = """
import torch
from torch import Tensor

from fastslots.data import open_dataset
from fastslots.interop import load_official, to_official
from fastslots.metrics import adjusted_rand_index, jacobian_ari, jacobian_interaction_score, slot_jacobian
from fastslots.models import SlotVAE, SlotVAEConfig
from fastslots.nn import InteractionCrossAttention
from fastslots.ops import cross_attention, explain, interaction_penalty
from fastslots.train import TrainConfig, fit


def scores(images: Tensor, masks: Tensor) -> tuple[float, float]:
    model = SlotVAE(SlotVAEConfig.preset("sprites-mini"))
    slots = model.encode(images).slots
    jacobian = slot_jacobian(model.decoder, slots)
    return jacobian_ari(jacobian, masks), jacobian_interaction_score(jacobian, masks)


q = torch.randn(2, 12, 64, 43)
k, v = torch.randn(2, 2, 12, 7, 43)
out, slot_map = cross_attention(q, k, v)
penalty: Tensor = interaction_penalty(slot_map)
backend: str = explain(q, k, v).backend
attention = InteractionCrossAttention(query_width=180, slot_width=64, heads=12, inner_width=516)
y, weights = attention(torch.randn(2, 64, 180), torch.randn(2, 7, 64))
result = fit(TrainConfig.preset("sprites-mini", steps=2, eval_images=4), out="my_run")
model: SlotVAE = SlotVAE.from_run("my_run")
"""


def test_one_version():
    (version,) = re.findall(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)
    assert fastslots.__version__ == version and f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## [{version}] - 20" in (ROOT / "CHANGELOG.md").read_text()


def test_the_readme_names_the_tested_torch():
    named = re.findall(r"torch==([\d.]+)", (ROOT / "README.md").read_text())
    (tested,) = re.findall(r"^torch==([\d.]+)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert named and set(named) == {tested}


def test_a_strictly_typed_program(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "program.py").write_text(PROGRAM)
    source = Path(fastslots.__file__).parent.parent
    assert (source / "fastslots" / "py.typed").exists()
    start = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache"), "program.py"]
    path = {}
    if source == ROOT:  # mypy does not follow the hook of an editable install, and silences site-packages alone
        path = {"MYPYPATH": str(ROOT)}
        start.insert(-1, "--follow-imports=silent")
    done = subprocess.run(start, cwd=tmp_path, env=os.environ | path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    (tmp_path / "program.py").write_text(PROGRAM + "\nwrong: int = cross_attention(q, k, v)\n")
    done = subprocess.run(start, cwd=tmp_path, env=os.environ | path, capture_output=True, text=True)
    assert done.returncode == 1 and "Incompatible types in assignment" in done.stdout


def test_an_installation_adds_fastslots_alone():
    """Hugging Face's libraries ask for a module ``kernels`` of their own: the checkout's is not to be met there."""
    code = "import importlib.util as u; print(*(n for n in ('fastslots', 'kernels', 'bench') if u.find_spec(n)))"
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd="/", env=clean, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["fastslots"], "an old editable install? Install again: pip install -e ."
