"""Sampling by (seed, step), the loader's promises, and the built-in scenes."""

from __future__ import annotations

import threading
import zlib

import numpy as np
import pytest
import torch

from fastslots.data import Loader, SpritesDataset, batch_indices, split_indices, to_float
from fastslots.data.loader import hold_images
from fastslots.data.map_style import as_split


def test_sampling_is_frozen():
    """A change of these numbers would change every run in the world: they may never change."""
    assert batch_indices(1, 2, 8, 1000).tolist() == [13, 472, 142, 531, 594, 489, 108, 232]


def test_sampling_depends_on_seed_step_and_place_alone():
    whole = batch_indices(7, 3, 16, 999)
    parts = np.concatenate([batch_indices(7, 3, 4, 999, start) for start in range(0, 16, 4)])
    assert np.array_equal(whole, parts)
    assert not np.array_equal(whole, batch_indices(7, 4, 16, 999))
    assert not np.array_equal(whole, batch_indices(8, 3, 16, 999))


def test_sampling_is_uniform_and_independent():
    draws = np.stack([batch_indices(0, step, 64, 10) for step in range(1, 1001)])
    counts = np.bincount(draws.ravel(), minlength=10)
    assert abs(counts - 6400).max() < 400  # five standard deviations
    assert abs(np.corrcoef(draws[:-1].ravel(), draws[1:].ravel())[0, 1]) < 0.02


@pytest.mark.parametrize(
    "n, published, sizes",
    [(100_000, True, (90_000, 5_000, 5_000)), (53_483, True, (49_483, 2_000, 2_000)), (1000, False, (900, 50, 50)),
     (20, False, (18, 1, 1)), (19, False, (19, 19, 19)), (100_000, False, (90_000, 5_000, 5_000))],
)  # fmt: skip
def test_splits(n, published, sizes):
    splits = split_indices(n, published)
    assert (len(splits.train), len(splits.val), len(splits.test)) == sizes
    if n >= 20:
        assert sorted([*splits.train, *splits.val, *splits.test]) == list(range(n))
    if published:
        assert splits.val.start == sizes[0]  # file order: train, val, test
    else:
        assert splits.val.stop == n


@pytest.mark.parametrize("prefetch", [0, 2])
def test_loader_starts_anywhere(prefetch):
    dataset = SpritesDataset(0, 16, count=50)
    with Loader(dataset, 3, 4, prefetch=prefetch) as loader:
        steps = iter(loader)
        first = [next(steps) for _ in range(5)]
    with Loader(dataset, 3, 4, start_step=4, prefetch=prefetch) as loader:
        fourth = next(iter(loader))
    assert [batch.step for batch in first] == [1, 2, 3, 4, 5]
    assert (
        fourth.step == 4 and torch.equal(first[3].images, fourth.images) and torch.equal(first[3].masks, fourth.masks)
    )


def test_loader_draws_from_its_rows_alone():
    images = np.arange(40, dtype=np.uint8)[:, None, None, None].repeat(4, 1).repeat(4, 2).repeat(3, 3)
    with Loader(list(map(torch.from_numpy, images)), 0, 16, indices=range(10, 13), prefetch=0) as loader:
        seen = {int(v) for _ in range(8) for v in next(iter(loader)).images[:, 0, 0, 0]}
    assert seen == {10, 11, 12}


def test_loader_hands_over_errors():
    class Broken(SpritesDataset):
        def batch(self, indices):
            raise OSError("the disk is gone")

    with Loader(Broken(0, 16), 0, 4) as loader:
        with pytest.raises(OSError, match="the disk is gone"):
            next(iter(loader))
        with pytest.raises(RuntimeError, match="this loader is closed"):  # rather than waiting for ever
            next(iter(loader))


@pytest.mark.parametrize("prefetch", [0, 2])
def test_loader_is_over_once_closed(prefetch):
    before = threading.active_count()
    with Loader(SpritesDataset(0, 16), 0, 4, prefetch=prefetch) as loader:
        steps = iter(loader)
        next(steps)
    assert threading.active_count() == before
    with pytest.raises(RuntimeError, match="this loader is closed"):
        next(steps)


def test_images_held_on_a_device_are_those_of_the_data_set(tmp_path):
    from fastslots.cli import main
    from fastslots.data import open_dataset

    assert main(["data", "generate", "sprites", str(tmp_path / "p"), "--count=40", "--size=8"]) == 0
    dataset, cpu = open_dataset(tmp_path / "p"), torch.device("cpu")
    split = as_split(dataset, range(5, 35))
    held = hold_images(split, cpu, limit=30 * 8 * 8 * 3)
    assert np.array_equal(held.numpy(), dataset.batch(np.arange(5, 35))[0])
    assert hold_images(split, cpu, limit=30 * 8 * 8 * 3 - 1) is None
    assert hold_images(as_split(SpritesDataset(0, 8), split.rows), cpu, limit=1e12) is None
    with Loader(dataset, 3, 4, indices=range(5, 35)) as read, Loader(split, 3, 4) as resident:
        resident._held = held
        assert torch.equal(read.read(9).images, resident.read(9).images)


@pytest.mark.gpu
@pytest.mark.parametrize("share", [0.4, 0.0])
def test_batches_for_a_gpu_are_held_there_or_pinned(tmp_path, monkeypatch, share, device):
    from fastslots.cli import main
    from fastslots.data import open_dataset

    assert main(["data", "generate", "sprites", str(tmp_path / "p"), "--count=40", "--size=8"]) == 0
    monkeypatch.setattr("fastslots.data.loader.RESIDENT_SHARE", share)
    dataset = open_dataset(tmp_path / "p")
    with Loader(dataset, 3, 4, device=device) as loader, Loader(dataset, 3, 4) as plain:
        batch = next(iter(loader)).images
        assert device.type == "cpu" or (batch.is_cuda if share else batch.is_pinned())
        assert torch.equal(batch.cpu(), next(iter(plain)).images)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_loader_takes_torch_datasets(dtype):
    pixels = torch.arange(5 * 3 * 8 * 8).remainder(251).view(5, 3, 8, 8)
    pictures = pixels.to(dtype) / (255 if dtype == torch.float32 else 1)
    masks = torch.arange(5)[:, None, None].expand(5, 8, 8)
    dataset = torch.utils.data.TensorDataset(pictures.to(dtype), masks)
    with Loader(dataset, 0, 4) as loader:
        batch = next(iter(loader))
    rows = batch_indices(0, 1, 4, 5)
    assert torch.equal(batch.masks[:, 0, 0], torch.from_numpy(rows))
    assert torch.allclose(to_float(batch.images), pixels[rows].float() / 255)


def test_to_float():
    x = to_float(torch.full((2, 4, 4, 3), 255, dtype=torch.uint8))
    assert x.shape == (2, 3, 4, 4) and x.dtype == torch.float32 and (x == 1).all() and x.is_contiguous()


@pytest.mark.parametrize("size, objects", [(32, (2, 3)), (64, (2, 4))])
def test_sprites_follow_their_recipe(size, objects):
    dataset = SpritesDataset(9, size, objects)
    images, masks, factors = dataset.scenes(np.arange(300))
    present = factors["shape"] > 0
    counts = present.sum(1)
    assert counts.min() == objects[0] and counts.max() == objects[1]
    assert (masks.reshape(300, -1).max(1) == counts).all()
    area = {1: np.pi, 2: 4 * 0.81, 3: 2.0}  # of a circle, square and triangle of radius 1
    for i in range(300):
        for j in range(counts[i]):
            radius = factors["radius"][i, j]
            assert 0.11 <= radius <= 0.19
            visible = (masks[i] == j + 1).mean() / (area[int(factors["shape"][i, j])] * radius**2)
            assert visible > 0.25  # 35 % of its samples; pixels that it shares round either way
    assert not images[masks == 0].max() > 200 or (images[masks == 0].max(-1) > 200).mean() < 0.01
    brightest = images[masks > 0].max(-1)
    assert np.median(brightest) > 140  # value of at least 0.6


def test_sprites_are_frozen():
    """Faster painting must paint the same: runs and scores with the built-in data depend on these bits."""
    images, masks = SpritesDataset(3, 32).batch(np.arange(64))
    assert zlib.crc32(images) == 0x13FA620E and zlib.crc32(masks) == 0xFD02B1F4


def test_sprites_depend_on_seed_and_index_alone():
    a, b = SpritesDataset(1, 32), SpritesDataset(2, 32)
    assert np.array_equal(a.batch(np.array([5, 3]))[0][1], a[3]["image"])
    assert not np.array_equal(a[3]["image"], b[3]["image"])
    with pytest.raises(IndexError):
        SpritesDataset(count=4)[4]
    with pytest.raises(ValueError, match="objects"):
        SpritesDataset(objects=(3, 2))
