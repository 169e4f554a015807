"""Triton kernels and the code that launches them; the rest of the package calls them through ``gpu_backend``.

Importing raises ImportError, which ``explain`` and ``doctor`` show, where there is no Triton or one that is too old.
"""

import re

import triton

OLDEST_TRITON = (3, 6)
"""The oldest version under which every launch compiles and the tests pass: that of torch 2.10 and 2.11."""

if tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:2]) < OLDEST_TRITON:
    raise ImportError(
        f"Triton {triton.__version__} is older than {OLDEST_TRITON[0]}.{OLDEST_TRITON[1]}, which the kernels need: "
        "torch 2.10 and newer bring it"
    )
