"""One case from options to rows: build, first call, check against float64, interleaved rounds, memory, energy."""

from __future__ import annotations

import dataclasses
import gc
import json
import statistics
from collections.abc import Callable

import torch

from fastslots.bench import memory, timing
from fastslots.bench.case import BOUNDS, OURS, Case, Options, Provider, Run, Tensors, check
from fastslots.bench.cases import CASES
from fastslots.bench.peers import CannotServeError
from fastslots.bench.reporting.rows import Row, environment
from fastslots.errors import first_line

FEW = 3
"""Samples of a provider right after its first call."""
WARM_SIDE = {"jacobian": 16}
"""Pixels a side of the call that brings code in; 48 elsewhere, enough for every path that the whole size takes."""

Say = Callable[[str], None]


def measure(
    name: str, options: Options, say: Say = lambda line: None, keep: Callable[[list[Row]], object] = lambda rows: None
) -> list[Row]:
    """Rows of one case, a row a provider, in the order of the case.

    say: told of progress, a line each; keep: given the rows so far after each provider, whose few samples on a GPU
    stand until the interleaved rounds replace them, and once all are timed, before memory is measured, where a compiled
    peer can run a machine out of it.
    """
    rows, lost = _timed(name, options, say, keep)
    gc.collect()  # models, graphs and their memory
    if options.device == "cuda" and not lost:
        torch.cuda.empty_cache()
    if options.memory and name != "loader" and not lost:
        for row in rows:
            if row.status == "ok":
                found = memory.measure(name, row.provider, options)
                row.peak_bytes, row.result_bytes = found.peak, found.results
                row.reason = row.reason or found.reason
                say(f"  {name} {row.provider}: peak {(found.peak or 0) / 1e6:,.0f} MB {found.reason}")
    return rows


def _timed(name: str, options: Options, say: Say, keep: Callable[[list[Row]], object]) -> tuple[list[Row], str]:
    """-> the rows, and why this process can use the GPU no more."""
    torch.set_num_threads(options.threads)
    roofs = timing.roofs(options.device, options.tiny)
    run = environment(options.device, options.threads, roofs) | {"tiny": options.tiny}
    case = CASES[name](options)
    rows: list[Row] = []
    runs: dict[str, Run] = {}
    expected: Tensors | None = None
    lost = ""  # why no further provider is tried
    with options.math():
        for provider, make in case.providers.items():
            if not options.wants(provider):
                continue
            row = Row(name, provider, options.preset, case.axes, options.precision, run=run)
            rows.append(row)
            if expected is None and not lost:
                expected, lost = _expected(case)
            if expected is None or lost:
                row.status, row.reason = "cannot", lost
                continue
            timed = _first(row, make, case, expected, options)
            if timed is not None and (options.device == "cuda" or options.tiny):
                _few(row, timed, case, options)
            lost = _lost(row, options)
            if timed is not None and row.status == "ok":
                runs[provider] = timed
            keep(ratios(rows))
            error = f", {row.error:.1e}" if row.error is not None else ""
            time = f", {1e3 * row.time:.3f} ms" if row.time is not None else ""
            say(f"  {name} {provider}: {row.status}{error}{time}" + f" ({row.reason})" * bool(row.reason))
        del expected
        gc.collect()
        first = {row.provider: row.first_call for row in rows if row.first_call is not None}
        try:
            seen = {} if lost else timing.interleave(runs, options.rounds, options.device, first, case.row)
            for row in rows:
                if row.provider in seen:
                    _fill(row, case, seen, options)
            for row in rows:
                if row.provider in seen and options.device == "cuda":
                    row.energy_j, row.clock_mhz = timing.energy(runs[row.provider]) or (None, None)
        except RuntimeError as error:
            if options.device != "cuda":
                raise
            lost = f"what came after its first samples broke ({first_line(error)[:200]})"
            for row in rows:
                row.reason = "; ".join(filter(None, (row.reason, lost))) if row.provider in runs else row.reason
    keep(ratios(rows))
    return rows, lost


def _expected(case: Case) -> tuple[Tensors | None, str]:
    """The case's, or None and why there are none."""
    try:
        return {key: t.detach() for key, t in case.expected().items()}, ""
    except torch.OutOfMemoryError as error:
        return None, f"no float64 values to hold it against ({first_line(error)[:200]}): take a smaller --batch"


def _lost(row: Row, options: Options) -> str:
    """Why a GPU takes no more work: an illegal address, say, after which every call of this process fails."""
    if options.device != "cuda":
        return ""
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        row.status, row.reason = "wrong", row.reason or f"the GPU stopped ({first_line(error)[:200]})"
        return f"not tried: {row.provider} stopped the GPU for this process"
    return ""


def _few(row: Row, run: Run, case: Case, options: Options) -> None:
    """A few samples at once, so that a row has its time whatever the next provider does."""
    few = dataclasses.replace(options, rounds=min(options.rounds, FEW))
    first = {row.provider: row.first_call or 0.0}
    try:
        _fill(row, case, timing.interleave({row.provider: run}, few.rounds, options.device, first, case.row), few)
    except RuntimeError as error:
        row.status, row.reason = "cannot", f"its second call broke: {first_line(error)[:200]}"


def _first(row: Row, provider: Provider, case: Case, expected: Tensors, options: Options) -> Run | None:
    """Build a provider, call it once and check it; the row says what came of it."""
    try:
        run = provider.built(options)
        result, row.first_call = timing.Stopwatch(options.device).first(run)
        actual = (provider.view or case.view)(result)
        row.error, row.error_at = check(actual, provider.expected() if provider.expected else expected)
        row.reason = provider.how() if provider.how else ""
    except CannotServeError as why:
        row.status, row.reason = "cannot", str(why)
        return None
    except Exception as error:  # a peer that breaks has a row that says how, and the others go on
        row.status, row.reason = "cannot", f"{type(error).__name__}: {first_line(error)[:200]}"
        return None
    row.error_bound = {**BOUNDS, **case.bounds}[options.precision]
    if not row.error <= row.error_bound:
        row.status, row.reason = "wrong", f"{row.error_at} is off by {row.error:.1e} (bound {row.error_bound:.0e})"
        return None
    return run


def _fill(row: Row, case: Case, seen: dict[str, dict[str, list[float]]], options: Options) -> None:
    provider, row.samples = case.providers[row.provider], seen[row.provider]
    row.clock = "cuda" if options.device == "cuda" else case.clock
    if row.clock == "cpu" and options.threads > 1:
        row.clock = "wall"  # threads that wait for work count as busy
    row.rounds = options.rounds
    if not options.rounds:
        return
    median, row.time_q20, row.time_q80 = timing.quantiles(row.samples[row.clock])
    row.time = median
    row.wall = statistics.median(row.samples["wall"])
    row.cpu = statistics.median(row.samples["cpu"]) if "cpu" in row.samples else None
    row.flops, row.bytes = provider.flops, provider.bytes
    row.items_per_s = case.items / median if case.items else None
    row.gflops_per_s = provider.flops / median / 1e9 if provider.flops else None
    row.gbytes_per_s = provider.bytes / median / 1e9 if provider.bytes else None


def baseline(rows: list[Row]) -> Row | None:
    """Our row, which ratios are taken to."""
    timed = {row.provider: row for row in rows if row.time is not None}
    return next((timed[name] for name in OURS if name in timed), None)


def ratios(rows: list[Row]) -> list[Row]:
    """Every timed row's time over ours, round by round: what slows a round slows both. -> the rows."""
    ours = baseline(rows)
    if ours is None:
        return rows
    for row in rows:
        if row.time is not None:
            pairs = zip(row.samples[row.clock], ours.samples[ours.clock], strict=True)
            row.ratio, row.ratio_q20, row.ratio_q80 = timing.quantiles(a / b for a, b in pairs)
    return rows


def memory_rows(options: Options, resolutions: tuple[int, ...], say: Say = lambda line: None) -> list[Row]:
    """Peak memory by resolution, for one provider of each kind; nothing is timed.

    Of the decoder step; on a GPU of the whole training step, as it is trained.
    """
    rows = []
    name = "step" if options.device == "cuda" else "layer"
    run = environment(options.device, options.threads, {}) | {"tiny": options.tiny}
    for resolution in resolutions:
        at = dataclasses.replace(options, overrides={**options.overrides, "resolution": resolution})
        case = CASES[name](at)
        axes, providers = case.axes, [provider for provider in case.providers if provider in MEMORY_PROVIDERS]
        del case
        for provider in filter(options.wants, providers):
            row = Row("memory", provider, options.preset, axes, options.precision, run=run)
            row.peak_bytes, row.result_bytes, row.reason = memory.measure(name, provider, at)
            row.status = "cannot" if row.peak_bytes is None else "ok"
            row.reason = row.reason or (f"of case {name}" if name != "layer" else "")
            rows.append(row)
            say(f"  {resolution} {provider}: {(row.peak_bytes or 0) / 1e6:,.0f} MB {row.reason}")
    return rows


def measure_memory(spec: str) -> None:
    """In a process of its own, which ``memory.measure`` starts: prints what ``memory.of_call`` says of one call."""
    wanted = json.loads(spec)
    options = Options(**wanted["options"])
    torch.set_num_threads(options.threads)
    side = min(WARM_SIDE.get(wanted["case"], 48), options.config().resolution)
    small = dataclasses.replace(options, overrides={**options.overrides, "resolution": side})
    warm = options if "compiled" in wanted["provider"] or "autotune" in wanted["provider"] else small
    with options.math():
        if warm is small:
            CASES[wanted["case"]](warm).providers[wanted["provider"]].built(warm)()
        run = CASES[wanted["case"]](options).providers[wanted["provider"]].built(options)
        if warm is options:
            run()
        print(*memory.of_call(run, options.device))


MEMORY_PROVIDERS = (
    "published", "published, compiled", "sdpa, identity in V", "folded", "folded, tiled",
    "fastslots, cpu", "fastslots, triton", "fastslots, one graph", "published, one graph",
)  # fmt: skip
