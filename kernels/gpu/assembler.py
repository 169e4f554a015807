"""Which assembler turns Triton's PTX into machine code for sm_90.

ptxas 12.8, which Triton 3.6 and 3.7 call for every GPU before Blackwell, miscompiles products of sm_90 whose operands
lie in shared memory: in the 64-bit addresses of their tiles it reads uniform registers that no instruction has written.
On an H100 that was a sum four times too large in one kernel and an illegal address in another. ptxas 12.9 does not.
Triton carries a newer ptxas for Blackwell, which knows the older GPUs as well, and takes it for sm_90 itself from 3.9
on. So do our launches, by the variable that Triton reads.
"""

from __future__ import annotations

import os
from functools import cache

import torch
from triton.backends.nvidia import compiler

VARIABLE = "TRITON_PTXAS_PATH"
SOUND = (12, 9)
"""The first version that is known to write all that it reads."""


def _version(arch: int) -> tuple[int, int]:
    major, minor = compiler.get_ptxas(arch).version.split(".")[:2]
    return int(major), int(minor)


@cache
def choose() -> None:
    """Have Triton take the sound one of those that it carries; called before the first compilation.

    A choice of the user's stays. The driver must be of the assembler's major version of CUDA or later, and torch's own
    version says which it needs; a torch without CUDA compiles for no driver.
    """
    if os.environ.get(VARIABLE) or _version(90) >= SOUND:
        return
    newer, cuda = _version(100), torch.version.cuda
    if newer >= SOUND and (cuda is None or newer[0] <= int(cuda.split(".")[0])):
        os.environ[VARIABLE] = compiler.get_ptxas(100).path
        compiler.get_ptxas_version.cache_clear()  # a part of the name of what is kept of earlier compilations


@cache
def why_not(arch: str) -> str | None:
    """Why the products of this architecture can't be trusted; None where they can."""
    if arch != "sm_90":
        return None
    choose()
    if _version(90) >= SOUND:
        return None
    used = ".".join(map(str, _version(90)))
    return f"ptxas {used} miscompiles products on {arch}: TRITON_PTXAS_PATH may name that of CUDA 12.9 or later"
