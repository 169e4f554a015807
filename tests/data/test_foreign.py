"""Sets that other tools wrote (tests/data_files/foreign): images and masks are those that the tools themselves read."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastslots.cli import main
from fastslots.data import open_dataset
from fastslots.data.check import check
from fastslots.data.open import pack
from fastslots.errors import UserError

FOREIGN = Path(__file__).parents[1] / "data_files" / "foreign"
EXPECTED = dict(np.load(FOREIGN / "expected.npz"))
IMAGES, MASKS = EXPECTED["images"], EXPECTED["masks"]
needs_arrow = pytest.mark.skipif(not importlib.util.find_spec("pyarrow"), reason="pyarrow is not installed")
needs_coco = pytest.mark.skipif(not importlib.util.find_spec("pycocotools"), reason="pycocotools is not installed")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTSLOTS_CACHE", str(tmp_path / "cache"))


def coco_labels() -> np.ndarray:
    """By pycocotools' own masks: the larger objects first, crowds (255) where nothing is."""
    labels = np.zeros(MASKS.shape, np.uint8)
    for i, entries in enumerate(EXPECTED["coco/entries"]):
        for k in sorted(range(len(entries)), key=lambda k: -int(entries[k].sum())):
            labels[i][entries[k] > 0] = k + 1
        labels[i][(EXPECTED["coco/crowds"][i] > 0) & (labels[i] == 0)] = 255
    return labels


SETS = [
    pytest.param(FOREIGN / "coco", EXPECTED["coco/images"], coco_labels(), "COCO", id="coco", marks=needs_coco),
    pytest.param(
        FOREIGN / "coco" / "annotations" / "instances_val2017.json",
        EXPECTED["coco/images"], coco_labels(), "COCO", id="coco, its annotations", marks=needs_coco,
    ),
    pytest.param(
        FOREIGN / "webdataset", EXPECTED["webdataset/images"], EXPECTED["webdataset/masks"], "WebDataset", id="tars"
    ),
    pytest.param(
        FOREIGN / "hub", EXPECTED["huggingface/hub_images"], EXPECTED["huggingface/hub_masks"],
        "Hugging Face data set", id="hub", marks=needs_arrow,
    ),
    pytest.param(
        FOREIGN / "on_disk", EXPECTED["huggingface/disk_images"], EXPECTED["huggingface/disk_masks"],
        "Hugging Face data set", id="save_to_disk", marks=needs_arrow,
    ),
    pytest.param(FOREIGN / "nested", IMAGES, MASKS, "Hugging Face data set", id="nested lists", marks=needs_arrow),
    pytest.param(
        FOREIGN / "movi_a" / "128x128" / "1.0.0", EXPECTED["movi/images"], EXPECTED["movi/masks"], "MOVi", id="movi"
    ),
]  # fmt: skip


@pytest.mark.parametrize(("path", "images", "masks", "kind"), SETS)
def test_images_and_masks_are_those_of_the_tool(tmp_path, path, images, masks, kind):
    dataset = open_dataset(path)
    found, labels = dataset.batch(np.arange(4))
    assert dataset.info.kind == kind and len(dataset) == 4
    assert np.array_equal(found, images) and np.array_equal(labels, masks)
    assert dataset.objects.tolist() == [len(set(np.unique(m)) - {0, 255}) for m in masks]
    report = str(check(path))
    assert f"read as      {dataset.info.read_as}" in report and dataset.info.read_as
    pack(path, tmp_path / "packed")
    again = open_dataset(tmp_path / "packed")
    assert np.array_equal(again.batch(np.arange(4))[1], masks) and again.info.ignore_label == dataset.info.ignore_label


def makers():
    spec = importlib.util.spec_from_file_location("make_foreign", FOREIGN / "make.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_foreign"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("tool", ["pycocotools", "webdataset", "datasets", "tfrecord"])
def test_the_tools_still_read_the_same(tool, tmp_path, monkeypatch):
    """Where they are installed: what is expected is theirs, not ours."""
    pytest.importorskip(tool, reason=f"compares with {tool}, which is not installed", exc_type=ImportError)
    make = makers()
    shutil.copytree(FOREIGN, tmp_path / "foreign")
    monkeypatch.setattr(make, "HERE", tmp_path / "foreign")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    if tool == "pycocotools":
        from pycocotools.coco import COCO

        found = make.read_coco(
            COCO(FOREIGN / "coco" / "annotations" / "instances_val2017.json"), FOREIGN / "coco/val2017"
        )
        name = "coco"
    elif tool == "webdataset":
        found, name = make.read_web(FOREIGN / "webdataset"), "webdataset"
    elif tool == "datasets":
        found, name = make.read_hugging_face(), "huggingface"
    else:
        found, name = make.read_movi(FOREIGN / "movi_a" / "128x128" / "1.0.0"), "movi"
    assert all(np.array_equal(value, EXPECTED[f"{name}/{key}"]) for key, value in found.items()) and found


def test_factors_of_tables_and_samples():
    factors = open_dataset(FOREIGN / "webdataset").factors_of(np.arange(4))
    assert factors["count"].tolist() == MASKS.max((1, 2)).tolist() and factors["cls"].tolist() == [0, 1, 2, 3]
    assert factors["where"].tolist() == [[i, i + 1] for i in range(4)] and "name" not in factors


@needs_arrow
def test_factors_of_tables():
    factors = open_dataset(FOREIGN / "hub").factors_of(np.arange(4))
    assert factors["objects"].tolist() == MASKS.max((1, 2)).tolist() and "caption" not in factors
    assert factors["area"].tolist() == [[float((m == 1).sum()), float((m == 2).sum())] for m in MASKS]


@needs_coco
def test_crowds_of_coco_are_not_scored():
    dataset = open_dataset(FOREIGN / "coco")
    assert dataset.info.ignore_label == 255 and (dataset.batch([1])[1] == 255).sum() > 50
    assert "crowds are not scored" in dataset.info.read_as
    assert dataset.factors_of(np.arange(1))["category"][0].tolist() == [0, 11, 12, 7]


@needs_coco
def test_what_is_wrong_with_a_set_of_coco(tmp_path):
    folder = shutil.copytree(FOREIGN / "coco", tmp_path / "coco")
    file = folder / "annotations" / "instances_val2017.json"
    good = json.loads(file.read_text())
    bad = json.loads(file.read_text())
    bad["annotations"][1]["segmentation"]["size"] = [99, 16]
    file.write_text(json.dumps(bad))
    with pytest.raises(UserError, match=r"000.png: annotation 2 has no mask that can be read .*its size is \[99, 16\]"):
        open_dataset(folder)
    assert len(open_dataset(folder, on_bad_record="skip")) == 3
    file.write_text(json.dumps(good))
    (folder / "val2017" / "000000000002.png").unlink()
    with pytest.raises(UserError, match=r"names 000000000002.png, which is not there below its folder"):
        open_dataset(folder)
    file.unlink()
    with pytest.raises(UserError, match=r"captions_val2017.json holds no segmentation .*: name instances_\*.json"):
        open_dataset(folder)


def test_samples_that_could_be_read_in_two_ways(tmp_path):
    for name, extensions, message in (
        ("two", ["left.image.png", "right.image.png"], "could both be its image: leave one out"),
        ("masks", ["png", "mask.png", "seg.png"], "has .mask.png and .seg.png, which could both be its mask"),
    ):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as archive:
            for i in range(3):
                for extension in extensions:
                    path = tmp_path / f"{i}.{extension}"
                    Image.fromarray(MASKS[i] if "mask" in extension or "seg" in extension else IMAGES[i]).save(path)
                    archive.add(path, path.name)
        with pytest.raises(UserError, match=message):
            open_dataset(tmp_path / f"{name}.tar")
    data = (FOREIGN / "webdataset" / "shard-000000.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(data[:12_000])
    with pytest.raises(UserError, match=r"cut.tar is damaged .*: download it again"):
        open_dataset(tmp_path / "cut.tar")


def voc(folder: Path) -> Path:
    """As Pascal VOC has them, written by Pillow."""
    for name in ("JPEGImages", "SegmentationObject"):
        (folder / name).mkdir(parents=True)
    for i in range(4):
        Image.fromarray(IMAGES[i]).save(folder / "JPEGImages" / f"{i}.png")
        mask = Image.fromarray(MASKS[i], "P")
        mask.putpalette(list(range(256)) * 3)
        mask.save(folder / "SegmentationObject" / f"{i}.png")
    return folder


ARCHIVES = {
    "zip": lambda folder, path: shutil.make_archive(str(path), "zip", folder.parent, folder.name),
    "tar": lambda folder, path: shutil.make_archive(str(path), "tar", folder.parent, folder.name),
    "tar.gz": lambda folder, path: shutil.make_archive(str(path), "gztar", folder),
}


@pytest.mark.parametrize("archive", ARCHIVES)
def test_archives_of_any_of_these(tmp_path, archive, capsys):
    folder = voc(tmp_path / "VOC2012")
    (folder / "JPEGImages" / "._0.png").write_bytes(b"\0\5\x16\7")
    path = ARCHIVES[archive](folder, tmp_path / "set")
    dataset = open_dataset(path)
    assert np.array_equal(dataset.batch(np.arange(4))[1], MASKS) and dataset.info.kind == "Pascal VOC"
    assert "unpacking" in capsys.readouterr().err
    open_dataset(path)
    assert "unpacking" not in capsys.readouterr().err
    np.savez(tmp_path / "one.npz", IMAGES, np.zeros(4), MASKS)
    with zipfile.ZipFile(tmp_path / "inside.zip", "w") as file:
        file.write(tmp_path / "one.npz", "deep/one.npz")
    assert np.array_equal(open_dataset(tmp_path / "inside.zip").batch(range(4))[0], IMAGES)


def test_archives_from_elsewhere_cannot_leave_their_folder(tmp_path):
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as file:
        for i in range(4):
            picture = tmp_path / f"{i}.png"
            Image.fromarray(IMAGES[i]).save(picture)
            file.write(picture, f"{i}.png")
        file.writestr("../../outside.png", b"x")
        file.writestr("/tmp/absolute.png", b"x")
        link = zipfile.ZipInfo("link.png")
        link.external_attr = 0o120777 << 16
        file.writestr(link, "/etc/passwd")
    assert len(open_dataset(tmp_path / "evil.zip")) == 4
    assert not list(tmp_path.rglob("outside.png")) and not list(tmp_path.rglob("link.png"))
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as file:
        for i in range(40):
            file.writestr(f"{i}.png", bytes(1 << 16))
    data = bytearray((tmp_path / "bomb.zip").read_bytes())
    place = data.rfind(b"PK\x01\x02")
    data[place + 24 : place + 28] = (1 << 31).to_bytes(4, "little")  # what it claims to hold
    (tmp_path / "bomb.zip").write_bytes(data)
    with pytest.raises(UserError, match=r"bomb.zip c(laims|annot be unpacked)"):
        open_dataset(tmp_path / "bomb.zip")


def test_npy(tmp_path):
    entries = (MASKS[:, None] == np.arange(4)[:, None, None]).astype(np.uint8)
    for name, masks in (("labels", MASKS), ("one-hot", entries), ("last", entries.transpose(0, 2, 3, 1))):
        folder = tmp_path / name
        folder.mkdir()
        np.save(folder / "images.npy", IMAGES)
        np.save(folder / "masks.npy", masks)
        for path in (folder, folder / "images.npy"):
            assert np.array_equal(open_dataset(path).batch(range(4))[1], MASKS)
    np.save(tmp_path / "x.npy", IMAGES / np.float32(255))
    np.save(tmp_path / "x_mask.npy", MASKS)
    dataset = open_dataset(tmp_path / "x.npy")
    assert np.array_equal(dataset.batch(range(4))[0], IMAGES) and np.array_equal(dataset.batch(range(4))[1], MASKS)
    with pytest.raises(UserError, match=r"masks.npy holds the masks of images.npy"):
        open_dataset(tmp_path / "labels" / "masks.npy")
    np.save(tmp_path / "o.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(UserError, match="pickled objects, which are never loaded"):
        open_dataset(tmp_path / "o.npy")


def test_splits_of_shards_by_their_names(tmp_path):
    folder = tmp_path / "sharded"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, count in (("train-00000-of-00002", 5), ("train-00001-of-00002", 4), ("validation-00000-of-00001", 3),
                        ("test-00000-of-00001", 2)):  # fmt: skip
        np.savez(folder / f"{name}.npz", rng.integers(0, 255, (count, 8, 8, 3), dtype=np.uint8))
    pack(folder, tmp_path / "packed")
    for path in (folder, tmp_path / "packed"):
        assert check(path).splits == "train 9, val 3, test 2 (as the files are named)"
        assert len(open_dataset(path)) == 14


def test_a_picture_of_what_was_understood(tmp_path, capsys):
    folder = voc(tmp_path / "VOC2012")
    assert main(["data", "check", str(folder), "--picture", str(tmp_path / "out.png")]) == 0
    assert "read as      pictures in JPEGImages, masks in SegmentationObject" in capsys.readouterr().out
    picture = np.asarray(Image.open(tmp_path / "out.png").convert("RGB"))
    side = picture.shape[0] // 2
    assert picture.shape[1] > 3 * side  # four scenes: images above, masks below
    assert len(np.unique(picture[side + 2 :].reshape(-1, 3), axis=0)) <= 6  # background, three objects, gaps
