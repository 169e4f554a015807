"""Rows as text: for a terminal, and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from fastslots.bench.reporting.rows import Row

UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))


def seconds(value: float) -> str:
    """Three digits and a unit."""
    scale, unit = next(((s, u) for s, u in UNITS if value >= s), UNITS[-1])
    return f"{_digits(value / scale)} {unit}"


def megabytes(value: float) -> str:
    return f"{value / 1e6:,.0f} MB" if value >= 1e7 else f"{value / 1e6:.1f} MB"


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def times(value: float) -> str:
    """A ratio: 3.21x."""
    return f"{_digits(value)}x"


def memory(row: Row) -> str:
    """What a call adds at its peak, and how much of that are its results."""
    if row.peak_bytes is None:
        return ""
    return megabytes(row.peak_bytes) + (f", results {megabytes(row.result_bytes)}" if row.result_bytes else "")


def cells(row: Row) -> list[str]:
    """provider, time, 20–80 %, over ours, GFLOP/s (share of sgemm) or GB/s or images/s, peak memory, error, note"""
    if row.time is None:
        return [row.provider, "", "", "", "", memory(row), "", f"{row.status}: {row.reason}" if row.reason else ""]
    assert row.time_q20 is not None and row.time_q80 is not None
    rate = ""
    if row.gflops_per_s is not None:
        rate = f"{row.gflops_per_s:.0f} GFLOP/s ({row.gflops_per_s / row.run['sgemm_gflops']:.0%})"
    elif row.gbytes_per_s is not None:
        rate = f"{row.gbytes_per_s:.3g} GB/s ({row.gbytes_per_s / row.run['copy_gbs']:.0%})"
        rate = f"{row.items_per_s:,.0f} images/s, {rate}" if row.items_per_s else rate
    note = row.reason
    if "compiled" in row.provider or "autotune" in row.provider:
        note = f"first call {seconds(row.first_call or 0)}" + f"; {note}" * bool(note)
    return [
        row.provider,
        seconds(row.time),
        f"{seconds(row.time_q20)} – {seconds(row.time_q80)}",
        "" if row.ratio is None else times(row.ratio),
        rate,
        memory(row),
        "" if row.error is None else f"{row.error:.0e}",
        note,
    ]


HEADER = ["provider", "time", "20–80 %", "over ours", "reached", "adds at its peak", "error", "note"]


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def for_people(rows: list[Row]) -> str:
    """An aligned table with the run's device and roofs above it."""
    lines = [HEADER, *(cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER) - 1)]
    text = ["  ".join([*(c.ljust(w) for c, w in zip(line, widths, strict=False)), line[-1]]).rstrip() for line in lines]
    return "\n".join([heading(rows[0]), *text])


def heading(row: Row) -> str:
    """One line: case, sizes, device, threads, clock, roofs."""
    run, axes = row.run, ", ".join(f"{key} {value}" for key, value in row.axes.items())
    roofs = ""
    if "sgemm_gflops" in run:
        roofs = f"; same run: sgemm {run['sgemm_gflops']:.0f} GFLOP/s, copy {run['copy_gbs']:.1f} GB/s"
        roofs += f", bf16 product {run['bf16_gflops']:,.0f} GFLOP/s" if "bf16_gflops" in run else ""
    threads = f", {run['threads']} thread{'s' * (run['threads'] > 1)}" if run["device_type"] == "cpu" else ""
    return f"{row.case} {row.preset} {row.precision} ({axes}) on {run['device']}{threads}{roofs}"
