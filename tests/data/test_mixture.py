"""Training images of two sets at once (``mix``): the second trains alone, and what is held out is the first's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import MODEL_8, flags, same_weights

from fastslots.cli import main
from fastslots.data import open_dataset
from fastslots.data.dataset import MixedScenes, Split
from fastslots.data.sources import open_source, training_source
from fastslots.errors import UserError
from fastslots.train import TrainConfig


def made(path, count: int, first: int, size: int = 8, masks: bool = True):
    """A set whose image i is of the one colour ``first`` + i, with a mask of one object."""
    colours = np.arange(first, first + count, dtype=np.uint8)
    images = np.zeros((count, size, size, 3), np.uint8) + colours[:, None, None, None]
    marks = np.zeros((count, size, size), np.uint8)
    marks[:, 2:4, 2:4] = 1
    np.savez(path, arr_0=images, **({"arr_2": marks} if masks else {}))
    return path


@pytest.fixture
def two(tmp_path):
    return made(tmp_path / "own.npz", 40, 0), made(tmp_path / "other.npz", 100, 100)


def whole(path) -> Split:
    dataset = open_dataset(path)
    return Split(dataset, range(len(dataset)))


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.9])
def test_every_scene_of_both_is_there_and_the_share_holds(two, share):
    mixed = MixedScenes(*map(whole, two), share)
    images, masks = mixed.batch(np.arange(len(mixed)))
    colours = images[:, 0, 0, 0].astype(int)
    assert set(colours) == {*range(40), *range(100, 200)}
    assert abs((colours >= 100).mean() - share) < 1 / len(mixed) + 1e-9
    assert masks.shape == images.shape[:3] and masks.sum((1, 2)).tolist() == [4] * len(mixed)
    for chosen in (colours < 100, colours >= 100):  # none comes twice as often as another, but for the last round
        counts = np.bincount(colours[chosen])
        assert counts.max() - counts[counts > 0].min() <= 1


def test_rows_come_in_the_order_asked_for(two):
    mixed = MixedScenes(*map(whole, two), 0.5)
    rows = np.array([150, 3, 99, 100, 101, 3])
    everything = mixed.batch(np.arange(len(mixed)))[0]
    assert np.array_equal(mixed.batch(rows)[0], everything[rows])


def test_there_are_masks_where_both_have_them(tmp_path, two):
    without = whole(made(tmp_path / "without.npz", 30, 200, masks=False))
    images, masks = MixedScenes(whole(two[0]), without, 0.5).batch(np.arange(40))
    assert masks is None or not (images[:, 0, 0, 0] >= 200).any()
    assert MixedScenes(whole(two[0]), without, 0.5).batch(np.array([0, 50]))[1] is None


def test_held_out_images_are_those_of_data(two):
    config = TrainConfig.preset("sprites-mini", **MODEL_8, data=str(two[0]), mix=str(two[1]), mix_share=0.75)
    alone, mixed = open_source(config), training_source(config)
    for name in ("val", "test"):
        assert torch.equal(mixed.splits[name].read()[0], alone.splits[name].read()[0])
    trained = set(mixed.splits["train"].read()[0][:, 0, 0, 0].tolist())
    held_out = {int(v) for name in ("val", "test") for v in alone.splits[name].read()[0][:, 0, 0, 0]}
    assert not trained & held_out and trained > set(range(36)) - held_out
    assert "75% of the training images" in mixed.description and str(two[1]) in mixed.description


def test_a_set_that_is_mixed_with_itself_is_itself(two):
    config = TrainConfig.preset("sprites-mini", **MODEL_8, data=str(two[0]), mix=str(two[0]))
    assert training_source(config).description == open_source(config).description


def test_built_in_data_mix_with_a_set(two):
    config = TrainConfig.preset("sprites-mini", **MODEL_8, data=str(two[0]), mix="sprites", mix_share=0.5)
    train = training_source(config).splits["train"]
    assert len(train) == 1 << 32  # scenes made on the fly have no end
    images, _ = train.read(np.array([0, 7, (1 << 31) - 1, 1 << 31, (1 << 32) - 1]))
    plain = [len(torch.unique(image.reshape(-1, 3), dim=0)) == 1 for image in images]
    assert plain == [True, True, True, False, False]


def test_a_run_trains_on_both_goes_on_bit_for_bit_and_needs_one_to_be_scored(two, tmp_path, capsys):
    few = dict(MODEL_8, batch_size=4, threads=1, eval_images=2, checkpoint_every=2, eval_every=2, steps=4)
    words = [*flags(few), "--data", str(two[0]), "--mix", str(two[1])]
    assert main(["train", *words, "--out", str(tmp_path / "whole")]) == 0
    assert "mixed     67% of the training images" in capsys.readouterr().err
    assert main(["train", *words, "--out", str(tmp_path / "part")]) == 0
    (tmp_path / "part/checkpoints/step_00000004.safetensors").unlink()
    capsys.readouterr()
    assert main(["train", "--out", str(tmp_path / "part"), "--resume"]) == 0
    assert "other images" not in capsys.readouterr().err
    assert same_weights(tmp_path / "whole", tmp_path / "part")
    alone = [word for word in words if word not in ("--mix", str(two[1]))]
    assert main(["train", *alone, "--out", str(tmp_path / "alone")]) == 0
    assert not same_weights(tmp_path / "whole", tmp_path / "alone")
    two[1].unlink()
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "whole"), "--split", "test", "--json"]) == 0
    assert main(["report", str(tmp_path / "whole")]) == 0
    assert "not those of config.data" not in capsys.readouterr().err


def test_what_cannot_be_mixed_is_named(two, tmp_path, capsys):
    for share in (0, 1, -0.5):
        with pytest.raises(UserError, match=f"mix_share must be above 0 and below 1, got {share}"):
            TrainConfig.preset("sprites-mini", mix_share=share)
    with pytest.raises(UserError, match="reads features: leave it out"):
        TrainConfig.preset("clevrtex", mix="scenes")
    own, other = whole(two[0]), whole(made(tmp_path / "large.npz", 30, 0, size=16))
    with pytest.raises(UserError, match=r"mix: its images are \[16, 16, 3\] .* those of data \[8, 8, 3\]"):
        MixedScenes(own, other, 0.5)
    words = [*flags(MODEL_8), "--data", str(two[0]), "--mix", str(tmp_path / "nothing"), "--out", str(tmp_path / "run")]
    assert main(["train", *words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert "nothing: no such file or folder" in lines[-1] and not any("Traceback" in line for line in lines)
