"""Two plots as SVG, from rows alone: speed by peer, memory by resolution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from fastslots.bench.reporting.rows import Row
from fastslots.bench.reporting.tables import megabytes, seconds, times

OURS_COLOUR, PEER_COLOUR, TEXT = "#c2410c", "#94a3b8", "#1e293b"
LINES = ("#64748b", "#0f766e", "#7c3aed", "#2563eb", "#ca8a04", OURS_COLOUR, "#be123c")
WIDTH, BAR, LABEL = 760, 20, 250


def _svg(height: float, parts: Sequence[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height:.0f}" '
        f'viewBox="0 0 {WIDTH} {height:.0f}" font-family="system-ui, sans-serif" font-size="13" fill="{TEXT}">'
    )
    return "\n".join([head, f'<rect width="{WIDTH}" height="{height:.0f}" fill="white"/>', *parts, "</svg>", ""])


def _text(x: float, y: float, text: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {more}>{escape(text)}</text>'


def speed(panels: Sequence[tuple[str, Sequence[Row]]]) -> str:
    """(title, rows of one setting) -> bars of time, the slowest of a panel as wide as the panel; ours in colour."""
    parts, y = [], 16.0
    for title, rows in panels:
        timed = sorted((row for row in rows if row.time is not None), key=lambda row: -(row.time or 0))
        longest = max((row.time or 0 for row in timed), default=1)
        parts.append(_text(12, y + 10, title, 'font-weight="600"'))
        y += 24
        for row in timed:
            assert row.time is not None
            width = max(2, (WIDTH - LABEL - 150) * row.time / longest)
            colour = OURS_COLOUR if row.provider.startswith("fastslots") else PEER_COLOUR
            parts.append(_text(LABEL - 8, y + 14, row.provider, 'text-anchor="end"'))
            parts.append(f'<rect x="{LABEL}" y="{y}" width="{width:.1f}" height="{BAR - 4}" fill="{colour}"/>')
            over = f"  ({times(row.ratio)})" if row.ratio is not None and row.ratio != 1 else ""
            parts.append(_text(LABEL + width + 6, y + 14, seconds(row.time) + over))
            y += BAR
        y += 12
    return _svg(y + 4, parts)


def memory(rows: Sequence[Row]) -> str:
    """Peak memory of a decoder step against the resolution, both axes logarithmic, a line a provider."""
    lines: dict[str, list[tuple[int, int]]] = {}
    for row in rows:
        if row.peak_bytes:
            lines.setdefault(row.provider, []).append((row.axes["R"], row.peak_bytes))
    sides = sorted({side for points in lines.values() for side, _ in points})
    peaks = [peak for points in lines.values() for _, peak in points]
    left, right, top, bottom = 80.0, WIDTH - 210.0, 40.0, 380.0
    low, high = 10 ** math.floor(math.log10(min(peaks))), 10 ** math.ceil(math.log10(max(peaks)))
    span = math.log(sides[-1] / sides[0]) or 1.0

    def x(side: float) -> float:
        return left + (right - left) * math.log(side / sides[0]) / span

    def y(peak: float) -> float:
        return bottom - (bottom - top) * math.log(peak / low) / math.log(high / low)

    parts = [_text(12, 22, "Memory that one decoder training step adds, by resolution", 'font-weight="600"')]
    tick = low
    while tick <= high:
        parts.append(f'<path d="M{left} {y(tick):.1f}H{right}" stroke="#e2e8f0"/>')
        parts.append(_text(left - 8, y(tick) + 4, megabytes(tick), 'text-anchor="end"'))
        tick *= 10
    parts += [_text(x(side), bottom + 20, f"{side} x {side}", 'text-anchor="middle"') for side in sides]
    label_y = -math.inf
    for (name, points), colour in zip(sorted(lines.items(), key=lambda line: line[1][-1][1]), LINES, strict=False):
        path = " ".join(f"{x(side):.1f},{y(peak):.1f}" for side, peak in sorted(points))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x(s):.1f}" cy="{y(p):.1f}" r="3.5" fill="{colour}"/>' for s, p in points]
        place = y(max(points)[1]) + 4
        label_y = (
            place if label_y == -math.inf else min(place, label_y - 16)
        )  # from the least upwards, none over another
        parts.append(_text(right + 10, label_y, name, f'fill="{colour}"'))
    return _svg(bottom + 40, parts)
