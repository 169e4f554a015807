"""A roofline of compiled launches as SVG: FLOP per byte against the rate a device could reach. A model, not a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from . import cost

Row = dict[str, Any]
COLOURS = {"bf16": "#c2410c", "tf32": "#0f766e", "fp32": "#475569"}
WIDTH, LEFT, RIGHT, TOP, BOTTOM = 760, 64, 740, 56, 400
LOW, HIGH = 1.0, 4000.0  # FLOP per byte
TEXT = "#1e293b"


def _text(x: float, y: float, text: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {more}>{escape(text)}</text>'


def _x(intensity: float) -> float:
    return LEFT + (RIGHT - LEFT) * math.log(intensity / LOW) / math.log(HIGH / LOW)


def roofline_svg(rows: Sequence[Row], arch: str, preset: str = "clevr6", precision: str = "bf16") -> str | None:
    """The roofs of one device and, numbered, the launches of one preset and product; None without a device or rows.

    Launches without a product have no place on it. Those of one intensity share a dot.
    """
    device = next((d for d in cost.DEVICES if d.arch == arch), None)
    wanted = (arch, preset, precision)
    shown = [r for r in rows if (r["target"], r["preset"], r["precision"]) == wanted and r["model"]["flops"]]
    if device is None or not shown:
        return None
    low, high = device.bandwidth * LOW, 2 * device.peak[precision]

    def y(rate: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * math.log(rate / low) / math.log(high / low)

    title = f"{device.name}, {preset}, {precision}: the rate each launch could reach (a model, nothing was run)"
    small = 'font-size="12"'
    parts = [_text(12, 24, title, 'font-weight="600"'), _text(12, 44, "TFLOP/s", small)]
    for power in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1):
        parts.append(f'<path d="M{LEFT} {y(10**power):.1f}H{RIGHT}" stroke="#e2e8f0"/>')
        parts.append(_text(LEFT - 6, y(10**power) + 4, f"{10 ** (power - 12):g}", f'text-anchor="end" {small}'))
    for tick in (1, 10, 100, 1000):
        parts.append(f'<path d="M{_x(tick):.1f} {TOP}V{BOTTOM}" stroke="#e2e8f0"/>')
        parts.append(_text(_x(tick), BOTTOM + 18, str(tick), f'text-anchor="middle" {small}'))
    parts.append(_text((LEFT + RIGHT) / 2, BOTTOM + 36, "FLOP per byte moved", f'text-anchor="middle" {small}'))
    for kind, colour in COLOURS.items():
        peak = device.peak[kind]
        parts.append(
            f'<polyline fill="none" stroke="{colour}" stroke-width="1.5" points="{_x(LOW):.1f},{y(low):.1f} '
            f'{_x(peak / device.bandwidth):.1f},{y(peak):.1f} {RIGHT},{y(peak):.1f}"/>'
        )
        parts.append(_text(RIGHT, y(peak) - 6, f"{kind} {peak / 1e12:g}", f'text-anchor="end" fill="{colour}" {small}'))
    dots: dict[int, list[Row]] = {}
    for row in shown:
        dots.setdefault(round(_x(_intensity(row))), []).append(row)
    half, last = math.ceil(len(dots) / 2), 0
    for number, (at, group) in enumerate(sorted(dots.items()), 1):
        intensity = _intensity(group[0])
        rate = min(device.peak[precision], intensity * device.bandwidth)
        parts.append(f'<circle cx="{at}" cy="{y(rate):.1f}" r="4" fill="{COLOURS[precision]}"/>')
        below = 18 if at - last > 16 else -9  # numbers of near dots in turn
        last = at if below > 0 else 0
        parts.append(_text(at, y(rate) + below, str(number), f'text-anchor="middle" {small}'))
        column, line = divmod(number - 1, half)
        text = f"{number}  {', '.join(row['kernel'] for row in group)}: {intensity:.0f} FLOP/B"
        parts.append(_text(12 + 370 * column, BOTTOM + 64 + 17 * line, text, 'font-size="11"'))
    height = BOTTOM + 60 + 17 * half
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        f'font-family="system-ui, sans-serif" font-size="13" fill="{TEXT}">'
    )
    return "\n".join([head, f'<rect width="{WIDTH}" height="{height}" fill="white"/>', *parts, "</svg>", ""])


def _intensity(row: Row) -> float:
    return float(row["model"]["flops"] / row["model"]["bytes"])
