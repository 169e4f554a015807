"""Every format on small files made here, and on real CLEVR where FASTSLOTS_CLEVR names its folder."""

from __future__ import annotations

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
from scenes import (
    FACTORS,
    IMAGES,
    MASKS,
    example,
    frame,
    multi_dsprites,
    same_scenes,
    write_tfrecord,
)
from wire import message

from fastslots.data import open_dataset
from fastslots.data.check import check
from fastslots.data.open import pack
from fastslots.data.readers.npz import Member
from fastslots.data.readers.tfrecord import Records, masked_crc, parse_example
from fastslots.data.sources import open_source
from fastslots.errors import UserError
from fastslots.train import TrainConfig

CLEVR = os.environ.get("FASTSLOTS_CLEVR")
real = pytest.mark.skipif(not CLEVR, reason="set FASTSLOTS_CLEVR to a folder with CLEVR data")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTSLOTS_CACHE", str(tmp_path / "cache"))


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
        assert {name: list(split.rows) for name, split in splits.items()} == {
            "train": [0, 1, 2], "val": [3, 4], "test": [5, 6, 7],
        }  # fmt: skip
    with pytest.raises(UserError, match="nothing tells how many objects"):
        open_dataset(folder, max_objects=3)
    (folder / "clevrtex_test.npz").unlink()
    with pytest.raises(UserError, match=r"test_mask.npz: arr_0 has shape .*: the images of these masks must lie"):
        open_dataset(folder)
    (folder / "clevrtex_test_mask.npz").unlink()
    assert check(folder).splits.startswith("train 3, val 2, test 2 (as the files are named; no test images are")
    (folder / "clevrtex_train.npz").rename(folder / "clevrtex_more.npz")
    with pytest.raises(UserError, match=r"val.npz holds npz .* with masks, but .*more.npz holds npz .* without masks"):
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


@pytest.mark.parametrize(("entries", "objects"), [(7, [1, 3, 2]), (10, [6, 5, 0]), (4, [0, 0, 0])])
def test_objects_room(tmp_path, entries, objects):
    """Sky, floor and two halves of the walls come before the objects: they are background; three numbers of entries."""
    records, expected = [], []
    for count in objects:
        masks = np.zeros((entries, 64, 64), np.uint8)
        masks[0, :20], masks[1, 44:], masks[2, 20:44, :32], masks[3, 20:44, 32:] = 255, 255, 255, 255
        for k in range(count):
            masks[:, 22 + k : 30 + k, 9 * k : 9 * k + 8] = 0
            masks[4 + k, 22 + k : 30 + k, 9 * k : 9 * k + 8] = 255
        expected.append(np.maximum(masks.argmax(0) - 3, 0))
        records.append(frame(example({"image": IMAGES[count].tobytes(), "mask": masks.tobytes()}, one_value=True)))
    (tmp_path / "room.tfrecords").write_bytes(b"".join(records))
    dataset = open_dataset(tmp_path / "room.tfrecords")
    assert dataset.info.kind.startswith("Objects Room") and dataset.objects.tolist() == objects
    assert np.array_equal(dataset.batch(range(3))[1], expected)


def test_hdf5_is_cropped_as_clevr_where_it_is_clevr(tmp_path):
    """Not by its size alone: a set of one's own may be 240 x 320 as well."""
    images = np.zeros((3, 240, 320, 3), np.uint8)
    images[..., 0], images[..., 1] = np.arange(240)[:, None], np.arange(320) // 2
    rows = {}
    for name, factors in (("own", ()), ("clevr", ("shape", "size", "material", "color"))):
        with h5py.File(tmp_path / name, "w") as file:
            file["image"] = images
            for factor in factors:
                file[factor] = np.zeros((3, 11), np.uint8)
        image = open_dataset(tmp_path / name, size=192)[0]["image"].astype(int)
        rows[name] = [image[0, 0, 0], image[-1, 0, 0], 2 * image[0, 0, 1], 2 * image[0, -1, 1]]
    assert np.allclose(rows["own"], [0, 239, 40, 279], atol=3)  # the centred square
    assert np.allclose(rows["clevr"], [29, 220, 64, 255], atol=3)


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


@settings(deadline=None)  # a busy machine stands still for longer than that
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
