"""Held-out combinations of factors: what counts as one, that training never shows one, and the two sets of scores."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tiny import MODEL_16, flags

from fastslots.cli import main
from fastslots.config.run import TrainConfig, read_config
from fastslots.data.builtin.sprites import FACTORS, SHAPES, SpritesDataset
from fastslots.data.factors import format_of_kind
from fastslots.data.holdout import Holdout
from fastslots.data.sources import open_source, unseen
from fastslots.errors import UserError
from fastslots.evaluation.evaluate import evaluate
from fastslots.models import SlotVAE

RULE = "shape=square,hue=0.5:0.75"
TINY = [*flags(MODEL_16 | {"num_slots": 4}), *"--batch_size 4 --steps 2 --eval_images 4".split()]


def test_an_object_must_meet_every_condition():
    holdout = Holdout.parse(RULE, FACTORS, {"shape": SHAPES})
    scenes = [  # (shape, hue) of two objects -> held out
        ([(2, 0.6), (1, 0.1)], True),
        ([(1, 0.1), (2, 0.5)], True),  # the lower end belongs to it
        ([(2, 0.75), (1, 0.6)], False),  # the upper does not; the circle has the hue, the square has not
        ([(2, 0.1), (3, 0.6)], False),
        ([(0, 0.6), (0, 0.0)], False),  # no objects
    ]
    shape, hue = (np.array([[thing[i] for thing in things] for things, _ in scenes]) for i in (0, 1))
    assert holdout.matches({"shape": shape, "hue": hue}, shape > 0).tolist() == [expected for _, expected in scenes]


def is_held_out(factors: dict[str, np.ndarray]) -> np.ndarray:
    return ((factors["shape"] == 2) & (factors["hue"] >= 0.5) & (factors["hue"] < 0.75)).any(1)


def test_training_never_shows_it_and_shows_its_parts():
    config = TrainConfig.preset("sprites-mini", holdout=RULE)
    source = open_source(config)
    assert f"none with {RULE}" in source.description
    for split in source.splits.values():
        factors = split[:1000].factors()
        assert not is_held_out(factors).any()
        squares, hues = factors["shape"] == 2, (factors["hue"] >= 0.5) & (factors["hue"] < 0.75)
        assert squares.any(1).mean() > 0.3 and hues.any(1).mean() > 0.3
    # Scenes that hold nothing out stay what they were without the rule.
    plain = open_source(TrainConfig.preset("sprites-mini")).splits["train"].dataset
    dataset = source.splits["train"].dataset
    (images, masks, factors), (own, own_masks, _) = (d.scenes(range(200)) for d in (plain, dataset))
    kept = ~is_held_out(factors)
    assert 0 < kept.sum() < 200 and (images[kept] == own[kept]).all() and (masks[kept] == own_masks[kept]).all()


def test_what_most_scenes_show_is_kept_from_all_of_training():
    source = open_source(TrainConfig.preset("sprites-mini", holdout="y=0:0.57"))  # nearly nine scenes in ten have one
    factors = source.splits["train"][:2000].factors()
    assert not ((factors["shape"] > 0) & (factors["y"] < 0.57)).any()


def test_unseen_scenes_are_the_first_that_have_it():
    split = unseen(TrainConfig.preset("sprites-mini", holdout=RULE), 30)
    everything = np.arange(split.rows[-1] + 1)
    assert split.rows.tolist() == everything[is_held_out(split.dataset.scenes(everything)[2])].tolist()
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
    for name, split in {"seen": seen[:12], "unseen": unseen(config, 12)}.items():
        assert is_held_out(split.factors()).tolist() == [name == "unseen"] * 12
        expected = evaluate(model, split, batch_size=4).scores()
        for score in ("recon", "j_ari", "jis", "fg_ari", "mbo"):
            assert scores[f"{name}_{score}"] == pytest.approx(expected[score], rel=1e-4, abs=1e-6)
    assert scores["seen_recon"] != scores["unseen_recon"]


@pytest.mark.parametrize(
    "rule, words",
    [
        ("colour=0:1", "no factor 'colour'"),
        ("shape=star", "'shape=star' is no condition .shape is one of circle, square, triangle."),
        ("hue=0.5", "'hue=0.5' is no condition"),
        ("hue=0.5:0.1", "'hue=0.5:0.1' is no condition"),
        ("hue=0:0.9", "more than 9 in 10 scenes have such an object: narrow it"),
    ],
)
def test_bad_rules_are_named(rule, words):
    with pytest.raises(UserError, match=words):
        open_source(TrainConfig.preset("sprites-mini", holdout=rule))


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    """Our sprites as a packed data set of 400 images."""
    folder = tmp_path_factory.mktemp("data") / "sprites"
    assert main(["data", "generate", "sprites", str(folder), "--count", "400", "--size", "16"]) == 0
    return folder


def test_data_on_disk_hold_out_the_same(on_disk, tmp_path, capsys):
    plain, source = (
        open_source(TrainConfig.preset("sprites-mini", data=str(on_disk), resolution=16, holdout=rule))
        for rule in ("", RULE)
    )
    assert f"none with {RULE}" in source.description
    for name, split in source.splits.items():
        every = plain.splits[name]
        assert split.rows.tolist() == np.asarray(every.rows)[~is_held_out(every.factors())].tolist()
        assert len(split) < len(every)
    run = tmp_path / "run"
    assert main(["train", *TINY, "--data", str(on_disk), "--holdout", RULE, "--out", str(run)]) == 0
    capsys.readouterr()
    assert main(["eval", str(run), "--composition", "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    split, test = unseen(read_config(run / "config.json"), 100), plain.splits["test"]
    all_there_are = np.asarray(test.rows)[is_held_out(test.factors())]  # fewer than asked for
    assert split.rows.tolist() == all_there_are.tolist()
    assert scores["composition_images"] == len(split) > 0
    expected = evaluate(SlotVAE.from_run(run), split).scores()
    assert scores["unseen_recon"] == pytest.approx(expected["recon"], rel=1e-4)


def test_any_data_set_with_factors_can_hold_out(tmp_path):
    class Mine:
        """Object 0 is the background; an object's colour is one of two codes."""

        def __len__(self):
            return 40

        def __getitem__(self, i):
            color = np.array([9, 1 + i % 3, 1 + i % 2])
            return {"image": np.zeros((16, 16, 3), np.uint8), "factors": {"color": color, "angle": np.zeros((3, 2))}}

    source = open_source(TrainConfig.preset("sprites-mini", holdout="color=3"), Mine())
    train = source.splits["train"]
    assert isinstance(train.dataset.dataset, Mine) and train.rows.tolist() == [i for i in range(36) if i % 3 != 2]
    assert open_source(TrainConfig.preset("sprites-mini", holdout="color=8:10"), Mine()).splits["test"].rows.size == 2
    refused = {"angle=0:1": "no factor 'angle' .there are color.", "color=0:4": "every image of train has such an"}
    for rule, words in refused.items():
        with pytest.raises(UserError, match=words):
            open_source(TrainConfig.preset("sprites-mini", holdout=rule), Mine())
    with pytest.raises(UserError, match="needs data that tell factors of their objects"):
        open_source(TrainConfig.preset("sprites-mini", holdout=RULE), [np.zeros((16, 16, 3), np.uint8)] * 3)


def in_items(factors: dict[str, np.ndarray]) -> list[dict[str, object]]:
    """A data set of the user's: ``factors`` name -> [n, ...], each image with its row of them."""
    count = len(next(iter(factors.values())))
    return [
        {"image": np.zeros((16, 16, 3), np.uint8)} | {"factors": {k: v[i] for k, v in factors.items()}}
        for i in range(count)
    ]


def kept_of(factors: dict[str, np.ndarray], rule: str) -> list[int]:
    return (
        open_source(TrainConfig.preset("sprites-mini", holdout=rule), in_items(factors)).splits["train"].rows.tolist()
    )


def test_factors_in_a_column_and_factors_of_the_whole_image():
    """As the object-centric-library keeps them, [objects, 1]; a camera's place is no factor of an object."""
    n = 12
    color = np.stack([[9, 1 + i % 3, 2] for i in range(n)])[..., None]
    visible = np.tile([[1.0], [1.0], [0.0]], (n, 1, 1))
    factors = {"color": color, "visibility": visible, "camera": np.ones((n, 2))}
    assert kept_of(factors, "color=2") == [i for i in range(n) if i % 3 != 1]
    del factors["visibility"]
    with pytest.raises(UserError, match=r"camera has 2, color has 3.*visibility"):
        kept_of(factors, "color=2")


def test_part_of_a_set_counts_objects_as_the_set_does():
    whole = SpritesDataset(1, 16, (2, 3), 100)
    part = torch.utils.data.Subset(whole, range(100))
    train = open_source(TrainConfig.preset("sprites-mini", holdout="shape=square"), part).splits["train"]
    assert train.rows.tolist() == [i for i in range(90) if not (whole[i]["factors"]["shape"] == 2).any()]


def test_pictures_are_read_once_and_not_held():
    alive = []

    class Picture(np.ndarray):
        def __del__(self):
            alive.pop()

    class Mine:
        reads = most = 0

        def __len__(self):
            return 40

        def __getitem__(self, i):
            alive.append(i)
            self.reads, self.most = self.reads + 1, max(self.most, len(alive))
            return {
                "image": np.zeros((16, 16, 3), np.uint8).view(Picture),
                "factors": {"color": np.array([0, 1 + i % 2])},
            }

    data = Mine()
    open_source(TrainConfig.preset("sprites-mini", holdout="color=2"), data)
    assert data.reads == 40 and data.most <= 2


def test_codes_have_the_words_of_their_data():
    words = format_of_kind("CLEVR with masks").words
    holdout = Holdout.parse("shape=cylinder,color=red", ("shape", "color"), words)
    factors = {"shape": np.array([[0, 3, 1], [0, 3, 2]]), "color": np.array([[0, 2, 1], [0, 1, 2]])}
    assert holdout.matches(factors, factors["shape"] > 0).tolist() == [True, False]
    assert Holdout.parse("shape=3", ("shape",), words) == Holdout.parse("shape=cylinder", ("shape",), words)


def test_shards_hold_out_as_one_set_does(on_disk, tmp_path, capsys):
    shards = tmp_path / "shards"
    for part in range(2):
        size = ["--count", "30", "--size", "16", "--seed", str(part)]
        assert main(["data", "generate", "sprites", str(shards / f"{part}"), *size]) == 0
    train = open_source(TrainConfig.preset("sprites-mini", data=str(shards), resolution=16)).splits["train"]
    dataset, rows = train.dataset, train.rows
    order = np.random.default_rng(0).permutation(len(dataset))
    factors = dataset.factors_of(order)
    for name, values in factors.items():
        assert (values == np.stack([dataset[i]["factors"][name] for i in order])).all()
    held = open_source(TrainConfig.preset("sprites-mini", data=str(shards), resolution=16, holdout="hue=0:0.2"))
    assert held.splits["train"].rows.tolist() == [i for i in rows if not _low_hue(dataset[i]["factors"])]


def _low_hue(factors: dict[str, np.ndarray]) -> bool:
    return ((factors["shape"] > 0) & (factors["hue"] < 0.2)).any()


@pytest.fixture(scope="module", params=["seeded", "sampled"])
def trained(request, tmp_path_factory):
    run = tmp_path_factory.mktemp("slots") / "run"
    few = [*TINY, "--queries", request.param, "--objects", "1-2"]
    assert main(["train", *few, "--out", str(run)]) == 0
    return run


def test_objects_of_a_built_in_scene_are_as_many_as_asked(trained):
    config = read_config(trained / "config.json")
    for split in open_source(config).splits.values():
        counts = (split[:200].factors()["shape"] > 0).sum(1)
        assert set(counts.tolist()) == {1, 2}
    assert set((open_source(TrainConfig.preset("sprites-mini")).splits["val"].factors()["shape"] > 0).sum(1)) == {2, 3}
    images = open_source(TrainConfig.preset("sprites-mini", objects="2-3")).splits["train"][:20].read()[0]
    assert torch.equal(images, open_source(TrainConfig.preset("sprites-mini")).splits["train"][:20].read()[0])


def test_more_objects_are_scored_with_more_slots(trained, capsys):
    asked = ["--objects", "3-4", "--slots", "6", "--images", "10", "--weights", "last", "--json"]
    capsys.readouterr()
    assert main(["eval", str(trained), *asked]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert (scores["objects"], scores["num_slots"], scores["images"]) == ("3-4", 6, 10)
    model = SlotVAE.from_run(trained, "last")
    more = model.with_slots(6)
    config = read_config(trained / "config.json", objects="3-4")
    split = open_source(config).splits["val"][:10]
    assert set((split.factors()["shape"] > 0).sum(1)) == {3, 4}
    expected = evaluate(more, split).scores()
    for score in ("recon", "j_ari", "jis", "kl"):
        assert scores[score] == pytest.approx(expected[score], rel=1e-4, abs=1e-6)
    assert scores["recon"] != pytest.approx(evaluate(model, split).scores()["recon"], rel=1e-4)
    images = split[:4].read()[0].permute(0, 3, 1, 2).float() / 255
    assert more(images, torch.zeros(4, 6, 4)).slots.shape == (4, 6, 4)
    same = model.with_slots(4)
    assert torch.equal(same(images, torch.zeros(4, 4, 4)).recon, model(images, torch.zeros(4, 4, 4)).recon)
    kept = json.loads((trained / "evaluations.json").read_text())["evaluations"]
    main(["eval", str(trained), "--images", "10", "--weights", "last"])
    assert len(json.loads((trained / "evaluations.json").read_text())["evaluations"]) == len(kept) + 1


def test_slots_that_were_learned_one_by_one_stay_as_many(tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", *TINY, "--queries", "learned", "--out", str(run)]) == 0
    capsys.readouterr()
    assert main(["eval", str(run), "--slots", "6"]) == 2
    assert "queries 'learned' are 4, one a slot" in capsys.readouterr().err


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"objects": "three"}, "objects must be A-B, such as 2-3, got 'three'"),
        ({"objects": "3-2"}, "objects must be A-B with 1 <= A <= B <= 10"),
        ({"objects": "0-2"}, "objects must be A-B with 1 <= A"),
        ({"objects": "2-3", "data": "my.npz"}, "objects 2-3 is of built-in data, and data is my.npz: leave it out"),
    ],
)
def test_bad_numbers_of_objects_are_named(fields, words):
    with pytest.raises(UserError, match=words):
        TrainConfig.preset("sprites-mini", **fields)
