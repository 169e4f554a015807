"""The decoder step against one size at a time: how time grows, and where one provider overtakes another."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from fastslots.bench.case import OURS, Options
from fastslots.bench.reporting.rows import Row
from fastslots.bench.run import Say, measure

PROVIDERS = "published|folded|fastslots"
SWEEPS: dict[str, tuple[int, ...]] = {
    "resolution": (32, 64, 128, 256),
    "slots": (2, 4, 8, 16, 32, 64),
    "batch": (1, 2, 4, 8, 16),
    "heads": (3, 6, 12, 24),
    "threads": (1, 2, 4, 8, 16),
}
TINY: dict[str, tuple[int, ...]] = {
    "resolution": (8, 16),
    "slots": (2, 4),
    "batch": (1, 2),
    "heads": (3, 6),
    "threads": (1,),
}
SIDE = 64
"""Pixels a side where the resolution is not what is swept."""


def at(axis: str, value: int, options: Options) -> Options:
    """Options of one point. Heads keep their width, so that H·d grows with H."""
    fixed = {} if axis == "resolution" or options.tiny else {"resolution": SIDE}
    if axis == "batch":
        return dataclasses.replace(options, batch=value, overrides=fixed)
    if axis == "threads":
        return dataclasses.replace(options, threads=value, overrides=fixed)
    config = options.config()
    of_axis = {
        "resolution": {"resolution": value},
        "slots": {"num_slots": value},
        "heads": {"decoder_heads": value, "slot_width": value * (config.slot_width // config.decoder_heads)},
    }
    return dataclasses.replace(options, batch=options.batch or 1, overrides={**fixed, **of_axis[axis]})


def sweep(axis: str, options: Options, processors: int, say: Say = lambda line: None) -> list[Row]:
    """Rows of all points of one axis, case ``scaling-AXIS``; compiled peers are left out (a compilation a point)."""
    options = dataclasses.replace(
        options,
        only=options.only or PROVIDERS,
        skip="|".join(filter(None, ("compiled|autotune", options.skip))),
        memory=False,
    )
    rows = []
    for value in (TINY if options.tiny else SWEEPS)[axis]:
        if axis == "threads" and value > processors:
            break
        say(f"{axis} {value}")
        for row in measure("layer", at(axis, value, options), say):
            row.case = f"scaling-{axis}"
            row.axes = {**row.axes, axis: value}
            rows.append(row)
    return rows


def exponent(points: Sequence[tuple[float, float]]) -> float | None:
    """Least-squares slope of log(time) over log(size); None for fewer than two sizes."""
    logs = [(math.log(x), math.log(y)) for x, y in points]
    if len({x for x, _ in logs}) < 2:
        return None
    mean_x, mean_y = sum(x for x, _ in logs) / len(logs), sum(y for _, y in logs) / len(logs)
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / sum((x - mean_x) ** 2 for x, _ in logs)


def growth(rows: Sequence[Row], axis: str) -> dict[str, tuple[list[tuple[int, float]], float | None]]:
    """Provider -> (size, median seconds) points and the exponent over their larger half (at least three points)."""
    points: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row.time is not None:
            points.setdefault(row.provider, []).append((row.axes[axis], row.time))
    return {name: (seen, exponent(seen[-max(3, len(seen) // 2) :])) for name, seen in points.items()}


def overtakes(rows: Sequence[Row], axis: str) -> dict[str, int | None]:
    """Peer -> the least size from which on ours is the faster at every size; None: at no size."""
    seen = {name: dict(points) for name, (points, _) in growth(rows, axis).items()}
    ours = next((seen[name] for name in OURS if name in seen), {})
    result: dict[str, int | None] = {}
    for name, times in seen.items():
        if times is ours:
            continue
        result[name] = None
        for size in sorted(set(times) & set(ours), reverse=True):
            if ours[size] >= times[size]:
                break
            result[name] = size
    return result
