"""The backends that ops are tested on: the reference, C++ on each instruction set of this machine, and Triton, whose
kernels run in its interpreter or on a GPU (``tests/devices.py``)."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch

HAS_CPP = importlib.util.find_spec("fastslots._cpu") is not None
HAS_TRITON = importlib.util.find_spec("triton") is not None


def _instruction_sets() -> tuple[str, ...]:
    if not HAS_CPP:
        return ()
    from fastslots.kernels import cpu_backend

    return cpu_backend.ISAS


BACKENDS = ["reference", *(f"cpu {isa}" for isa in _instruction_sets()), *(["triton"] if HAS_TRITON else [])]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, device: torch.device) -> str:
    """Name of a backend; the C++ one on the instruction set that the test's name says."""
    return _use(request.param, device)


@pytest.fixture(params=[name for name in BACKENDS if name != "triton"])
def host_backend(request: pytest.FixtureRequest) -> str:
    """The same for ops whose Triton kernels have a file of their own: the reference and C++."""
    return _use(request.param, torch.device("cpu"))


@pytest.fixture(params=BACKENDS[1:])
def kernels(request: pytest.FixtureRequest, device: torch.device) -> str:
    """The same of those that have kernels."""
    return _use(request.param, device)


def _use(backend: str, device: torch.device) -> str:
    name, _, isa = backend.partition(" ")
    if isa and device.type != "cpu":
        pytest.skip("the C++ kernels are the CPU's")
    if isa:
        from fastslots.kernels import cpu_backend

        cpu_backend.set_isa(isa)
    return name


@pytest.fixture(autouse=True)
def best_isa_and_threads_as_they_were() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    if HAS_CPP:
        from fastslots.kernels import cpu_backend

        cpu_backend.set_isa(None)
