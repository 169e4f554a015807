"""Peak memory of a program in a process of its own, which sees what the allocator of C++ gives as well as torch's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

PRELUDE = """
import json, sys, torch
from fastslots import ops
from fastslots.records import FeedForward, FoldedDecoder, FoldedLayer, FoldedProjections, LossInputs, OutputHead

torch.set_num_threads(1)


def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def added(call):
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts again from what is resident
    before = status("VmRSS:")
    call()
    return status("VmHWM:") - before


def leaf(*size):
    return torch.randn(*size, requires_grad=True)
"""


def measured(*program: str) -> Any:
    """What the program prints. Blocks that it frees go back to the system, so that the peak is of what was alive."""
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 17)}
    command = [sys.executable, "-P", "-c", *program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


needs_peak = pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="no peak of memory to read")
