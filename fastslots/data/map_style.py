"""Data sets that Python code hands to ``fit``: read item by item as checked arrays, looked at before the first step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset

from fastslots.data.dataset import SceneDataset, Split
from fastslots.data.items import FEATURES, image_of, mask_of
from fastslots.errors import UserError

SOME_MASKS = "some images have a mask and others none: give all of them one, or none"
MASK_LIKE = {"masks", "segmentation", "segmentations", "label_map", "labels", "instances", "seg", "annotation"}
"""Names under which others keep masks; only "mask" is read."""


def as_scenes(dataset: Any) -> SceneDataset:
    """One of ours as it is, any other map-style data set behind ``MapStyleDataset``.

    A method ``batch`` alone makes none of ours: that of Hugging Face's ``datasets`` groups rows.
    """
    return dataset if isinstance(dataset, SceneDataset) else MapStyleDataset(dataset)


def as_split(dataset: Any, rows: range | np.ndarray | None = None) -> Split:
    """Those ``rows`` of any map-style data set, or all of it."""
    scenes = as_scenes(dataset)
    return Split(scenes, range(len(scenes)) if rows is None else rows)


class MapStyleDataset:
    """A map-style data set of Python code: ``len()``, and items by number as ``read_items`` takes them."""

    info = None
    by_range = False

    def __init__(self, dataset: Any):
        self.dataset = dataset

    @property
    def whole(self) -> Any:
        """What a torch ``Subset`` (of a ``Subset``) is a part of; else the data set itself."""
        whole = self.dataset
        while hasattr(whole, "dataset"):
            whole = whole.dataset
        return whole

    @property
    def ignore_label(self) -> int | None:
        return getattr(self.whole, "ignore_label", None)

    def __len__(self) -> int:
        return len(self.dataset)

    def batch(self, indices: np.ndarray, masks: bool = True) -> tuple[np.ndarray, np.ndarray | None]:
        """See ``read_items``."""
        images, labels = read_items(self.dataset, indices)
        return images, labels if masks else None

    def factors_of(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The factors that all items have, stacked: entry "factors" of an item that is a mapping."""
        items = [_factors_of_item(self.dataset[int(i)]) for i in indices]  # not the items: pictures may fill the memory
        names = set.intersection(*(set(factors) for factors in items)) if items else set()
        try:
            return {name: np.stack([factors[name] for factors in items]) for name in sorted(names)}
        except ValueError as error:
            raise UserError(f"the images' factors differ in shape ({error}): give every image the same") from None


def _factors_of_item(item: Any) -> Mapping[str, Any]:
    return item.get("factors") or {} if isinstance(item, Mapping) else {}


def read_items(dataset: Any, indices: np.ndarray | Iterable[int]) -> tuple[np.ndarray, np.ndarray | None]:
    """Images and masks of items: uint8 [n, H, W, 3] or floats [n, C, H, W]; labels [n, H, W], or None without any.

    An item is an image, a tuple (image, mask, ...) or a mapping with "image" and perhaps "mask"; see
    ``items.image_of`` and ``items.mask_of`` for what these may be. UserError names the item that is none of it, or
    that differs from the first in size, type or in having a mask.
    """
    return _together(((index, dataset[index]) for index in map(int, indices)), type(dataset).__name__)


def _together(items: Iterable[tuple[int, Any]], owner: str) -> tuple[np.ndarray, np.ndarray | None]:
    images: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    start = None
    for index, item in items:
        start, name = index if start is None else start, f"item {index} of the {owner}"
        image, mask = _parts(item, name)
        images.append(image_of(image, f"{name}: its image"))
        first, last = images[0], images[-1]
        if (first.shape, first.dtype) != (last.shape, last.dtype):
            raise UserError(
                f"{name} is {_what(last)}, but item {start} is {_what(first)}: bring all images to one size and type"
            )
        if mask is not None:
            masks.append(mask_of(mask, _size(last, mask), f"{name}: its mask", most=1 << 62))
    if 0 < len(masks) < len(images):
        raise UserError(f"{owner}: {SOME_MASKS}")
    if len({mask.shape for mask in masks}) > 1:
        raise UserError(f"{owner}: masks differ in size: bring all to one")
    return np.stack(images), np.stack(masks) if masks else None


def _parts(item: Any, name: str) -> tuple[Any, Any]:
    if isinstance(item, Mapping):
        if "image" not in item:
            keys = ", ".join(map(repr, item))
            raise UserError(f"{name} has no 'image' (it has {keys or 'nothing'}): rename that which is one to 'image'")
        return item["image"], item.get("mask")
    if isinstance(item, tuple | list):
        if not item:
            raise UserError(f"{name} is empty: give an image, (image, mask), or a dict with 'image'")
        second = item[1] if len(item) > 1 else None
        return item[0], second if _is_map(second) else None
    return item, None


def _is_map(value: Any) -> bool:
    """Whether the second part of a tuple is a mask rather than a class or a vector of factors."""
    return isinstance(value, Image.Image) or (value is not None and getattr(value, "ndim", np.ndim(value)) >= 2)


def _size(image: np.ndarray, mask: Any) -> tuple[int, int]:
    """Height and width that a mask is to have: those of its image, or its own where the image is a grid of features."""
    if image.dtype == np.uint8:
        return image.shape[:2]
    if len(image) < FEATURES:
        return image.shape[1:]
    return tuple(np.squeeze(np.asarray(mask)).shape[-2:])


def _what(image: np.ndarray) -> str:
    height, width = image.shape[:2] if image.dtype == np.uint8 else image.shape[1:]
    return f"{height} x {width} of {image.dtype}"


def check_map_style(dataset: Any) -> None:
    """UserError unless it has items by number, and at least one."""
    name = type(dataset).__name__
    expected = "a data set with len() and items by number, 0 to len - 1"
    if isinstance(dataset, str | PurePath):
        raise UserError(f"{dataset} is a path: set the configuration's data to it, or hand over open_dataset of it")
    if isinstance(dataset, DataLoader):
        raise UserError(f"{name} gives batches: hand over its data set (loader.dataset)")
    if isinstance(dataset, Mapping):
        keys = ", ".join(map(repr, list(dataset)[:5]))
        raise UserError(
            f"{name} has the keys {keys}: hand over one of its parts, e.g. dataset[{next(iter(dataset), '')!r}]"
        )
    by_number = hasattr(dataset, "__getitem__") and not isinstance(dataset, IterableDataset)
    try:
        count = len(dataset) if by_number else 0
    except (TypeError, NotImplementedError):
        by_number = False
    if not by_number:
        raise UserError(
            f"{name} can only be iterated, and each image of a step is drawn from the whole set: expected {expected}; "
            f"what fits into memory becomes one by list(dataset)"
        )
    if not count:
        raise UserError(f"{name} is empty: expected {expected}, and at least one image")


def look_at(scenes: MapStyleDataset, splits: Sequence[Split]) -> tuple[np.ndarray, list[str]]:
    """Read the first and the last item of each split: the images, and what looks wrong without being an error.

    A data set may be slow to read, or count what is read: no more than that. UserError as of ``read_items``.
    """
    owner = type(scenes.dataset).__name__
    rows = [int(row) for split in splits for row in dict.fromkeys((split.rows[0], split.rows[-1]))]
    items = [(row, scenes.dataset[row]) for row in rows]
    images, masks = _together(items, owner)
    warnings = [f"images of the {owner} are all equal"] if len(images) > 2 and (images == images[:1]).all() else []
    if masks is None:
        warnings += _unread(items[0][1], owner)
    elif (masks == 255).any() and all(split.ignore_label is None for split in splits):
        warnings.append(
            f"masks of the {owner} have the label 255, scored as an object: where it means 'do not score', set its "
            f"attribute ignore_label = 255, or --ignore_label 255"
        )
    return images, warnings


def _unread(item: Any, name: str) -> list[str]:
    """What could be a mask, in items from which none is read."""
    if isinstance(item, Mapping):
        found = sorted(MASK_LIKE & {str(key) for key in item})
        return [f"items of the {name} have {found[0]!r}, but masks are read from 'mask' alone"] if found else []
    if isinstance(item, tuple | list) and len(item) > 1:
        second = item[1]
        shape = list(getattr(second, "shape", ()))
        return [f"the second part of the {name}'s items ({type(second).__name__} {shape}) is no mask [H, W]: not used"]
    return []
