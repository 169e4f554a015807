"""fastslots doctor: says what is there, and gives a mend for what is not."""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from fastslots.cli import doctor, installation, main
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
    monkeypatch.setattr(
        installation.shutil, "which", lambda name: "/usr/bin/nvidia-smi" if name == "nvidia-smi" else None
    )
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


def test_without_a_home_folder_the_cache_is_a_problem_like_others(quick, capsys, monkeypatch):
    """It ended there, before the self-check."""

    def unknown(self):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", unknown)
    monkeypatch.delenv("FASTSLOTS_CACHE", raising=False)
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "training   123 images/s" in said and "mend: set FASTSLOTS_CACHE or HOME" in said


def test_an_error_without_words_goes_by_its_type(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError

    monkeypatch.setattr("fastslots.train.fit", fail)
    assert doctor._train_a_little() == (0.0, "FAILED: RuntimeError")


def test_data_that_is_not_there(capsys):
    assert main(["doctor", "nowhere"]) == 2
    assert "nowhere: no such file or folder" in capsys.readouterr().err


DRIVERS = {
    "535.129.03": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC 2023\n",
    "580.65.06": "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs)\n",
}


def problems_of(*checks) -> str:
    found = installation.Findings()
    for check in checks:
        check(found)
    return "\n".join(f"{name}: {text} MEND {mend}" for name, text, mend in found.problems)


@pytest.mark.parametrize(
    "driver, cuda, expected",
    [
        (
            "535.129.03",
            "13.0",
            "for CUDA 13.0 needs 580 or newer: the CPU serves MEND update the driver, or pip install",
        ),
        ("535.129.03", "12.8", "driver 535.129.03 is here, but torch sees no GPU: the CPU serves MEND see nvidia-smi"),
        ("580.65.06", "13.0", "driver 580.65.06 is here, but torch sees no GPU: the CPU serves MEND see nvidia-smi"),
        (
            "580.65.06",
            None,
            "this torch was built without CUDA: the CPU serves MEND install torch from https://pytorch.org",
        ),
    ],
)
def test_a_driver_that_torch_cannot_use(monkeypatch, tmp_path, driver, cuda, expected):
    from fastslots.runs import machine

    (tmp_path / "version").write_text(DRIVERS[driver] + "GCC version:  gcc version 11.4.0\n")
    monkeypatch.setattr(machine, "DRIVER", tmp_path / "version")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("torch.version.cuda", cuda)
    assert expected in problems_of(installation.check_gpus)


@pytest.mark.parametrize("cuda", ["13.0", None])
def test_no_triton(monkeypatch, capsys, cuda):
    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(installation, "version", absent)
    monkeypatch.setattr(installation, "requires", lambda _: ['triton==3.7.1; platform_system == "Linux"', "numpy"])
    monkeypatch.setattr("torch.version.cuda", cuda)
    said = problems_of(installation.check_triton)
    if cuda:
        assert said.endswith("MEND pip install 'triton==3.7.1', which this torch requires")
    else:  # CPUs need none
        assert not said and "not installed, and needed on GPUs alone (pip install" in capsys.readouterr().out


def test_packages_that_are_missing_or_too_old(monkeypatch):
    from fastslots.runs import machine

    here = {"numpy": "1.24.4", "torch": "2.13.0+cpu", "scipy": "not installed", "rich": "not installed"}
    monkeypatch.setattr(machine, "versions", lambda names: {name: here.get(name, "99.1") for name in names})
    said = problems_of(installation.check_packages)
    assert "numpy: 1.24.4 is older than 1.26, the oldest that is tested MEND pip install 'numpy>=1.26'" in said
    assert "scipy: not installed, and needed MEND pip install 'scipy>=" in said
    assert "torch" not in said and "rich" not in said  # plain lines stand in for the latter
    assert set(installation.lower_bounds()) >= {"torch", "numpy", "scipy", "pillow", "safetensors", "fsspec"}


def test_a_python_that_is_too_old_is_told_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "version_info", (3, 9, 18))
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("fastslots.__main__", run_name="__main__")
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and "needs Python 3.10 or newer" in said and "3.9.18" in said


@pytest.mark.parametrize("package", ["torch", "numpy"])
def test_a_package_that_cannot_be_imported_is_told_in_one_line(tmp_path, package):
    code = f"import runpy, sys; sys.modules[{package!r}] = None; sys.argv = ['fastslots', 'doctor']\n"
    code += "runpy.run_module('fastslots', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    said = done.stderr.splitlines()  # torch warns first where NumPy is missing
    assert done.returncode == 2 and "Traceback" not in done.stderr and (package == "numpy" or len(said) == 1)
    assert said[-1].startswith("fastslots: error: can't start") and package in said[-1] and "pip install" in said[-1]
