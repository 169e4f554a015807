"""Peak memory that one call adds, in a process of its own, and how much of it are the results that it hands back.

On a GPU torch's allocator tells; a provider that is a CUDA graph has its rehearsals and its capture in that call. On a
CPU: the kernel's high-water mark of resident memory, reset before the call (Linux), less what was resident. Code and
libraries are brought in by a small call first; a compiled peer is called once in full, so that its compiler is not
counted, and what it freed is given back before the mark is reset.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastslots.bench.case import Options

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Memory(NamedTuple):
    """In bytes; None where it could not be measured, with the reason."""

    peak: int | None = None  # added by one call
    results: int | None = None  # what the call hands back: no implementation can do with less
    reason: str = ""


def measure(case: str, provider: str, options: Options) -> Memory:
    """Of one call."""
    if options.device == "cpu" and not CLEAR.exists():
        return Memory(reason="this system does not tell peak memory")
    spec = {"case": case, "provider": provider, "options": dataclasses.asdict(options)}
    code = "import sys; from fastslots.bench import run; run.measure_memory(sys.argv[1])"
    # Blocks of 128 KiB or more go back to the system when they are freed: the peak is of what was alive.
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 17)}
    with tempfile.TemporaryDirectory() as folder:  # a checkout's folder would hide the installed package
        done = subprocess.run(
            [sys.executable, "-c", code, json.dumps(spec)], capture_output=True, text=True, cwd=folder, env=environment
        )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        if "CannotServeError: " in last:
            return Memory(reason=last.split("CannotServeError: ", 1)[1])
        return Memory(reason=f"the process that measures memory ended with {done.returncode}: {last}")
    peak, results = map(int, done.stdout.split()[-2:])
    return Memory(peak, results)


def results_of(value: object) -> int:
    """Bytes of the tensors that a call returns; those that share their memory count once."""
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage() for t in tree_leaves(value) if isinstance(t, Tensor)
    }
    return sum(storage.nbytes() for storage in storages.values())


def of_call(run: Callable[[], object], device: str) -> tuple[int, int]:
    """-> bytes that the call adds at its peak, and those of its results."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        results = results_of(run())
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, results
    if sys.platform == "linux":
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        except (OSError, AttributeError):  # not glibc: nothing to give back by hand
            pass
    CLEAR.write_text("5")  # the high-water mark starts again from here
    before = _status("VmRSS")
    results = results_of(run())
    return max(0, _status("VmHWM") - before), results


def _status(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB", STATUS.read_text(), re.M)
    assert found is not None
    return int(found[1]) * 1024
