"""Held-out combinations of factors: what counts as one, that training never shows one, and the two sets of scores."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fastslots.cli import main
from fastslots.data import SpritesDataset
from fastslots.data.holdout import Holdout
from fastslots.data.sprites import FACTORS, SHAPES
from fastslots.errors import UserError
from fastslots.models import SlotVAE
from fastslots.train.config import TrainConfig, read_config
from fastslots.train.evaluate import evaluate
from fastslots.train.sources import open_source, unseen

RULE = "shape=square,hue=0.5:0.75"
TINY = """--resolution 16 --num_slots 4 --slot_dim 4 --cnn_channels 8 --encoder_width 16 --encoder_layers 1
--query_width 16 --query_hidden 16 --slot_width 16 --slot_hidden 16 --decoder_heads 2 --output_hidden 16
--batch_size 4 --pixels_per_step 0 --steps 2 --eval_images 4""".split()


def test_an_object_must_meet_every_condition():
    holdout = Holdout.parse(RULE, FACTORS, SHAPES)
    scenes = [  # (shape, hue) of two objects -> held out
        ([(2, 0.6), (1, 0.1)], True),
        ([(1, 0.1), (2, 0.5)], True),  # the lower end belongs to it
        ([(2, 0.75), (1, 0.6)], False),  # the upper does not; the circle has the hue, the square has not
        ([(2, 0.1), (3, 0.6)], False),
        ([(0, 0.6), (0, 0.0)], False),  # no objects
    ]
    shape, hue = (np.array([[thing[i] for thing in things] for things, _ in scenes]) for i in (0, 1))
    assert holdout.matches({"shape": shape, "hue": hue}).tolist() == [expected for _, expected in scenes]


def is_held_out(factors: dict[str, np.ndarray]) -> np.ndarray:
    return ((factors["shape"] == 2) & (factors["hue"] >= 0.5) & (factors["hue"] < 0.75)).any(1)


def test_training_never_shows_it_and_shows_its_parts():
    config = TrainConfig.preset("sprites-mini", holdout=RULE)
    source = open_source(config)
    assert f"none with {RULE}" in source.description
    for dataset, rows in source.splits.values():
        factors = dataset.scenes(rows[:1000])[2]
        assert not is_held_out(factors).any()
        squares, hues = factors["shape"] == 2, (factors["hue"] >= 0.5) & (factors["hue"] < 0.75)
        assert squares.any(1).mean() > 0.3 and hues.any(1).mean() > 0.3
    # Scenes that hold nothing out stay what they were without the rule.
    plain, _ = open_source(TrainConfig.preset("sprites-mini")).splits["train"]
    dataset, _ = source.splits["train"]
    (images, masks, factors), (own, own_masks, _) = (d.scenes(range(200)) for d in (plain, dataset))
    kept = ~is_held_out(factors)
    assert 0 < kept.sum() < 200 and (images[kept] == own[kept]).all() and (masks[kept] == own_masks[kept]).all()


def test_unseen_scenes_are_the_first_that_have_it():
    dataset, rows = unseen(TrainConfig.preset("sprites-mini", holdout=RULE), 30)
    everything = np.arange(rows[-1] + 1)
    assert rows.tolist() == everything[is_held_out(dataset.scenes(everything)[2])].tolist()
    with pytest.raises(UserError, match="fewer than one scene in 100 has such an object: widen it"):
        unseen(TrainConfig.preset("sprites-mini", holdout="hue=0.5:0.5001,shape=circle"), 10)
    with pytest.raises(UserError, match="the run held no combination out"):
        unseen(TrainConfig.preset("sprites-mini"), 10)


def test_both_scores_from_the_command_line(tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", *TINY, "--holdout", RULE, "--out", str(run)]) == 0
    capsys.readouterr()
    assert main(["eval", str(run), "--composition", "--images", "12", "--batch_size", "5", "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["composition_images"] == 12
    model, config = SlotVAE.from_run(run), read_config(run / "config.json")
    seen = open_source(config).splits["test"]
    for name, (dataset, rows) in {"seen": (seen[0], seen[1][:12]), "unseen": unseen(config, 12)}.items():
        assert is_held_out(dataset.scenes(rows)[2]).tolist() == [name == "unseen"] * 12
        expected = evaluate(model, dataset, rows, batch_size=4)
        for score in ("recon", "j_ari", "jis", "fg_ari", "mbo"):
            assert scores[f"{name}_{score}"] == pytest.approx(expected[score], rel=1e-4, abs=1e-6)
    assert scores["seen_recon"] != scores["unseen_recon"]


@pytest.mark.parametrize(
    "rule, words",
    [
        ("colour=0:1", "no factor 'colour'"),
        ("shape=star", "'shape=star' is no condition .shapes: circle, square, triangle."),
        ("hue=0.5", "'hue=0.5' is no condition"),
        ("hue=0.5:0.1", "'hue=0.5:0.1' is no condition"),
    ],
)
def test_bad_rules_are_named(rule, words):
    with pytest.raises(UserError, match=words):
        open_source(TrainConfig.preset("sprites-mini", holdout=rule))


def test_only_the_built_in_data_can_hold_out(tmp_path):
    with pytest.raises(UserError, match="holdout needs the built-in sprites"):
        open_source(TrainConfig.preset("sprites", data=str(tmp_path), holdout=RULE))
    assert SpritesDataset().avoid is None
