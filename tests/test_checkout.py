"""A checkout that is not installed, without what is optional: it runs, and says what is missing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BARE = """
import importlib.metadata, runpy, sys

sys.modules.update(dict.fromkeys({absent}))  # importing them raises ModuleNotFoundError, and they have no spec
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in type(finder).__module__]
sys.path.insert(0, {root!r})
known = importlib.metadata.version

def version(name):
    if name in {absent} or name == "fastslots":
        raise importlib.metadata.PackageNotFoundError(name)
    return known(name)

importlib.metadata.version = version
"""
ABSENT = ("rich", "google_crc32c", "fastslots._cpu", "flask", "tensorboard", "h5py")


def bare(code: str, tmp_path: Path, absent: tuple[str, ...] = ABSENT, **env: str) -> subprocess.CompletedProcess[str]:
    script = BARE.format(absent=absent, root=str(ROOT)) + code
    start = [sys.executable, "-c", script]
    return subprocess.run(start, cwd=tmp_path, env=os.environ | env, capture_output=True, text=True)


def test_a_checkout_finds_its_parts(tmp_path):
    code = "import fastslots, fastslots.kernels, fastslots.bench\n"
    code += "print(fastslots.__version__, fastslots.kernels.__file__, fastslots.bench.__file__)"
    done = bare(code, tmp_path)
    assert done.returncode == 0, done.stderr
    (version,) = re.findall(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)
    assert done.stdout.split() == [version, str(ROOT / "kernels/__init__.py"), str(ROOT / "bench/__init__.py")]


def test_a_bare_checkout_trains_and_reads_records(tmp_path):
    code = """
from fastslots.cli import main
tiny = "--steps 2 --eval_images 4 --cnn_channels 8 --query_width 16 --slot_width 16 --slot_hidden 16".split()
assert main(["train", *tiny, "--out", "run"]) == 0
from fastslots.data.readers.tfrecord import masked_crc
assert masked_crc(b"123456789") == ((0xE3069283 >> 15 | 0xE3069283 << 17) + 0xA282EAD8) & 0xFFFFFFFF
"""
    done = bare(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "no C++ module: `pip install .`" in done.stderr and (tmp_path / "run" / "report.html").exists()


def test_a_terminal_without_rich_gets_plain_lines(tmp_path):
    code = """
import pathlib
from fastslots.runs.view import open_progress
sys.stderr.isatty = lambda: True
print(type(open_progress(1, 1, 0, None, pathlib.Path("metrics.jsonl"))).__name__)
"""
    assert bare(code, tmp_path, TERM="xterm").stdout == "Progress\n"


def test_an_old_triton_is_named(tmp_path):
    pytest.importorskip("triton")
    code = """
import triton
triton.__version__ = "3.2.0"
from fastslots.ops import explain
import torch
print(explain(*[torch.empty(1, 1, 1, 1)] * 3).reasons["triton"])
"""
    said = bare(code, tmp_path).stdout
    assert "Triton 3.2.0 is older than 3.6" in said and "torch 2.10" in said


def test_the_check_of_a_gpu_machine_ends_well_without_one(tmp_path):
    pytest.importorskip("triton")
    code = "sys.argv = ['check']; runpy.run_module('fastslots.bench.check', run_name='__main__')"
    (tmp_path / "bench").mkdir()
    done = bare(code, tmp_path, ("rich", "google_crc32c", "fastslots._cpu", "pytest"), CUDA_VISIBLE_DEVICES="")
    assert "ready, but for a GPU: " in done.stdout, done.stdout + done.stderr
    assert done.returncode == 0 and re.search(r"^without  rich +\S", done.stdout, re.M)
    done = bare(code, tmp_path, ("scipy",), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1 and "MISSING  scipy" in done.stdout and done.stdout.endswith("missing: scipy\n")
