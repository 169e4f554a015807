"""First queries of an encoder: learned, seeded at places of the image, sampled."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import MODEL_16

from fastslots.cli import main
from fastslots.data import SpritesDataset, to_float
from fastslots.data.builtin import ScenesDataset
from fastslots.errors import UserError
from fastslots.interop import to_official
from fastslots.models import SlotVAE, SlotVAEConfig
from fastslots.models.layers import grid
from fastslots.models.queries import (
    BRIGHTNESS,
    PLACE,
    SEED_LEVEL,
    farthest_from_surface,
    farthest_patches,
    patch_features,
    polynomials,
    smooth_surface,
)
from fastslots.train import TrainConfig, fit
from fastslots.train.draws import draw

SMALL = {name: value for name, value in MODEL_16.items() if name != "pixels_per_step"} | {"cnn_stride": 4}


def config(**overrides) -> SlotVAEConfig:
    return SlotVAEConfig(**SMALL, **overrides)


def model(**overrides) -> SlotVAE:
    torch.manual_seed(0)
    return SlotVAE(config(**overrides)).eval()


def scenes(count: int, size: int = 16, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    images, masks = SpritesDataset(seed, size, (2, 3)).batch(np.arange(count))
    return to_float(torch.from_numpy(images)), torch.from_numpy(masks).long()


def traversal(image: torch.Tensor, side: int, count: int) -> tuple[list[int], list[float]]:
    """Seeds and distances by their definition, one patch after the other, in NumPy and float64."""
    r = image.shape[-1] // side
    pixels = image.double().numpy().reshape(image.shape[0], side, r, side, r)
    colours = pixels.mean((2, 4)).reshape(image.shape[0], -1).T
    places = np.array([(y, x) for y in range(side) for x in range(side)]) / (side - 1)
    ground = np.sort(colours, 0)[(len(colours) - 1) // 2]
    weight = np.linalg.norm(colours - ground, axis=1)
    points = np.concatenate([colours, places], 1)
    seeds: list[int] = []
    distances: list[float] = []
    for _ in range(count):
        nearest = [min([np.linalg.norm(p - points[s]) for s in seeds], default=1) for p in points]
        seeds.append(int(np.argmax(weight * nearest)))
        distances.append(float(nearest[seeds[-1]]))
    return seeds, distances


def test_the_traversal_is_its_definition():
    images, _ = scenes(20, 32)
    seeds, distances = farthest_patches(patch_features(images, grid(16)), 4)
    expected = [traversal(image, 16, 4) for image in images]
    assert seeds.tolist() == [places for places, _ in expected]
    torch.testing.assert_close(distances, torch.tensor([apart for _, apart in expected]))


def test_seeds_lie_on_nearly_every_object():
    images, masks = scenes(300, 32)
    seeds, _ = farthest_patches(patch_features(images, grid(16)), 4)
    patches = masks.unflatten(1, (16, 2)).unflatten(3, (16, 2)).transpose(2, 3).flatten(3).flatten(1, 2)  # [B, 256, 4]
    seen = objects = 0
    for image, chosen in zip(patches, seeds, strict=True):
        labels = set(image.unique().tolist()) - {0}
        seen, objects = seen + len(labels & set(image[chosen].unique().tolist())), objects + len(labels)
    assert seen / objects > 0.97


def test_an_image_of_one_colour_has_its_seeds_spread_out():
    for level in (0.0, 0.3, 1.0):
        seeds, _ = farthest_patches(patch_features(torch.full((2, 3, 16, 16), level), grid(8)), 3)
        assert seeds.tolist() == [[0, 63, 7]] * 2  # corners, each as far as can be from those before
    assert all(torch.isfinite(part).all() for part in model(queries="seeded")(torch.full((2, 3, 16, 16), 0.3)))


def test_a_smooth_surface_is_found_behind_objects():
    """A lit floor, an eighth of it behind a red object: its colours, which least squares misses by far more."""
    code = polynomials(grid(16))
    basis, _ = torch.linalg.qr(code)
    truth = torch.tensor([[0.5, 0.1, -0.05, -0.1, 0.02, -0.15]]).repeat(3, 1) @ code.T  # [3, 256]
    covered = torch.zeros(16, 16, dtype=torch.bool)
    covered[5:10, 4:10] = True
    colours = torch.where(covered.flatten(), torch.tensor([[0.9], [0.1], [0.2]]), truth)
    found = (smooth_surface(colours[None], basis) @ basis.T)[0]
    missed = ((colours @ basis) @ basis.T - truth).abs()
    assert (found - truth).abs().max() < 0.05 < 0.15 < missed.max()
    assert (found - truth).abs().mean() < missed.mean() / 8


def test_the_traversal_from_a_surface_is_its_definition():
    images, _ = scenes(10, 32)
    patches, surface = patch_features(images, grid(16)), 0.1 * torch.rand(10, 3, 256)
    seeds, distances = farthest_from_surface(patches, surface, 4)
    for b in range(10):
        colours, places = (part.double().numpy().T for part in (patches[b, :3], patches[b, 3:]))
        apart = np.linalg.norm(colours - surface[b].double().numpy().T, axis=1)
        weight = apart / (apart + SEED_LEVEL)
        points = np.concatenate([colours - (1 - BRIGHTNESS) * colours.mean(1, keepdims=True), PLACE * places], 1)
        chosen: list[int] = []
        for k in range(4):
            nearest = np.array([min([np.linalg.norm(p - points[s]) for s in chosen], default=1) for p in points])
            assert weight[seeds[b, k]] * nearest[seeds[b, k]] == pytest.approx((weight * nearest).max(), rel=1e-4)
            assert distances[b, k].item() == pytest.approx(nearest[seeds[b, k]], rel=1e-4)
            chosen.append(int(seeds[b, k]))


def test_seeds_from_a_surface_lie_on_more_objects_of_a_lit_scene():
    images, masks, _ = ScenesDataset(0, 64).scenes(range(60))
    pictures = to_float(torch.from_numpy(images))
    covered = {}
    for queries in ("seeded", "seeded-surface"):
        first = SlotVAE(SlotVAEConfig.preset("clevr6-mini", queries=queries)).encoder.first_queries
        seeds, _ = first.look(pictures)
        y, x = 2 * (seeds // 32), 2 * (seeds % 32)
        found = [set(mask[row, column].tolist()) - {0} for mask, row, column in zip(masks, y, x, strict=True)]
        covered[queries] = sum(map(len, found)) / sum(len(set(mask.flat) - {0}) for mask in masks)
    assert covered["seeded-surface"] > 0.93 and covered["seeded-surface"] > covered["seeded"] + 0.02


def test_seeds_from_a_surface_spread_out_where_there_is_one_colour():
    first = model(queries="seeded-surface").encoder.first_queries
    for level in (0.0, 0.3, 1.0):
        seeds, distances = first.look(torch.full((2, 3, 16, 16), level))
        assert all(len(set(row)) == 3 for row in seeds.tolist()) and (distances[:, 1:, -1] > 0.2).all()


def test_seeded_queries_are_their_formula():
    net = model(queries="seeded")
    encoder, (images, _) = net.encoder, scenes(4)
    tokens = encoder.tokens(images)
    found = encoder.first_queries(encoder.queries, images, tokens, None)
    for b in range(4):
        for k, (seed, distance) in enumerate(zip(*traversal(images[b], 8, 3), strict=True)):
            y, x = divmod(seed, 8)
            colour = images[b, :, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].mean((1, 2))
            place = torch.tensor([y / 7, x / 7])
            row = torch.cat([tokens[b, y // 2 * 4 + x // 2], colour, place, torch.tensor([distance])])
            expected = encoder.queries[0, 0] + encoder.first_queries.projection.weight @ row
            torch.testing.assert_close(found[b, k], expected)


def test_gradients_reach_the_token_under_a_seed_and_no_choice():
    net = model(queries="seeded")
    images, _ = scenes(3)
    tokens = torch.randn(3, 16, 16, requires_grad=True)
    net.encoder.first_queries(net.encoder.queries, images, tokens, None).sum().backward()
    touched = tokens.grad.abs().sum(-1) > 0
    for b in range(3):
        expected = {s // 8 // 2 * 4 + s % 8 // 2 for s in traversal(images[b], 8, 3)[0]}
        assert set(touched[b].nonzero().flatten().tolist()) == expected
    assert net.encoder.first_queries.projection.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("encoder", ["transformer", "slot-attention"])
@pytest.mark.parametrize("queries", ["learned", "seeded", "seeded-surface", "sampled"])
def test_an_image_has_the_same_slots_in_any_batch(queries, encoder):
    net, (images, _) = model(queries=queries, encoder=encoder), scenes(5)
    zeros = torch.zeros(5, 3, 4)
    whole = net.encode(images, zeros).slots
    torch.testing.assert_close(net.encode(images[2:4], zeros[:2]).slots, whole[2:4], rtol=1e-5, atol=1e-5)
    assert net.encode(images[:0], zeros[:0]).slots.shape == (0, 3, 4)


def test_sampled_slots_differ_and_evaluation_repeats():
    net, (images, _) = model(queries="sampled"), scenes(4)
    zeros = torch.zeros(4, 3, 4)
    slots = net.encode(images, zeros).slots
    assert torch.equal(net.encode(images, zeros).slots, slots)
    assert (slots[:, 0] - slots[:, 1]).abs().max() > 1e-3  # the mean would make them alike
    noise = torch.randn(4, 3, 16)
    drawn = net.encode(images, zeros, noise).slots
    assert not torch.equal(drawn, slots) and torch.equal(drawn, net.encode(images, zeros, noise).slots)
    net.train()
    assert not torch.equal(net.encode(images, zeros).slots, net.encode(images, zeros).slots)
    with pytest.raises(ValueError, match=r"query_noise has shape \[4, 3, 15\], expected \[4, 3, 16\]"):
        net.encode(images, zeros, noise[..., :15])


def test_sampled_queries_follow_from_seed_step_and_place():
    run = TrainConfig.preset("sprites-mini", **MODEL_16, queries="sampled", batch_size=6)
    images = torch.rand(6, 3, 16, 16)
    whole = draw(run, 3, images)
    assert whole.query_noise.shape == (6, 3, 16)
    assert torch.equal(draw(run, 3, images[2:5], start=2).query_noise, whole.query_noise[2:5])
    assert not torch.equal(draw(run, 4, images).query_noise, whole.query_noise)
    assert not torch.equal(whole.query_noise.flatten()[:72], whole.noise.flatten())
    assert draw(TrainConfig.preset("sprites-mini", **MODEL_16, queries="learned"), 3, images).query_noise is None


@pytest.mark.parametrize("queries", ["seeded", "seeded-surface", "sampled"])
def test_runs_resume_bit_for_bit_and_are_scored(queries, tmp_path, capsys):
    few = dict(
        MODEL_16, batch_size=4, steps=4, threads=1, eval_every=2, eval_images=4, checkpoint_every=2, queries=queries
    )
    whole = fit(TrainConfig.preset("sprites-mini", **few), out=tmp_path / "whole")
    part = tmp_path / "part"
    fit(TrainConfig.preset("sprites-mini", **few), out=part)
    (part / "checkpoints" / "step_00000004.safetensors").unlink()
    again = fit(TrainConfig.preset("sprites-mini", **few), out=part, resume=True)
    for a, b in zip(whole.model.state_dict().values(), again.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    capsys.readouterr()
    assert main(["eval", str(part), "--images", "8", "--json"]) == 0


def test_published_queries_keep_their_weights_and_names():
    assert not [name for name in SlotVAE(config()).state_dict() if "first_queries" in name]
    for preset in ("sprites", "clevr6", "clevrtex"):
        assert SlotVAEConfig.preset(preset).queries == "learned"
    for change in ({"queries": "seeded"}, {"queries": "sampled"}, {"cnn_kernel": 3}):
        with pytest.raises(UserError, match=f"{next(iter(change))} .* has no place in the authors' state_dict"):
            to_official(SlotVAE(SlotVAEConfig(resolution=16, cnn_stride=4, num_slots=2, slot_dim=8, **change)))


def test_what_cannot_be_seeded_is_named():
    with pytest.raises(UserError, match="features have none: choose learned"):
        SlotVAEConfig.preset("clevrtex", queries="seeded")
    with pytest.raises(UserError, match="queries 'seeded-surface' looks at"):
        SlotVAEConfig.preset("clevrtex", queries="seeded-surface")
    with pytest.raises(UserError, match="num_slots 5, and resolution 2 with cnn_stride 1 has 4: ask for fewer slots"):
        SlotVAEConfig(resolution=2, num_slots=5, queries="seeded")
    with pytest.raises(UserError, match="must be one of learned, seeded, seeded-surface, sampled, got 'random'"):
        SlotVAEConfig(queries="random")
    with pytest.raises(UserError, match="cnn_kernel must be odd, got 4"):
        SlotVAEConfig(cnn_kernel=4)
    full = SlotVAE(SlotVAEConfig(resolution=2, num_slots=4, queries="seeded", slot_dim=2)).eval()
    assert torch.isfinite(full(torch.rand(2, 3, 2, 2)).recon).all()  # a slot for every patch
    sampled = SlotVAEConfig.preset("clevrtex", queries="sampled", resolution=4, channels=8, encoder_layers=1)
    assert SlotVAE(sampled).eval().encode(torch.rand(2, 8, 4, 4)).slots.shape == (2, 11, 64)


def test_pictures_of_one_colour_train_and_are_scored(tmp_path):
    """There is no object to start at: seeds lie anywhere, no pixel is an edge, and nothing becomes infinite."""
    pictures = [
        {"image": np.full((16, 16, 3), 7 * i, np.uint8), "mask": np.zeros((16, 16), np.uint8)} for i in range(24)
    ]
    few = dict(MODEL_16, pixels_per_step=32, batch_size=4, steps=5, eval_images=1, data="sprites")
    for queries in ("seeded", "seeded-surface", "sampled", "learned"):
        run = TrainConfig.preset("sprites-mini", **few, queries=queries)
        result = fit(run, out=tmp_path / queries, dataset=pictures)
        assert all(torch.isfinite(value).all() for value in result.model.state_dict().values())
        assert result.scores["j_ari"] == 1.0 and np.isfinite(result.scores["recon"])  # no foreground, nothing missed
        assert result.scores["foreground_pixels"] == 0


def test_seeds_that_cannot_be_end_the_command_in_one_line(tmp_path, capsys):
    for flags, words in (
        (["--resolution", "4", "--cnn_stride", "4", "--num_slots", "5"], "ask for fewer slots"),
        (["clevrtex", "--data", "anything", "--queries", "seeded"], "features have none: choose learned"),
    ):
        assert main(["train", *flags, "--out", str(tmp_path / "run")]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and words in lines[0] and not (tmp_path / "run").exists()


def test_more_slots_than_patches_are_refused_of_a_trained_model():
    net = model(queries="seeded")  # 8 x 8 patches
    images, _ = scenes(2)
    assert net.with_slots(64).encode(images, torch.zeros(2, 64, 4)).slots.isfinite().all()
    with pytest.raises(UserError, match="has 64: ask for fewer slots"):
        net.with_slots(65)
