"""Built-in data: rendered scenes and textured sprites, made from a seed, on any number of processes."""

from __future__ import annotations

import numpy as np
import pytest

from fastslots.cli import main
from fastslots.config import run
from fastslots.data import open_dataset
from fastslots.data.builtin import BUILTIN, ScenesDataset, SpritesDataset, TexturedSpritesDataset, generate
from fastslots.data.builtin.geometry import CUBE, CYLINDER, SPHERE, Objects, View
from fastslots.data.builtin.raytrace import LAMP_POSITIONS, render
from fastslots.data.builtin.scenes import GAP, HALF_SIZES, MIN_PIXELS
from fastslots.data.factors import factor_format, numbered_objects, object_factors
from fastslots.data.holdout import Holdout
from fastslots.data.map_style import as_split
from fastslots.data.sources import open_source

EYE = np.array([7.38, -6.53, 5.34], np.float32)


def objects(shape: int, x: float = 0.0, y: float = 0.0, half: float = 0.7, metal: bool = False) -> Objects:
    one = np.ones(1, np.float32)
    return Objects(np.array([shape]), x * one, y * one, half * one, 0.3 * one, 0.5 * np.ones((1, 3)), np.array([metal]))


@pytest.fixture(scope="module")
def made():
    return ScenesDataset(0, 64).scenes(range(24))


def test_names_of_built_in_data_are_those_of_the_configuration():
    assert tuple(BUILTIN) == run.BUILTIN


def test_scenes_depend_on_seed_and_index_alone(made):
    images, masks, factors = made
    again = ScenesDataset(0, 64).scenes([5, 17])
    for whole, some in zip((images, masks, *factors.values()), (*again[:2], *again[2].values()), strict=True):
        assert np.array_equal(whole[[5, 17]], some)
    assert not np.array_equal(ScenesDataset(1, 64).scenes([5])[0][0], images[5])
    item = ScenesDataset(0, 64)[5]
    assert np.array_equal(item["image"], images[5]) and np.array_equal(item["mask"], masks[5])


def test_every_object_of_a_scene_is_seen_and_keeps_its_distance(made):
    _, masks, factors = made
    counts = (factors["shape"] > 0).sum(1)
    assert counts.min() >= 3 and counts.max() <= 6 and len(set(counts)) > 2
    for mask, count, size, x, y in zip(masks, counts, factors["size"], factors["x"], factors["y"], strict=True):
        shown = np.bincount(mask.ravel(), minlength=count + 1)
        assert len(shown) == count + 1 and shown[1:].min() >= MIN_PIXELS * 64**2
        half = np.array(HALF_SIZES)[size[:count] - 1]
        apart = np.hypot(x[:count, None] - x[:count], y[:count, None] - y[:count])
        least = half[:, None] + half + GAP
        assert (apart + 1e9 * np.eye(count) >= least - 1e-5).all()
    assert all(factors[name].max() == len(ScenesDataset.WORDS[name]) for name in ScenesDataset.WORDS)


def surface(shape: int) -> np.ndarray:
    """[3, n]: many points of a shape of half-height 1 about the origin, lid included."""
    u, v = np.meshgrid(np.linspace(0, 2 * np.pi, 720), np.linspace(-1, 1, 361))
    reach = {
        SPHERE: np.sqrt(1 - v**2),
        CYLINDER: np.ones_like(u),
        CUBE: 1 / np.maximum(np.abs(np.cos(u)), np.abs(np.sin(u))),
    }[shape]
    side = np.stack([reach * np.cos(u), reach * np.sin(u), v])
    if shape == SPHERE:
        return side.reshape(3, -1)
    rim = side[:, -1]
    lid = [np.stack([share * rim[0], share * rim[1], rim[2]]) for share in np.linspace(0, 1, 200)]
    return np.concatenate([side.reshape(3, -1), *lid], 1)


@pytest.mark.parametrize("shape", [SPHERE, CUBE, CYLINDER])
def test_a_mask_is_the_projection_of_its_shape(shape):
    """Against the projection of many points of the surface, by the camera's formula alone."""
    size = 96
    _, mask = render(objects(shape), View(EYE, LAMP_POSITIONS), size)
    x, y, z = 0.7 * surface(shape)
    x, y, z = np.cos(0.3) * x - np.sin(0.3) * y, np.sin(0.3) * x + np.cos(0.3) * y, z + 0.7
    forward = -EYE / np.linalg.norm(EYE)
    right = np.cross(forward, [0, 0, 1])
    right /= np.linalg.norm(right)
    offset = np.stack([x, y, z]) - EYE[:, None]
    depth = forward @ offset
    column = (160 + 350 * (right @ offset) / depth - 64) / 192 * size
    row = (120 - 350 * (np.cross(right, forward) @ offset) / depth - 29) / 192 * size
    hit = np.zeros((size, size), bool)
    hit[np.floor(row).astype(int), np.floor(column).astype(int)] = True
    inner = hit[1:-1, 1:-1] & hit[:-2, 1:-1] & hit[2:, 1:-1] & hit[1:-1, :-2] & hit[1:-1, 2:]
    ours = mask == 1
    assert ours[1:-1, 1:-1][inner].all(), "a pixel well inside the shape is not its own"
    assert not ours[~hit].any(), "a pixel that the shape does not touch is labelled"


def test_light_and_shadow_fall_where_they_must():
    view = View(EYE, LAMP_POSITIONS)
    with_sphere, mask = render(objects(SPHERE), view, 96)
    far, far_mask = render(objects(SPHERE, x=-2.9, y=2.9, half=0.35), view, 96)
    both_floor = (mask == 0) & (far_mask == 0)
    darker = (far.astype(int) - with_sphere).max(-1)[both_floor]
    assert darker.max() > 25, "no shadow"
    assert np.percentile(darker, 20) <= 2, "a shadow that covers the whole floor"
    soft = np.unique(darker[darker > 3])
    assert len(soft) > 10, "a shadow without a penumbra"
    shiny, _ = render(objects(SPHERE, metal=True), view, 96)
    assert shiny[mask == 1].max() > with_sphere[mask == 1].max() + 30, "metal mirrors no lamp"


def test_packed_scenes_are_the_same_on_any_number_of_processes(tmp_path, monkeypatch):
    for cores in (1, 3):
        monkeypatch.setattr(generate, "usable_cores", lambda cores=cores: cores)
        monkeypatch.setattr(generate, "PIXELS_AT_ONCE", 2 * 32**2)
        generate.pack("scenes", tmp_path / f"on{cores}", 3, 32, (3, 4), 9)
    one, three = open_dataset(tmp_path / "on1"), open_dataset(tmp_path / "on3")
    assert one.info.digest == three.info.digest and len(one) == 9
    assert np.array_equal(one[8]["image"], ScenesDataset(3, 32, (3, 4), 9)[8]["image"])


def test_generate_command_makes_scenes_that_tell_their_factors(tmp_path, capsys):
    folder = tmp_path / "scenes"
    assert main(["data", "generate", "scenes", str(folder), "--count", "6", "--size", "32", "--objects", "3-3"]) == 0
    assert "generated scenes" in capsys.readouterr().out
    split = as_split(open_dataset(folder))
    factors, present = numbered_objects(split)
    words = factor_format(split.dataset).words
    assert present.all() and present.shape == (6, 3) and words["material"] == ("rubber", "metal")
    assert object_factors(split)["color"].max() <= 8 and "x" in factors
    assert main(["data", "generate", "scenes", str(folder), "--count", "6"]) == 2
    assert main(["data", "generate", "scenes", str(tmp_path / "x"), "--count", "6", "--objects", "3-30"]) == 2
    assert "objects <= 10" in capsys.readouterr().err


def test_scenes_avoid_what_is_held_out():
    rule = Holdout.parse("shape=cube,color=red", ("shape", "color"), ScenesDataset.WORDS)
    factors = ScenesDataset(0, 32, count=60, avoid=rule).factors_of(range(60))
    assert not ((factors["shape"] == 1) & (factors["color"] == 2)).any()
    free = ScenesDataset(0, 32, count=60).factors_of(range(60))
    assert ((free["shape"] == 1) & (free["color"] == 2)).any()


def test_textured_sprites_have_the_shapes_of_plain_ones_and_no_plain_colours():
    plain, textured = SpritesDataset(4, 32), TexturedSpritesDataset(4, 32)
    indices = np.arange(40)
    images, masks, factors = textured.scenes(indices)
    same_images, same_masks, same_factors = plain.scenes(indices)
    assert np.array_equal(masks, same_masks) and all(np.array_equal(factors[n], same_factors[n]) for n in factors)

    def flat(pictures: np.ndarray) -> float:
        """The share of an object's or background's pixels that have its commonest colour: median over regions."""
        regions = [pictures[i][masks[i] == label] for i in indices for label in (0, 1)]
        return float(np.median([np.unique(r, axis=0, return_counts=True)[1].max() / len(r) for r in regions]))

    assert flat(same_images) > 0.7 and flat(images) < 0.5
    assert np.array_equal(textured.scenes([7])[0][0], images[7])


def test_training_on_built_in_scenes(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTSLOTS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(generate, "CACHED", 40)
    command = ["train", "clevr6-mini", "--steps", "1", "--batch_size", "2", "--eval_images", "2", "--data"]
    assert main([*command, "scenes", "--resolution", "32", "--out", str(tmp_path / "run")]) == 0
    assert "generated scenes" in (tmp_path / "run" / "data.txt").read_text()
    assert len(list((tmp_path / "cache").glob("scenes-*"))) == 1
    assert main([*command, "sprites-textured", "--resolution", "32", "--out", str(tmp_path / "other")]) == 0
    assert "built-in sprites-textured" in (tmp_path / "other" / "data.txt").read_text()


def test_a_few_scenes_are_made_without_the_cache_and_are_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTSLOTS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(generate, "CACHED", 40)
    config = run.TrainConfig.preset("clevr6-mini", data="scenes", resolution=32)
    few = open_source(config, few=True)
    assert not (tmp_path / "cache").exists()
    whole = open_source(config)
    assert (tmp_path / "cache").exists()
    for name, split in whole.splits.items():
        assert list(few.splits[name].rows) == list(split.rows)
        for a, b in zip(few.splits[name][:3].read(), split[:3].read(), strict=True):
            assert a.equal(b)
    assert open_source(config, few=True).description == whole.description  # now they are there
