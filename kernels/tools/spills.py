"""Which compiled launches use local memory, by Triton and GPU: what docs/platforms.md shows of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

Row = dict[str, Any]
ORDER = ("bf16", "fp16", "tf32", "fp32")


def spill_table(rows: list[Row]) -> list[str]:
    """A markdown table of ``tables.compile_row``'s rows, a line for every Triton and target among them.

    A number is that of instructions on local memory: outside loops they run once a block, inside once a trip. The last
    column names launches whose block takes more shared memory than there is: they are launched with fewer stages.
    """
    lines = [
        "| Triton | target | launches | outside loops alone | inside loops (of all) | too much shared memory |",
        "|---|---|---|---|---|---|",
    ]
    sets: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        sets[row.get("triton", "?"), row["target"]].append(row)
    for (version, target), found in sorted(sets.items()):
        counts = (f"{sum(row['precision'] == p for row in found)} {p}" for p in ORDER)
        cells = [
            version, target, ", ".join(count for count in counts if not count.startswith("0 ")),
            _named(found, lambda row: f" {row['spills']}" if row["spills"] and not row["loop_spills"] else ""),
            _named(found, lambda row: f" {row['loop_spills']} ({row['spills']})" if row["loop_spills"] else ""),
            _named(found, lambda row: f" {row['shared_bytes'] >> 10} KiB" if row["occupancy"] == 0 else ""),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _named(rows: list[Row], said: Callable[[Row], str]) -> str:
    """``bf16: kernel 3, kernel 4; fp32: ...`` of the rows of which ``said`` says anything."""
    of_precision = {
        p: [row["kernel"] + said(row) for row in rows if row["precision"] == p and said(row)] for p in ORDER
    }
    return "; ".join(f"{p}: {', '.join(names)}" for p, names in of_precision.items() if names) or "none"
