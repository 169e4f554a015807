"""Makes a model that ships with the package, from a seed, and the scores of further seeds beside it.

    python scripts/make_shipped.py sprites-mini --seeds 0,1,2 [--steps N] [--data DATA] [--mix DATA]

Trains the preset with each seed on one thread (the same version, processor and torch give the same bits), scores
the last weights on the test split with mean latents, and writes into fastslots/runs/shipped/PRESET

    config.json          the first seed's configuration, without paths of this machine: where only what was mixed in is
                         built in, that is its data, so that `fastslots eval` and `explore` need no other
    model.safetensors    its weights; the metadata hold the model's configuration and these scores
    seeds.json           test scores of every seed ("mix_test": on the test images of what was mixed in), and the curve
                         of its validation scores; as "earlier" those of other seeds that the file had, which an
                         earlier version trained

Runs that are complete in --runs already are not trained again.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastslots.config.run import BUILTIN, TrainConfig
from fastslots.data.sources import open_source
from fastslots.evaluation.evaluate import evaluate
from fastslots.files import write_atomic
from fastslots.models import SlotVAE
from fastslots.runs.folder import RunFolder, write_json
from fastslots.runs.log import read_metrics
from fastslots.runs.pretrained import SHIPPED
from fastslots.train import fit

KEPT = ("j_ari", "jis", "fg_ari", "mbo", "recon", "kl", "interaction_normalized", "images")


def trained(config: TrainConfig, path: Path) -> RunFolder:
    """The folder of a complete run of ``config``."""
    folder = RunFolder(path)
    if not folder.checkpoint(config.steps).is_file():
        fit(config, out=path, resume=True)
    return folder


def scored(folder: RunFolder, images: int) -> dict[str, Any]:
    """Test scores of a run's last weights, and the curve of its validation scores; kept in the run's folder."""
    kept = folder.path / "test.json"
    if kept.is_file():
        return folder.read_json(kept)
    config = folder.read_config()
    model, sets = SlotVAE.from_run(folder.path, "last"), {"test": config}
    if config.mix:
        sets["mix_test"] = replace(config, data=config.mix, mix="")
    tests = {name: _test_scores(model, of, images) for name, of in sets.items()}
    curve = [{key: round(line[key], 4) for key in ("step", "j_ari", "jis")} for line in read_metrics(folder.metrics)[1]]
    write_json(kept, {"seed": config.seed, "steps": config.steps, **tests, "validation": curve})
    return folder.read_json(kept)


def _test_scores(model: SlotVAE, config: TrainConfig, images: int) -> dict[str, Any]:
    scores = evaluate(model, open_source(config).splits["test"][: images or None]).scores()
    return {key: round(scores[key], 4) if isinstance(scores[key], float) else scores[key] for key in KEPT}


def main(preset: str, seeds: list[int], runs: Path, out: Path, images: int = 0, **given: Any) -> Path:
    """Train with the fields ``given`` beside the preset's, score, write; returns the folder of the model that ships."""
    folders = []
    for seed in seeds:
        config = TrainConfig.preset(preset, preset_name=preset, seed=seed, threads=1, **given)
        folders.append(trained(config, runs / f"{preset}-seed-{seed}"))
    scores = [scored(folder, images) for folder in folders]
    config = folders[0].read_config()
    data, mix = (value if value in BUILTIN else "" for value in (config.data, config.mix))
    kept = replace(config, data=data or mix, mix=mix if data else "", threads=0, init_from="")
    made = RunFolder(out / preset)
    write_atomic(made.last_weights, SlotVAE.from_run(folders[0].path, "last").weights_bytes(scores[0]))
    write_atomic(made.config, f"{kept.to_json()}\n".encode())
    there = made.read_json(made.path / "seeds.json")
    others = [run for run in [*there.get("seeds", []), *there.get("earlier", [])] if run["seed"] not in seeds]
    kept_scores = {"seeds": scores} | ({"earlier": others} if others else {})
    write_atomic(made.path / "seeds.json", f"{json.dumps(kept_scores, indent=1)}\n".encode())
    return made.path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("preset")
    parser.add_argument("--seeds", default="0,1,2", help="the first one's weights ship (default 0,1,2)")
    parser.add_argument("--data", default="", help="for presets of data that are not built in")
    parser.add_argument("--mix", default="", help="as of `fastslots train`")
    parser.add_argument("--steps", type=int, help="default: the preset's")
    parser.add_argument("--images", type=int, default=0, help="test images that are scored (default 0: all)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where runs are kept (default runs/)")
    parser.add_argument("--out", type=Path, default=SHIPPED, help="default: the package's own folder")
    args = parser.parse_args()
    args.out.joinpath(args.preset).mkdir(parents=True, exist_ok=True)
    fields = {name: getattr(args, name) for name in ("steps", "data", "mix") if getattr(args, name)}
    seeds = [int(seed) for seed in args.seeds.split(",")]
    made = main(args.preset, seeds, args.runs, args.out, args.images, **fields)
    print(f"{made}: {sum(path.stat().st_size for path in made.iterdir()):,} bytes")
