"""Two runs side by side, provider by provider: slower, faster, or within their noise.

A shared machine is faster at one hour than at another, so what is compared is not seconds but each provider's time
over that of an anchor (the published algorithm) measured in the same rounds; where a run has no anchor, seconds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fastslots.bench.reporting.rows import Row
from fastslots.bench.timing import Quantiles, quantiles

ANCHORS = ("published", "new iterator a step")
LEAST_NOISE = 0.05
"""Changes below this are never called one: what remains between runs whose quantiles agree."""

Key = tuple[object, ...]


@dataclass(frozen=True)
class Change:
    """One provider in both runs. ``change`` is B over A less one; ``bound`` the noise that it is held against."""

    label: str
    provider: str
    before: float
    after: float
    change: float
    bound: float
    anchored: bool

    @property
    def verdict(self) -> str:
        if self.change > self.bound:
            return "slower"
        return "faster" if self.change < -self.bound / (1 + self.bound) else "same"


def setting(row: Row, device: bool = True) -> Key:
    """What two rows must share to be comparable, the provider left out; ``device=False``: wherever it was run."""
    axes = tuple(sorted(row.axes.items()))
    shared = row.case, row.preset, axes, row.precision, row.run["threads"], row.run["tiny"]
    return (*shared, row.run["device"]) if device else shared


def compare(before: Iterable[Row], after: Iterable[Row]) -> list[Change]:
    """Changes of every provider that both runs timed; the last run of a setting counts."""
    first, second = _by_provider(before), _by_provider(after)
    changes = []
    for key in first:
        if key not in second:
            continue
        anchors = [_anchor(rows, key) for rows in (first, second)]
        anchored = all(anchor is not None and anchor.provider != key[1] for anchor in anchors)
        if not anchored:
            anchors = [None, None]
        a, b = (_spread(rows[key], anchor) for rows, anchor in zip((first, second), anchors, strict=True))
        noise = sum(((q.q80 - q.q20) / (2 * q.median)) ** 2 for q in (a, b)) ** 0.5
        row = first[key]
        label = f"{row.case} {row.preset} B {row.axes.get('B')} R {row.axes.get('R')} K {row.axes.get('K', '')}".strip()
        changes.append(
            Change(label, row.provider, a.median, b.median, b.median / a.median - 1, max(LEAST_NOISE, noise), anchored)
        )
    return changes


def _by_provider(rows: Iterable[Row]) -> dict[tuple[Key, str], Row]:
    return {(setting(row), row.provider): row for row in rows if row.time is not None}


def _anchor(rows: dict[tuple[Key, str], Row], key: tuple[Key, str]) -> Row | None:
    found = [row for (of, name), row in rows.items() if of == key[0] and name in ANCHORS]
    return found[0] if found and len(found[0].samples[found[0].clock]) == len(_samples(rows[key])) else None


def _samples(row: Row) -> list[float]:
    return row.samples[row.clock]


def _spread(row: Row, anchor: Row | None) -> Quantiles:
    if anchor is None:
        return quantiles(_samples(row))
    return quantiles(a / b for a, b in zip(_samples(row), _samples(anchor), strict=True))


def table(changes: list[Change]) -> str:
    lines = [f"{'what':<34} {'provider':<28} {'before':>9} {'after':>9} {'change':>8} {'noise':>7}  verdict"]
    for c in changes:
        unit = "x" if c.anchored else "s"
        lines.append(
            f"{c.label:<34} {c.provider:<28} {c.before:>8.4g}{unit} {c.after:>8.4g}{unit} {c.change:>+8.1%} "
            f"{c.bound:>7.1%}  {c.verdict}"
        )
    lines.append("x: times the published algorithm's time of the same rounds; s: seconds")
    return "\n".join(lines)
