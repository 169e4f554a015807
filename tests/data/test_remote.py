"""Packed sets in object storage: the same run, bit for bit, fetched whole, by byte range, or some of each."""

from __future__ import annotations

import json
import os
import pickle
import sys
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.registry import known_implementations
from tiny import MODEL_8, same_weights

from fastslots.cli import main
from fastslots.data import open_dataset
from fastslots.data.builtin.sprites import SpritesDataset
from fastslots.data.check import check
from fastslots.data.open import pack
from fastslots.data.packed.ranges import Range, fetch
from fastslots.errors import UserError
from fastslots.train import TrainConfig, fit

IMAGES, MASKS, FACTORS = SpritesDataset(5, 8, (2, 4), 40).scenes(range(40))
SHARD = 20 * 8 * 8 * 4 + 20  # bytes of the arrays of one of two shards
TINY = dict(
    MODEL_8, batch_size=3, threads=1, warmup=2, optimizer="adam", lr=1e-3,
    eval_every=0, eval_images=2, checkpoint_every=3,
)  # fmt: skip


@pytest.fixture
def local(tmp_path) -> Path:
    """Two packed folders in one."""
    (tmp_path / "npz").mkdir()
    for number in range(2):
        rows = slice(20 * number, 20 * number + 20)
        np.savez(tmp_path / "npz" / f"{number}.npz", IMAGES[rows], FACTORS["x"][rows], MASKS[rows])
    pack(tmp_path / "npz", tmp_path / "packed")
    return tmp_path / "packed"


@pytest.fixture
def far(local, tmp_path, monkeypatch) -> str:
    """The same in a bucket."""
    monkeypatch.setattr("fastslots.data.packed.urls.PROTOCOLS", ("memory",))
    monkeypatch.setenv("FASTSLOTS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("fastslots.data.packed.ranges.WAITS", (0.0,))
    fs, url = fsspec.filesystem("memory"), f"memory://bucket-{tmp_path.name}/packed"
    fs.put(str(local), url, recursive=True)
    return url


@pytest.mark.parametrize("limit, ranged", [("1", 0), (str(1.5 * (SHARD + 1500) / 1e9), 1), ("0", 2)])
def test_same_run_as_from_the_local_folder(local, far, tmp_path, monkeypatch, limit, ranged):
    monkeypatch.setenv("FASTSLOTS_CACHE_GB", limit)
    dataset = open_dataset(far)
    assert sum(bool(part.ranged) for part in dataset._parts) == ranged
    assert dataset.info.digest == open_dataset(local).info.digest
    order = np.array([39, 0, 7, 7, 21])
    images, masks = dataset.batch(order)
    assert np.array_equal(images, IMAGES[order]) and np.array_equal(masks, MASKS[order])
    assert np.array_equal(dataset[-1]["mask"], MASKS[39])
    assert np.array_equal(dataset[3]["factors"]["latents"], FACTORS["x"][3])
    part = dataset._parts[1]
    assert np.array_equal(pickle.loads(pickle.dumps(part))[2]["image"], IMAGES[22])  # workers of a DataLoader
    config = {
        name: TrainConfig.preset("sprites-mini", **TINY, data=where, steps=7)
        for name, where in (("near", str(local)), ("far", far))
    }
    for name in config:
        fit(config[name], out=tmp_path / name)
    assert same_weights(tmp_path / "near", tmp_path / "far")


def test_a_shard_is_fetched_once(far, monkeypatch, capsys):
    monkeypatch.setenv("FASTSLOTS_CACHE_GB", "1")
    open_dataset(far)
    assert capsys.readouterr().err.count("fetching") == 2
    open_dataset(far)
    assert "fetching" not in capsys.readouterr().err


def test_a_lower_limit_shrinks_what_a_set_has(far, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTSLOTS_CACHE_GB", "1")
    open_dataset(far)
    monkeypatch.setenv("FASTSLOTS_CACHE_GB", "0")
    assert np.array_equal(open_dataset(far).batch(np.arange(40))[0], IMAGES)
    assert not list((tmp_path / "cache").rglob("images.u8"))


def test_what_was_used_longest_ago_makes_room(local, far, tmp_path, monkeypatch):
    fs = fsspec.filesystem("memory")
    fs.put(str(local / "shard-00000"), f"{far}-other", recursive=True)
    monkeypatch.setenv("FASTSLOTS_CACHE_GB", "1")
    first = open_dataset(far)
    folders = [part._folder for part in first._parts]
    os.utime(folders[0], (1, 1))
    held = sum(f.stat().st_size for folder in folders for f in folder.iterdir())
    monkeypatch.setenv("FASTSLOTS_CACHE_GB", str((held + 10) / 1e9))
    open_dataset(f"{far}-other")
    assert not folders[0].exists() and folders[1].exists()
    assert np.array_equal(first.batch(np.arange(40))[0], IMAGES)  # a map outlives its file
    total = sum(f.stat().st_size for f in (tmp_path / "cache" / "remote").rglob("*") if f.is_file())
    assert total <= held + 10


def test_a_kill_while_fetching_leaves_nothing_that_is_taken_for_whole(far, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTSLOTS_CACHE_GB", "1")
    with monkeypatch.context() as patch:
        patch.setattr("fastslots.data.packed.remote.os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            open_dataset(far)
    left = [path.name for path in (tmp_path / "cache" / "remote").iterdir() if path.is_dir()]
    assert left and all(name.endswith(".partial") for name in left)
    assert np.array_equal(open_dataset(far).batch(np.arange(40))[0], IMAGES)


def test_a_short_silence_is_outlived(far, monkeypatch):
    monkeypatch.setenv("FASTSLOTS_CACHE_GB", "0")
    dataset = open_dataset(far)
    memory = type(fsspec.filesystem("memory"))
    read, failures = memory.cat_file, iter([True, False, True])
    asked: list[int] = []

    def sometimes(self, path, start=None, end=None, **more):
        asked.append(start)
        if next(failures, False):
            raise TimeoutError("the network is gone")
        return read(self, path, start, end, **more)

    monkeypatch.setattr(memory, "cat_file", sometimes)
    assert np.array_equal(dataset.batch(np.array([4, 5, 5, 6]), masks=False)[0], IMAGES[[4, 5, 5, 6]])
    assert len(asked) == 5  # three images, of which two did not come at first
    monkeypatch.setattr(memory, "cat_file", lambda *_, **__: (_ for _ in ()).throw(TimeoutError("gone for good")))
    with pytest.raises(UserError, match=r"images.u8 at byte \d+ cannot be read \(gone for good\): go on with --resume"):
        dataset.batch(np.array([4]))


def test_objects_that_vanish_while_in_use_end_the_run_with_a_checkpoint(far, tmp_path, monkeypatch):
    from fastslots.runs.folder import RunFolder
    from fastslots.train.checkpoint import latest_checkpoint

    monkeypatch.setenv("FASTSLOTS_CACHE_GB", "0")
    fs, steps = fsspec.filesystem("memory"), iter(range(10**6))
    from fastslots.train.device import steps as device_steps

    def step(*args, **more):
        if next(steps) == 4:
            fs.rm(far, recursive=True)
        return training_step(*args, **more)

    training_step = device_steps.training_step
    monkeypatch.setattr(device_steps, "training_step", step)
    config = TrainConfig.preset("sprites-mini", **{**TINY, "checkpoint_every": 0}, data=far, steps=10**6)
    with pytest.raises(UserError, match=r"images.u8 at byte"):
        fit(config, out=tmp_path / "run")
    assert latest_checkpoint(RunFolder(tmp_path / "run"))[0].step >= 4


@pytest.mark.parametrize("limit", ["0", "1"])
def test_altered_images_are_noticed(far, monkeypatch, limit):
    monkeypatch.setenv("FASTSLOTS_CACHE_GB", limit)
    fs = fsspec.filesystem("memory")
    path = f"{far}/shard-00001/images.u8"
    data = bytearray(fs.cat_file(path))
    data[100] ^= 1
    fs.pipe_file(path, bytes(data))
    with pytest.raises(UserError, match="shard-00001: its images are not those that were packed"):
        check(far)
    if limit == "1":
        assert len(open_dataset(far, on_bad_record="skip")) == 20
    fs.pipe_file(path, bytes(data[:-1]))
    with pytest.raises(UserError, match=r"shard-00001/images.u8 has 3839 bytes, expected 3840: upload"):
        open_dataset(far)


def test_check_tells_of_a_set_far_away(far, local, monkeypatch, capsys):
    monkeypatch.setenv("FASTSLOTS_CACHE_GB", "0")
    assert main(["data", "check", far, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert main(["data", "check", str(local), "--json"]) == 0
    near = json.loads(capsys.readouterr().out)
    assert told["info"].pop("path") == far and near["info"].pop("path") == str(local) and told == near
    assert main(["data", "check", far, "--quick"]) == 0


@pytest.mark.parametrize(
    "argv, words",
    [
        (["data", "check", "memory://no-such-bucket/x"], "memory://no-such-bucket/x is not there, or empty"),
        (["train", "--data", "memory://no-such-bucket/x"], "memory://no-such-bucket/x is not there, or empty"),
        (
            ["data", "check", "nonsense://x"],
            "nonsense://x: data are not read through 'nonsense': download them, or name",
        ),
        (["data", "check", "needs://x"], "needs://x needs a package that is not there (Install somefs"),
        (["data", "pack", "memory://x", "out"], "memory://x: packing reads and writes local folders"),
        (["data", "pack", "x.npz", "s3://bucket/out"], "s3://bucket/out is a URL"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, argv, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTSLOTS_CACHE", str(tmp_path / "cache"))
    known = {"class": "no_such_package.Fs", "err": "Install somefs to read needs://"}
    monkeypatch.setitem(known_implementations, "needs", known)
    monkeypatch.setattr("fastslots.data.packed.urls.PROTOCOLS", ("memory", "needs"))
    assert main(argv) == 2
    error = capsys.readouterr().err.splitlines()
    assert error[-1].startswith("fastslots") and words in error[-1] and "Traceback" not in "".join(error)
    assert not [path.name for path in tmp_path.iterdir() if path.name != "cache"]


def test_a_package_that_reads_a_protocol_is_named_with_its_mend(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    assert main(["data", "check", "http://localhost:1/x"]) == 2
    assert "aiohttp" in (said := capsys.readouterr().err) and said.rstrip().endswith("pip install 'fsspec[http]'")


def test_a_limit_that_is_no_number(far, monkeypatch):
    monkeypatch.setenv("FASTSLOTS_CACHE_GB", "much")
    with pytest.raises(UserError, match="FASTSLOTS_CACHE_GB must be a number of gigabytes from 0 on, got 'much'"):
        open_dataset(far)


def test_a_set_of_another_size_is_refused(far):
    """Nor is a flag named that ``eval`` does not have."""
    with pytest.raises(
        UserError, match=r"was packed at \d+ x \d+, not 6, .* not resized: run `fastslots data pack IN OUT"
    ):
        open_dataset(far, size=6)


def test_an_image_drawn_twice_is_fetched_once(far):
    fs = fsspec.filesystem("memory")
    path = fs.find(far)[0]
    asked = Range(path, 0, 4)
    assert list(fetch(far, [asked, asked])) == [asked]
