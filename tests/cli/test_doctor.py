"""fastslots doctor: says what is there, and gives a mend for what is not."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastslots.cli import doctor, main
from fastslots.data.open import cache_folder


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(doctor, "_train_a_little", lambda: (123.0, ""))


def test_what_is_there(quick, capsys, tmp_path):
    (tmp_path / "file").write_bytes(bytes(1 << 23))
    assert main(["doctor", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    for name in ("python", "torch", "cpu", "gpu", "compiler", "C++ module", "cache", "runs", "reading", "training"):
        assert re.search(rf"^{re.escape(name)} +\S", text, re.M), name
    assert "self-check passed" in text and "123 images/s" in text and re.search(r"^cross_attention\b.*: ", text, re.M)


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


@pytest.mark.skipif(not importlib.util.find_spec("fastslots._cpu"), reason="the C++ module is not built")
def test_an_instruction_set_that_is_none_is_named():
    code = "from fastslots.cli import main; raise SystemExit(main(['doctor']))"
    env = os.environ | {"FASTSLOTS_ISA": "foo"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "instruction set 'foo' is not one that this processor serves" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("value", [None, "", "~/elsewhere", "/tmp/there"])
def test_the_cache_is_one_place(quick, capsys, monkeypatch, tmp_path, value):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("FASTSLOTS_CACHE", raising=False)
    if value is not None:
        monkeypatch.setenv("FASTSLOTS_CACHE", value)
    (tmp_path / "file").touch()
    place = cache_folder(tmp_path / "file", 16).parent
    assert place == (Path(value).expanduser() if value else tmp_path / ".cache" / "fastslots")
    doctor._folders(doctor.Findings())
    assert f"{place}, " in capsys.readouterr().out


def test_an_error_without_words_goes_by_its_type(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError

    monkeypatch.setattr("fastslots.train.fit", fail)
    assert doctor._train_a_little() == (0.0, "FAILED: RuntimeError")


def test_data_that_is_not_there(capsys):
    assert main(["doctor", "nowhere"]) == 2
    assert "nowhere: no such file or folder" in capsys.readouterr().err
