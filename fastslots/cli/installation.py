"""What ``fastslots doctor`` asks of an installation: Python's packages, Triton, the C++ module, the GPU's driver."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shutil
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

OPTIONAL = ("rich", "flask", "h5py", "tensorboard", "xformers", "nvidia-ml-py")  # beside those that a run records
PLAIN_WITHOUT = {"rich": "plain lines in place of the live view", "google-crc32c": "NumPy checks TFRecords, slower"}
OLDEST_DRIVERS = {11: 450, 12: 525, 13: 580}
"""By CUDA's major version (table 2 of the CUDA Compatibility guide)."""
CUDA_12 = "pip install 'torch==2.10.*', whose public wheels are built for CUDA 12"


class Findings:
    """Lines printed as they are found; the problems, each with its mend, once more at the end."""

    def __init__(self) -> None:
        self.problems: list[tuple[str, str, str]] = []

    def say(self, name: str, text: str) -> None:
        print(f"{name:<10} {text}", flush=True)

    def problem(self, name: str, text: str, mend: str) -> None:
        self.say(name, text)
        self.problems.append((name, text, mend))

    def summary(self) -> None:
        print("\nno problems found" if not self.problems else "\nproblems:")
        for name, text, mend in self.problems:
            print(f"  {name}: {text}\n    mend: {mend}")


def lower_bounds() -> dict[str, str]:
    """The dependencies and the oldest version of each, as installed, or as a checkout's pyproject.toml has them."""
    try:
        lines = requires("fastslots") or []
    except PackageNotFoundError:
        text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
        lines = re.findall(r'^    "(.*)",$', text.split("\ndependencies = [")[1].split("\n]")[0], re.M)
    found = [re.fullmatch(r"([\w.-]+) *>=([\d.]+)", line) for line in lines]  # extras have markers
    return {match[1]: match[2] for match in found if match}


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text.split("+")[0])[:3])


def check_packages(found: Findings) -> None:
    from fastslots.runs.machine import PACKAGES, versions

    oldest = lower_bounds()
    for package, text in versions(tuple(dict.fromkeys((*PACKAGES, *oldest, *OPTIONAL)))).items():
        mend = f"pip install '{package}>={oldest[package]}'" if package in oldest else ""
        if mend and text == "not installed" and package in PLAIN_WITHOUT:
            found.say(package, f"not installed: {PLAIN_WITHOUT[package]}")
        elif mend and text == "not installed":
            found.problem(package, "not installed, and needed", mend)
        elif mend and numbers(text) < numbers(oldest[package]):
            found.problem(package, f"{text} is older than {oldest[package]}, the oldest that is tested", mend)
        elif package != "triton":  # has lines of its own
            found.say(package, text)


def check_triton(found: Findings) -> None:
    """Torch requires the Triton that it was built with; only GPUs need it."""
    import torch

    try:
        here = version("triton")
    except PackageNotFoundError:
        here = ""
    needed = [line for line in requires("torch") or [] if re.match(r"triton\b", line)]
    get = (
        f"pip install '{needed[0].split(';')[0].strip()}', which this torch requires"
        if needed
        else "pip install triton"
    )
    if not here and torch.version.cuda is None:
        found.say("triton", f"not installed, and needed on GPUs alone ({get})")
        return
    if not here:
        found.problem("triton", "not installed: on GPUs the slower PyTorch reference serves", get)
        return
    try:
        importlib.import_module("fastslots.kernels.gpu")
        found.say("triton", here)
    except ImportError as error:
        found.problem("triton", str(error), "pip install 'torch>=2.10', which brings Triton 3.6 or newer")


def check_compiled(found: Findings) -> None:
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    found.say("compiler", compiler or "none")
    get = "" if compiler else "install g++ or clang++ (Debian: apt install g++), then "
    again = f"{get}pip install --force-reinstall --no-deps . in fastslots' folder, and read what CMake says (-v)"
    if not importlib.util.find_spec("fastslots._cpu"):
        found.problem("C++ module", "absent: the slower PyTorch reference serves on CPUs", again)
        return
    try:
        importlib.import_module("torch")  # its OpenMP pool comes first
        importlib.import_module("fastslots._cpu")
        backend = importlib.import_module("fastslots.kernels.cpu_backend")
        asked = os.environ.get("FASTSLOTS_ISA")
        why = f"FASTSLOTS_ISA is {asked}" if asked else f"the best of {', '.join(backend.ISAS)} here"
        found.say("C++ module", f"present, computes with {backend.isa()}: {why}")
    except ImportError as error:
        found.problem("C++ module", f"present, but cannot be loaded ({error})", again)


def check_gpus(found: Findings) -> None:
    import torch

    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        text = f"{properties.name}, {properties.total_memory >> 30} GiB, sm_{properties.major}{properties.minor}"
        if (properties.major, properties.minor) < (8, 0):
            found.problem("gpu", text, "the Triton kernels need sm_80 (Ampere) or newer: this one runs the reference")
        else:
            found.say("gpu", text)
    if not torch.cuda.device_count():
        _unseen_gpus(found)


def _unseen_gpus(found: Findings) -> None:
    """Why torch sees none, where there is a driver."""
    import torch

    from fastslots.runs.machine import nvidia_driver

    driver = nvidia_driver()
    if driver is None and not shutil.which("nvidia-smi"):
        found.say("gpu", "none seen by torch")
        return
    here = f"NVIDIA's driver {driver} is here" if driver else "NVIDIA's driver is here"
    if torch.version.cuda is None:
        mend = "install torch from https://pytorch.org/get-started for the CUDA of your driver"
        found.problem("gpu", f"{here}, but this torch was built without CUDA: the CPU serves", mend)
        return
    major = int(torch.version.cuda.split(".")[0])
    oldest = OLDEST_DRIVERS.get(major, 0)
    if driver and numbers(driver) < (oldest,):
        text = f"{here}, but torch {torch.__version__} for CUDA {torch.version.cuda} needs {oldest} or newer"
        other = f", or {CUDA_12} (driver {OLDEST_DRIVERS[12]} or newer)" if major > 12 else ""
        found.problem("gpu", f"{text}: the CPU serves", f"update the driver{other}")
    else:
        mend = "see nvidia-smi, CUDA_VISIBLE_DEVICES, and in a container whether it was started with --gpus all"
        found.problem("gpu", f"{here}, but torch sees no GPU: the CPU serves", mend)
