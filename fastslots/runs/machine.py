"""What a run costs its machine: memory, power and energy, which the training loop logs every so often.

Memory is this process's: resident on a CPU, the most that torch held on a GPU. Energy is what the GPUs of this
machine's processes used (NVML), or on a CPU its packages (RAPL), with all that other programs had them do.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import resource
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("fastslots", "torch", "triton", "numpy", "safetensors", "pillow", "scipy")
POWERCAP = Path("/sys/class/powercap")
Joules = Callable[[], float]  # counted since whenever


class Meter:
    """``read`` gives memory_mb, and where energy is counted power_w (mean since the last reading) and energy_wh.

    energy_wh: what the run had used before, of one that is resumed.
    """

    def __init__(self, device: torch.device, energy_wh: float = 0.0):
        self._device, self._energy_wh = device, energy_wh
        self._joules, self.energy_from = energy_counter(device)
        self._last, self._since = (self._joules() if self._joules else 0.0), time.monotonic()

    def read(self) -> dict[str, float]:
        values = {"memory_mb": round(memory_bytes(self._device) / 1e6, 1)}
        if self._joules:
            joules, now = self._joules(), time.monotonic()
            self._energy_wh += (joules - self._last) / 3600
            values["power_w"] = round((joules - self._last) / max(now - self._since, 1e-9), 2)
            values["energy_wh"] = round(self._energy_wh, 4)
            self._last, self._since = joules, now
        return values

    def facts(self) -> dict[str, str]:
        """For the run's page."""
        kind = "the most that torch held on the GPU" if self._device.type == "cuda" else "what the process holds"
        return {"machine": name_of(self._device), "memory_mb": kind, "energy": self.energy_from}


def memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def name_of(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.M) if cpuinfo.exists() else None
    threads = torch.get_num_threads()
    return f"{found[1] if found else platform.machine()}, {threads} thread{'s' * (threads > 1)}"


def energy_counter(device: torch.device) -> tuple[Joules | None, str]:
    """(a counter or None, what it counts or why there is none)"""
    return _nvml(device) if device.type == "cuda" else _rapl(POWERCAP)


def _nvml(device: torch.device) -> tuple[Joules | None, str]:
    try:
        import pynvml
    except ImportError:
        return None, "not counted: pip install 'fastslots[gpu]' for nvidia-ml-py"
    count = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    numbers = range(count) if count > 1 else [device.index or 0]
    try:
        pynvml.nvmlInit()
        # By identity: CUDA_VISIBLE_DEVICES renumbers torch's devices, and NVML knows nothing of it
        ids = [f"GPU-{torch.cuda.get_device_properties(n).uuid}" for n in numbers]
        boards = [pynvml.nvmlDeviceGetHandleByUUID(name) for name in ids]

        def joules() -> float:
            return float(sum(map(pynvml.nvmlDeviceGetTotalEnergyConsumption, boards))) / 1e3

        joules()
    except (AttributeError, pynvml.NVMLError) as error:
        return None, f"not counted: NVML says {error}"
    return joules, f"of {len(boards)} GPU{'s' * (len(boards) > 1)} (NVML)"


def _rapl(root: Path) -> tuple[Joules | None, str]:
    zones = [path for path in sorted(root.glob("intel-rapl:*")) if re.fullmatch(r"intel-rapl:\d+", path.name)]
    try:
        packages = [path for path in zones if (path / "name").read_text().startswith("package")]
        counters = [_Counter(path / "energy_uj", int((path / "max_energy_range_uj").read_text())) for path in packages]
    except OSError as error:
        return None, f"not counted: {error.filename} cannot be read ({error.strerror}); most systems let root alone"
    if not counters:
        return None, f"not counted: the processor's counters (RAPL) are not in {root}"
    return lambda: sum(counter() for counter in counters) / 1e6, "of the processor, other programs' part too (RAPL)"


class _Counter:
    """Microjoules of a counter that starts again at ``largest``."""

    def __init__(self, path: Path, largest: int):
        self._path, self._largest = path, largest
        self._last, self._total = int(path.read_text()), 0

    def __call__(self) -> int:
        now = int(self._path.read_text())
        self._total += (now - self._last) % (self._largest + 1)
        self._last = now
        return self._total


DRIVER = Path("/proc/driver/nvidia/version")


def nvidia_driver() -> str | None:
    """The version of the NVIDIA driver that the kernel has loaded; "" where that can't be read, None without one."""
    if not DRIVER.exists():
        return None
    with contextlib.suppress(OSError):
        found = re.search(r"Kernel Module.*?(\d+(?:\.\d+)+)", DRIVER.read_text())
        return found.group(1) if found else ""
    return ""


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """The versions in this interpreter; "not installed" for what is missing."""
    found = {"python": f"{platform.python_version()} on {platform.system()} {platform.machine()}"}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
