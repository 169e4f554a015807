"""Data sets handed to ``fit``: each kind of item is used as it is meant, or refused before the first step."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import MODEL_16
from torch.utils.data import DataLoader, IterableDataset, Subset

from fastslots.data import SpritesDataset, read_batch, to_float
from fastslots.data.dataset import Split
from fastslots.data.map_style import MapStyleDataset, look_at, read_items
from fastslots.errors import UserError
from fastslots.train import TrainConfig, fit

SPRITES = SpritesDataset(3, 32, (2, 3), 24)
IMAGES, MASKS, _ = SPRITES.scenes(range(24))


TINY = MODEL_16 | dict(resolution=32, steps=1, batch_size=2, eval_images=3, eval_every=0, checkpoint_every=0, threads=1)


class Items:
    """``item`` of each number from 0 to 23; counts what is read."""

    def __init__(self, item):
        self.item, self.read = item, 0

    def __len__(self):
        return 24

    def __getitem__(self, index):
        self.read += 1
        return self.item(index)


def train(dataset, tmp_path, **changes):
    """A step, an evaluation of three images, and what was said."""
    said = io.StringIO()
    config = TrainConfig.preset("sprites-mini", **(TINY | changes))
    return fit(config, dataset, tmp_path / "run", stream=said), said.getvalue()


def floats(i):
    return torch.from_numpy(IMAGES[i].transpose(2, 0, 1) / np.float32(255))


def one_hot(i, first: bool = True):
    entries = (MASKS[i] == np.arange(5)[:, None, None]).astype(np.float32)
    return entries if first else entries.transpose(1, 2, 0)


IMAGES_GIVEN = {
    "uint8 [R, R, 3]": lambda i: IMAGES[i],
    "uint8 [3, R, R]": lambda i: torch.from_numpy(IMAGES[i]).permute(2, 0, 1),
    "float [3, R, R]": floats,
    "float [R, R, 3]": lambda i: floats(i).permute(1, 2, 0),
    "float64": lambda i: floats(i).double().numpy(),
    "PIL": lambda i: Image.fromarray(IMAGES[i]),
    "PIL, palette of all its colours": lambda i: Image.fromarray(IMAGES[i]).quantize(256),
    "PIL, opaque alpha": lambda i: Image.fromarray(IMAGES[i]).convert("RGBA"),
    "tuple with a class": lambda i: (IMAGES[i], 3),
    "nested lists": lambda i: {"image": IMAGES[i].tolist() and IMAGES[i]},
}


@pytest.mark.parametrize("kind", IMAGES_GIVEN)
def test_images_are_read_as_they_are_meant(kind):
    images, masks = read_batch(Items(IMAGES_GIVEN[kind]), np.array([4, 0, 4]))
    assert masks is None
    expected = to_float(torch.from_numpy(IMAGES[[4, 0, 4]]))
    torch.testing.assert_close(to_float(images), expected, atol=0.02 if "palette" in kind else 1e-6, rtol=0)


GRAY = [
    lambda i: IMAGES[i][..., 0],
    lambda i: IMAGES[i][..., :1],
    lambda i: IMAGES[i][None, ..., 0],
    lambda i: Image.fromarray(IMAGES[i][..., 0]),
]


@pytest.mark.parametrize("gray", GRAY)
def test_gray_images_have_three_equal_channels(gray):
    images, _ = read_batch(Items(gray), np.array([7]))
    assert np.array_equal(images[0], IMAGES[7][..., :1].repeat(3, 2))


MASKS_GIVEN = {
    "[R, R]": lambda i: MASKS[i],
    "[1, R, R]": lambda i: torch.from_numpy(MASKS[i][None].astype(np.int64)),
    "[R, R, 1]": lambda i: MASKS[i][..., None].astype(np.int32),
    "whole floats": lambda i: MASKS[i].astype(np.float32),
    "one-hot [N, R, R]": one_hot,
    "one-hot [R, R, N]": lambda i: one_hot(i, first=False),
    "one-hot [N, R, R, 1], 0 or 255": lambda i: (one_hot(i) * 255).astype(np.uint8)[..., None],
    "one-hot without a background": lambda i: one_hot(i)[1:],
    "PIL palette": lambda i: Image.fromarray(MASKS[i]).convert("P"),
    "colours": lambda i: np.array([[0, 0, 0], [0, 0, 9], [0, 200, 0], [70, 0, 0]], np.uint8)[MASKS[i]],
}


@pytest.mark.parametrize("kind", MASKS_GIVEN)
@pytest.mark.parametrize(
    "form", [lambda image, mask: (image, mask), lambda image, mask: {"image": image, "mask": mask}]
)
def test_masks_are_read_as_they_are_meant(kind, form):
    images, masks = read_batch(Items(lambda i: form(IMAGES[i], MASKS_GIVEN[kind](i))), np.arange(6))
    assert np.array_equal(images, IMAGES[:6]) and np.array_equal(masks, MASKS[:6])


def test_masks_of_any_such_kind_are_scored(tmp_path):
    scores = []
    for number, kind in enumerate(("[R, R]", "[1, R, R]", "one-hot [N, R, R]")):
        result, _ = train(Items(lambda i, kind=kind: (IMAGES[i], MASKS_GIVEN[kind](i))), tmp_path / f"{number}")
        assert result.scores["images_with_masks"] == 1
        scores.append([result.scores[name] for name in ("j_ari", "fg_ari", "mbo", "jis")])
    assert scores[0] == scores[1] == scores[2]


def overlapping(i):
    entries = one_hot(i)
    entries[1:3, 5, 7] = 1
    return entries


normalised = (IMAGES / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
REFUSED = {
    "float_255": (lambda i: floats(i) * 255, r"item 0 of the Items: .* values from 0 to 192, .*: divide by 255"),
    "float_255_last": (lambda i: IMAGES[i].astype(np.float32), r"item 0 .* from 0 to 192, .*: divide by 255"),
    "imagenet": (lambda i: normalised[i].astype(np.float32), r"item 0 .* from -2.12 to .*undo their scaling"),
    "minus_one_to_one": (lambda i: floats(i) * 2 - 1, r"item 0 .* has values from -1 to .*undo their scaling"),
    "int64": (lambda i: IMAGES[i].astype(np.int64), r"item 0 .* holds int64: expected uint8, or floats in \[0, 1\]"),
    "16 bits": (lambda i: IMAGES[i].astype(np.uint16) * 257, r"holds uint16.*divide 16-bit values by 257"),
    "16-bit PNG": (lambda i: Image.fromarray(IMAGES[i][..., 0].astype(np.uint16) * 257), "more than 8 bits a channel"),
    "alpha": (lambda i: np.dstack([IMAGES[i], IMAGES[i][..., 0]]), "with an alpha channel: give red, green and blue"),
    "transparent": (lambda i: Image.fromarray(np.dstack([IMAGES[i], IMAGES[i][..., 0]])), "is transparent in places"),
    "batched": (lambda i: IMAGES[i][None], r"has shape \[1, 32, 32, 3\], expected an image \[H, W, 3\]"),
    "text": (lambda i: "picture.png", "item 0 .* is a str, expected an array, a tensor or a PIL picture"),
    "no image": (lambda i: {"pixels": IMAGES[i]}, "item 0 of the Items has no 'image' .it has 'pixels'.: rename"),
    "empty tuple": (lambda i: (), "item 0 of the Items is empty"),
    "ragged": (lambda i: IMAGES[i][:, : 32 - i % 2], "item .* is 32 x 31 of uint8, but item 0 is 32 x 32 of uint8"),
    "not square": (lambda i: IMAGES[i][:, :31], r"the data gives images of shape \[3, 32, 31\], the model expects"),
    "types differ": (lambda i: floats(i) if i % 2 else IMAGES[i], "of float32, but item 0 is 32 x 32 of uint8"),
    "-1 background": (lambda i: (IMAGES[i], MASKS[i].astype(int) - 1), "its mask has labels from -1 to .*add 1 to all"),
    "ToTensor": (lambda i: (IMAGES[i], MASKS[i][None] / 255), "its mask holds float64: .* not whole.*ToTensor"),
    "half": (lambda i: (IMAGES[i], MASKS[i][::2, ::2]), r"its mask has shape \[16, 16\], but its image is 32 x 32"),
    "overlap": (lambda i: (IMAGES[i], overlapping(i)), "3 entries that overlap .at row 5, column 7.: give each"),
    "soft": (lambda i: (IMAGES[i], one_hot(i) * 0.9 + 0.02), "its mask has shape .* and is not one-hot"),
    "some": (lambda i: (IMAGES[i], MASKS[i] if i % 3 else None), "some images have a mask and others none"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_before_the_first_step(case, tmp_path):
    item, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        train(Items(item), tmp_path)
    metrics = tmp_path / "run" / "metrics.jsonl"
    assert not metrics.exists() or not metrics.read_text()


class Stream(IterableDataset):
    def __iter__(self):
        yield from IMAGES


class StreamOfKnownLength(Stream):
    def __len__(self):
        return 24


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (
            Stream(),
            r"Stream can only be iterated.*: expected a data set with len.*list\(dataset\)",
        ),
        (StreamOfKnownLength(), "StreamOfKnownLength can only be iterated"),
        ((image for image in IMAGES), "generator can only be iterated"),
        (DataLoader(list(IMAGES)), r"DataLoader gives batches: hand over its data set \(loader.dataset\)"),
        (
            {"train": list(IMAGES), "test": []},
            r"dict has the keys 'train', 'test': hand over one .* dataset\['train'\]",
        ),
        ([], "list is empty"),
        (torch.empty(0, 3, 32, 32), "Tensor is empty"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_what_is_no_map_style_data_set(dataset, message, tmp_path):
    with pytest.raises(UserError, match=message):
        train(dataset, tmp_path)


def test_a_batch_method_of_others_is_left_alone(tmp_path):
    """Hugging Face's ``Dataset.batch`` groups rows by a number."""

    class Theirs(Items):
        def batch(self, batch_size: int, drop_last_batch: bool = False):
            raise AssertionError("called")

    result, _ = train(
        Theirs(lambda i: {"image": Image.fromarray(IMAGES[i]), "mask": Image.fromarray(MASKS[i])}), tmp_path
    )
    assert result.scores["images_with_masks"] == 1


def test_what_could_be_a_mask_and_is_not_read_is_said(tmp_path):
    _, said = train(Items(lambda i: {"image": IMAGES[i], "segmentation": MASKS[i]}), tmp_path / "dict")
    assert "items of the Items have 'segmentation', but masks are read from 'mask' alone" in said
    _, said = train(Items(lambda i: (IMAGES[i], MASKS[i].max())), tmp_path / "class")
    assert "second part of the Items's items (uint8 []) is no mask" in said


def test_label_255_is_said_and_left_out_where_the_data_say_so(tmp_path):
    masks = MASKS.copy()
    masks[:, :, :6] = 255  # a border that says "do not care"
    dataset = Items(lambda i: (IMAGES[i], masks[i]))
    result, said = train(dataset, tmp_path / "object")
    assert "set its attribute ignore_label = 255" in said
    pixels = int((masks[23] > 0).sum())
    assert result.scores["foreground_pixels"] == pixels
    dataset.ignore_label = 255
    result, said = train(dataset, tmp_path / "ignored")
    assert "255" not in said.split("run  ")[0] and result.scores["foreground_pixels"] == (MASKS[23, :, 6:] > 0).sum()
    part, _ = train(Subset(dataset, range(24)), tmp_path / "subset")
    assert part.scores["foreground_pixels"] == result.scores["foreground_pixels"]


def test_a_set_is_looked_at_here_and_there():
    dataset = Items(lambda i: IMAGES[i])
    scenes = MapStyleDataset(dataset)
    images, warnings = look_at(scenes, [Split(scenes, range(0, 20)), Split(scenes, range(20, 24))])
    assert np.array_equal(images, IMAGES[[0, 19, 20, 23]]) and not warnings and dataset.read == 4
    scenes = MapStyleDataset(Items(lambda i: IMAGES[0]))
    assert look_at(scenes, [Split(scenes, range(24))])[1] == []
    warnings = look_at(scenes, [Split(scenes, range(24)), Split(scenes, range(3))])[1]
    assert warnings == ["images of the Items are all equal"]


def test_each_item_is_checked_when_it_is_drawn(tmp_path):
    """One that nobody has looked at before the first step ends the run with its number, and what was learnt is kept."""
    with pytest.raises(UserError, match=r"item 9 of the Items: its mask has labels from -1"):
        read_batch(Items(lambda i: (IMAGES[i], MASKS[i].astype(int) - (i == 9))), np.array([3, 9]))
    with pytest.raises(UserError, match=r"item 9 of the Items: its image has values from 0 to"):
        train(Items(lambda i: floats(i) * (255 if i == 9 else 1)), tmp_path, steps=200)
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_features_are_of_any_value():
    grids = np.random.default_rng(0).normal(size=(4, 384, 16, 16)).astype(np.float32) * 30
    images, masks = read_items([(grid, MASKS[i]) for i, grid in enumerate(grids)], range(4))
    assert np.array_equal(images, grids) and np.array_equal(masks, MASKS[:4])
