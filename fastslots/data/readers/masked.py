"""Pictures with masks in picture files: ``images/`` and ``masks/`` of any names, NAME_mask.png beside NAME.png, Pascal
VOC. A layout that could be read in two ways is refused, and both are named."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from fastslots.data.items import MOST_LABEL, VOID, labels_of_colours, mask_of, to_labels, void_label
from fastslots.data.readers.named_splits import SPLIT_WORDS, Parts, in_order, split_of
from fastslots.data.readers.npz import read_npy
from fastslots.data.readers.pictures import SUFFIXES, open_picture, read_picture
from fastslots.data.readers.scene import BadRecordError, Scene
from fastslots.data.readers.voc import find_pairs, voc_root
from fastslots.data.storage.paths import visible
from fastslots.errors import UserError

MASK_WORDS = set(
    "mask masks seg segs segmentation segmentations label labels labelmap gt annotation annotations".split()
)
MASK_WORDS |= set("instance instances instanceids labelids panoptic segmentationobject segmentationclass".split())
IMAGE_WORDS = set(
    "image images img imgs rgb picture pictures photo photos frame frames jpegimages input inputs".split()
)
LOOKED_AT = 32  # masks that tell how labels are written
FEW_COLOURS = 64  # of a picture that may be a mask
T = TypeVar("T")
Key = tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """Pictures with the mask of each, and how they were found."""

    pairs: list[tuple[Path, Path]]
    how: str
    kind: str = "images with masks"
    parts: Parts | None = None  # of ``pairs``, where folders or lists say which train, validate and test


def find_layout(folder: Path) -> Layout | None:
    """The pictures of a folder that have masks; None where it holds pictures alone, or none.

    UserError where two readings are possible, or where some pictures have masks and others none.
    """
    root = voc_root(folder)
    if root:
        pairs, how, parts = find_pairs(root)
        return Layout(pairs, how, "Pascal VOC", parts) if pairs else None
    found = [p for p in visible(folder) if p.suffix.lower() in {*SUFFIXES, ".npy"}]
    layout = _beside(folder, found) or _in_folders(folder, found)
    if layout is None:
        return None
    pairs, parts = in_order(layout.pairs, [split_of(image.relative_to(folder)) for image, _ in layout.pairs])
    return replace(layout, pairs=pairs, parts=parts)


# ---- NAME_mask.png beside NAME.png -----------------------------------------------------------------------------------


def _role(path: Path) -> tuple[str, Key]:
    """Mask or image, and the words of a name without those that say so."""
    words = [word for word in re.split(r"[ ._-]+", path.stem.lower()) if word]
    said = [word for word in words if word in MASK_WORDS]
    key = tuple(word for word in words if word not in MASK_WORDS and word not in IMAGE_WORDS)
    return ("mask" if said else "image"), key or tuple(words)


def _beside(folder: Path, found: list[Path]) -> Layout | None:
    images: dict[Key, list[Path]] = defaultdict(list)
    masks: dict[Key, list[Path]] = defaultdict(list)
    for path in found:
        role, key = _role(path)
        (masks if role == "mask" else images)[(str(path.parent), *key)].append(path)
    if not images.keys() & masks.keys():
        return None
    return Layout(_paired(images, masks, folder), "masks beside their images, by name (NAME_mask beside NAME)")


def _paired(images: dict[Key, list[Path]], masks: dict[Key, list[Path]], folder: Path) -> list[tuple[Path, Path]]:
    """One mask each, in the order of the images' names. UserError names the first that is left over, or has two."""
    for one, paths in ((images, "images"), (masks, "masks")):
        twice = next((p for p in one.values() if len(p) > 1), None)
        if twice:
            first, second = (p.relative_to(folder) for p in twice[:2])
            raise UserError(
                f"{folder}: {first} and {second} could both be the {paths[:-1]} of one scene: keep one of them, or "
                f"name the folder of the {paths} that are meant"
            )
    for one, other, what, lacks in ((images, masks, "image", "mask"), (masks, images, "mask", "image")):
        left = [paths[0] for key, paths in one.items() if key not in other]
        if left:
            raise UserError(
                f"{folder}: {len(left):,} of {len(one):,} {what}s have no {lacks} of their name (first: "
                f"{left[0].relative_to(folder)}): add what is missing, or remove them; a folder of images alone is "
                f"named by its own path"
            )
    return sorted((images[key][0], masks[key][0]) for key in images)


# ---- two folders -----------------------------------------------------------------------------------------------------


def _in_folders(folder: Path, found: list[Path]) -> Layout | None:
    """Two folders whose pictures have the same names, at any depth (images/train/1.png and masks/train/1.png)."""
    deepest = max((len(p.relative_to(folder).parts) - 1 for p in found), default=0)
    for place in range(deepest):
        of_names: dict[str, dict[Key, list[Path]]] = defaultdict(lambda: defaultdict(list))
        for path in found:
            parts = path.relative_to(folder).parts[:-1]
            if len(parts) > place:
                _, key = _role(path)
                of_names[parts[place]][(*parts[:place], "*", *parts[place + 1 :], *key)].append(path)
        layout = _of_two(folder, of_names)
        if layout:
            return layout
    lone = [p for p in found if any(part.lower() in MASK_WORDS for part in p.relative_to(folder).parts[:-1])]
    if lone and len(lone) < len(found) and _is_flat(lone):
        inside = lone[0].relative_to(folder)
        raise UserError(
            f"{folder}: {inside.parent} could hold masks, by its name and pictures, but no picture elsewhere has the "
            f"name of {inside.name}; or all are images: name masks as their images, or give one folder's path alone"
        )
    return None


def _of_two(folder: Path, of_names: dict[str, dict[Key, list[Path]]]) -> Layout | None:
    """Which of folders that share names of pictures holds the images, and which the masks."""
    shared = sorted(
        n for n, keys in of_names.items() if any(keys.keys() & of_names[m].keys() for m in of_names if m != n)
    )
    if len(shared) < 2 or {name.lower() for name in shared} <= SPLIT_WORDS.keys():
        return None
    pictures = {name: [p for paths in of_names[name].values() for p in paths] for name in shared}
    named = [name for name in shared if name.lower() in MASK_WORDS]
    masks = [name for name in named or shared if name.lower() not in IMAGE_WORDS and _is_flat(pictures[name])]
    if named and not masks:
        raise UserError(
            f"{folder}: {named[0]} is named as masks, but its pictures have hundreds of colours: save masks as PNG, "
            f"without smoothing; or, if they are images, rename it or give one folder's path alone"
        )
    if not masks:
        return None
    if len(masks) > 1:  # drawn images are of few colours too, but not of numbers
        masks = [name for name in masks if _is_flat(pictures[name], numbers=True)] or masks
    images = [name for name in shared if name not in masks]
    images = [name for name in images if name.lower() in IMAGE_WORDS] or images
    if len(masks) != 1 or len(images) != 1:
        listed = ", ".join(shared)
        raise UserError(
            f"{folder}: {listed} hold pictures of the same names: either all are images, or one holds the masks of "
            f"another, and nothing tells which: name that one 'masks' and the other 'images', or give one's path alone"
        )
    return Layout(
        _paired(of_names[images[0]], of_names[masks[0]], folder),
        f"images in {images[0]}, masks of their names in {masks[0]}",
    )


def _is_flat(paths: list[Path], numbers: bool = False) -> bool:
    """Whether pictures may be masks: without losses, and of few colours. numbers: and of one channel."""
    for path in _some(sorted(paths), 3):
        if path.suffix.lower() == ".npy":
            continue
        try:
            with open_picture(path) as picture:
                if picture.format in ("JPEG", "MPO") or (numbers and len(picture.getbands()) > 1):
                    return False
                if picture.convert("RGB").getcolors(FEW_COLOURS) is None:
                    return False
        except UserError:
            return False
    return True


# ---- how labels are written ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Coding:
    """How the masks of a set are written, as the first and others of them show."""

    colours: bool  # else indices
    binary: bool  # 0 and 255 alone: one object
    ignore_label: int | None

    def __str__(self) -> str:
        form = (
            "colours, black the background"
            if self.colours
            else "one object, 255"
            if self.binary
            else "labels as numbers"
        )
        return form + ("; 255 is not scored" if self.ignore_label is not None else "")


def coding_of(masks: Iterable[np.ndarray]) -> Coding:
    """masks: as files hold them, [H, W] indices or [H, W, 3 or 4] colours."""
    seen: set[int] = set()
    colours = False
    for mask in masks:
        if mask.ndim == 3 and mask.shape[2] in (3, 4):
            colours |= bool((mask[..., :1] != mask[..., 1:3]).any())
        seen |= set(np.unique(mask[..., 0] if mask.ndim == 3 else mask).tolist())
    if colours:
        return Coding(True, False, None)
    return Coding(False, seen <= {0, VOID}, void_label(seen))


def decoded(mask: np.ndarray, coding: Coding, size: tuple[int, int], name: str) -> np.ndarray:
    """Labels uint8 [H, W] of one mask. UserError where it is of another size or has what no mask has."""
    if mask.shape[:2] == size and mask.ndim == 3 and mask.shape[2] in (3, 4):
        if coding.colours:
            return labels_of_colours(mask, name)
        mask = mask[..., 0]  # grey, written as colours
    labels = mask_of(mask, size, name, most=1 << 62)
    if coding.binary:
        return (labels > 0).astype(np.uint8)
    if (
        labels.max(initial=0) > MOST_LABEL
    ):  # numbers that are unique in a whole set: only who is who in a picture counts
        labels = np.unique(labels, return_inverse=True)[1].reshape(size) + (0 if labels.min() == 0 else 1)
    return to_labels(labels, name)


class MaskedReader:
    crop = False
    published_split = False

    def __init__(self, folder: Path, layout: Layout):
        self._pairs, self.kind, self.parts = layout.pairs, layout.kind, layout.parts
        self.native = self._first_size()
        self._coding = coding_of(self._readable_masks())
        self.ignore_label = self._coding.ignore_label
        self.read_as = f"{layout.how}; masks are {self._coding}"

    def _first_size(self) -> tuple[int, int]:
        first: UserError | None = None
        for path, _ in self._pairs:
            try:
                return read_picture(path).shape[:2]
            except UserError as error:
                first = first or error
        assert first is not None
        raise first

    def _readable_masks(self) -> Iterator[np.ndarray]:
        for _, path in _some(self._pairs, LOOKED_AT):
            try:
                yield raw_mask(path)
            except UserError:  # said where it is read as a scene
                continue

    def share(self, done: int) -> float:
        return done / len(self._pairs)

    def scenes(self, start: int = 0) -> Iterator[Scene | BadRecordError]:
        for path, mask in self._pairs[start:]:
            try:
                image = read_picture(path)
                labels = decoded(raw_mask(mask), self._coding, image.shape[:2], str(mask))
                yield Scene(image, labels, count_objects(labels, self.ignore_label))
            except UserError as error:
                yield BadRecordError(str(error))


def count_objects(labels: np.ndarray, ignore: int | None) -> int:
    return len(np.setdiff1d(labels, [0] if ignore is None else [0, ignore]))


def raw_mask(path: Path, data: bytes | None = None) -> np.ndarray:
    """As its file holds it: [H, W] indices (of a palette too), [H, W, 3 or 4] colours, or what an npy holds. data: as
    of ``read_picture``."""
    if path.suffix.lower() == ".npy":
        return read_npy(path, data)
    with open_picture(path, data) as picture:
        if picture.mode == "LA":
            picture = picture.convert("L")
        return np.asarray(picture)


def _some(things: Sequence[T], count: int) -> list[T]:
    return [things[i] for i in np.unique(np.linspace(0, len(things) - 1, min(count, len(things))).astype(int))]
