"""One page of a folder's rows for a person: what is faster, by how much, what was wrong, what could not be run."""

from __future__ import annotations

import sys
from pathlib import Path

from fastslots.bench.reporting import rows
from fastslots.bench.reporting.rows import Row


def page(measured: list[Row]) -> str:
    """Of the newest rows of each case and precision on the device that ran last: a line a provider."""
    lines: list[str] = []
    last = max((row.run for row in measured), key=lambda run: str(run.get("when", "")), default={})
    measured = [row for row in measured if row.run.get("device") == last.get("device")]
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in measured:
        groups.setdefault((row.case, row.preset, row.precision), []).append(row)
    for (case, preset, precision), of_case in sorted(groups.items()):
        newest = {row.provider: row for row in sorted(of_case, key=lambda row: str(row.run.get("when", "")))}
        tiny = " (tiny: no figures)" if any(row.run.get("tiny") for row in newest.values()) else ""
        device = next(iter(newest.values())).run.get("device", "")
        lines.append(f"{case} {preset} {precision} on {device}{tiny}")
        for row in newest.values():
            if row.status == "ok" and row.time is not None:
                over = f"{row.ratio:6.2f} x ours" if row.ratio is not None else ""
                error = "" if row.error is None else f", error {row.error:.0e}"
                lines.append(f"  {row.provider:<34} {1e3 * row.time:10.3f} ms {over}{error}")
            elif row.peak_bytes is not None:
                lines.append(f"  {row.provider:<34} {row.peak_bytes / 1e6:10,.0f} MB at R {row.axes.get('R')}")
            else:
                lines.append(f"  {row.provider:<34} {row.status}: {row.reason}")
    return "\n".join(lines) or "no rows"


if __name__ == "__main__":
    print(page(rows.read([Path(sys.argv[1])])))
