"""fastslots doctor: says what is there, and gives a mend for what is not."""

from __future__ import annotations

import importlib.util
import re

import pytest

from fastslots.cli import doctor, main


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(doctor, "_train_a_little", lambda: (123.0, ""))


def test_what_is_there(quick, capsys, tmp_path):
    (tmp_path / "file").write_bytes(bytes(1 << 23))
    assert main(["doctor", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    for name in ("python", "torch", "cpu", "gpu", "compiler", "C++ module", "cache", "runs", "reading", "training"):
        assert re.search(rf"^{re.escape(name)} +\S", text, re.M), name
    assert "self-check passed" in text and "cross_attention: " in text and "123 images/s" in text


def test_every_problem_comes_with_its_mend(quick, capsys, monkeypatch, tmp_path):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "fastslots._cpu" else find_spec(name))
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi" if name == "nvidia-smi" else None)
    monkeypatch.setattr(doctor, "LITTLE_SPACE", 1 << 62)
    monkeypatch.setenv("FASTSLOTS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert main(["doctor"]) == 0
    problems = capsys.readouterr().out.split("problems:")[1]
    assert problems.count("mend: ") == len(re.findall(r"^  \S", problems, re.M)) >= 4
    assert "apt install g++" in problems and "pytorch.org" in problems and "FASTSLOTS_CACHE" in problems


def test_a_wrong_kernel_or_a_failed_training_exits_1(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "_train_a_little", lambda: (0.0, "FAILED: the loss does not fall"))
    assert main(["doctor"]) == 1
    assert "training: FAILED: the loss does not fall\n    mend: " in capsys.readouterr().out
    monkeypatch.setattr(doctor, "_train_a_little", lambda: (1.0, ""))
    monkeypatch.setattr("fastslots.testing.errors", lambda *_: (0.5, 0.5))
    assert main(["doctor"]) == 1
    assert "self-check: FAILED" in capsys.readouterr().out


def test_data_that_is_not_there(capsys):
    assert main(["doctor", "nowhere"]) == 2
    assert "nowhere: no such file or folder" in capsys.readouterr().err
