"""Matching of slots to objects, probes against closed forms, and what ``fastslots eval`` measures on request."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LinearRegression
from sklearn.metrics import r2_score

from fastslots.cli import main
from fastslots.data import SpritesDataset
from fastslots.data.map_style import as_split
from fastslots.errors import UserError
from fastslots.evaluation.analyses import attribute_scores, recombination_scores
from fastslots.metrics.attributes import circular, match_slots, probe
from fastslots.models import SlotVAE, SlotVAEConfig
from fastslots.models.slot_decoder import Decoded
from fastslots.train import TrainConfig, fit

TINY = dict(resolution=16, num_slots=4, slot_dim=6, cnn_channels=8, encoder_width=16, encoder_layers=1, query_width=16)
TINY |= dict(query_hidden=16, slot_width=16, slot_hidden=16, decoder_heads=2, output_hidden=(16,))


def test_matching_is_one_to_one_by_overlap():
    masks = torch.tensor([[[1, 1, 2, 2], [1, 1, 2, 2], [0, 0, 5, 5], [0, 0, 0, 0]], torch.zeros(4, 4).tolist()]).long()
    slots = torch.tensor([[[3, 3, 3, 3], [3, 3, 2, 2], [1, 1, 2, 2], [1, 1, 1, 1]]]).repeat(2, 1, 1)
    slot_map = torch.nn.functional.one_hot(slots, 4).flatten(1, 2).float()
    image, label, slot = match_slots(slot_map, masks)
    # Slot 3 covers all of object 1 and half of 2; slot 2 half of 2 and all of 5 (IoU 1/3 and 1/2). Slot 0 owns nothing.
    assert image.tolist() == [0, 0] and dict(zip(label.tolist(), slot.tolist(), strict=True)) == {1: 3, 5: 2}


def data(n: int = 400, noise: float = 0.3):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 5, generator=g, dtype=torch.float64)
    y = x @ torch.randn(5, 2, generator=g, dtype=torch.float64) + 3
    return x, y + noise * torch.randn(n, 2, generator=g, dtype=torch.float64), torch.arange(n) >= n // 2


def test_the_linear_probe_is_least_squares():
    x, y, held_out = data()
    model = LinearRegression().fit(x[~held_out], y[~held_out])
    expected = r2_score(y[held_out, 0], LinearRegression().fit(x[~held_out], y[~held_out, 0]).predict(x[held_out]))
    found = probe(x, {"one": y[:, 0], "both": y, "constant": torch.ones(400), "class": (y[:, 0] > 3).long()}, held_out)
    assert found.r2["one"] == pytest.approx(expected, abs=1e-4)
    std = y[~held_out].std(0).numpy()
    residual = ((y[held_out].numpy() - model.predict(x[held_out])) / std) ** 2
    spread = ((y[held_out].numpy() - y[held_out].numpy().mean(0)) / std) ** 2
    assert found.r2["both"] == pytest.approx(1 - residual.sum() / spread.sum(), abs=1e-4)
    assert found.r2.keys() == {"one", "both"} and found.accuracy["class"] > 0.9


def test_the_nonlinear_probe_sees_more_and_nothing_is_seen_in_noise():
    x, _, held_out = data(800)
    bent = {"bent": (x[:, 0] * x[:, 1]), "xor": (x[:, 2] * x[:, 3] > 0).long()}
    linear, curved = probe(x, bent, held_out), probe(x, bent, held_out, "mlp")
    print(linear, curved)
    assert linear.r2["bent"] < 0.1 and curved.r2["bent"] > 0.8
    assert linear.accuracy["xor"] < 0.65 and curved.accuracy["xor"] > 0.85
    noise = {"y": torch.randn(800, generator=torch.Generator().manual_seed(5)).double()}
    assert probe(x, noise, held_out).r2["y"] < 0.05
    assert probe(x, bent, held_out) == linear  # the same scores every time


def test_a_circle_closes():
    ends = circular(torch.tensor([0.0, 0.25, 1.0]), 1.0)
    assert torch.allclose(ends[0], ends[2]) and torch.allclose(ends[1], torch.tensor([0.0, 1.0]).double(), atol=1e-12)


def test_wrong_arguments_are_named():
    x, y, held_out = data(60)
    with pytest.raises(ValueError, match="kind must be linear or mlp"):
        probe(x, {"y": y}, held_out, "forest")
    with pytest.raises(ValueError, match="needs 20 objects to fit and 20 to score, got 15 and 15"):
        probe(x[:30], {"y": y[:30]}, torch.arange(30) >= 15)


class Oracle(torch.nn.Module):
    """Slots that hold what is painted: slot k of an image the mean place and colour of the k-th object."""

    config = SlotVAEConfig(**TINY)

    def __init__(self, dataset: SpritesDataset):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.dataset, self.first = dataset, 0

    def encode(self, images, noise):
        rows = np.arange(self.first, self.first + len(images))
        _, masks, factors = self.dataset.scenes(rows)
        self.first += len(images)
        names = ("y", "x", "radius", "hue", "saturation", "value")
        known = np.stack([factors[name] for name in names], -1)
        slots = torch.zeros(len(images), 4, 6)
        slots[:, 1 : 1 + known.shape[1]] = torch.from_numpy(known)
        self.maps = torch.nn.functional.one_hot(torch.from_numpy(masks).long(), 4).flatten(1, 2).float()
        return type("Posterior", (), {"slots": slots})()

    def decode(self, slots):
        return Decoded(torch.empty(0), self.maps)


def test_slots_that_hold_the_factors_score_one_and_the_labels_fit():
    dataset = SpritesDataset(3, 16, (2, 3), 200)
    found = attribute_scores(Oracle(dataset), as_split(dataset), batch_size=30)
    assert found["attribute_objects"] > 380
    for name in ("y", "x", "radius", "saturation", "value"):
        assert found[f"attribute_r2_linear_{name}"] > 0.999
    assert found["attribute_r2_mlp_hue"] > 0.9  # hue is a circle: the linear probe cannot
    assert found["attribute_r2_linear_hue"] < 0.9
    assert found["attribute_accuracy_linear"] == found["attribute_accuracy_linear_shape"] < 0.6
    names = ("y", "x", "radius", "hue", "saturation", "value")
    mean = sum(found[f"attribute_r2_linear_{name}"] for name in names) / 6
    assert found["attribute_r2_linear"] == pytest.approx(mean)


def test_recombination_of_a_decoder_that_loses_nothing():
    class Exact(torch.nn.Module):
        config = SlotVAEConfig(**TINY | {"input": "features"})

        def __init__(self, lost: float = 0.0):
            super().__init__()
            self.weight, self.lost = torch.nn.Parameter(torch.zeros(())), lost

        def encode(self, images, noise):  # the slots are the picture, in another order
            flat = images.flatten(1)[:, :24].unflatten(1, (4, 6)).float()
            return type("Posterior", (), {"slots": flat.flip(1) * (1 - self.lost)})()

        def decode(self, slots):
            return Decoded(torch.nn.functional.pad(slots.flatten(1), (0, 3 * 256 - 24)).view(-1, 3, 16, 16), None)

    images = torch.randn(30, 6, 16, 16)  # features of any values
    found = recombination_scores(Exact(), as_split(images))
    assert found["reencoding_error"] < 1e-10 and found["recombination_error"] < 1e-10
    found = recombination_scores(Exact(lost=0.5), as_split(images))
    assert found["reencoding_error"] == pytest.approx(0.25, abs=0.02)  # of their spread about a mean near 0
    with pytest.raises(UserError, match="at least two images"):
        recombination_scores(Exact(), as_split(images[:1]))


def test_eval_measures_what_it_is_asked_for(tmp_path, capsys):
    config = TrainConfig.preset(
        "sprites-mini", **TINY, pixels_per_step=0, steps=1, batch_size=4, eval_images=2, threads=1
    )
    run = str(tmp_path / "run")
    fit(config, out=run)
    capsys.readouterr()
    asked = ["--images", "60", "--attributes", "--interaction-order", "--recombination", "--batch_size", "20"]
    assert main(["eval", run, *asked, "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    expected = {"attribute_r2_linear", "attribute_r2_mlp_y", "attribute_accuracy_mlp_shape", "recombination_error"}
    assert expected <= scores.keys() and scores["interaction_order_images"] == 32
    assert all(math.isfinite(scores[name]) for name in (*expected, "interaction_order"))
    both = []
    for mode in ("pooled", "paper"):
        assert main(["eval", run, "--images", "6", "--score-mode", mode, "--batch_size", "4", "--json"]) == 0
        both.append(json.loads(capsys.readouterr().out))
    assert both[1]["score_mode"] == "paper" and both[0]["jis"] != both[1]["jis"]  # 4 and 2 images weigh the same
    assert main(["eval", run, "--images", "10", "--attributes"]) == 2
    assert "take more images" in capsys.readouterr().err


def test_data_without_factors_or_masks_are_refused(tmp_path):
    model = SlotVAE(SlotVAEConfig(**TINY))
    images = np.zeros((4, 16, 16, 3), np.uint8)
    with pytest.raises(UserError, match="no factors"):
        attribute_scores(model, as_split([{"image": image} for image in images]))
    with pytest.raises(UserError, match="no masks"):
        attribute_scores(model, as_split([{"image": image, "factors": {"x": np.zeros(3)}} for image in images]))
