"""Every format on small files made here, and on real CLEVR where FASTSLOTS_CLEVR names its folder."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import struct
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from wire import message

from fastslots.cli import main
from fastslots.data import SpritesDataset, open_dataset
from fastslots.data.check import check
from fastslots.data.npz import Member
from fastslots.data.open import pack, recognise
from fastslots.data.packed import PackedDataset
from fastslots.data.scene import Scene, preprocess
from fastslots.data.tfrecord import Records, masked_crc, parse_example
from fastslots.errors import UserError
from fastslots.train import TrainConfig
from fastslots.train.sources import open_source

CLEVR = os.environ.get("FASTSLOTS_CLEVR")
real = pytest.mark.skipif(not CLEVR, reason="set FASTSLOTS_CLEVR to a folder with CLEVR data")
SPRITES = SpritesDataset(5, 64, (2, 4), 8)
IMAGES, MASKS, FACTORS = SPRITES.scenes(range(8))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTSLOTS_CACHE", str(tmp_path / "cache"))


# ---- writers of what users hold --------------------------------------------------------------------------------------


def example(features: dict[str, object], one_value: bool = False) -> bytes:
    entries = b""
    for name, value in features.items():
        if isinstance(value, bytes):
            values = [value] if one_value else [bytes([b]) for b in value]
            feature = message(1, b"".join(message(1, v) for v in values))
        else:
            feature = message(2, message(1, np.asarray(value, "<f4").tobytes()))
        entries += message(1, message(1, name.encode()) + message(2, feature))
    return message(1, entries)


def frame(payload: bytes) -> bytes:
    length = struct.pack("<Q", len(payload))
    return length + struct.pack("<I", masked_crc(length)) + payload + struct.pack("<I", masked_crc(payload))


def multi_dsprites(one_value: bool = False) -> list[bytes]:
    """Eight scenes in the layout of coloured on coloured: entities on the third axis."""
    records = []
    for i in range(8):
        entries = (MASKS[i][..., None] == np.arange(5)).astype(np.uint8) * 255
        visibility = (np.arange(5) <= MASKS[i].max()).astype(np.float32)
        factors = {"visibility": visibility, "x": np.arange(5.0), "color": np.arange(15.0)}
        records.append(example({"image": IMAGES[i].tobytes(), "mask": entries.tobytes(), **factors}, one_value))
    return records


def write_tfrecord(path: Path, zipped: bool = True, **options) -> Path:
    data = b"".join(frame(record) for record in multi_dsprites(**options))
    path.write_bytes(gzip.compress(data, 1) if zipped else data)
    return path


# ---- formats ---------------------------------------------------------------------------------------------------------


def same_scenes(dataset, kind: str, masks: bool = True):
    assert dataset.info.kind.startswith(kind)
    assert len(dataset) == 8 and dataset.info.size == 64
    images, found = dataset.batch(np.arange(8))
    assert np.array_equal(images, IMAGES)
    assert np.array_equal(found, MASKS) if masks else found is None
    assert np.array_equal(dataset[3]["image"], IMAGES[3]) and ("mask" in dataset[3]) == masks


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("one_value", [True, False])
def test_tfrecord(tmp_path, zipped, one_value):
    dataset = open_dataset(write_tfrecord(tmp_path / "x", zipped, one_value=one_value))
    same_scenes(dataset, "Multi-dSprites, coloured on coloured")
    assert dataset.objects.tolist() == MASKS.reshape(8, -1).max(1).tolist()
    assert dataset[2]["factors"]["color"].shape == (5, 3) and dataset[2]["factors"]["x"][3] == 3


@pytest.mark.parametrize("trailing", [True, False])
def test_npz(tmp_path, trailing):
    np.savez(tmp_path / "x.bin", IMAGES, FACTORS["x"], MASKS[..., None] if trailing else MASKS)
    dataset = open_dataset(tmp_path / "x.bin.npz")
    same_scenes(dataset, "npz")
    assert dataset.info.published_split and dataset[1]["factors"]["latents"].shape == (4,)
    np.savez(tmp_path / "floats.npz", IMAGES / np.float32(255), FACTORS["x"], MASKS)
    same_scenes(open_dataset(tmp_path / "floats.npz"), "npz")


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_npz_in_fortran_order(tmp_path, write):
    """What numpy.savez makes of arrays whose first axis varies fastest, such as transposed ones."""
    write(tmp_path / "x.npz", *(np.asfortranarray(array) for array in (IMAGES, FACTORS["x"], MASKS)))
    dataset = open_dataset(tmp_path / "x.npz")
    same_scenes(dataset, "npz")
    assert np.array_equal(dataset[3]["factors"]["latents"], FACTORS["x"][3])
    rows = Member(tmp_path / "x.npz", "arr_0").rows(5)
    assert all(np.array_equal(row, image) for row, image in zip(rows, IMAGES[5:], strict=True))


IMAGENET = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def clevrtex_arrays(folder: Path, dtype: type = np.float32) -> Path:
    """The authors' files of ClevrTex: channels first, scaled as DINO takes them; no masks of the training images."""
    folder.mkdir()
    mean, std = IMAGENET
    for name, rows in (("train", slice(0, 3)), ("val", slice(3, 5)), ("test", slice(5, 8))):
        scaled = ((IMAGES[rows] / 255 - mean) / std).transpose(0, 3, 1, 2)
        np.savez(folder / f"clevrtex_{name}.npz", scaled.astype(dtype))
        if name != "train":
            np.savez(folder / f"clevrtex_{name}_mask.npz", MASKS[rows, None].astype(np.float32))
    return folder


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_arrays_of_clevrtex(tmp_path, dtype):
    folder = clevrtex_arrays(tmp_path / "arrays", dtype)
    one = open_dataset(folder / "clevrtex_val.npz")
    assert one.info.kind == "npz in the authors' layout, scaled by ImageNet's mean and deviation"
    assert np.array_equal(one.batch(range(2))[0], IMAGES[3:5]) and np.array_equal(one.batch(range(2))[1], MASKS[3:5])
    assert one.objects.tolist() == MASKS[3:5].reshape(2, -1).max(1).tolist()
    with pytest.raises(UserError, match=r"val_mask.npz holds the masks of clevrtex_val.npz: name that file"):
        open_dataset(folder / "clevrtex_val_mask.npz")


def test_a_folder_of_train_val_and_test_is_split_so(tmp_path):
    folder = clevrtex_arrays(tmp_path / "arrays")
    pack(folder, tmp_path / "packed")
    for path in (folder, str(folder / "*.npz"), tmp_path / "packed"):
        dataset = open_dataset(path)
        images, masks = dataset.batch(np.arange(8))
        assert np.array_equal(images, IMAGES) and np.array_equal(masks[3:], MASKS[3:]) and not masks[:3].any()
        assert "mask" not in dataset[0] and np.array_equal(dataset[4]["mask"], MASKS[4])
        report = check(path)
        assert report.splits == "train 3, val 2, test 3 (as the files are named)" and report.unmasked == 3
        assert "; 3 images have none" in str(report) and not report.warnings
        splits = open_source(TrainConfig.preset("sprites-mini", data=str(path))).splits
        assert {name: list(rows) for name, (_, rows) in splits.items()} == {
            "train": [0, 1, 2], "val": [3, 4], "test": [5, 6, 7],
        }  # fmt: skip
    with pytest.raises(UserError, match="nothing tells how many objects"):
        open_dataset(folder, max_objects=3)
    (folder / "clevrtex_test.npz").unlink()
    with pytest.raises(UserError, match=r"test_mask.npz: arr_0 has shape .*: the images of these masks must lie"):
        open_dataset(folder)
    (folder / "clevrtex_test_mask.npz").unlink()
    with pytest.raises(UserError, match=r"val.npz holds npz .* with masks, but .*train.npz holds npz .* without masks"):
        open_dataset(folder)


def test_other_scales_are_told_what_to_do(tmp_path):
    """[-1, 1], and ImageNet's statistics on pixels that are no 8-bit ones: neither can be known from the values."""
    mean, std = IMAGENET
    smooth = np.random.default_rng(0).random((4, 16, 16, 3))
    for i, images in enumerate((IMAGES / 127.5 - 1, (smooth - mean) / std)):
        np.savez(tmp_path / f"{i}.npz", images.astype(np.float32))
        with pytest.raises(UserError, match=r"arr_0\[0\] has values from .*: undo their scaling \(x \* std \+ mean\)"):
            open_dataset(tmp_path / f"{i}.npz")


def test_masks_beside_an_npz_must_fit(tmp_path):
    np.savez(tmp_path / "x.npz", IMAGES)
    assert open_dataset(tmp_path / "x.npz").batch(range(8))[1] is None
    np.savez(tmp_path / "x_mask.npz", MASKS)  # seen, though the images have not changed
    assert np.array_equal(open_dataset(tmp_path / "x.npz").batch(range(8))[1], MASKS)
    np.savez(tmp_path / "x_mask.npz", MASKS + 0.5)
    with pytest.raises(UserError, match=r"x_mask.npz: arr_0\[0\] holds float64: expected integer labels"):
        open_dataset(tmp_path / "x.npz")
    np.savez(tmp_path / "x_mask.npz", MASKS[:, ::2])
    with pytest.raises(UserError, match=r"x_mask.npz: arr_0 has shape \[8, 32, 64\], the images \[8, 64, 64, 3\]"):
        open_dataset(tmp_path / "x.npz")


def test_hdf5(tmp_path):
    with h5py.File(tmp_path / "anything", "w") as file:
        file["image"], file["mask"], file["x"] = IMAGES, MASKS[..., None], FACTORS["x"]
        file["num_actual_objects"] = (FACTORS["shape"] > 0).sum(1, keepdims=True)
    dataset = open_dataset(tmp_path / "anything")
    same_scenes(dataset, "multi-object set (object-centric-library HDF5)")
    assert len(open_dataset(tmp_path / "anything", max_objects=2)) == (dataset.objects <= 2).sum()


def test_folder_of_images(tmp_path):
    for i in range(8):
        Image.fromarray(IMAGES[i]).save(tmp_path / f"{i}.png")
    same_scenes(open_dataset(tmp_path), "folder of images", masks=False)
    with pytest.raises(UserError, match="nothing tells how many objects"):
        open_dataset(tmp_path, max_objects=2)


def clevr_folder(path: Path, name: str = "CLEVR_train_000000.png") -> Path:
    (path / "images" / "train").mkdir(parents=True)
    (path / "scenes").mkdir()
    pixels = np.zeros((320, 480, 4), np.uint8)
    pixels[..., 0], pixels[..., 3] = np.arange(480) // 2, 255
    Image.fromarray(pixels).save(path / "images" / "train" / "CLEVR_train_000000.png")
    scenes = [{"split": "train", "image_filename": name, "objects": [{"rotation": 1.0, "3d_coords": [1, 2, 3]}] * 3}]
    (path / "scenes" / "CLEVR_train_scenes.json").write_text(json.dumps({"scenes": scenes}))
    return path


def test_clevr_v1(tmp_path):
    dataset = open_dataset(clevr_folder(tmp_path))
    assert dataset.info.kind == "CLEVR v1.0" and dataset.info.size == 128 and dataset.objects.tolist() == [3]
    red = dataset[0]["image"][0, :, 0].astype(float)  # columns 112..368 of 480, halved by the ramp: 56..184
    assert abs(red[0] - 56) <= 1 and abs(red[-1] - 183.5) <= 1
    factors = dataset[0]["factors"]
    assert factors["3d_coords"].tolist() == [[0, 0, 0], *[[1, 2, 3]] * 3] and factors["rotation"].shape == (4,)
    for i, name in enumerate(["../../../etc/passwd", "/etc/passwd", "..", "a\\b", ""]):
        with pytest.raises(UserError, match="lies outside the data folder"):
            open_dataset(clevr_folder(tmp_path / f"{i}", name))


@pytest.mark.parametrize("file", ["CLEVR_train_scenes.json", "CLEVR_half_scenes.json"])
def test_clevr_v1_without_a_split_in_its_scenes(tmp_path, file):
    """The split is then that of the file's name, or of the picture's where pictures of that one are not there."""
    folder = clevr_folder(tmp_path)
    path = folder / "scenes" / "CLEVR_train_scenes.json"
    scene = {"image_filename": "CLEVR_train_000000.png", "objects": [{}]}
    path.write_text(json.dumps({"scenes": [scene]}))
    path.rename(path.with_name(file))
    assert open_dataset(folder).objects.tolist() == [1]


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
    monkeypatch.setattr("fastslots.data.packing.FLUSH_EVERY", 2)
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
    monkeypatch.setattr("fastslots.data.packing.FLUSH_EVERY", 2)
    with monkeypatch.context() as patch:
        patch.setattr("fastslots.data.packing._Appender.finish", lambda *_: 1 / 0)
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


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_known_checksums():
    assert masked_crc(b"123456789") == (((0xE3069283 >> 15) | (0xE3069283 << 17)) + 0xA282EAD8) & 0xFFFFFFFF
    assert masked_crc(b"") == 0xA282EAD8


@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_tfrecord_names_the_record(tmp_path, zipped):
    data = write_tfrecord(tmp_path / "x", zipped).read_bytes()
    for cut in (len(data) - 1, len(data) - 9, len(data) // 2 + 5):
        (tmp_path / "y").write_bytes(data[:cut])
        with pytest.raises(UserError, match=r"y: record \d+ at byte \d+ is damaged"):
            open_dataset(tmp_path / "y")
    assert not list((tmp_path / "cache").glob("*[!l]"))  # nothing but partial folders


TWO_RECORDS = b"".join(frame(record) for record in multi_dsprites()[:2])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_every_flipped_bit_is_noticed(tmp_path_factory, place, bit):
    data = bytearray(TWO_RECORDS)
    data[int(place * len(data))] ^= 1 << bit
    path = tmp_path_factory.mktemp("flip") / "x.tfrecord"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"record \d+ "):
        for payload in Records(path):
            parse_example(payload)


@pytest.mark.parametrize("byte, what", [(3, "length"), (9, "length"), (40, "payload"), (-2, "payload")])
def test_damage_is_said_where_it_is(tmp_path, byte, what):
    data = bytearray(TWO_RECORDS)
    second = len(data) // 2
    data[second + byte if byte > 0 else byte] ^= 4
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(UserError, match=f"record 1 at byte {second} is damaged .checksum of its {what} differs"):
        list(Records(tmp_path / "x"))


@given(st.lists(st.binary(max_size=3) | st.binary(min_size=1, max_size=1), max_size=60))
def test_lists_of_any_values_are_joined(values):
    """The short cut for values of one byte takes no other list for one of those."""
    joins(values)
    joins([b"abcd"] * 4)  # 24 bytes, a multiple of 3 as the short cut wants


def joins(values: list[bytes]):
    entry = message(1, b"v") + message(2, message(1, b"".join(message(1, value) for value in values)))
    assert parse_example(message(1, message(1, entry)))["v"].tobytes() == b"".join(values)


def test_a_length_beyond_the_file_allocates_nothing(tmp_path):
    head = struct.pack("<Q", (1 << 28) - 1)
    frames = head + struct.pack("<I", masked_crc(head)) + b"x" * 1000
    (tmp_path / "x").write_bytes(frames)
    with pytest.raises(UserError, match="more than there are"):
        open_dataset(tmp_path / "x")


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_are_no_example_or_parse(data):
    try:
        parse_example(data)
    except (ValueError, KeyError):
        pass


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("bomb-went-off",)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda p: np.savez(p, arr_0=np.array([Bomb()], object)), "holds pickled objects, which are never loaded"),
        (lambda p: np.savez(p, IMAGES[..., 0]), r"arr_0 has shape \[8, 64, 64\], expected images \[N, R, R, 3\]"),
        (lambda p: np.savez(p, IMAGES, np.zeros(8), MASKS[:7]), "arr_2 has shape"),
        (lambda p: np.savez(p, pictures=IMAGES), "no member arr_0 .it has pictures"),
        (lambda p: np.savez(p, np.full((2, 8, 8, 3), np.nan)), r"arr_0\[0\] has NaN or infinite pixels"),
        (lambda p: np.savez(p, np.full((2, 8, 8, 3), 7.0)), r"arr_0\[0\] has values from 7 to 7"),
        (lambda p: p.write_bytes(b"PK\x03\x04 nonsense"), "cannot be read"),
        (lambda p: p.write_bytes(b"\x89HDF\r\n\x1a\n nonsense"), "cannot be read as HDF5"),
        (lambda p: p.write_bytes(pickle.dumps([1])), "looks like a pickle .* never loaded"),
        (lambda p: p.write_bytes(b"nonsense"), "not recognised; known are"),
        (lambda p: p.write_bytes(b""), "not recognised"),
        (lambda p: p.write_bytes(frame(example({"image": b"abc"}))), "image and mask of 3 and 0 values are none of"),
        (lambda p: None, "no such file"),
    ],
)
def test_bad_files_are_named(tmp_path, monkeypatch, make, words):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.npz"
    make(path)
    with pytest.raises(UserError, match=words) as error:
        open_dataset(path)
    assert str(path) in str(error.value)
    assert not (tmp_path / "bomb-went-off").exists()


def test_lmdb_is_refused(tmp_path):
    (tmp_path / "data.mdb").write_bytes(b"x")
    with pytest.raises(UserError, match="LMDB of pickles"):
        open_dataset(tmp_path)


def test_pictures_and_scenes_that_would_be_read_wrongly_are_named(tmp_path):
    folder = clevr_folder(tmp_path / "deep")
    (folder / "scenes" / "CLEVR_train_scenes.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="is no CLEVR scenes file"):
        open_dataset(folder)
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a.png has more than 8 bits a channel"):
        open_dataset(tmp_path)


def test_unreadable_picture_is_named(tmp_path):
    Image.fromarray(IMAGES[0]).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:99])
    with pytest.raises(UserError, match=r"b.png cannot be read as a picture"):
        open_dataset(tmp_path)


@real
def test_real_clevr_v1():
    dataset = open_dataset(Path(CLEVR or "") / "CLEVR_v1.0-mini", max_objects=6)
    assert (dataset.info.kind, len(dataset), dataset.info.total) == ("CLEVR v1.0", 20, 40)


@real
def test_real_clevr_with_masks():
    """Counts as its README states them; bits, so that a faster decoder stays the same decoder."""
    path = Path(CLEVR or "") / "clevr_with_masks_train.tfrecords"
    dataset = open_dataset(path)
    report = check(path, max_objects=6)
    assert np.bincount(dataset.objects)[3:].tolist() == [127, 134, 116, 144, 113, 104, 131, 131]
    assert (report.info.count, report.objects) == (521, {3: 127, 4: 134, 5: 116, 6: 144})
    assert report.info.digest == "cbaa352ec426535af683e01c6fccb26f" and not report.warnings
    masks, colours = dataset[0]["mask"], dataset[0]["factors"]["color"]
    assert set(np.unique(masks)) <= set(range(9)) and colours.shape == (11,) and not colours[9:].any()


# ---- many shards, damaged records ------------------------------------------------------------------------------------


def shards_of(folder: Path, count: int = 3) -> Path:
    """The eight scenes over ``count`` TFRecords, uneven."""
    folder.mkdir()
    records = [frame(record) for record in multi_dsprites()]
    for number in range(count):
        part = records[8 * number // count : 8 * (number + 1) // count]
        (folder / f"clips-{number}-of-{count}.tfrecord").write_bytes(b"".join(part))
    return folder


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
