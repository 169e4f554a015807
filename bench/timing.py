"""Clocks: rounds interleaved over providers, so that a busy machine slows all of them alike; the machine's roofs."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

MIN_SAMPLE = 0.02
"""Seconds that one sample lasts at least: shorter work is repeated inside it."""
MAX_REPEATS = 1000
LONG = 1.0
"""Seconds of a first call from which on caches are warm whatever comes next."""
L2_FLUSH_BYTES = 1 << 28  # above the L2 of any GPU sold so far


class Quantiles(NamedTuple):
    median: float
    q20: float
    q80: float


def quantiles(values: Iterable[float]) -> Quantiles:
    """Median and 20/80 % quantiles, linear between samples."""
    ordered = sorted(values)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    return Quantiles(statistics.median(ordered), at(0.2), at(0.8))


class Stopwatch:
    """Seconds of one call on every clock the device has: wall and processor time, and CUDA events on a GPU."""

    def __init__(self, device: str):
        self._cuda = device == "cuda"
        self._flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.uint8, device="cuda") if self._cuda else None

    def first(self, run: Callable[[], Any]) -> tuple[Any, float]:
        """The first call, compilation included -> its result, wall seconds."""
        start = time.perf_counter()
        result = run()
        if self._cuda:
            torch.cuda.synchronize()
        return result, time.perf_counter() - start

    def sample(self, run: Callable[[], Any], repeats: int = 1) -> dict[str, float]:
        """Seconds a call by clock, over ``repeats`` calls (on a GPU, where L2 is emptied before the first)."""
        if self._cuda:
            return self._cuda_sample(run, repeats)
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(repeats):
            run()
        return {"wall": (time.perf_counter() - wall) / repeats, "cpu": (time.process_time() - cpu) / repeats}

    def _cuda_sample(self, run: Callable[[], Any], repeats: int) -> dict[str, float]:
        assert self._flush is not None
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        torch.cuda.synchronize()
        wall = time.perf_counter()
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        torch.cuda.synchronize()
        wall = time.perf_counter() - wall
        return {"cuda": start.elapsed_time(end) / 1e3 / repeats, "wall": wall / repeats}


def interleave(
    runs: dict[str, Callable[[], Any]],
    rounds: int,
    device: str,
    first: dict[str, float] | None = None,
    row: int = 1,
) -> dict[str, dict[str, list[float]]]:
    """Every provider once a round, each round starting with another -> provider -> clock -> seconds, a round each.

    first: wall seconds of calls made before; a long one was warm-up enough. row: calls of a sample on a GPU.
    """
    watch, names = Stopwatch(device), list(runs)
    repeats = {}
    for name, run in runs.items():
        seconds = (first or {}).get(name, 0.0)
        if seconds < LONG:  # a warm call, which also says how long one lasts
            seconds = watch.sample(run)["wall"]
        repeats[name] = row if device == "cuda" else min(MAX_REPEATS, max(1, round(MIN_SAMPLE / max(seconds, 1e-9))))
    seen: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    gc.collect()
    gc.disable()
    try:
        for round_ in range(rounds):
            shift = round_ % max(len(names), 1)
            for name in names[shift:] + names[:shift]:
                for clock, seconds in watch.sample(runs[name], repeats[name]).items():
                    seen[name].setdefault(clock, []).append(seconds)
    finally:
        gc.enable()
    return seen


def roofs(device: str, tiny: bool = False) -> dict[str, float]:
    """GFLOP/s of an fp32 matrix product (on a GPU also of one in bf16) and GB/s of a copy (read and write counted), on
    the timed clock of this run."""
    side, count = (256, 1 << 20) if tiny else (2048, 1 << 26)
    if device == "cuda":
        side, count = side * 4, count * 4
    a, b, c = (torch.rand(side, side, device=device) for _ in range(3))
    source = torch.rand(count, device=device)
    target = torch.empty_like(source)
    runs = {"product": lambda: torch.mm(a, b, out=c), "copy": lambda: target.copy_(source)}
    if device == "cuda":
        left, right = a.bfloat16(), b.bfloat16()
        runs["16 bits"] = lambda: torch.mm(left, right)
    seen = interleave(runs, 3, device)
    # A shared machine's wall clock counts what others did; with several threads processor time is a sum over them.
    clock = "cuda" if device == "cuda" else ("cpu" if torch.get_num_threads() == 1 else "wall")
    in_16_bits = {"bf16_gflops": 2 * side**3 / min(seen["16 bits"][clock]) / 1e9} if "16 bits" in seen else {}
    return {
        "sgemm_gflops": 2 * side**3 / min(seen["product"][clock]) / 1e9,
        "copy_gbs": 8 * count / min(seen["copy"][clock]) / 1e9,
        **in_16_bits,
    }


def energy(run: Callable[[], Any], seconds: float = 0.4) -> tuple[float, int] | None:
    """Joules of one call (whole board) and the SM clock in MHz, by NVML; None without a GPU or without NVML."""
    if not torch.cuda.is_available():
        return None
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        board = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(0).uuid}")
        calls, before, stop = 0, pynvml.nvmlDeviceGetTotalEnergyConsumption(board), time.perf_counter() + seconds
        while time.perf_counter() < stop:
            run()
            torch.cuda.synchronize()
            calls += 1
        used = pynvml.nvmlDeviceGetTotalEnergyConsumption(board) - before  # millijoules
        clock = pynvml.nvmlDeviceGetClockInfo(board, pynvml.NVML_CLOCK_SM)
    except (AttributeError, pynvml.NVMLError):
        return None
    return used / 1e3 / calls, int(clock)
