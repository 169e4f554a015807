"""Two threads at most, so that a test machine is shared fairly; Triton kernels run on NumPy where there is no GPU."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

torch.set_num_threads(min(2, torch.get_num_threads()))

# Subprocesses started at the root of a checkout import the installed package, not the source folder (Python 3.11 on).
os.environ["PYTHONSAFEPATH"] = "1"
