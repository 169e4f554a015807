"""fastslots doctor"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version

PACKAGES = (
    "fastslots",
    "torch",
    "triton",
    "numpy",
    "safetensors",
    "pillow",
    "scipy",
    "h5py",
    "tensorboard",
    "xformers",
)


def add_parser(commands) -> None:
    parser = commands.add_parser("doctor", help="what this installation can do, and the mend for what it cannot")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import torch

    from fastslots.ops import explain
    from fastslots.ops.backends import OPS

    print(f"python     {platform.python_version()} on {platform.system()} {platform.machine()}")
    for package in PACKAGES:
        print(f"{package:<10} {_version(package)}")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"cpu        {os.cpu_count()} processors, torch uses {torch.get_num_threads()} threads")
    print(f"gpu        {', '.join(devices) or 'none seen by torch'}")
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    print(f"compiler   {compiler or 'none: install g++ or clang++, then reinstall fastslots to get the C++ kernels'}")
    module = importlib.util.find_spec("fastslots._cpu")
    print(f"C++ module {'present' if module else 'absent: the PyTorch reference serves on CPUs'}")
    for device in ["cpu"] + ["cuda"] * bool(devices):
        print(f"\non {device}:")
        for op in OPS:
            print(explain(torch.empty(1, device=device), op=op))
    print(f"\nself-check {_self_check()}")
    return 0


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _self_check() -> str:
    """The auto backend of this machine against the float64 reference."""
    import torch

    from fastslots.ops import cross_attention
    from fastslots.testing import SHAPES, errors, random_qkv

    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, k, v = (t.to(device) for t in random_qkv(SHAPES["clevr6"], torch.float32))
    out, slot_map = cross_attention(q, k, v)
    exact_out, exact_map = cross_attention(q.double(), k.double(), v.double(), backend="reference")
    worst = max(errors(out, exact_out)[0], errors(slot_map, exact_map)[0])
    return f"{'passed' if worst < 1e-4 else 'FAILED'}: cross_attention on {device}, largest relative error {worst:.1e}"
