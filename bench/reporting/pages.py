"""From rows to the README's table, docs/benchmarks.md and the plots. No number of theirs is written by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from fastslots.bench.reporting import plots
from fastslots.bench.reporting.compare import ANCHORS, Key, compare, setting
from fastslots.bench.reporting.rows import Row
from fastslots.bench.reporting.tables import HEADER, cells, heading, markdown, megabytes, seconds, times
from fastslots.bench.run import baseline
from fastslots.bench.scaling import SWEEPS, growth, overtakes
from fastslots.config.presets import PRESETS
from fastslots.errors import UserError

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
TITLES = {
    "layer": "decoder training step",
    "step": "whole training step",
    "op": "attention and penalty, forward and backward",
    "block": "one decoder layer, forward and backward",
    "jacobian": "slot Jacobian",
    "loader": "loader, 8 batches",
    "map": "attention to 77 tokens with its map, forward and backward",
    "slots": "slot attention, three iterations, forward and backward",
}


class Goal(NamedTuple):
    """What a case should reach over one provider: at least ``must``, better ``aim`` (times less)."""

    case: str
    preset: str
    against: str
    must: float
    aim: float | None
    memory: bool = False
    images: int | None = None  # the goal was set for this many; None: for any


GOALS = (
    Goal("layer", "clevr6", "published", 3, 3.7, images=4),
    Goal("layer", "clevr6", "published, compiled", 2.5, 3.2, images=4),
    Goal("layer", "clevr6", "folded", 1.5, 1.9, images=4),
    Goal("step", "clevr6", "published", 1.8, 2.5, images=1),
    Goal("step", "clevr6", "published", 1.8, 2.5, images=4),
    Goal("layer", "clevr6", "published", 8, 30, memory=True, images=4),
    Goal("jacobian", "sprites", "published", 40, 100),
    Goal("loader", "clevr6", "new iterator a step", 20, None),
    Goal("loader", "clevr6", "new iterator a step, 2 workers", 20, None),
    Goal("map", "clevr6", "sdpa, without a map", 0.83, 1),
    Goal("map", "clevr6", "published", 3, None, memory=True),
    Goal("slots", "clevr6", "published", 2.5, None),
    Goal("slots", "clevr6", "published, compiled", 2, None),
    Goal("slots", "clevr6", "published", 4, None, memory=True),
)


class Run(NamedTuple):
    """Rows of one setting: those of its last run, and of the run before it on the same device."""

    last: list[Row]
    before: list[Row]


def runs(rows: Iterable[Row]) -> dict[Key, Run]:
    """By setting, in the order of ``TITLES``; tiny runs left out. Memory is that of the last run that measured it."""
    found: dict[Key, dict[str, list[Row]]] = {}
    for row in rows:
        if not row.run["tiny"] and row.case in TITLES:
            found.setdefault(setting(row, device=False), {}).setdefault(row.run["when"], []).append(row)
    order = list(TITLES)
    result = {}
    for key in sorted(found, key=lambda key: (order.index(str(key[0])), str(key[3]), str(key))):
        in_order = [found[key][when] for when in sorted(found[key])]
        peaks = {row.provider: row for rows in in_order for row in rows if row.peak_bytes is not None}
        last = [_with_memory(row, peaks.get(row.provider, row)) for row in in_order[-1]]
        before = [rows for rows in in_order[:-1] if rows[0].run["device"] == last[0].run["device"]]
        result[key] = Run(last, before[-1] if before else [])
    return result


def _with_memory(row: Row, measured: Row) -> Row:
    return dataclasses.replace(row, peak_bytes=measured.peak_bytes, result_bytes=measured.result_bytes)


def write(rows: list[Row], into: Path) -> list[Path]:
    """Write the regions of README.md and docs/benchmarks.md and both plots -> what was written.

    UserError where there are no rows, or a file has no region for them.
    """
    seen = runs(rows)
    if not seen:
        raise UserError("no rows but tiny ones: run `fastslots bench layer step` first")
    docs = into / "docs"
    written = [docs / "bench-speed.svg"]
    _save(written[0], plots.speed([(_title(run.last[0]), run.last) for run in seen.values() if _speed_plot(run)]))
    memory = _memory_rows(rows)
    if memory:
        written.append(docs / "bench-memory.svg")
        _save(written[1], plots.memory(memory))
    _region(into / "README.md", summary(seen, bool(memory)))
    _region(docs / "benchmarks.md", details(seen, rows))
    return [*written, into / "README.md", docs / "benchmarks.md"]


def _speed_plot(run: Run) -> bool:
    return run.last[0].case != "loader" and baseline(run.last) is not None


def _memory_rows(rows: Iterable[Row]) -> list[Row]:
    """The last row of each provider and resolution."""
    found = [row for row in rows if row.case == "memory" and not row.run["tiny"]]
    last = {(row.provider, row.axes["R"]): row for row in found}
    return list(last.values())


def _save(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: name a checkout that can be written with --into") from None


def _region(path: Path, text: str) -> None:
    old = path.read_text() if path.is_file() else ""
    if old.count(BEGIN) != 1 or old.count(END) != 1:
        raise UserError(f"{path} has no region {BEGIN} ... {END}: name the checkout with --into")
    before, after = old.split(BEGIN)[0], old.split(END)[1]
    _save(path, f"{before}{BEGIN}\n{text}\n{END}{after}")


def _title(row: Row) -> str:
    images = row.axes["B"]
    threads = f", {row.run['threads']} threads" if row.run["threads"] > 1 else ""
    if "R" in row.axes:
        preset, size = f"{row.preset}, ", f"{row.axes['R']} x {row.axes['R']}"
    else:  # sizes of the case itself
        preset, size = "", f"{row.axes['L']:,} pixels, K {row.axes['K']}"
    images_of = f"{images} image{'s' * (images > 1)} of {size}"
    return f"{TITLES[row.case]} ({preset}{images_of}, {row.precision}{threads})"


def summary(seen: dict[Key, Run], memory: bool) -> str:
    """The README's region."""
    shown = ("published, compiled", "folded")
    lines = []
    last = next(iter(seen.values())).last[0].run
    for run in seen.values():
        ours = baseline(run.last)
        if ours is None or ours.time is None:
            continue
        by_name = {row.provider: row for row in run.last}
        anchor = next((by_name[name] for name in ANCHORS if name in by_name), None)
        peers = [_time_and_memory(anchor), *(_time_and_memory(by_name.get(name)) for name in shown)]
        first = anchor.ratio if anchor is not None else None
        # No published loader stands alone: what the first column then timed is named
        against = f"; first column: {anchor.provider}" if anchor is not None and anchor.provider != "published" else ""
        if ours.run["device"] != last["device"]:  # what the line under the table says is not of this row
            against += f"; on {ours.run['device']}, commit {ours.run['commit']}"
        faster = "" if first is None else f"**{times(first)}**"
        lines.append([_title(ours) + against, *peers, _time_and_memory(ours), faster])
    head = ["", "published, eager", "published, `torch.compile`", "folded, plain PyTorch", "fastslots", "faster"]
    text = [
        markdown(head, lines),
        "",
        f"{last['device']}, {last['threads']} thread, torch {last['torch']}, fp32, commit {last['commit']}; "
        "processor time (loader: wall), median of interleaved rounds, and memory that one call adds; every provider "
        "was first checked against float64. `fastslots bench report` writes this from the rows in `bench/results`. "
        "[docs/benchmarks.md](docs/benchmarks.md) has all peers, spreads, what was missed, and a second run.",
        "",
        "![Speed by peer](docs/bench-speed.svg)",
    ]
    return "\n".join(text + ["", "![Memory by resolution](docs/bench-memory.svg)"] * memory)


def _time_and_memory(row: Row | None) -> str:
    if row is None or row.time is None:
        return ""
    return seconds(row.time) + (f", {megabytes(row.peak_bytes)}" if row.peak_bytes is not None else "")


def details(seen: dict[Key, Run], rows: list[Row]) -> str:
    """The region of docs/benchmarks.md."""
    parts = ["## Goals", "", goals(seen), "", "## A second run", "", second_run(seen)]
    for run in seen.values():
        first = run.last[0]
        lines = [cells(row) for row in run.last]
        parts += ["", f"## {_title(first)[0].upper()}{_title(first)[1:]}", "", heading(first) + ".", ""]
        parts += [markdown(HEADER, lines), "", _provenance(first)]
    parts += ["", "## A whole run", "", cost_of_a_run(seen)]
    memory = _memory_rows(rows)
    if memory:
        parts += ["", "## Memory by resolution", "", memory_table(memory)]
    for axis in SWEEPS:
        swept = [row for row in rows if row.case == f"scaling-{axis}" and not row.run["tiny"]]
        if any(row.time is not None for row in swept):
            parts += ["", f"## Growth with {axis}", "", scaling_table(_last_points(swept, axis), axis)]
    return "\n".join(parts)


def _provenance(row: Row) -> str:
    run = row.run
    versions = ", ".join(f"{name} {run[name]}" for name in ("torch", "triton", "numpy", "python") if run[name])
    where = ", ".join(filter(None, (run["device"], run["isa"])))
    rounds = f"{row.rounds or 'no'} rounds"
    return f"`{run['command']}` on {where}; commit {run['commit']}, {run['when']}, {versions}, {rounds}."


def goals(seen: dict[Key, Run]) -> str:
    """What was asked for, and whether the last run reached it (of several sizes: the worst one's)."""
    lines = []
    for goal in GOALS:
        images = f", {goal.images} image{'s' * (goal.images > 1)}" if goal.images else ""
        what = f"{TITLES[goal.case]}, {goal.preset}{images}" + ", memory it adds" * goal.memory
        aim = "" if goal.aim is None else times(goal.aim)
        reached = min((r for key, run in seen.items() if (r := _reached(goal, key, run))), default=None)
        if reached is None:
            lines.append([what, goal.against, times(goal.must), aim, "not measured", ""])
            continue
        value, spread = reached
        verdict = "missed" if value < goal.must else "met" if goal.aim is None or value < goal.aim else "aim met"
        lines.append([what, goal.against, times(goal.must), aim, f"{times(value)}{spread}", verdict])
    return markdown(["what", "against", "must", "aim", "seen (20–80 %)", ""], lines)


def _reached(goal: Goal, key: Key, run: Run) -> tuple[float, str] | None:
    if key[:2] != (goal.case, goal.preset) or run.last[0].run["threads"] != 1:
        return None
    if goal.images is not None and run.last[0].axes["B"] != goal.images:
        return None
    peer = next((row for row in run.last if row.provider == goal.against), None)
    ours = baseline(run.last)
    if peer is None or ours is None or peer.ratio is None:
        return None
    if goal.memory:
        return (peer.peak_bytes / ours.peak_bytes, "") if peer.peak_bytes and ours.peak_bytes else None
    return peer.ratio, f" ({times(peer.ratio_q20 or 0)} – {times(peer.ratio_q80 or 0)})"


def second_run(seen: dict[Key, Run]) -> str:
    """Each setting's last two runs: time over the published algorithm's, and whether they agree within noise."""
    lines = []
    for run in seen.values():
        for c in compare(run.before, run.last):
            if c.anchored:
                change = (f"{c.before:.3f}", f"{c.after:.3f}", f"{c.change:+.1%}", f"{c.bound:.1%}", c.verdict)
                lines.append([c.label, c.provider, *change])
    if not lines:
        return "No setting was run twice."
    head = ["setting", "provider", "first run", "second run", "change", "noise", ""]
    text = "Times the published algorithm's time, in each of the last two runs on the device of the last.\n\n"
    return text + markdown(head, lines)


def cost_of_a_run(seen: dict[Key, Run]) -> str:
    """Days of a preset's published number of steps, extrapolated linearly from the measured batch to the preset's."""
    lines = []
    for run in seen.values():
        for row in run.last:
            if row.case == "step" and row.time is not None:
                preset = PRESETS[row.preset]
                step = row.time * preset["batch_size"] / row.axes["B"]
                days = step * preset["steps"] / 86400
                threads = f" on {row.run['threads']} threads" if row.run["threads"] > 1 else ""
                what = f"{row.preset}, {preset['steps']:,} steps of {preset['batch_size']} images"
                lines.append(
                    [f"{what}, from {row.axes['B']:,}{threads}", row.provider, f"{1 / step:.3g}", f"{days:,.0f}"]
                )
    if not lines:
        return "The whole step was not measured."
    note = "From the steps above, linear in images: a CPU is for small presets and for tests.\n\n"
    return note + markdown(["run", "provider", "steps/s", "days"], lines)


def memory_table(rows: list[Row]) -> str:
    sides = sorted({row.axes["R"] for row in rows})
    lines = []
    for name in dict.fromkeys(row.provider for row in rows):
        by_side = {row.axes["R"]: row for row in rows if row.provider == name}
        if any(row.peak_bytes is not None for row in by_side.values()):
            peaks = [by_side[side].peak_bytes if side in by_side else None for side in sides]
            lines.append([name, *("" if peak is None else megabytes(peak) for peak in peaks)])
        else:
            lines.append([name, *([""] * (len(sides) - 1)), f"cannot: {next(iter(by_side.values())).reason}"])
    head = ["decoder training step, added at its peak", *(f"{side} x {side}" for side in sides)]
    return markdown(head, lines) + "\n\n" + _provenance(rows[-1])


def _last_points(rows: list[Row], axis: str) -> list[Row]:
    """The last row of each provider and size, in the order of sizes."""
    last = {(row.provider, row.axes[axis]): row for row in rows}
    return sorted(last.values(), key=lambda row: row.axes[axis])


def scaling_table(rows: list[Row], axis: str) -> str:
    """Times by size, the fitted exponent, and from which size on ours is the faster."""
    sizes = sorted({row.axes[axis] for row in rows})
    faster = overtakes(rows, axis)
    lines = []
    for name, (points, fitted) in growth(rows, axis).items():
        at, note = dict(points), ""
        if name in faster:
            note = "nowhere" if faster[name] is None else f"from {faster[name]}"
        of_size = (seconds(at[size]) if size in at else "–" for size in sizes)
        lines.append([name, *of_size, "" if fitted is None else f"{fitted:.2f}", note])
    reasons = dict.fromkeys(f"{r.provider} at {r.axes[axis]}: {r.reason}" for r in rows if _partly(r, rows))
    text = markdown(["", *map(str, sizes), "exponent", "ours is faster"], lines)
    notes = "".join(f"\n- {reason}" for reason in reasons)
    timed = [row for row in rows if row.time is not None]
    return f"{text}\n\n{_provenance(timed[-1])} Clock: {timed[-1].clock}." + f"\n{notes}" * bool(notes)


def _partly(row: Row, rows: list[Row]) -> bool:
    """A provider that serves some sizes and not this one."""
    return row.time is None and any(r.time is not None for r in rows if r.provider == row.provider)
