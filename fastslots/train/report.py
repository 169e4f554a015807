"""report.html: one self-contained file of a run's curves, grids, scores and configuration."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path

from fastslots.train.files import write_atomic
from fastslots.train.log import read_metrics

CURVES = ("recon", "kl", "interaction_normalized", "lr", "alpha", "grad_norm", "images_per_s")
SCORES = ("j_ari", "jis", "fg_ari", "ari", "mbo", "miou", "recon")
POINTS = 400  # a curve is thinned to this many, each the mean of its stretch
WIDTH, HEIGHT = 340, 130
STYLE = """
:root{color-scheme:light dark}body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.4rem}h2{font-size:1.1rem;margin-top:2rem}.curves{display:flex;flex-wrap:wrap;gap:1rem}
figure{margin:0}figcaption{font-size:.85rem}svg{background:color-mix(in srgb,currentColor 5%,transparent)}
polyline{fill:none;stroke-width:1.5;stroke:#0072b2}img{max-width:100%;image-rendering:pixelated}
table{border-collapse:collapse}td,th{padding:.2rem .8rem;border-bottom:1px solid #8886;text-align:right}
th:first-child,td:first-child{text-align:left}pre{overflow:auto}
"""


def write_report(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Write the report of one run (into its folder), or of several side by side; returns its path."""
    body = "".join(_section(run) for run in runs)
    title = html.escape(", ".join(run.name for run in runs))
    page = (
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{title} - fastslots</title><style>{STYLE}</style><body>{body}</body></html>"
    )
    path = out or runs[0] / "report.html"
    write_atomic(path, page.encode())
    return path


def _section(run: Path) -> str:
    training, evaluations = read_metrics(run / "metrics.jsonl")
    config = (run / "config.json").read_text() if (run / "config.json").exists() else "{}"
    data = (run / "data.txt").read_text() if (run / "data.txt").exists() else ""
    steps = json.loads(config).get("steps", "?")
    done = training[-1]["step"] if training else 0
    parts = [f"<h1>{html.escape(run.name)}</h1><p>step {done:,} of {steps:,}. {html.escape(data)}</p>"]
    if evaluations:
        parts.append(_table(evaluations))
    parts.append("<h2>Training</h2>" + _figures(training, CURVES))
    if len(evaluations) > 1:
        parts.append("<h2>Evaluation</h2>" + _figures(evaluations, SCORES))
    grids = sorted((run / "images").glob("step_*.png"))
    if grids:
        parts.append(_grid(grids[-1]))
    parts.append(f"<details><summary>Configuration</summary><pre>{html.escape(config)}</pre></details>")
    return "".join(parts)


def _table(evaluations: list[dict]) -> str:
    names = [name for name in SCORES if name in evaluations[-1]]
    head = "".join(f"<th>{name}" for name in ("step", *names, "images"))
    rows = "".join(
        f"<tr><td>{line['step']:,}" + "".join(f"<td>{_number(line.get(name))}" for name in (*names, "images"))
        for line in evaluations[-8:]
    )
    return f"<h2>Scores on held-out images</h2><table><tr>{head}{rows}</table><p>z is the posterior mean.</p>"


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "-"


def _figures(lines: list[dict], names: Sequence[str]) -> str:
    return f"<div class=curves>{''.join(_curve(lines, name) for name in names)}</div>"


def _curve(lines: list[dict], name: str) -> str:
    points = [(line["step"], line[name]) for line in lines if isinstance(line.get(name), int | float)]
    if len(points) < 2:
        return ""
    size = -(-len(points) // POINTS)
    stretches = [points[i : i + size] for i in range(0, len(points), size)]
    means = [tuple(sum(axis) / len(stretch) for axis in zip(*stretch, strict=True)) for stretch in stretches]
    (x0, x1), (low, high) = (points[0][0], points[-1][0]), (min(y for _, y in means), max(y for _, y in means))
    place = " ".join(
        f"{(x - x0) / (x1 - x0) * WIDTH:.1f},{HEIGHT - 4 - (y - low) / ((high - low) or 1) * (HEIGHT - 8):.1f}"
        for x, y in means
    )
    caption = f"<b>{name}</b> {_number(points[-1][1])} (from {_number(low)} to {_number(high)})"
    return (
        f"<figure><svg width={WIDTH} height={HEIGHT} role=img aria-label='{name} by step'>"
        f"<polyline points='{place}'/></svg><figcaption>{caption}</figcaption></figure>"
    )


def _grid(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    step = int(path.stem.split("_")[1])
    return (
        f"<h2>Slots at step {step:,}</h2><img src='data:image/png;base64,{data}' alt='slot grid'>"
        "<p>Columns: input, reconstruction, slots by colour (attention map, then Jacobian), each slot's attention map, "
        "each slot's share of the Jacobian.</p>"
    )
