"""Where the time of our own provider goes, operator by operator: a text file beside the rows."""

from __future__ import annotations

import torch
from torch.profiler import ProfilerActivity

from fastslots.bench.case import Options
from fastslots.bench.cases import CASES
from fastslots.bench.reporting.rows import Row
from fastslots.bench.run import baseline

LINES = 40


def profile(case: str, options: Options, rows: list[Row]) -> str:
    """The table of torch's profiler over two calls, after one to warm up; empty where ours was not timed."""
    ours = baseline(rows)
    if ours is None:
        return "no provider of ours was timed\n"
    torch.set_num_threads(options.threads)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (options.device == "cuda")
    with options.math():
        run = CASES[case](options).providers[ours.provider].make()
        run()
        with torch.profiler.profile(activities=activities) as seen:
            run()
            run()
    order = "self_cuda_time_total" if options.device == "cuda" else "self_cpu_time_total"
    return f"{case}, {ours.provider}, two calls\n{seen.key_averages().table(sort_by=order, row_limit=LINES)}\n"
