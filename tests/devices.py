"""The device of a test run. ``pytest --device cuda`` runs what takes the fixture ``device`` on a GPU, with Triton's
kernels compiled; everything else is skipped there, with the reason. The report says where each test made tensors.

Tests that a GPU alone can run are marked ``gpu``. ``--device rehearsal`` runs those on the CPU, with a stand-in for
what only CUDA has: it shows that they run, not that a GPU is right.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

RAN_ON = "ran_on"
NO_GPU = "torch sees no GPU"
MADE = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    choices = ("cpu", "cuda", "rehearsal")
    text = "where ops and kernels are tested: cpu (Triton's interpreter), cuda; rehearsal: tests of a GPU, on the CPU"
    parser.addoption("--device", choices=choices, default="cpu", help=text)


def pytest_configure(config: pytest.Config) -> None:
    """Before anything imports triton: the one place that says whether its kernels are interpreted."""
    if config.getoption("device") == "cuda":
        os.environ["TRITON_INTERPRET"] = "0"
    else:
        os.environ.setdefault("TRITON_INTERPRET", "1")
    if config.getoption("device") == "rehearsal":
        _round_as_a_gpu()


def _round_as_a_gpu() -> None:
    """Triton's interpreter cuts fp32 off to bf16, a GPU rounds to nearest: its tests, with their bounds, need that."""
    import triton.language as tl
    from triton.runtime import interpreter

    cut = interpreter._convert_float

    def convert(data: np.ndarray, source: Any, target: Any, *rest: Any) -> np.ndarray:
        if (source, target) != (tl.float32, tl.bfloat16):
            return cut(data, source, target, *rest)
        bits = np.ascontiguousarray(data).view(np.uint32)
        rounded = (bits.astype(np.uint64) + 0x7FFF + (bits >> 16 & 1)) >> 16
        return np.where(np.isnan(data), 0x7FC0, rounded).astype(np.uint16)

    interpreter._convert_float = convert


def pytest_report_header(config: pytest.Config) -> str:
    chosen = config.getoption("device")
    if chosen != "cuda":
        return f"device: {chosen}, Triton kernels in the interpreter"
    if not torch.cuda.is_available():
        return f"device: cuda, but {NO_GPU} (torch {torch.__version__}): every test is skipped"
    return f"device: {gpu()}, torch {torch.__version__}, Triton kernels compiled"


@cache
def gpu() -> str:
    properties = torch.cuda.get_device_properties(0)
    return f"cuda:0 ({properties.name}, sm_{properties.major}{properties.minor})"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What does not run on the chosen device is skipped, and says why."""
    chosen = config.getoption("device")
    for item in items:
        needs_gpu, any_device = item.get_closest_marker("gpu"), "device" in getattr(item, "fixturenames", ())
        if chosen == "cuda" and not (needs_gpu or any_device):
            item.add_marker(pytest.mark.skip(reason="about no GPU: run it without --device cuda"))
        elif chosen == "cuda" and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason=NO_GPU))
        elif chosen == "cpu" and needs_gpu:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU: --device cuda"))
        elif chosen == "rehearsal" and not needs_gpu:
            item.add_marker(pytest.mark.skip(reason="not of a GPU alone: run it without --device rehearsal"))


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where a test makes its tensors. On a GPU Triton's kernels are compiled, elsewhere they run in its interpreter.

    Products are IEEE fp32 there, convolutions too (torch's default is TF32), and sums have one order: what a run's
    precision has set before is set back.
    """
    chosen = request.config.getoption("device")
    try:
        from fastslots.kernels.gpu._tiles import INTERPRETED
    except ImportError:  # no Triton here
        pass
    else:
        words = "triton was imported before TRITON_INTERPRET was set: run these tests in a new process"
        assert INTERPRETED.value == (chosen != "cuda"), words
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    return torch.device("cuda", 0) if chosen == "cuda" else torch.device("cpu")


# ---- where each test ran, as the GPU's allocator saw it, whatever the test believes ----------------------------------


def _made() -> int:
    """Tensors that this process has made on the GPU so far."""
    return torch.cuda.memory_stats(0).get("allocation.all.allocated", 0) if torch.cuda.is_initialized() else 0


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    try:
        _wait()
    except RuntimeError as error:  # an illegal address, say, after which CUDA refuses this process everything
        pytest.skip(f"not run, an earlier test of this process lost the GPU: {str(error).splitlines()[0]}")
    item.stash[MADE] = _made()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    try:
        result = yield
        _wait()  # what a kernel did wrong is found in its own test
        return result
    finally:
        item.user_properties.append((RAN_ON, gpu() if _made() > item.stash[MADE] else "cpu"))


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many tests ran where; of a run on a GPU also the names of those that made nothing there."""
    reports = [r for kind in ("passed", "failed") for r in terminalreporter.getreports(kind) if r.when == "call"]
    places = {report.nodeid: dict(report.user_properties).get(RAN_ON, "cpu") for report in reports}
    if terminalreporter.config.getoption("device") != "cuda" or not places:
        return
    terminalreporter.section("where tests ran")
    for place, count in Counter(places.values()).items():
        terminalreporter.line(f"{count} on {place}")
    for name, place in places.items():
        if place == "cpu":
            terminalreporter.line(f"  nothing on a GPU: {name}")
