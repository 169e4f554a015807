"""How the C++ module is called: the instruction set in use, and tensors as the arrays that its bindings take."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch  # before _cpu, which takes its OpenMP symbols from the runtime that torch has loaded
from torch import Tensor

from fastslots import _cpu
from fastslots.errors import UserError

MAX_CHAIN: int = _cpu.most_maps
"""Largest number of decoder layers, and of linear layers of the head or the query MLP, that the C++ kernels hold."""

ISAS: tuple[str, ...] = tuple(_cpu.instruction_sets())
"""Instruction sets that this processor serves, the best first."""


_isa: str


def set_isa(name: str | None) -> None:
    """Use this instruction set from now on; None for the best. UserError where the processor lacks it."""
    global _isa
    if name is not None and name not in ISAS:
        served = ", ".join(ISAS)
        raise UserError(f"instruction set {name!r} is not one that this processor serves: name one of {served}")
    _isa = name or ISAS[0]


def isa() -> str:
    """The instruction set in use."""
    return _isa


set_isa(os.environ.get("FASTSLOTS_ISA") or None)


_own = threading.local()


def threads() -> int:
    """How many the kernels take."""
    return getattr(_own, "count", None) or torch.get_num_threads()


@contextlib.contextmanager
def torch_on_one_thread() -> Iterator[None]:
    """Inside, the kernels take the threads that torch had, and torch's own operators one.

    Those are then the small rest: on several threads each would cost more in waiting than in work, and some would give
    other bits for another number of threads.
    """
    _own.count = threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(_own.count)
        _own.count = None


def binding(name: str, dtype: torch.dtype) -> Callable[..., Any]:
    """The binding of this name for arrays of ``dtype``; it takes keywords alone."""
    binding: Callable[..., Any] = getattr(_cpu, f"{name}_{str(dtype).removeprefix('torch.')}")
    return binding


def kernel(name: str, dtype: torch.dtype) -> Callable[..., Any]:
    """The same on the instruction set in use and the kernels' threads."""
    return partial(binding(name, dtype), isa=_isa, threads=threads())


def wide(dtype: torch.dtype) -> torch.dtype:
    """What the kernels compute in."""
    return torch.promote_types(dtype, torch.float32)


def plain(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """What the C++ side takes: detached, contiguous, of its dtype."""
    return tensor.detach().to(dtype).contiguous()


def unit_rows(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Last axis contiguous, other strides as they are: heads split from one projection are not copied."""
    tensor = tensor.detach().to(dtype)
    if not tensor.numel():  # torch calls any strides of an empty tensor contiguous: those of a sum's gradient are 0
        return tensor.new_empty(tensor.shape)
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def mask(slot_mask: Tensor | None) -> Tensor | None:
    return None if slot_mask is None else plain(slot_mask, torch.uint8)
