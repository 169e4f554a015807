"""Packed sets: bits as in their source, resized and filtered, continued after a stop; shards; damaged records."""

from __future__ import annotations

import json

import h5py
import numpy as np
import pytest
from PIL import Image
from scenes import (
    FACTORS,
    IMAGES,
    MASKS,
    example,
    frame,
    same_scenes,
    shards_of,
    write_tfrecord,
)

from fastslots.cli import main
from fastslots.data import open_dataset
from fastslots.data.check import check
from fastslots.data.open import pack, recognise
from fastslots.data.packed.dataset import PackedDataset
from fastslots.data.readers.scene import Scene, preprocess
from fastslots.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTSLOTS_CACHE", str(tmp_path / "cache"))


def test_packed_and_source_give_the_same_bits_in_the_same_order(tmp_path):
    source = write_tfrecord(tmp_path / "x")
    pack(source, tmp_path / "packed", max_objects=3)
    packed, direct = PackedDataset(tmp_path / "packed"), open_dataset(source, max_objects=3)
    assert len(packed) == len(direct) < 8
    for a, b in zip(packed.batch(np.arange(len(packed))), direct.batch(np.arange(len(packed))), strict=True):
        assert np.array_equal(a, b)
    assert packed[0]["factors"].keys() == direct[0]["factors"].keys()
    same = open_dataset(tmp_path / "packed")
    assert same.info.digest == packed.info.digest


def small(images: np.ndarray, masks: np.ndarray, size: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """As every reader's scenes are resized: images bilinearly, masks by nearest neighbour."""
    scenes = [preprocess(Scene(i, m, None), False, size) for i, m in zip(images, masks, strict=True)]
    return np.stack([s.image for s in scenes]), np.stack([s.mask for s in scenes if s.mask is not None])


def test_packed_sets_are_resized(tmp_path):
    source = write_tfrecord(tmp_path / "x")
    pack(source, tmp_path / "packed", max_objects=3)
    packed = PackedDataset(tmp_path / "packed")
    dataset = open_dataset(tmp_path / "packed", size=32)
    images, masks = dataset.batch(np.arange(len(dataset)))
    for found, expected in zip((images, masks), small(*packed.batch(np.arange(len(packed)))), strict=True):
        assert np.array_equal(found, expected)
    assert dataset.objects.tolist() == packed.objects.tolist() and dataset.info.path == packed.info.path
    assert dataset[1]["factors"]["color"].tolist() == packed[1]["factors"]["color"].tolist()
    assert len(open_dataset(tmp_path / "packed", 2, 32)) == (packed.objects <= 2).sum()
    with pytest.raises(UserError, match="was packed with at most 3 objects, not 4"):
        open_dataset(tmp_path / "packed", 4, 32)
    report = check(tmp_path / "packed", size=32)
    assert (report.info.size, report.info.digest) == (32, dataset.info.digest)
    assert check(tmp_path / "packed", size=16, quick=True).info.size == 16
    assert len(list((tmp_path / "cache").iterdir())) == 1  # what --quick reads is not kept
    with open(tmp_path / "packed" / "images.u8", "r+b") as file:
        file.write(b"damaged")
    with pytest.raises(UserError, match="not those that were packed"):
        open_dataset(tmp_path / "packed", size=48)


def test_packed_shards_are_resized(tmp_path):
    pack(shards_of(tmp_path / "shards"), tmp_path / "packed")
    images, masks = open_dataset(tmp_path / "packed", size=32).batch(np.arange(8))
    for found, expected in zip((images, masks), small(IMAGES, MASKS), strict=True):
        assert np.array_equal(found, expected)


def test_packed_sets_can_be_packed_again(tmp_path):
    pack(write_tfrecord(tmp_path / "x"), tmp_path / "packed")
    pack(tmp_path / "packed", tmp_path / "again", size=32, max_objects=3)
    again, direct = open_dataset(tmp_path / "again"), open_dataset(tmp_path / "packed", 3, 32)
    assert (again.info.kind, again.info.max_objects, len(again)) == (direct.info.kind, 3, len(direct))
    assert np.array_equal(again.batch(np.arange(len(again)))[0], direct.batch(np.arange(len(again)))[0])
    pack(tmp_path / "again", tmp_path / "third", size=16)
    with pytest.raises(UserError, match="was packed with at most 3 objects, not 4"):
        open_dataset(tmp_path / "third", 4)
    with pytest.raises(UserError, match="was packed with at most 3 objects, not 4"):
        pack(tmp_path / "again", tmp_path / "fourth", max_objects=4)


def test_check_answers_for_a_preset(tmp_path, capsys):
    """It refuses what that preset's training would: pictures do not tell how many objects they show."""
    (tmp_path / "pictures").mkdir()
    for i in range(3):
        Image.fromarray(IMAGES[i]).save(tmp_path / "pictures" / f"{i}.png")
    check_command = ["data", "check", str(tmp_path / "pictures")]
    assert main(check_command) == 0 and main([*check_command, "--preset", "sprites-mini"]) == 0
    assert "32 x 32" in capsys.readouterr().out
    assert main([*check_command, "--preset", "clevr6-mini"]) == 2
    assert "nothing tells how many objects" in capsys.readouterr().err.splitlines()[-1]
    assert main([*check_command, "--preset", "clevr6-mini", "--max-objects", "0"]) == 0
    assert main([*check_command, "--preset", "clevrtex"]) == 2
    assert "this model reads features" in capsys.readouterr().err.splitlines()[-1]


def test_what_is_generated_trains(tmp_path, capsys):
    """At the size that ``data generate`` makes, by the preset that ``train`` takes."""
    folder = str(tmp_path / "d")
    assert main(["data", "generate", "sprites", folder, "--count", "30"]) == 0
    assert main(["data", "check", folder]) == 0
    flags = ["--steps", "1", "--batch_size", "2", "--eval_images", "2", "--device", "cpu", "--threads", "1"]
    assert main(["train", "--data", folder, "--out", str(tmp_path / "run"), *flags]) == 0
    assert "32 x 32, with masks" in capsys.readouterr().err


def test_pack_continues_after_a_kill(tmp_path, monkeypatch):
    monkeypatch.setattr("fastslots.data.packed.writer.FLUSH_EVERY", 2)
    source = write_tfrecord(tmp_path / "x")
    pack(source, tmp_path / "whole")

    class Killed(BaseException):
        pass

    def kill(self, done):
        if done == 5:
            raise Killed

    monkeypatch.setattr("fastslots.data.open.Progress.__call__", kill)
    with pytest.raises(Killed):
        pack(source, tmp_path / "part")
    assert not (tmp_path / "part").exists()
    assert json.loads((tmp_path / "part.partial" / "progress.json").read_text())["done"] == 4
    parsed = []
    monkeypatch.setattr("fastslots.data.open.Progress.__call__", lambda self, done: parsed.append(done))
    pack(source, tmp_path / "part")
    assert parsed == [5, 6, 7, 8]  # goes on where it was, and does not begin again
    assert sorted(p.name for p in (tmp_path / "part").iterdir()) == sorted(
        p.name for p in (tmp_path / "whole").iterdir()
    )
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "part" / path.name).read_bytes() == path.read_bytes()
    assert not (tmp_path / "part.partial").exists()


def test_pack_does_not_continue_what_was_packed_otherwise(tmp_path, monkeypatch):
    source = write_tfrecord(tmp_path / "x")
    monkeypatch.setattr("fastslots.data.packed.writer.FLUSH_EVERY", 2)
    with monkeypatch.context() as patch:
        patch.setattr("fastslots.data.packed.writer._Appender.finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pack(source, tmp_path / "packed", max_objects=3)
    pack(source, tmp_path / "packed")
    assert len(open_dataset(tmp_path / "packed")) == 8


def test_damaged_factors_and_counts_are_named(tmp_path):
    pack(write_tfrecord(tmp_path / "x"), tmp_path / "packed")
    factors = tmp_path / "packed" / "factors.npz"
    whole = factors.read_bytes()
    factors.write_bytes(whole[:100])
    with pytest.raises(UserError, match=r"factors.npz is damaged .*remove that folder"):
        check(tmp_path / "packed")
    np.savez(factors, x=np.zeros(2))
    with pytest.raises(UserError, match=r"x has shape \[2\] for 8 scenes"):
        open_dataset(tmp_path / "packed")[5]
    factors.write_bytes(whole)
    meta = tmp_path / "packed" / "meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"count": 1 << 62}))
    with pytest.raises(UserError, match="98304 bytes, expected 56"):
        open_dataset(tmp_path / "packed")


def test_any_name_of_a_factor_can_be_packed(tmp_path):
    features = {"image": IMAGES[0].tobytes(), "mask": bytes(64 * 64 * 5), "visibility": np.ones(5)}
    record = example(features | {"file": np.arange(5.0), "allow_pickle": np.arange(5.0)})
    (tmp_path / "x").write_bytes(frame(record))
    assert open_dataset(tmp_path / "x")[0]["factors"]["file"].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("where", ["file/below", "/proc/nowhere"])
def test_places_that_cannot_be_written_are_named(tmp_path, monkeypatch, where):
    source = write_tfrecord(tmp_path / "file")
    with pytest.raises(UserError, match="cannot be written"):
        pack(source, tmp_path / where)
    monkeypatch.setenv("FASTSLOTS_CACHE", str(tmp_path / where))
    with pytest.raises(UserError, match=r"cannot be written .*FASTSLOTS_CACHE"):
        open_dataset(source)


def test_check_tells_what_looks_wrong(tmp_path):
    report = check(write_tfrecord(tmp_path / "x"))
    assert sum(report.objects.values()) == 8 and report.info.has_masks
    assert any("under 20 images" in warning for warning in report.warnings)
    np.savez(tmp_path / "flat.npz", np.full((30, 8, 8, 3), 9, np.uint8), np.zeros(30), np.zeros((30, 8, 8), np.uint8))
    warnings = " ".join(check(tmp_path / "flat.npz").warnings)
    assert "all equal" in warnings and "every mask is background" in warnings
    pack(tmp_path / "x", tmp_path / "packed")
    images = tmp_path / "packed" / "images.u8"
    images.write_bytes(b"\x01" + images.read_bytes()[1:])
    with pytest.raises(UserError, match="not those that were packed"):
        check(tmp_path / "packed")


def test_check_tells_of_labels_that_are_no_entry_numbers(tmp_path):
    gap = np.where(MASKS == 1, 0, MASKS)  # an object that a crop hid
    np.savez(tmp_path / "gap.npz", IMAGES, FACTORS["x"], np.concatenate([MASKS[:4], gap[4:]]))
    assert not any("labels" in warning for warning in check(tmp_path / "gap.npz").warnings)
    np.savez(tmp_path / "white.npz", IMAGES, FACTORS["x"], (MASKS > 0) * np.uint8(255))
    assert any("8 of 8 masks have labels up to 255" in warning for warning in check(tmp_path / "white.npz").warnings)


# ---- many shards, damaged records ------------------------------------------------------------------------------------


def test_shards_open_as_one_set(tmp_path):
    folder = shards_of(tmp_path / "shards")
    for path in (folder, tmp_path / "shards" / "*.tfrecord", str(folder / "clips-?-of-3.tfrecord")):
        dataset = open_dataset(path)
        same_scenes(dataset, "Multi-dSprites, coloured on coloured")
    order = np.array([7, 0, 3, 3, 5])
    assert np.array_equal(dataset.batch(order)[0], IMAGES[order])
    assert np.array_equal(dataset[-1]["mask"], MASKS[7]) and len(open_dataset(folder, max_objects=2)) < 8
    assert check(folder).objects == check(write_tfrecord(tmp_path / "x")).objects
    assert "8 images" in str(check(folder, quick=True).info) or check(folder, quick=True).info.total == 2


def test_shards_pack_to_shards_and_go_on_after_a_stop(tmp_path, monkeypatch):
    folder = shards_of(tmp_path / "shards")
    whole = (folder / "clips-1-of-3.tfrecord").read_bytes()
    (folder / "clips-1-of-3.tfrecord").write_bytes(whole[:-5])
    with pytest.raises(UserError, match=r"clips-1-of-3.tfrecord: record 2 at byte \d+ is damaged"):
        pack(folder, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()
    (folder / "clips-1-of-3.tfrecord").write_bytes(whole)
    decoded_now: list[str] = []
    monkeypatch.setattr("fastslots.data.open.recognise", lambda path: decoded_now.append(path.name) or recognise(path))
    pack(folder, tmp_path / "packed")
    assert decoded_now == ["clips-1-of-3.tfrecord", "clips-2-of-3.tfrecord"]
    same_scenes(open_dataset(tmp_path / "packed"), "Multi-dSprites")
    assert check(tmp_path / "packed").info.digest == check(folder).info.digest


def test_shards_that_do_not_fit_together_are_named(tmp_path):
    folder = shards_of(tmp_path / "shards")
    np.savez(folder / "z.npz", IMAGES)
    with pytest.raises(UserError, match=r"z.npz holds npz .* without masks, but .*clips-0-of-3"):
        open_dataset(folder)
    with pytest.raises(UserError, match=r"nothing-\*: no such file"):
        open_dataset(tmp_path / "nothing-*")


def test_damaged_records_can_be_skipped_and_are_counted(tmp_path, capsys):
    folder = shards_of(tmp_path / "shards")
    second = folder / "clips-1-of-3.tfrecord"
    data = bytearray(second.read_bytes())
    length = len(data) // 3
    data[length + 100] ^= 1  # scene 3 of the set, record 1 of its file: a payload, after which the next is found
    second.write_bytes(data)
    last = folder / "clips-2-of-3.tfrecord"
    last.write_bytes(last.read_bytes()[: length + 50])  # scene 6: nothing after this place can be found
    with pytest.raises(UserError, match=f"clips-1-of-3.tfrecord: record 1 at byte {length} is damaged"):
        open_dataset(folder)
    dataset = open_dataset(folder, on_bad_record="skip")
    said = capsys.readouterr().err
    assert f"left out: {second}: record 1 at byte {length}" in said and f"left out: {last}: record 1" in said
    assert dataset.info.skipped == 2 and np.array_equal(dataset.batch(np.arange(5))[0], IMAGES[[0, 1, 2, 4, 5]])
    report = check(folder, on_bad_record="skip")
    assert "2 damaged records left out" in str(report.info) and "2 damaged records" in report.warnings[0]
    with pytest.raises(UserError, match="is damaged"):  # what was decoded while skipping does not serve without
        open_dataset(folder)


@pytest.mark.parametrize("kind", ["npz", "hdf5", "pictures"])
def test_every_reader_skips(tmp_path, kind):
    images = IMAGES / np.float32(255)
    images[2, 0, 0, 0] = np.nan
    path = tmp_path / "x.npz"
    if kind == "npz":
        np.savez(path, images)
    elif kind == "hdf5":
        with h5py.File(path, "w") as file:
            file["image"] = images
    else:
        path = tmp_path / "pictures"
        path.mkdir()
        for i in range(8):
            Image.fromarray(IMAGES[i]).save(path / f"{i}.png")
        (path / "2.png").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"\[2\] has NaN|2.png cannot be read"):
        open_dataset(path)
    dataset = open_dataset(path, on_bad_record="skip")
    assert dataset.info.skipped == 1 and np.array_equal(dataset.batch(np.arange(7))[0], np.delete(IMAGES, 2, 0))
