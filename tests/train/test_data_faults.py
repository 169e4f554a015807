"""Data that change or fail under a run: what is said, and what is kept."""

from __future__ import annotations

import io

import numpy as np
import pytest
from tiny import MODEL_8

from fastslots.data import SpritesDataset
from fastslots.runs.log import read_metrics
from fastslots.train import TrainConfig, fit, recorder

TINY = dict(MODEL_8, steps=3, batch_size=2, threads=1, eval_every=0, eval_images=2, checkpoint_every=0)
IMAGES, MASKS, _ = SpritesDataset(0, 8, (2, 3)).scenes(range(40))


def train(out, dataset=None, **changes):
    said = io.StringIO()
    resume = changes.pop("resume", False)
    result = fit(TrainConfig.preset("sprites-mini", **(TINY | changes)), dataset, out, resume=resume, stream=said)
    return result, said.getvalue()


class Failing:
    """Validation images (the last two of 40) fail once ``fails`` is set."""

    def __init__(self):
        self.fails = False

    def __len__(self):
        return 40

    def __getitem__(self, index):
        if self.fails and index >= 38:
            raise OSError("the disk is gone")
        return IMAGES[index], MASKS[index]


def fail_after_the_check(dataset, monkeypatch):
    original = recorder.Recorder.announce

    def announce(self, *args):
        dataset.fails = True
        return original(self, *args)

    monkeypatch.setattr(recorder.Recorder, "announce", announce)


def test_nothing_fails_after_the_last_step(tmp_path, monkeypatch):
    dataset = Failing()
    fail_after_the_check(dataset, monkeypatch)
    result, said = train(tmp_path / "run", dataset)
    assert result.step == 3 and (tmp_path / "run" / "model.safetensors").is_file() and not result.scores
    assert "warning   no last evaluation (OSError: the disk is gone); the weights are kept" in said


def test_an_evaluation_that_fails_on_the_way_costs_no_step(tmp_path, monkeypatch):
    dataset = Failing()
    fail_after_the_check(dataset, monkeypatch)
    with pytest.raises(OSError, match="the disk is gone"):
        train(tmp_path / "run", dataset, eval_every=2)
    dataset.fails = False
    monkeypatch.undo()
    result, said = train(tmp_path / "run", dataset, resume=True)
    assert result.step == 3 and "resumed at step 2" in said
    steps = [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")[0]]
    assert steps == [1, 2, 3]


@pytest.mark.parametrize("what", ["page", "explore", "pictures"])
def test_a_page_or_picture_that_fails_ends_no_run(tmp_path, monkeypatch, what):
    def broken(*_, **__):
        raise RuntimeError("no such font")

    target = {"page": "write_report", "explore": "write_explorer", "pictures": "encoded"}[what]
    monkeypatch.setattr(recorder, target, broken)
    result, said = train(tmp_path / "run", Failing() if what != "explore" else None)
    assert result.step == 3 and result.scores["recon"] > 0 and (tmp_path / "run" / "model.safetensors").is_file()
    assert said.count("warning   RuntimeError: no such font; training goes on") == 1


@pytest.mark.parametrize("change", ["pixels", "masks", "nothing"])
def test_other_pictures_of_the_same_description_are_said(tmp_path, monkeypatch, change):
    """Told by the digest: number, size and path of the images are the same."""
    monkeypatch.setenv("FASTSLOTS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "a.npz"
    np.savez(path, IMAGES, np.zeros((40, 1)), MASKS)
    train(tmp_path / "run", data=str(path))
    images, masks = IMAGES.copy(), MASKS.copy()
    if change == "pixels":
        images[7, 0, 0, 0] ^= 1
    elif change == "masks":
        masks[7, 0, 0] ^= 1
    np.savez(path, images, np.zeros((40, 1)), masks)
    _, said = train(tmp_path / "run", data=str(path), steps=4, resume=True)
    assert ("warning   other images than before from here on: their fingerprint was" in said) == (change != "nothing")
