"""Folders of pictures and masks as people hold them: what belongs to a set, what is a mask, and what is said of it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scenes import IMAGES, MASKS

from fastslots.data import open_dataset
from fastslots.data.check import check
from fastslots.data.open import pack
from fastslots.errors import UserError

PALETTE = [value for i in range(256) for value in ((i * 67) % 256, (i * 29) % 256, (i * 151) % 256)]
COLOURS = np.array([[0, 0, 0], [220, 20, 60], [0, 0, 142], [119, 11, 32], [0, 60, 100]], np.uint8)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTSLOTS_CACHE", str(tmp_path / "cache"))


def palette(mask: np.ndarray) -> Image.Image:
    picture = Image.fromarray(mask, "P")
    picture.putpalette(PALETTE)
    return picture


def bordered(mask: np.ndarray) -> np.ndarray:
    """A line labelled 255 around what is there, as Pascal VOC draws it."""
    out = mask.copy()
    out[0], out[:, 0] = 255, 255
    return out


def by_colour(mask: np.ndarray) -> np.ndarray:
    """Labels by the order of the colours that a picture has."""
    values = COLOURS.astype(int) @ [1 << 16, 1 << 8, 1]
    return np.unique(values[mask], return_inverse=True)[1].reshape(mask.shape).astype(np.uint8)


WAYS = {  # how a mask is written, and the labels that it stands for
    "grey": (lambda m: Image.fromarray(m), lambda m: m),
    "palette": (palette, lambda m: m),
    "16 bits": (lambda m: Image.fromarray(m.astype(np.uint16)), lambda m: m),
    "numbers of a whole set": (lambda m: Image.fromarray(m.astype(np.uint16) * 1000), lambda m: m),
    "colours": (lambda m: Image.fromarray(COLOURS[m]), by_colour),
    "grey written as colours": (lambda m: Image.fromarray(m).convert("RGB"), lambda m: m),
    "one object, 255": (lambda m: Image.fromarray((m > 0).astype(np.uint8) * 255), lambda m: (m > 0).astype(np.uint8)),
    "one bit": (lambda m: Image.fromarray(m > 0), lambda m: (m > 0).astype(np.uint8)),
    "with a border": (lambda m: palette(bordered(m)), bordered),
}


def write_pictures(folder: Path, names: str = "{}.png", picture=lambda i: Image.fromarray(IMAGES[i])) -> Path:
    for i in range(8):
        path = folder / names.format(i)
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(path)
    return folder


def mask_picture(i):
    return Image.fromarray(MASKS[i])


LAYOUTS = {
    "images and masks": ("images/{}.png", "masks/{}.png"),
    "any names": ("renders/{}.png", "who_is_who/{}.png"),
    "JPEGImages": ("rgb/scene{}.bmp", "segmentation/scene{}_seg.png"),
    "splits below": ("images/train/{}.png", "masks/train/{}.png"),
    "splits above": ("train/images/{}.png", "train/labels/{}.png"),
    "img and mask": ("imgs/img_{}.png", "gt/mask_{}.png"),
    "beside": ("{}.png", "{}_mask.png"),
    "beside, other words": ("a/rgb-{}.png", "a/instances-{}.png"),
    "beside, dots": ("deep/er/{}.image.png", "deep/er/{}.seg.png"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_pictures_and_masks(tmp_path, layout):
    images, masks = LAYOUTS[layout]
    folder = write_pictures(write_pictures(tmp_path / "set", images), masks, mask_picture)
    for junk in (tmp_path / "set" / ".DS_Store", (tmp_path / "set" / masks.format(0)).with_name("._0.png")):
        junk.write_bytes(b"\0\5\x16\7")
    dataset = open_dataset(folder)
    found, labels = dataset.batch(range(8))
    assert np.array_equal(found, IMAGES) and np.array_equal(labels, MASKS)
    assert dataset.objects.tolist() == MASKS.reshape(8, -1).max(1).tolist()
    assert "masks are labels as numbers" in str(check(folder)) and dataset.info.kind == "images with masks"
    pack(folder, tmp_path / "packed", max_objects=3)
    packed = open_dataset(tmp_path / "packed")
    assert len(packed) == (dataset.objects <= 3).sum() and packed.info.read_as == dataset.info.read_as


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_write_masks(tmp_path, way):
    write, labels = WAYS[way]
    folder = write_pictures(
        write_pictures(tmp_path / "set", "images/{}.png"), "masks/{}.png", lambda i: write(MASKS[i])
    )
    dataset, expected = open_dataset(folder), np.stack([labels(m) for m in MASKS])
    assert np.array_equal(dataset.batch(range(8))[1], expected)
    assert dataset.info.ignore_label == (255 if way == "with a border" else None)
    report = check(folder)
    assert ("255 is not scored" in str(report)) == (way == "with a border")
    assert report.labels == np.where(expected == 255, 0, expected).max()
    assert dataset.objects.tolist() == [len(set(np.unique(m)) - {0, 255}) for m in expected]


def test_masks_as_arrays(tmp_path):
    """One-hot entries beside their pictures."""
    folder = write_pictures(tmp_path / "set", "images/{}.png")
    (folder / "masks").mkdir()
    for i, mask in enumerate(MASKS):
        np.save(folder / "masks" / f"{i}.npy", mask == np.arange(5)[:, None, None])
    assert np.array_equal(open_dataset(folder).batch(range(8))[1], MASKS)


def test_layouts_that_could_be_read_in_two_ways(tmp_path):
    flat = lambda i: Image.fromarray(COLOURS[MASKS[i]])  # noqa: E731
    cases = {
        "both flat": (
            [("left/{}.png", flat), ("right/{}.png", flat)],
            "left, right hold pictures of the same names: ei",
        ),
        "three": (
            [("a/{}.png", None), ("b/{}.png", None), ("masks/{}.png", mask_picture)],
            "a, b, masks hold pictures of the same names",
        ),
        "other names": (
            [("images/{}.png", None), ("masks/x{}.png", mask_picture)],
            "masks could hold masks, by its name",
        ),
        "JPEG masks": (
            [("images/{}.png", None), ("masks/{}.jpg", lambda i: Image.fromarray(COLOURS[MASKS[i]]))],
            "masks is named as masks, but its pictures have hundreds of colours: save masks as PNG",
        ),
        "two masks": (
            [("{}.png", None), ("{}_mask.png", mask_picture), ("{}_label.png", mask_picture)],
            r"0_label.png and 0_mask.png could both be the mask of one scene",
        ),
    }
    for name, (parts, message) in cases.items():
        for names, picture in parts:
            write_pictures(tmp_path / name, names, picture or (lambda i: Image.fromarray(IMAGES[i])))
        with pytest.raises(UserError, match=message):
            open_dataset(tmp_path / name)


def test_what_is_missing_is_named(tmp_path):
    folder = write_pictures(write_pictures(tmp_path / "set", "images/{}.png"), "masks/{}.png", mask_picture)
    (folder / "masks" / "3.png").rename(folder / "masks" / "33.png")
    with pytest.raises(UserError, match=r"1 of 8 images have no mask of their name \(first: images/3.png\): add"):
        open_dataset(folder)
    Image.fromarray(MASKS[3]).save(folder / "masks" / "3.png")
    with pytest.raises(UserError, match=r"1 of 9 masks have no image of their name \(first: masks/33.png\)"):
        open_dataset(folder)
    (folder / "masks" / "33.png").unlink()
    Image.fromarray(MASKS[3][:32]).save(folder / "masks" / "3.png")
    with pytest.raises(UserError, match=r"masks/3.png has shape \[32, 64\], but its image is 64 x 64"):
        open_dataset(folder)
    assert len(open_dataset(folder, on_bad_record="skip")) == 7


def test_pictures_alone_are_pictures_alone(tmp_path):
    """Splits of the same names, words that also name masks, flat pictures."""
    folder = write_pictures(write_pictures(tmp_path / "splits", "train/{}.png"), "val/{}.png", mask_picture)
    assert len(open_dataset(folder)) == 16 and not open_dataset(folder).info.has_masks
    folder = write_pictures(tmp_path / "words", "mask_of_zorro_{}.png")
    assert len(open_dataset(folder)) == 8
    folder = write_pictures(tmp_path / "masks", "{}.png", mask_picture)
    assert len(open_dataset(folder)) == 8 and open_dataset(folder).info.kind == "folder of images"


def test_pascal_voc(tmp_path):
    """Pictures that have no mask belong to the set, and are left out; the border of each object is not scored."""
    root = write_pictures(tmp_path / "VOC2012", "JPEGImages/2007_{:06}.png")
    for i in range(0, 8, 2):
        path = root / "SegmentationObject" / f"2007_{i:06}.png"
        path.parent.mkdir(exist_ok=True)
        palette(bordered(MASKS[i])).save(path)
    dataset = open_dataset(root)
    images, masks = dataset.batch(range(4))
    assert np.array_equal(images, IMAGES[::2]) and np.array_equal(masks, [bordered(m) for m in MASKS[::2]])
    assert dataset.info.kind == "Pascal VOC" and dataset.info.ignore_label == 255
    assert "masks in SegmentationObject; 4 pictures without a mask left out" in str(check(root))
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    (root / "ImageSets" / "Segmentation" / "trainval.txt").write_text("2007_000004\n2007_000000\n2007_000001\n")
    assert np.array_equal(open_dataset(root).batch(range(2))[0], IMAGES[[4, 0]])
    (root / "JPEGImages" / "2007_000004.png").unlink()
    with pytest.raises(UserError, match=r"lacks the picture of .*2007_000004.png"):
        open_dataset(root)


# ---- what is a picture of the set, and how it is shown ---------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_as_viewers_turn_them(tmp_path, orientation):
    scene = IMAGES[0].copy()
    scene[:32] = 255 - scene[:32]  # no two sides alike
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # PIL's operations that give the stored picture
    stored = Image.fromarray(scene)
    if orientation > 1:
        stored = stored.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "0.png", exif=exif)
    (tmp_path / "1.png").write_bytes((tmp_path / "0.png").read_bytes())
    assert np.array_equal(open_dataset(tmp_path)[0]["image"], scene)


def test_transparency(tmp_path):
    """Opaque alpha is dropped, whatever lies under real transparency is not trained on."""
    opaque = np.dstack([IMAGES[0], np.full((64, 64), 255, np.uint8)])
    Image.fromarray(opaque).save(tmp_path / "0.png")
    assert np.array_equal(open_dataset(tmp_path)[0]["image"], IMAGES[0])
    opaque[0, 0, 3] = 254
    Image.fromarray(opaque).save(tmp_path / "0.png")
    with pytest.raises(UserError, match=r"0.png is transparent in places: lay it on a background"):
        open_dataset(tmp_path)
    palette(MASKS[0]).save(tmp_path / "0.png", transparency=0)
    with pytest.raises(UserError, match=r"0.png is transparent"):
        open_dataset(tmp_path)


def test_hidden_files_belong_to_no_set(tmp_path):
    folder = write_pictures(tmp_path / "set")
    (folder / "__MACOSX").mkdir()
    (folder / ".thumbnails").mkdir()
    for path in (folder / "__MACOSX" / "0.png", folder / ".thumbnails" / "0.png", folder / "._0.png"):
        Image.fromarray(MASKS[0]).save(path)
    assert len(open_dataset(folder)) == 8
    shards = tmp_path / "shards"
    shards.mkdir()
    for i in range(2):
        np.savez(shards / f"{i}.npz", IMAGES[4 * i : 4 * i + 4])
        (shards / f"._{i}.npz").write_bytes(b"\0\5\x16\7")
    assert len(open_dataset(shards)) == len(open_dataset(str(shards / "*.npz"))) == 8


@pytest.mark.parametrize("name", ["a [set]", "what?", "st*r", "[!b]x"])
def test_folders_whose_names_look_like_patterns(tmp_path, name):
    folder = tmp_path / name
    (folder / "in").mkdir(parents=True)
    for i in range(2):
        np.savez(folder / "in" / f"s{i}.npz", IMAGES[4 * i : 4 * i + 4])
    assert len(open_dataset(folder / "in")) == len(open_dataset(str(folder / "in" / "s*.npz"))) == 8
    assert len(open_dataset(str(folder / "*" / "s?.npz"))) == 8 and len(open_dataset(folder / "in" / "s0.npz")) == 4


@pytest.mark.parametrize("change", ["older", "renamed", "swapped", "same sum"])
def test_the_cache_sees_each_file(tmp_path, change):
    """Changes that leave the number of files, their total size and the newest time as they were."""
    folder = tmp_path / "set"
    folder.mkdir()
    for i in range(4):
        path = folder / f"{i}.bmp"
        Image.fromarray(np.full((16, 16, 3), 40 * i, np.uint8)).save(path)
        os.utime(path, (10**9 + i, 10**9 + i))

    def colours():
        return [int(open_dataset(folder)[i]["image"].mean()) for i in range(4)]

    assert colours() == [0, 40, 80, 120]
    if change == "older":
        Image.fromarray(np.full((16, 16, 3), 200, np.uint8)).save(folder / "0.bmp")
        os.utime(folder / "0.bmp", (10**8, 10**8))
        assert colours() == [200, 40, 80, 120]
    elif change == "renamed":
        (folder / "0.bmp").rename(folder / "9.bmp")
        assert colours() == [40, 80, 120, 0]
    elif change == "swapped":
        (folder / "0.bmp").rename(folder / "x")
        (folder / "3.bmp").rename(folder / "0.bmp")
        (folder / "x").rename(folder / "3.bmp")
        assert colours() == [120, 40, 80, 0]
    else:
        Image.fromarray(np.full((16, 16, 3), 200, np.uint8)).save(folder / "1.bmp")
        os.utime(folder / "1.bmp", (10**9 + 2, 10**9 + 2))
        assert colours() == [0, 200, 80, 120]
