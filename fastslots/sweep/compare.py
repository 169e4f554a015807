"""Runs beside each other: in which fields they differ, and their scores of one kind."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastslots.errors import UserError
from fastslots.evaluation.kept import KIND
from fastslots.files import write_atomic
from fastslots.report.facts import run_facts
from fastslots.report.page import render
from fastslots.runs.folder import RunFolder
from fastslots.runs.log import read_metrics
from fastslots.sweep.tables import FIRST, SHOWN, is_number, mean_and_std, mean_std_text, score_names

SECONDARY = {"device", "threads", "log_every", "keep_checkpoints", "checkpoint_every", "log_to", "tensorboard"}
"""Fields that change no result: they stay out of the printed table."""


@dataclass(frozen=True)
class Comparison:
    """Lists have an entry a run, in the order in which runs were named; None where a run has no such value."""

    runs: list[str]  # names that tell them apart
    differing: dict[str, list[Any]]  # field -> its values
    kind: str  # what the scores are of, in words
    scores: dict[str, list[float | None]]
    groups: list[dict[str, Any]] = field(default_factory=list)  # of runs that differ in their seed alone; see _groups
    notes: list[str] = field(default_factory=list)  # what stands in the way of a fair comparison


def compare(folders: Sequence[RunFolder], split: str = "", latent: str = "") -> Comparison:
    """Compare runs by what ``fastslots eval`` has measured of all of them alike, or else by their last own evaluation.

    split, latent: only evaluations of these. UserError where a folder is no run, or no such evaluation is common to
    all.
    """
    for folder in folders:
        folder.check()
    configs = [asdict(folder.read_config()) for folder in folders]
    names = [name for name in configs[0] if any(config[name] != configs[0][name] for config in configs)]
    differing = {name: [config[name] for config in configs] for name in names}
    notes: list[str] = []
    chosen = _common([folder.read_evaluations() for folder in folders], split, latent)
    if chosen:
        kind = describe(chosen[0])
    elif split or latent:
        asked = " ".join(f"--{name} {value}" for name, value in (("split", split), ("latent", latent)) if value)
        raise UserError(
            f"no evaluation with {asked} is common to these runs: run `fastslots eval RUN {asked}` for each first"
        )
    else:
        chosen, kind = _last(folders, notes)
    datas = {(folder.described_data(), folder.read_json(folder.machine).get("digest", "")) for folder in folders}
    if len(datas) > 1:
        notes.append("the runs were trained on different images")
    scores = {
        name: [float(v) if is_number(v := entry.get(name)) else None for entry in chosen]
        for name in score_names(chosen)
    }
    return Comparison(run_names(folders), differing, kind, scores, _groups(differing, scores), notes)


def run_names(folders: Sequence[RunFolder]) -> list[str]:
    """Each run's folder, with as many of the folders above it as it takes to tell them apart."""
    parts = [folder.path.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(path[-depth:]) for path in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"{folders[0].path} and another are the same run: name each once")


def describe(entry: dict[str, Any]) -> str:
    """What an evaluation's scores are of: ``test, 500 images, z mean, best weights``."""
    z = "mean" if entry["latent"] == "mean" else "a sample"
    mode = ", as published" if entry.get("score_mode") == "paper" else ""
    return f"{entry['split']}, {entry['images']:,} images, z {z}, {entry['weights']} weights{mode}"


def write_page(folders: Sequence[RunFolder], comparison: Comparison, out: Path) -> None:
    """The comparison as one HTML file. UserError where it cannot be written."""
    facts = []
    for name, folder in zip(comparison.runs, folders, strict=True):
        facts.append(run_facts(folder.path) | {"name": name, "explorer": {}})  # pictures: `fastslots report RUN RUN`
    page = render(facts, asdict(comparison))
    write_atomic(out, page.encode(errors="backslashreplace"))


def _common(evaluations: Sequence[list[dict[str, Any]]], split: str, latent: str) -> list[dict[str, Any]]:
    """An entry of one kind of each run: of the kinds that all have, test before val, many images before few, the mean
    before a sample, and the newest. [] where there is none."""
    best: list[dict[str, Any]] = []
    for entry in evaluations[0]:
        if not {"split", "latent", "images", "weights"} <= entry.keys():
            continue
        if (split or entry["split"]) != entry["split"] or (latent or entry["latent"]) != entry["latent"]:
            continue
        alike = [next((e for e in of_run if _kind(e) == _kind(entry)), None) for of_run in evaluations]
        found = [e for e in alike if e is not None]
        if len(found) == len(alike) and (not best or _rank(entry) >= _rank(best[0])):
            best = found
    return best


def _kind(entry: dict[str, Any]) -> list[Any]:
    return [entry.get(name) for name in KIND]


def _rank(entry: dict[str, Any]) -> tuple[bool, int, bool]:
    return entry["split"] == "test", entry["images"], entry["latent"] == "mean"


def _last(folders: Sequence[RunFolder], notes: list[str]) -> tuple[list[dict[str, Any]], str]:
    """The last evaluation in each run's own log."""
    evaluations = [read_metrics(folder.metrics)[1] if folder.metrics.is_file() else [] for folder in folders]
    last = [lines[-1] if lines else {} for lines in evaluations]
    for what in ("images", "step"):
        if len({entry.get(what) for entry in last if entry}) > 1:
            counts = ", ".join(str(entry.get(what, "none")) for entry in last)
            notes.append(f"the runs' last evaluations are not of the same {what} ({counts})")
    return last, "held-out images, each run's own last evaluation"


def _groups(differing: dict[str, list[Any]], scores: dict[str, list[float | None]]) -> list[dict[str, Any]]:
    """Runs that differ in their seed alone, where there are such: {"values": fields, "runs": their places, "scores":
    {name: {"mean", "std"}}}, std None for one run."""
    fields = [name for name in differing if name != "seed" and name not in SECONDARY]
    places: dict[str, list[int]] = {}
    for place in range(len(differing.get("seed", []))):
        places.setdefault(repr([differing[name][place] for name in fields]), []).append(place)
    if all(len(group) == 1 for group in places.values()):
        return []
    groups = []
    for group in places.values():
        found = {name: [v for i in group if (v := values[i]) is not None] for name, values in scores.items()}
        rows = {name: mean_and_std(values) for name, values in found.items() if values}
        means = {name: {"mean": mean, "std": None if math.isnan(std) else std} for name, (mean, std) in rows.items()}
        values = {name: differing[name][group[0]] for name in fields}
        groups.append({"values": values, "runs": group, "scores": means})
    return groups


def table(comparison: Comparison, show: Callable[[Any], str]) -> list[list[str]]:
    """A row a field and a score, a column a run; of two runs also their difference."""
    two = len(comparison.runs) == 2
    rows = [["", *comparison.runs, *(["difference"] if two else [])]]
    for name, values in comparison.differing.items():
        if name not in SECONDARY:
            rows.append([name, *map(show, values), *([""] if two else [])])
    for name in printed_scores(comparison.scores):
        numbers = comparison.scores[name]
        row = [name, *("-" if number is None else f"{number:.4g}" for number in numbers)]
        if two:
            first, second = numbers
            row.append("" if first is None or second is None else f"{second - first:+.3g}")
        rows.append(row)
    return rows


def groups_table(comparison: Comparison, show: Callable[[Any], str]) -> list[list[str]]:
    """A row a setting: its values, the number of runs, and mean ± standard deviation of each score."""
    groups = comparison.groups
    names = printed_scores(comparison.scores)[:SHOWN]
    rows = [[*groups[0]["values"], "runs", *names]]
    for group in groups:
        row = [*map(show, group["values"].values()), str(len(group["runs"]))]
        for name in names:
            of_runs = group["scores"].get(name, {"mean": math.nan, "std": None})
            row.append(mean_std_text(of_runs["mean"], math.nan if of_runs["std"] is None else of_runs["std"]))
        rows.append(row)
    return rows


def printed_scores(scores: Iterable[str]) -> list[str]:
    """Those of a table; what probes say of single factors is on the page, and in the JSON."""
    return [name for name in scores if name in FIRST or not name.startswith("attribute_")]
