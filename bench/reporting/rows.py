"""One measured row, the machine it was measured on, and the files that hold rows.

A run writes NAME.json (rows with their samples) and NAME.csv (the same, flat, without samples).
"""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import fastslots
from fastslots.errors import UserError

SCHEMA = 1
CPUINFO = Path("/proc/cpuinfo")


@dataclass
class Row:
    """What one provider did with one case. Times in seconds, memory in bytes; None where there is nothing to say."""

    case: str  # op, block, layer, step, jacobian, loader, memory, scaling-...
    provider: str
    preset: str
    axes: dict[str, int]  # B, R, K, H, d, D, F, N as far as the case has them
    precision: str
    status: str = "ok"  # ok, wrong (checked against float64 and failed: no times), cannot (see reason)
    reason: str = ""
    clock: str = ""  # what ``time`` is: cpu (processor time of all threads), wall, cuda (events)
    rounds: int = 0
    time: float | None = None  # median
    time_q20: float | None = None
    time_q80: float | None = None
    wall: float | None = None  # median, whatever the clock
    cpu: float | None = None
    ratio: float | None = None  # this provider's time over ours, median of the rounds' ratios
    ratio_q20: float | None = None
    ratio_q80: float | None = None
    first_call: float | None = None  # wall time of the first call: compilation, loading and one run
    items_per_s: float | None = None  # images (loader, step)
    flops: float | None = None  # of the provider's own algorithm, products alone
    gflops_per_s: float | None = None
    bytes: float | None = None  # the least that must move
    gbytes_per_s: float | None = None
    peak_bytes: int | None = None  # added by one run, in a process of its own
    result_bytes: int | None = None  # of what that run hands back: outputs and gradients, which the peak holds
    energy_j: float | None = None  # a run, whole board (NVML)
    clock_mhz: int | None = None
    error: float | None = None  # largest RMS error of a value or gradient, relative to the RMS of the float64 one
    error_at: str = ""
    error_bound: float | None = None
    samples: dict[str, list[float]] = field(default_factory=dict)  # clock -> seconds, round by round
    run: dict[str, Any] = field(default_factory=dict)  # of the whole run: see ``environment``


def environment(device: str, threads: int, roofs: dict[str, float]) -> dict[str, Any]:
    """What a row needs to be believed: device, threads, versions, commit, command, roofs measured in the same run."""
    packages = ("torch", "triton", "numpy")
    return {
        "schema": SCHEMA,
        "device": device_name(device),
        "device_type": device,
        "processors": os.cpu_count(),
        "threads": threads,
        "fastslots": fastslots.__version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
        "system": f"{platform.system()} {platform.machine()}",
        "isa": _isa() if device == "cpu" else "",
        "commit": commit(),
        "command": _command(),
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **roofs,
    }


def _command() -> str:
    """What the user typed, but for where the rows go: that is a path of one machine."""
    if Path(sys.argv[0]).stem != "fastslots":
        return ""
    words = sys.argv[1:]
    if "--out" in words:
        at = words.index("--out")
        del words[at : at + 2]
    return "fastslots " + shlex.join(words)


def device_name(device: str) -> str:
    """The GPU's name, or the processor's; on x86 with family and model, since "AMD EPYC" alone is four generations."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        text = CPUINFO.read_text()
    except OSError:
        text = ""

    def value(key: str) -> str:
        found = re.search(rf"^{key}\s*:\s*(.+)$", text, re.M)
        return found[1].strip() if found else ""

    name = value("model name") or platform.processor() or platform.machine()
    return name + f" (family {value('cpu family')}, model {value('model')})" * bool(value("cpu family"))


def _isa() -> str:
    try:
        from fastslots.kernels import cpu_backend
    except ImportError:
        return "no C++ kernels"
    return cpu_backend.isa()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def commit() -> str:
    """Commit of the checkout that the package is imported from, with + where its code was changed since; else empty."""
    root = Path(fastslots.__file__).parent.parent

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return ""
        return done.stdout.strip()

    head = git("rev-parse", "--short=12", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", "fastslots", "kernels", "bench/*.py")
    return head + "+" * bool(changed)


def write(rows: list[Row], folder: Path, name: str) -> Path:
    """Write NAME.json and NAME.csv -> path of the JSON. UserError where the folder cannot be written."""
    path = folder / f"{name}.json"
    flat = [_flat(row) for row in rows]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text("[\n" + ",\n".join(json.dumps(dataclasses.asdict(row)) for row in rows) + "\n]\n")
        with open(folder / f"{name}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for row in flat for key in row)))
            writer.writeheader()
            writer.writerows(flat)
    except OSError as error:
        raise UserError(f"--out {folder}: {error.strerror}: name a folder that can be written") from None
    return path


def _flat(row: Row) -> dict[str, Any]:
    values = dataclasses.asdict(row)
    axes, run = values.pop("axes"), values.pop("run")
    del values["samples"]
    return {**values, **{f"axis_{key}": value for key, value in axes.items()}, **run}


def read(paths: Iterable[Path]) -> list[Row]:
    """Rows of JSON files, or of all in a folder, oldest run first. UserError naming a file that holds none."""
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} does not exist: run `fastslots bench ... --out {path.parent}` first")
        files += sorted(path.glob("*.json")) if path.is_dir() else [path]
    rows = []
    for file in files:
        try:
            rows += [Row(**values) for values in json.loads(file.read_text())]
        except (ValueError, TypeError) as error:
            raise UserError(f"{file} holds no benchmark rows ({error}): name what `fastslots bench` wrote") from None
    return sorted(rows, key=lambda row: row.run.get("when", ""))
