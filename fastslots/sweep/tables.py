"""What a sweep found: mean ± standard deviation per cell, as text, CSV and JSON, and one plot a metric."""

from __future__ import annotations

import csv
import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from fastslots.files import write_atomic
from fastslots.sweep.trials import TrialResult, show

FIRST = ("j_ari", "jis", "fg_ari", "ari", "mbo", "miou", "attribute_r2_linear", "recon", "kl", "interaction_normalized")
"""Metrics in the order of the tables; others follow by name."""
NO_METRIC = {
    "step",
    "images",
    "images_with_masks",
    "jacobian_images",
    "foreground_pixels",
    "seconds",
    "attribute_objects",
    "composition_images",
    "interaction_order_images",
    "ignore_label",
    "num_slots",
}
SHOWN = 10  # metrics in the printed table; the files have all
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")  # Okabe and Ito's


@dataclass(frozen=True)
class Cell:
    """One combination of values, and each metric of its finished trials."""

    values: dict[str, Any]
    trials: int  # finished
    failed: int
    metrics: dict[str, list[float]]

    @property
    def label(self) -> str:
        return ", ".join(f"{name} {show(value)}" for name, value in self.values.items()) or "all"


def cells_of(results: Sequence[TrialResult]) -> list[Cell]:
    """Trials grouped by cell, in the order in which they come."""
    groups: list[tuple[dict[str, Any], list[TrialResult]]] = []
    for result in results:
        group = next((g for values, g in groups if values == result.trial.cell), None)
        if group is None:
            groups.append((result.trial.cell, group := []))
        group.append(result)
    cells = []
    for values, group in groups:
        good = [result for result in group if not result.error]
        # A score that is no number (diverged) stays in the list of trials, and out of the mean.
        metrics = {name: [r.scores[name] for r in good if is_number(r.scores.get(name))] for name in metric_names(good)}
        cells.append(Cell(values, len(good), len(group) - len(good), metrics))
    return cells


def metric_names(results: Sequence[TrialResult]) -> list[str]:
    return score_names([result.scores for result in results])


def score_names(evaluations: Sequence[Mapping[str, Any]]) -> list[str]:
    """The scores among what evaluations say, those that are looked at most first."""
    names = {name for scores in evaluations for name, value in scores.items() if is_number(value)} - NO_METRIC
    return sorted(names, key=lambda name: (FIRST.index(name) if name in FIRST else len(FIRST), name))


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (n − 1); nan where there are too few values."""
    if not values:
        return math.nan, math.nan
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, math.nan
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))


def table_rows(cells: Sequence[Cell]) -> list[list[str]]:
    """The table that is printed: a head, then a row a cell, ``mean ± std`` a metric."""
    metrics = _all_metrics(cells)[:SHOWN]
    rows = [[*(cells[0].values if cells else ()), "trials", *metrics]]
    for cell in cells:
        trials = f"{cell.trials}" + (f" ({cell.failed} failed)" if cell.failed else "")
        rows.append([*map(show, cell.values.values()), trials, *(_mean_std(cell.metrics.get(m, [])) for m in metrics)])
    return rows


def csv_table(cells: Sequence[Cell]) -> str:
    metrics = _all_metrics(cells)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    fields = list(cells[0].values) if cells else []
    writer.writerow([*fields, "trials", "failed", *(f"{m}_{part}" for m in metrics for part in ("mean", "std"))])
    for cell in cells:
        numbers = [number for m in metrics for number in mean_and_std(cell.metrics.get(m, []))]
        texts = ["" if math.isnan(number) else f"{number:.6g}" for number in numbers]
        writer.writerow([*map(show, cell.values.values()), cell.trials, cell.failed, *texts])
    return out.getvalue()


def json_table(cells: Sequence[Cell], results: Sequence[TrialResult]) -> str:
    def finite(number: float) -> float | None:
        return None if math.isnan(number) else number

    rows = []
    for cell in cells:
        scores = {}
        for name, values in cell.metrics.items():
            mean, std = map(finite, mean_and_std(values))
            scores[name] = {"mean": mean, "std": std, "values": values}
        rows.append({"values": cell.values, "trials": cell.trials, "failed": cell.failed, "metrics": scores})
    trials = [
        {"name": r.trial.name, "values": r.trial.cell, "seed": r.trial.config.seed, "error": r.error}
        | {"scores": r.scores}
        for r in results
    ]
    return json.dumps({"cells": rows, "trials": trials}, indent=1)


def write_sweep(results: Sequence[TrialResult], out: Path) -> list[list[str]]:
    """Write sweep.csv, sweep.json and METRIC.svg for each metric into ``out`` -> the rows of the printed table."""
    cells = cells_of(results)
    write_atomic(out / "sweep.csv", csv_table(cells).encode())
    write_atomic(out / "sweep.json", json_table(cells, results).encode())
    for metric in _all_metrics(cells):
        write_atomic(out / f"{metric}.svg", plot(metric, cells).encode())
    return table_rows(cells)


def plot(metric: str, cells: Sequence[Cell]) -> str:
    """An SVG: a row a cell; each trial a dot, their mean a bar, ± one standard deviation a line."""
    left, width, row, top, right = 12 + 7 * max(len(cell.label) for cell in cells), 420, 34, 34, 90
    values = [v for cell in cells for v in cell.metrics.get(metric, [])]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    margin = 0.08 * (high - low) or abs(high) * 0.1 or 1.0
    low, high = low - margin, high + margin
    bottom = top + row * len(cells)

    def x(value: float) -> float:
        return left + min(max((value - low) / (high - low), 0), 1) * width  # a long deviation ends at the frame

    parts = [f"<text x='{left}' y='20' font-weight='bold'>{html.escape(metric)}</text>"]
    for i in range(5):
        value = low + (high - low) * i / 4
        parts.append(f"<path d='M{x(value):.1f} {top}V{bottom}' stroke='#8884'/>")
        parts.append(f"<text x='{x(value):.1f}' y='{bottom + 16}' text-anchor='middle'>{value:.3g}</text>")
    for i, cell in enumerate(cells):
        y, numbers = top + row * (i + 0.5), cell.metrics.get(metric, [])
        mean, std = mean_and_std(numbers)
        parts.append(f"<text x='{left - 8}' y='{y + 4}' text-anchor='end'>{html.escape(cell.label)}</text>")
        colour = COLOURS[i % len(COLOURS)]
        if not math.isnan(std):
            parts.append(f"<path d='M{x(mean - std):.1f} {y}H{x(mean + std):.1f}' stroke='{colour}' stroke-width='2'/>")
        parts += [f"<circle cx='{x(v):.1f}' cy='{y}' r='3.5' fill='{colour}' fill-opacity='.45'/>" for v in numbers]
        if numbers:
            parts.append(f"<path d='M{x(mean):.1f} {y - 9}v18' stroke='{colour}' stroke-width='3'/>")
            parts.append(f"<text x='{left + width + 8}' y='{y + 4}'>{_mean_std(numbers)}</text>")
    size = f"width='{left + width + right}' height='{bottom + 28}'"
    style = "font-family='system-ui,sans-serif' font-size='12' fill='#666'"
    return f"<svg xmlns='http://www.w3.org/2000/svg' {size} {style}>{''.join(parts)}</svg>\n"


def _mean_std(values: Sequence[float]) -> str:
    return mean_std_text(*mean_and_std(values))


def mean_std_text(mean: float, std: float) -> str:
    """``0.906 ± 0.001``; nan: there is none."""
    if math.isnan(mean):
        return "-"
    digits = 3 if abs(mean) < 10 else 2 if abs(mean) < 100 else 1
    return f"{mean:.{digits}f}" + ("" if math.isnan(std) else f" ± {std:.{digits}f}")


def _all_metrics(cells: Sequence[Cell]) -> list[str]:
    return list(dict.fromkeys(name for cell in cells for name in cell.metrics))


def is_number(value: object) -> TypeGuard[int | float]:
    """A finite number, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
