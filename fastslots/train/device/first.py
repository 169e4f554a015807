"""What the first step on a GPU needs, and says: kernels are compiled, products have to repeat where that was asked."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol, cast

import torch

from fastslots.ops import backends

REPEATING = (":4096:8", ":16:8")
"""Values of CUBLAS_WORKSPACE_CONFIG with which products of cuBLAS repeat bit for bit, the faster one first."""


class Telling(Protocol):
    """The backend that compiles kernels when they are first called."""

    def compiles_told(self, say: Callable[[str], None]) -> AbstractContextManager[None]: ...


def compiles_told(device: torch.device, say: Callable[[str], None]) -> AbstractContextManager[None]:
    """Inside, kernels that are compiled on this device are told of; nothing where there are none to compile."""
    if device.type == "cuda":
        with contextlib.suppress(ImportError):
            return cast(Telling, backends.load("triton")).compiles_told(say)
    return contextlib.nullcontext()


def make_products_repeat(say: Callable[[str], None]) -> None:
    """Where the program asks torch for deterministic algorithms, cuBLAS needs a setting of the environment, without
    which torch refuses every product on a GPU. It is read at the first product, so it can be set until then."""
    if not torch.are_deterministic_algorithms_enabled() or os.environ.get("CUBLAS_WORKSPACE_CONFIG") in REPEATING:
        return
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = REPEATING[0]
    say(
        f"CUBLAS_WORKSPACE_CONFIG={REPEATING[0]} set, which torch.use_deterministic_algorithms(True) needs on a GPU; "
        "set it before the program starts if it has multiplied there already"
    )
