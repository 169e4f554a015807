"""Sets that say which images train, validate and test: folders, lists of Pascal VOC, annotations of COCO, shards.

In the order of names "test" comes before "train": all of these tests' images had trained.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scenes import IMAGES, MASKS

from fastslots.cli import main
from fastslots.data import open_dataset
from fastslots.data.check import check
from fastslots.data.open import pack
from fastslots.data.sources import open_source
from fastslots.errors import UserError
from fastslots.train import TrainConfig

WHOLE = "train 4, val 2, test 2 (as the files are named)"
NO_TEST = "train 4, val 4, test 4 (as the files are named; no test images are, so that test is val)"
OF = {"train": (0, 3, 5, 6), "val": (1, 4), "test": (2, 7)}
TWO = {"train": OF["train"], "val": (1, 2, 4, 7)}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTSLOTS_CACHE", str(tmp_path / "cache"))


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def masks_below(folder: Path, splits: dict[str, tuple[int, ...]]) -> None:
    for split, scenes in splits.items():
        for i in scenes:
            save(folder / "images" / split / f"{i}.png", IMAGES[i])
            save(folder / "masks" / split / f"{i}.png", MASKS[i])


def masks_above(folder: Path, splits: dict[str, tuple[int, ...]]) -> None:
    for split, scenes in splits.items():
        for i in scenes:
            save(folder / split / "rgb" / f"{i}.png", IMAGES[i])
            save(folder / split / "labels" / f"{i}.png", MASKS[i])


def masks_beside(folder: Path, splits: dict[str, tuple[int, ...]]) -> None:
    for split, scenes in splits.items():
        for i in scenes:
            save(folder / split / f"{i}.png", IMAGES[i])
            save(folder / split / f"{i}_mask.png", MASKS[i])


def pictures_alone(folder: Path, splits: dict[str, tuple[int, ...]]) -> None:
    for split, scenes in splits.items():
        for i in scenes:
            save(folder / f"{split}2017" / "a class" / f"{i}.png", IMAGES[i])


def pascal_voc(folder: Path, splits: dict[str, tuple[int, ...]]) -> None:
    root = folder / "VOCdevkit" / "VOC2012"
    for split, scenes in splits.items():
        for i in scenes:
            save(root / "JPEGImages" / f"2007_{i}.png", IMAGES[i])
            save(root / "SegmentationObject" / f"2007_{i}.png", MASKS[i])
        list_of(root, split, scenes)
    list_of(root, "trainval", (*splits["train"], *splits["val"]))


def list_of(root: Path, name: str, scenes: tuple[int, ...]) -> None:
    path = root / "ImageSets" / "Segmentation" / f"{name}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"2007_{i}\n" for i in scenes))


def clevr(folder: Path, splits: dict[str, tuple[int, ...]]) -> None:
    picture = np.zeros((320, 480, 3), np.uint8)
    for split, scenes in splits.items():
        listed = []
        for i in scenes:
            picture[:] = IMAGES[i].mean((0, 1))
            save(folder / "images" / split / f"CLEVR_{split}_{i:06}.png", picture)
            listed.append({"image_filename": f"CLEVR_{split}_{i:06}.png", "split": split, "objects": []})
        (folder / "scenes").mkdir(exist_ok=True)
        (folder / "scenes" / f"CLEVR_{split}_scenes.json").write_text(json.dumps({"scenes": listed}))


LAYOUTS = [masks_below, masks_above, masks_beside, pictures_alone, pascal_voc, clevr]


def same(images: np.ndarray, scenes: tuple[int, ...]) -> bool:
    """By the mean colours, which scenes have of their own: CLEVR's pictures here hold them alone."""
    return bool(np.allclose(images.mean((1, 2)), IMAGES[list(scenes)].mean((1, 2)), atol=1))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("splits, said", [(OF, WHOLE), (TWO, NO_TEST)])
def test_what_the_set_says_is_how_it_is_split(tmp_path, layout, splits, said):
    layout(tmp_path / "set", splits)
    pack(tmp_path / "set", tmp_path / "packed")
    pack(tmp_path / "packed", tmp_path / "smaller", size=32)
    for path in (tmp_path / "set", tmp_path / "packed", tmp_path / "smaller"):
        assert check(path).splits == said
        size = open_dataset(path).info.size
        found = open_source(TrainConfig.preset("sprites-mini", data=str(path), resolution=size)).splits
        for name, split in found.items():
            assert same(split.read()[0].numpy(), splits.get(name, splits["val"])), name
    assert len({i for split in ("train", "val") for i in found[split].rows}) == len(IMAGES) - 2 * (splits is OF)


def test_without_validation_some_of_train_are(tmp_path):
    masks_below(tmp_path / "set", {"train": (0, 1, 2, 3, 4, 5), "test": (6, 7)})
    said = "as the files are named; no validation images are, so that val is the last 5 % of train"
    assert check(tmp_path / "set").splits == f"train 5, val 1, test 2 ({said})"


def test_splits_outlive_what_is_left_out(tmp_path):
    """An object filter, here and while packing, and a damaged picture."""
    masks_below(tmp_path / "set", OF)
    for i in (0, 4, 7):  # one of each split with a single object, which the filter leaves
        save(next((tmp_path / "set" / "masks").rglob(f"{i}.png")), np.minimum(MASKS[i], 1))
    assert min(int(mask.max()) for mask in MASKS) > 1
    pack(tmp_path / "set", tmp_path / "packed", max_objects=1)
    for found in (open_dataset(tmp_path / "packed"), open_dataset(tmp_path / "set", max_objects=1)):
        assert found.info.parts == (1, 1, 1) and same(found.batch(np.arange(3))[0], (0, 4, 7))
    save(next((tmp_path / "set" / "masks").rglob("7.png")), MASKS[7])
    with pytest.raises(UserError, match="train, val or test is left without images: raise --max_objects"):
        open_dataset(tmp_path / "set", max_objects=1)
    (tmp_path / "set" / "images" / "train" / "3.png").write_bytes(b"no picture")
    assert open_dataset(tmp_path / "set", on_bad_record="skip").info.parts == (3, 2, 2)


def test_half_named_sets_are_split_as_any_other(tmp_path):
    masks_below(tmp_path / "set", OF)
    save(tmp_path / "set" / "images" / "9.png", IMAGES[0])
    save(tmp_path / "set" / "masks" / "9.png", MASKS[0])
    assert open_dataset(tmp_path / "set").info.parts is None
    shutil.rmtree(tmp_path / "set")
    masks_below(tmp_path / "set", {"train": OF["train"]})
    assert open_dataset(tmp_path / "set").info.parts is None


def test_several_sets_of_pascal_voc_are_named(tmp_path):
    pascal_voc(tmp_path / "set", TWO)
    shutil.copytree(tmp_path / "set" / "VOCdevkit" / "VOC2012", tmp_path / "set" / "VOCdevkit" / "VOC2007")
    with pytest.raises(UserError, match=r"several sets of Pascal VOC \(VOC2007, VOC2012\): name one of these folders"):
        open_dataset(tmp_path / "set" / "VOCdevkit")


@pytest.mark.skipif(not importlib.util.find_spec("pycocotools"), reason="pycocotools is not installed")
def test_annotations_of_coco_name_their_split(tmp_path):
    categories = [{"id": 1, "name": "thing"}]
    for split, scenes in TWO.items():
        images = [{"id": i, "file_name": f"{i:012}.png", "width": 64, "height": 64} for i in scenes]
        marks = []
        for i in scenes:
            save(tmp_path / "coco" / f"{split}2017" / f"{i:012}.png", IMAGES[i])
            box = [[4.0, 4.0, 20.0, 4.0, 20.0, 20.0, 4.0, 20.0]]
            marks.append({"id": i, "image_id": i, "category_id": 1, "segmentation": box, "area": 256, "iscrowd": 0})
        file = tmp_path / "coco" / "annotations" / f"instances_{split}2017.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({"images": images, "annotations": marks, "categories": categories}))
    assert check(tmp_path / "coco").splits == NO_TEST
    assert check(tmp_path / "coco" / "annotations" / "instances_train2017.json").splits.startswith(
        "train 4, val 4, test 4 (under"
    )
    images, _ = open_dataset(tmp_path / "coco").batch(np.arange(8))
    assert np.array_equal(images, IMAGES[[*TWO["train"], *TWO["val"]]])


# ---- labels that say "do not score" ----------------------------------------------------------------------------------


def test_a_label_that_is_not_scored_is_named_to_check_and_pack(tmp_path, capsys):
    """It counts as no object, and the packed set says so to whoever opens it."""
    masks = MASKS.copy()
    masks[:4, :8] = 9
    path = tmp_path / "set.npz"
    np.savez(path, arr_0=IMAGES, arr_2=masks)
    counts = [int(mask.max()) for mask in MASKS]
    assert main(["data", "check", str(path), "--ignore_label", "9", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["info"]["ignore_label"] == 9 and report["labels"] == max(counts) and not report["warnings"][1:]
    histogram = {str(n): counts.count(n) for n in sorted(set(counts))}
    hidden = [len(set(np.unique(mask)) - {0, 9}) for mask in masks]
    assert report["objects"] == {str(n): hidden.count(n) for n in sorted(set(hidden))} and histogram
    assert main(["data", "pack", str(path), str(tmp_path / "packed"), "--ignore-label", "9"]) == 0
    packed = open_dataset(tmp_path / "packed")
    assert packed.info.ignore_label == 9 and packed.objects.tolist() == hidden
    assert np.array_equal(packed.batch(np.arange(8))[1], masks)
    assert main(["data", "pack", str(path), str(tmp_path / "other"), "--ignore_label", "300"]) == 2
    assert "--ignore_label must be from 0 to 255, got 300" in capsys.readouterr().err


def test_255_beside_few_labels_is_not_scored_in_arrays_either(tmp_path):
    """In npz and npy it was an object of its own, which every metric scored."""
    masks = MASKS.copy()
    masks[:, 0] = 255
    counts = [len(set(np.unique(mask)) - {0, 255}) for mask in masks]
    np.savez(tmp_path / "set.npz", arr_0=IMAGES, arr_2=masks)
    (tmp_path / "arrays").mkdir()
    np.save(tmp_path / "arrays" / "images.npy", IMAGES)
    np.save(tmp_path / "arrays" / "masks.npy", masks)
    for path in (tmp_path / "set.npz", tmp_path / "arrays"):
        dataset = open_dataset(path)
        assert dataset.info.ignore_label == 255 and dataset.objects.tolist() == counts
        report = str(check(path))
        assert "read as      masks are labels; 255 is not scored" in report and "labels up to 255" not in report
    np.savez(tmp_path / "many.npz", arr_0=IMAGES, arr_2=np.where(MASKS > 0, MASKS + 120, 0) | (masks == 255) * 255)
    assert open_dataset(tmp_path / "many.npz").info.ignore_label is None  # labels go that far


def test_a_path_is_no_data_set(tmp_path):
    config = TrainConfig.preset("sprites-mini", steps=1)
    with pytest.raises(UserError, match="data/x is a path: set the configuration's data to it"):
        open_source(config, "data/x")
