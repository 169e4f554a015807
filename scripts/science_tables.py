"""Tables of a sweep over alpha, beta and queries: what the two terms buy, with paired tests over the seeds.

    fastslots sweep sprites-mini --queries seeded,learned --alpha 0,12 --beta 0,0.1 --seed 21,22,23,24,25 --steps 1500 \
        --holdout shape=square,hue=0.5:0.75 --eval_every 0 --threads 1 --out sweeps/science
    python scripts/science_tables.py sweeps/science --out docs/results/science.json

Each run's last weights are scored, mean latents, on test images that the run's choices never saw:

    seen     test images, none with the combination that the run held out
    unseen   as many test images that each have an object with it
    more     images of --objects shapes (4-6), with three slots more than were trained where slots share one first
             query; learned queries are one a slot, so that such runs keep theirs

Printed: Markdown tables of mean ± sample standard deviation over seeds, and of paired differences between cells (the
same seeds: the same batches and noise), with the two-sided p of a paired t test. --out has every run's scores.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from scipy.stats import ttest_rel

from fastslots.config.run import TrainConfig
from fastslots.data.sources import open_source, unseen
from fastslots.evaluation.evaluate import evaluate
from fastslots.models import SlotVAE
from fastslots.runs.folder import RunFolder, write_json
from fastslots.sweep.tables import mean_and_std

KEPT = ("j_ari", "jis", "fg_ari", "recon", "kl", "interaction_normalized", "images")
SHOWN = ("j_ari", "jis")
SETS = {"seen": "test images", "unseen": "held-out combination", "more": "more objects"}
MORE_SLOTS = 3
BATCH = 20

Run = dict[str, Any]
Cell = tuple[bool, bool]
"""Whether alpha and beta are above 0."""
PAIRS: dict[str, tuple[Cell, Cell]] = {
    "alpha, beside beta": ((True, True), (False, True)),
    "alpha alone": ((True, False), (False, False)),
    "beta, beside alpha": ((True, True), (True, False)),
    "beta alone": ((False, True), (False, False)),
    "both": ((True, True), (False, False)),
}


def scored(path: Path, images: int, objects: str) -> Run:
    """Scores of a run on the three sets; kept in its folder."""
    folder, asked = RunFolder(path), {"images": images, "objects": objects}
    kept = folder.read_json(path / "science.json")
    if kept.get("asked") == asked:
        return kept["run"]
    config: TrainConfig = folder.read_config()
    model = SlotVAE.from_run(path, "last")
    wider = model if config.queries == "learned" else model.with_slots(config.num_slots + MORE_SLOTS)
    several = open_source(replace(config, objects=objects)).splits["test"]
    splits = {
        "seen": (model, open_source(config).splits["test"][:images]),
        "unseen": (model, unseen(config, images)),
        "more": (wider, several[:images]),
    }
    run: Run = {
        name: getattr(config, name) for name in ("queries", "alpha", "beta", "seed", "steps", "data", "holdout")
    }
    run["more_slots"] = wider.config.num_slots
    for name, (scorer, split) in splits.items():
        scores = evaluate(scorer, split, BATCH).scores()
        run[name] = {key: round(scores[key], 5) for key in KEPT if key in scores}
    write_json(path / "science.json", {"asked": asked, "run": run})
    return run


def cell_of(run: Run) -> Cell:
    return run["alpha"] > 0, run["beta"] > 0


def cell_rows(runs: list[Run]) -> list[Run]:
    """A row a cell: values, n, and of each set each score's mean and deviation."""
    rows = []
    for queries, alpha, beta in dict.fromkeys((r["queries"], r["alpha"], r["beta"]) for r in runs):
        of_cell = [r for r in runs if (r["queries"], r["alpha"], r["beta"]) == (queries, alpha, beta)]
        row: Run = {"queries": queries, "alpha": alpha, "beta": beta, "seeds": [r["seed"] for r in of_cell]}
        for name in SETS:
            values = {key: [r[name][key] for r in of_cell] for key in (*SHOWN, "recon")}
            row[name] = {
                key: [round(v, 5) for v in mean_and_std(vs) if not math.isnan(v)] for key, vs in values.items()
            }
        rows.append(row)
    return rows


def paired(runs: list[Run]) -> list[Run]:
    """Differences between cells that share seeds: mean, how many seeds agree in its sign, p of the paired t test."""
    tests = []
    for queries in dict.fromkeys(r["queries"] for r in runs):
        by_cell = {
            cell: {r["seed"]: r for r in runs if r["queries"] == queries and cell_of(r) == cell} for cell in CELLS
        }
        for label, (one, other) in PAIRS.items():
            seeds = sorted(by_cell[one].keys() & by_cell[other].keys())
            for name in SETS:
                for key in SHOWN:
                    a, b = ([by_cell[cell][seed][name][key] for seed in seeds] for cell in (one, other))
                    differences = [x - y for x, y in zip(a, b, strict=True)]
                    if len(seeds) < 2:
                        continue
                    mean, std = mean_and_std(differences)
                    tests.append(
                        {"queries": queries, "effect": label, "set": name, "score": key, "seeds": len(seeds)}
                        | {"difference": round(mean, 5), "deviation": round(std, 5)}
                        | {"same_sign": sum(d * mean > 0 for d in differences), "p": float(ttest_rel(a, b).pvalue)}
                    )
    return tests


CELLS: tuple[Cell, ...] = ((False, False), (False, True), (True, False), (True, True))


def tables(rows: list[Run], tests: list[Run]) -> str:
    """Both as Markdown."""
    lines = [f"| queries | alpha | beta | n | {' | '.join(f'{what}: J-ARI / JIS' for what in SETS.values())} |"]
    lines.append("|---|---|---|---|" + "---|" * len(SETS))
    for row in rows:
        shown = [" / ".join(" ± ".join(f"{v:.3f}" for v in row[name][key]) for key in SHOWN) for name in SETS]
        values = [row["queries"], f"{row['alpha']:g}", f"{row['beta']:g}", str(len(row["seeds"])), *shown]
        lines.append(f"| {' | '.join(values)} |")
    lines += ["", f"| queries | effect of | {' | '.join(f'{what}: J-ARI | JIS' for what in SETS.values())} |"]
    lines.append("|---|---|" + "---|---|" * len(SETS))
    for queries, label in dict.fromkeys((t["queries"], t["effect"]) for t in tests):
        found = [t for t in tests if (t["queries"], t["effect"]) == (queries, label)]
        shown = [f"{t['difference']:+.3f} (p {t['p']:.2g}, {t['same_sign']} of {t['seeds']})" for t in found]
        lines.append(f"| {queries} | {label} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main(sweep: Path, images: int, objects: str, out: Path | None) -> str:
    found = [
        scored(path, images, objects) for path in sorted(sweep.iterdir()) if RunFolder(path).last_weights.is_file()
    ]
    order = sorted(found, key=lambda r: (r["queries"] != "seeded", r["alpha"], r["beta"], r["seed"]))
    rows, tests = cell_rows(order), paired(order)
    if out:
        out.write_text(json.dumps({"cells": rows, "paired": tests, "runs": order}, indent=1) + "\n")
    return tables(rows, tests)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sweep", type=Path, help="folder of runs")
    parser.add_argument("--images", type=int, default=1000, help="of each set (default 1000)")
    parser.add_argument("--objects", default="4-6", help="of the scenes with more of them (default 4-6)")
    parser.add_argument("--out", type=Path, help="JSON to write")
    asked = parser.parse_args()
    print(main(asked.sweep, asked.images, asked.objects, asked.out))
