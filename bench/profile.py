"""Where the time of a step goes, kernel by kernel: a text and a JSON file in a folder beside the rows.

A provider is built and called before the profiler is entered: a CUDA graph is captured by then, and replays alone are
seen. On a GPU a provider's share of time without a kernel is what launches and the host cost.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from fastslots.bench.case import Options, Run
from fastslots.bench.cases import CASES
from fastslots.bench.reporting.rows import Row
from fastslots.errors import first_line

LINES = 60
CALLS = 3
WANTED = ("fastslots", "published, one graph", "folded, tiled")
"""How the names of those that are looked at start; ``published`` itself where it was timed too."""


def write(case: str, options: Options, rows: list[Row], path: Path) -> list[Path]:
    """Write NAME.txt and NAME.json into the folder profiles beside the rows NAME.json -> their paths."""
    torch.set_num_threads(options.threads)
    profiles = [
        _profile(case, row.provider, options)
        for row in rows
        if row.time is not None and (row.provider == "published" or row.provider.startswith(WANTED))
    ]
    folder = path.parent / "profiles"  # whoever reads the rows of a folder takes every JSON file in it for rows
    folder.mkdir(exist_ok=True)
    text, data = folder / f"{path.stem}.txt", folder / f"{path.stem}.json"
    text.write_text("\n".join(_page(case, profile) for profile in profiles) or "no provider of ours was timed\n")
    data.write_text(json.dumps(profiles, indent=1) + "\n")
    return [text, data]


def _profile(case: str, provider: str, options: Options) -> dict[str, Any]:
    """By call: microseconds between the first kernel's start and the last one's end, those with a kernel running, and
    each kernel's and operator's; or what went wrong."""
    on_gpu, graphs = options.device == "cuda", "graph" in provider
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    try:
        with options.math(), _without_graphs() if not graphs else contextlib.nullcontext():
            run = CASES[case](options).providers[provider].built(options)
            for _ in range(2):
                run()
            _wait(on_gpu)
            with torch.profiler.profile(activities=activities) as seen:
                _calls(run, on_gpu)
        form = provider if graphs else f"{provider}, operator by operator"
        found: dict[str, Any] = {"provider": form, "calls": CALLS, "operators": _operators(seen, on_gpu)}
        return found | (_on_device(seen.events()) if on_gpu else {})
    except Exception as error:  # what can't be profiled says so, and the others go on
        return {"provider": provider, "error": f"{type(error).__name__}: {first_line(error)[:300]}"}
    finally:
        gc.collect()  # those before this one


@contextlib.contextmanager
def _without_graphs() -> Iterator[None]:
    """Inside, the decoder's loss is no graph of its own, so that its kernels are named with what launches them."""
    before = os.environ.get("FASTSLOTS_CUDA_GRAPHS")
    os.environ["FASTSLOTS_CUDA_GRAPHS"] = "0"
    try:
        yield
    finally:
        del os.environ["FASTSLOTS_CUDA_GRAPHS"]
        if before is not None:
            os.environ["FASTSLOTS_CUDA_GRAPHS"] = before


def _calls(run: Run, on_gpu: bool) -> None:
    for _ in range(CALLS):
        run()
    _wait(on_gpu)


def _wait(on_gpu: bool) -> None:
    if on_gpu:
        torch.cuda.synchronize()


def _on_device(seen: Iterable[Any]) -> dict[str, Any]:
    """Of a GPU: kernels and copies by name, the largest first, how much of the time none ran, and the last call's in
    order: name, microseconds from its first one's start, microseconds."""
    events = [e for e in seen if e.device_type.name == "CUDA" and e.time_range.end > e.time_range.start]
    events = [e for e in events if not getattr(e, "is_user_annotation", False)]
    by_name: dict[str, list[float]] = {}
    for event in events:
        by_name.setdefault(event.name, []).append(event.time_range.end - event.time_range.start)
    spans = sorted((e.time_range.start, e.time_range.end) for e in events)
    busy, last = 0.0, float("-inf")
    for start, end in spans:  # copies beside kernels count once
        busy += max(0.0, end - max(start, last))
        last = max(last, end)
    span = last - spans[0][0] if spans else 0.0
    ordered = sorted(events, key=lambda e: e.time_range.start)[-round(len(events) / CALLS) :]
    first = ordered[0].time_range.start if ordered else 0.0
    kernels = [
        {"name": name, "launches": len(us) / CALLS, "us": sum(us) / CALLS}
        for name, us in sorted(by_name.items(), key=lambda item: -sum(item[1]))
    ]
    return {
        "span_us": span / CALLS,
        "busy_us": busy / CALLS,
        "gaps_us": (span - busy) / CALLS,
        "sum_us": sum(k["us"] for k in kernels),
        "launches": len(events) / CALLS,
        "kernels": kernels,
        "in_order": [
            [e.name, round(e.time_range.start - first, 2), round(e.time_range.end - e.time_range.start, 2)]
            for e in ordered
        ],
    }


def _operators(seen: Any, on_gpu: bool) -> list[dict[str, Any]]:
    """torch's operators, by the time of their own kernels (on a CPU: by their own); with the kernels, where an operator
    has launched them itself."""
    time = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    launched: dict[str, dict[str, float]] = {}
    for event in seen.events():
        of = launched.setdefault(event.name, {})
        for kernel in event.kernels:
            of[kernel.name] = of.get(kernel.name, 0.0) + kernel.duration / CALLS
    rows = [
        {"name": e.key, "calls": e.count / CALLS, "us": getattr(e, time) / CALLS, "kernels": launched.get(e.key, {})}
        for e in seen.key_averages()
        if e.device_type.name == "CPU" and getattr(e, time) > 0
    ]
    return sorted(rows, key=lambda row: -row["us"])


def _page(case: str, profile: dict[str, Any]) -> str:
    lines = [f"{case}, {profile['provider']}"]
    if "error" in profile:
        return f"{lines[0]}: {profile['error']}\n"
    if "kernels" in profile:
        lines.append(
            f"a call: {profile['span_us']:,.0f} µs, {profile['busy_us']:,.0f} with a kernel, {profile['gaps_us']:,.0f} "
            f"with none; {profile['launches']:,.0f} launches"
        )
    for what in ("kernels", "operators"):
        for row in profile.get(what, [])[:LINES]:
            lines.append(f"{row['us']:12,.1f} µs {row.get('launches', row.get('calls')):9,.1f} x  {row['name'][:120]}")
        lines.append("")
    return "\n".join(lines)
