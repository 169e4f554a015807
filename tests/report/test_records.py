"""A row of docs/records.md, from a run's log."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from fastslots.train import TrainConfig

ROOT = Path(__file__).parents[2]


def test_a_row_counts_training_until_a_score_is_reached(tmp_path):
    spec = importlib.util.spec_from_file_location("record_row", ROOT / "scripts" / "record_row.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    lines: list[dict[str, object]] = []
    for step in range(1, 41):
        lines.append({"step": step, "loss": 1.0, "images_per_s": 16.0 if step <= 20 else 32.0})
        if step % 10 == 0:
            lines.append({"step": step, "eval": "val", "j_ari": 0.8 + step / 400, "jis": 0.9, "recon": 1.0})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = TrainConfig.preset("sprites-mini", preset_name="sprites-mini", batch_size=32, steps=40, seed=7)
    (tmp_path / "config.json").write_text(config.to_json())
    (tmp_path / "machine.json").write_text('{"machine": "a processor, 2 threads"}')
    row = script.row(tmp_path, "abc123")
    # two seconds a step for 20 steps, then one: J-ARI is 0.85 after step 20 and 0.90 after step 40
    assert "| abc123 | a processor, 2 threads | sprites-mini, 40 steps" in row
    assert "| 40 s (20 steps) | 60 s (40 steps) | 0.900 / 0.900 |" in row and "seed 7" in row
    head = (ROOT / "docs" / "records.md").read_text().splitlines()
    columns = next(line for line in head if line.startswith("| commit"))
    assert columns.count("|") == row.count("|")
    lines = [line for line in lines if "eval" not in line or line["step"] < 20] + [
        lines[-1] | {"step": 41, "j_ari": 0.8}
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "| not reached | not reached |" in script.row(tmp_path, "abc123")
