"""What the benchmarks on a GPU need, and whether it is here: ``bench/gpu.sh --check``. No GPU needed, under a minute.

Exit code 1 where something is missing that they can't do without; the last line says what to run next.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import fastslots
from fastslots.errors import first_line

NEEDED = ("torch", "triton", "numpy", "scipy", "pillow", "safetensors", "fsspec")
OPTIONAL = {
    "xformers": "no row of this peer",
    "nvidia-ml-py": "no energy and no clocks",
    "rich": "plain lines in place of the live view",
    "google-crc32c": "NumPy checks TFRecords, more slowly",
}
TOOLS = {"ncu": "no profile by Nsight Compute", "compute-sanitizer": "no check for races and bounds"}
EXPECTED_ERROR = 1e-4  # of fp32 against float64, relative to the largest element


def main() -> int:
    os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported: the compiler is to be seen
    problems: list[str] = []

    def say(name: str, text: str, problem: bool = False) -> None:
        print(f"{'MISSING' if problem else 'ok':<8} {name:<18} {text}", flush=True)
        problems.extend([name] * problem)

    place = Path(fastslots.__file__).parent
    module = importlib.util.find_spec("fastslots._cpu") is not None
    built = "C++ module built" if module else "C++ module not built: on a CPU the slower reference serves"
    say("fastslots", f"{fastslots.__version__} in {place}; {built}")
    for package in NEEDED:
        try:
            say(package, version(package))
        except PackageNotFoundError:
            say(package, f"pip install {package}", problem=True)
    if problems:
        print(f"\nmissing: {', '.join(problems)}")
        return 1
    for package, without in OPTIONAL.items():
        try:
            say(package, version(package))
        except PackageNotFoundError:
            print(f"{'without':<8} {package:<18} {without}")
    for tool, without in TOOLS.items():
        where = shutil.which(tool)
        say(tool, where) if where else print(f"{'without':<8} {tool:<18} {without}")

    arch = _gpu(say)
    for name, check in (("op", _op), ("compiler", lambda: _compiler(arch or "sm_90")), ("results", _results)):
        start = time.monotonic()
        try:
            text = check()
        except Exception as error:  # whatever is wrong with this machine is what was asked
            say(name, f"{type(error).__name__}: {first_line(error)}", problem=True)
        else:
            say(name, f"{text} ({time.monotonic() - start:.0f} s)")
    if problems:
        print(f"\nmissing: {', '.join(problems)}")
        return 1
    dry = _interpreter_fails() or "bench/gpu.sh --dry walks through on the CPU"
    print("\nready: bench/gpu.sh" if arch else f"\nready, but for a GPU: {dry}")
    return 0


def _interpreter_fails() -> str:
    """Why Triton's interpreter can't stand in for a GPU; empty where it can."""
    triton, numpy = (tuple(int(part) for part in version(name).split(".")[:2]) for name in ("triton", "numpy"))
    old = triton < (3, 7) and numpy >= (2, 4)
    return "Triton 3.6's interpreter, which --dry uses, needs NumPy below 2.4" if old else ""


def _gpu(say: Callable[..., None]) -> str | None:
    """The architecture of the first GPU that torch can use; None without one."""
    import torch

    from fastslots.runs.machine import nvidia_driver

    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        arch = f"sm_{properties.major}{properties.minor}"
        say(
            f"gpu {i}",
            f"{properties.name}, {properties.total_memory >> 30} GiB, {arch}; torch for CUDA {torch.version.cuda}",
        )
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(0)
        return f"sm_{major}{minor}"
    driver = nvidia_driver()
    if driver is not None:
        text = f"driver {driver} is here, but torch for CUDA {torch.version.cuda} sees no GPU: see `fastslots doctor`"
        say("gpu", text, problem=True)
    else:
        print(f"{'without':<8} {'gpu':<18} no NVIDIA driver here: nothing is timed")
    return None


def _op() -> str:
    """Attention and its gradients on this device against float64."""
    import torch

    from fastslots.ops import cross_attention, explain
    from fastslots.testing import SHAPES, errors, random_qkv

    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = [t.to(device) for t in random_qkv(SHAPES["clevr6"], torch.float32)]
    results = []
    for tensors, backend in ((inputs, "auto"), ([t.double() for t in inputs], "reference")):
        leaves = [t.detach().requires_grad_() for t in tensors]
        q, k, v = leaves
        out, slot_map = cross_attention(q, k, v, backend=backend)
        results.append([out, slot_map, *torch.autograd.grad(out.square().sum() + slot_map.square().sum(), leaves)])
    worst = max(errors(ours.detach().cpu(), exact.detach().cpu())[0] for ours, exact in zip(*results, strict=True))
    if not worst < EXPECTED_ERROR:
        raise RuntimeError(f"attention and its gradients are wrong by {worst:.1e} on {device}")
    return f"attention and its gradients on {device} by {explain(*inputs).backend}: relative error {worst:.0e}"


def _compiler(arch: str) -> str:
    """The smallest and the largest kernel of a decoder layer, through Triton's compiler and assembler."""
    from fastslots.kernels.tools import compile, shipped

    wanted = ("token_attention_combine", "decoder_layer_fwd")
    launches = dict(shipped.record_shipped(arch, shipped.PRESETS["clevr6"], "bf16"))
    compiled = {name: compile.compile_launch(launches[name], arch) for name in wanted}
    return (
        ", ".join(f"{name}: {row.registers} registers, {row.spills} spills" for name, row in compiled.items())
        + f" on {arch}"
    )


def _results() -> str:
    folder = Path.cwd() / "bench" / "results"
    if not os.access(folder if folder.exists() else folder.parent, os.W_OK):
        raise PermissionError(f"{folder} can't be written")
    return f"{folder}, {shutil.disk_usage(Path.cwd()).free >> 30} GiB free"


if __name__ == "__main__":
    raise SystemExit(main())
