"""COCO: an annotations JSON with polygons and run-length masks, and the pictures that it names.

Objects of a picture are labelled 1, 2, ... in the order of the annotations; where they overlap, which COCO allows, the
smaller one is on top. Regions of crowds are not scored (label 255). Masks are decoded by pycocotools.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fastslots.data.readers.named_splits import in_order, split_named
from fastslots.data.readers.pictures import MAX_PIXELS, MOST_OBJECTS, SUFFIXES, read_picture
from fastslots.data.readers.scene import BadRecordError, Scene
from fastslots.data.storage.paths import visible
from fastslots.errors import UserError

CROWD = 255
_HEAD = re.compile(rb'"(images|annotations|licenses|categories|info)"\s*:')


def annotation_files(path: Path) -> list[Path]:
    """The JSON files of COCO's kind that a path means: itself, or those of a folder or of its ``annotations``; of these
    the ones named instances_* where there are such (beside captions and key points)."""
    if path.is_file():
        return [path] if _looks_like_coco(path) else []
    places = [*path.glob("*.json"), *(path / "annotations").glob("*.json")]
    found = sorted(p for p in places if p.name[0] != "." and _looks_like_coco(p))
    return [p for p in found if p.name.startswith("instances")] or found


def _looks_like_coco(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            head = file.read(4096)
    except OSError:
        return False
    return head.lstrip()[:1] == b"{" and bool(_HEAD.search(head)) and b'"scenes"' not in head


class CocoReader:
    kind = "COCO"
    crop = False
    published_split = False

    def __init__(self, path: Path, files: list[Path]):
        try:
            import pycocotools.mask
        except ImportError:
            raise UserError(f"{path} is COCO, which needs pycocotools: pip install 'fastslots[coco]'") from None
        self._rle = pycocotools.mask
        root = path if path.is_dir() else _root(path)
        places: dict[str, list[Path]] = defaultdict(list)
        for picture in visible(root):
            if picture.suffix.lower() in SUFFIXES:
                places[picture.name].append(picture)
        self._scenes: list[tuple[Path, list[dict[str, Any]]]] = []
        splits: list[str | None] = []
        for file in files:
            self._add(file, places)
            splits += [split_named(file.stem.rpartition("_")[2])] * (len(self._scenes) - len(splits))
        self._scenes, self.parts = in_order(self._scenes, splits)
        if not self._scenes:
            raise UserError(f"{files[0]} names no pictures: name the annotations of instances")
        crowds = any(a.get("iscrowd") for _, objects in self._scenes for a in objects)
        self.ignore_label = CROWD if crowds else None
        self._entries = 1 + max(sum(not a.get("iscrowd") for a in objects) for _, objects in self._scenes)
        self._entries = min(self._entries, MOST_OBJECTS + 1)
        self.native = self._first_size()
        names = ", ".join(file.name for file in files)
        self.read_as = f"objects of {names}, the smaller on top" + ("; crowds are not scored" if crowds else "")

    def _add(self, file: Path, places: dict[str, list[Path]]) -> None:
        try:
            found = json.loads(file.read_bytes())
            of_image: dict[Any, list[dict[str, Any]]] = defaultdict(list)
            for annotation in found["annotations"]:
                of_image[annotation["image_id"]].append(annotation)
            if found["annotations"] and not any("segmentation" in a for a in found["annotations"]):
                raise UserError(f"{file} holds no segmentation (boxes or captions alone): name instances_*.json")
            for image in found["images"]:
                self._scenes.append((_place(image["file_name"], places, file), of_image[image["id"]]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{file} is no annotation file of COCO ({error!r}): download it again") from None

    def _first_size(self) -> tuple[int, int]:
        for path, _ in self._scenes:
            try:
                return read_picture(path).shape[:2]
            except UserError:
                continue
        return read_picture(self._scenes[0][0]).shape[:2]  # none can be read: the first one's error

    def share(self, done: int) -> float:
        return done / len(self._scenes)

    def scenes(self, start: int = 0) -> Iterator[Scene | BadRecordError]:
        for path, found in self._scenes[start:]:
            try:
                image = read_picture(path)
                mask, categories = self._mask(path, found, image.shape[:2])
                factors = {"category": np.zeros(self._entries, np.int64)}
                factors["category"][1 : 1 + len(categories)] = categories
                shown = np.unique(mask)
                yield Scene(image, mask, int(((shown > 0) & (shown != self.ignore_label)).sum()), factors)
            except UserError as error:
                yield BadRecordError(str(error))

    def _mask(self, path: Path, found: list[dict[str, Any]], size: tuple[int, int]) -> tuple[np.ndarray, list[int]]:
        """Labels [H, W], and the category of each object."""
        mask, crowds, objects = np.zeros(size, np.uint8), np.zeros(size, bool), []
        for annotation in found:
            region = self._region(path, annotation, size)
            if annotation.get("iscrowd"):
                crowds |= region
            else:
                objects.append((region, int(annotation.get("category_id", 0))))
        if len(objects) > MOST_OBJECTS:
            raise UserError(f"{path} has {len(objects):,} objects, {MOST_OBJECTS} are the most: leave it out")
        for label in sorted(range(len(objects)), key=lambda i: -int(objects[i][0].sum())):
            mask[objects[label][0]] = label + 1
        mask[crowds & (mask == 0)] = CROWD
        return mask, [category for _, category in objects]

    def _region(self, path: Path, annotation: dict[str, Any], size: tuple[int, int]) -> np.ndarray:
        """bool [H, W] of polygons, or of a run-length code, compressed or not."""
        height, width = size
        try:
            region = annotation["segmentation"]
            if isinstance(region, list):
                if not region:
                    return np.zeros(size, bool)
                code = self._rle.merge(self._rle.frPyObjects(region, height, width))
            else:
                if list(region["size"]) != [height, width] or height * width > MAX_PIXELS:
                    raise ValueError(f"its size is {region['size']}, the picture's {[height, width]}")
                code = region
                if isinstance(region["counts"], list):
                    if sum(region["counts"]) != height * width or min(region["counts"]) < 0:
                        raise ValueError("its runs are not as long as the picture")
                    code = self._rle.frPyObjects(region, height, width)
            decoded: np.ndarray = self._rle.decode(code)
            return decoded.astype(bool)
        except Exception as error:  # pycocotools raises what its C code meets
            which = annotation.get("id", "?")
            raise UserError(f"{path}: annotation {which} has no mask that can be read ({error}): remove it") from None


def _root(file: Path) -> Path:
    """Where the pictures of an annotation file lie: beside it, or beside the folder ``annotations`` that holds it."""
    return file.parent.parent if file.parent.name == "annotations" else file.parent


def _place(name: str, places: dict[str, list[Path]], file: Path) -> Path:
    """The picture of that name below the set's folder; where several have it, the one whose folders fit best."""
    parts = Path(name).parts
    found = places.get(parts[-1], []) if parts else []
    split = file.stem.rpartition("_")[2]
    fits = [p for p in found if p.parts[-len(parts) :] == parts]
    fits = [p for p in fits if split in p.parts] or fits
    if len(fits) != 1:
        what = "is not there" if not fits else f"is there {len(fits)} times"
        raise UserError(f"{file} names {name}, which {what} below its folder: put the pictures of that set beside it")
    return fits[0]
