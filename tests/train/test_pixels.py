"""Which pixels a step decodes, and that the loss stays what it is over all of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import MODEL_16

from fastslots.data import SpritesDataset, to_float
from fastslots.errors import UserError
from fastslots.train import TrainConfig
from fastslots.train.draws import draw
from fastslots.train.pixels import edge_pixels, pixel_probabilities


def run(**overrides) -> TrainConfig:
    return TrainConfig.preset("sprites-mini", **{**MODEL_16, **overrides})


def scenes() -> torch.Tensor:
    return to_float(torch.from_numpy(SpritesDataset(3, 16, (2, 3)).batch(np.arange(6))[0]))


def test_edges_are_where_the_3x3_spans_enough():
    images = torch.rand(2, 3, 7, 9, generator=torch.Generator().manual_seed(0)).round(decimals=1) * 0.15
    found = edge_pixels(images).view(2, 7, 9)
    for b in range(2):
        for y in range(7):
            for x in range(9):
                near = images[b, :, max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2].flatten(1)
                assert found[b, y, x] == ((near.amax(1) - near.amin(1)) > 0.1).any()
    assert found.any() and not found.all()


@pytest.mark.parametrize("sampling", ["foreground", "edges"])
def test_probabilities_favour_their_half(sampling):
    images = torch.zeros(3, 3, 16, 16)
    images[:2, :, 4:12, 4:12] = 0.7
    images[1, :, 4:12, 4:12] += torch.linspace(0, 0.2, 8)  # shading is no edge
    p = pixel_probabilities(images, sampling).view(3, 16, 16)
    torch.testing.assert_close(p.sum((1, 2)), torch.ones(3))
    torch.testing.assert_close(p[2], torch.full((16, 16), 1 / 256))  # nothing there: uniform
    inside, outside, border = p[0, 6, 6], p[0, 0, 0], p[0, 4, 4]
    assert inside.item() == pytest.approx((0.5 / 256 + 0.5 / 64) * (0.5 if sampling == "edges" else 1))
    assert outside.item() == pytest.approx(0.5 / 256 * (0.5 if sampling == "edges" else 1))
    edges = 10 * 10 - 6 * 6  # a ring of two pixels
    assert border.item() == pytest.approx(inside.item() + (0.5 / edges if sampling == "edges" else 0))


@pytest.mark.parametrize("sampling", ["uniform", "foreground", "edges"])
def test_drawn_pixels_estimate_the_sum_over_all_without_bias(sampling):
    """Exactly where the probabilities are known, and by draws as a step makes them."""
    images, L = scenes(), 256
    error = torch.rand(6, L)
    if sampling != "uniform":
        p = pixel_probabilities(images, sampling)
        assert (p > 0).all()
        torch.testing.assert_close((p * error / (L * p)).sum(1), error.mean(1))
    config = run(pixels_per_step=200, pixel_sampling=sampling, batch_size=6)
    estimates = []
    for step in range(300):
        drawn = draw(config, step, images)
        weight = torch.ones(()) if drawn.pixel_weight is None else drawn.pixel_weight
        estimates.append((weight * error.gather(1, drawn.pixels)).mean(1))
    stacked = torch.stack(estimates)
    spread = stacked.std(0) / len(stacked) ** 0.5
    assert ((stacked.mean(0) - error.mean(1)).abs() < 5 * spread).all()


def test_edges_are_the_same_whichever_process_draws_them():
    config, images = run(pixels_per_step=20, pixel_sampling="edges", batch_size=6), scenes()
    whole, part = draw(config, 5, images), draw(config, 5, images[2:5], start=2)
    assert torch.equal(whole.pixels[2:5], part.pixels) and torch.equal(whole.pixel_weight[2:5], part.pixel_weight)


def test_an_unknown_way_of_drawing_is_named():
    with pytest.raises(UserError, match="pixel_sampling must be one of uniform, foreground, edges"):
        run(pixel_sampling="corners")
