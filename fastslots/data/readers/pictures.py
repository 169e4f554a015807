"""Sets made of picture files: CLEVR v1.0 (with its scenes JSON) and any folder of images. Neither has masks."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastslots.data.items import pixels_of
from fastslots.data.readers.named_splits import in_order, split_named, split_of
from fastslots.data.readers.scene import BadRecordError, Scene
from fastslots.data.storage.paths import visible
from fastslots.errors import UserError

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}  # of files that are taken for pictures
FORMATS = ("PNG", "JPEG", "BMP", "WEBP")
"""Whatever a file is named: for PostScript Pillow would start another program. MPO is opened as a JPEG: by its own name
Pillow cannot open it."""
MAX_PIXELS = 1 << 26  # a picture that claims more is refused before it is decoded,
MAX_RATIO = 4096  # as is one that claims more pixels a byte of its file: DEFLATE gives at most 1,032 bytes a byte
# Codes count from 1 in the order of the CLEVR generator's table; 0 = background or no object
CODES = {
    "shape": ("cube", "sphere", "cylinder"),
    "size": ("large", "small"),
    "material": ("rubber", "metal"),
    "color": ("gray", "red", "blue", "green", "brown", "purple", "cyan", "yellow"),
}
NUMBERS = ("3d_coords", "pixel_coords", "rotation")
MOST_OBJECTS = 254  # of a scene; every scene's factors have room for those of the fullest, and 255 means unknown


def read_picture(path: Path, data: bytes | None = None) -> np.ndarray:
    """uint8 [H, W, 3], as a viewer shows it. UserError where it is no picture, or not one of 8 bits and opaque.

    data: the bytes of its file, where they lie in another one; ``path`` is then what messages call it.
    """
    with open_picture(path, data) as picture:
        return pixels_of(picture, str(path))


@contextlib.contextmanager
def open_picture(path: Path, data: bytes | None = None) -> Iterator[Image.Image]:
    """A decoded picture. UserError where it is none, or claims more than its file can hold. data: as of
    ``read_picture``."""
    try:
        size = path.stat().st_size if data is None else len(data)
        with Image.open(path if data is None else io.BytesIO(data), formats=FORMATS) as picture:
            pixels = picture.width * picture.height
            if pixels > MAX_PIXELS or pixels > (1 << 18) + MAX_RATIO * size:
                raise UserError(f"{path}: {picture.width} x {picture.height} pixels are too many: make it smaller")
            picture.load()
            yield picture
    except UserError:
        raise
    except Exception as error:  # Pillow's plugins raise many types on bad bytes
        raise UserError(f"{path} cannot be read as a picture ({error}): replace or remove it") from None


class ClevrReader:
    """CLEVR v1.0: ``images/SPLIT/*.png`` and ``scenes/CLEVR_SPLIT_scenes.json``."""

    kind = "CLEVR v1.0"
    crop = True
    published_split = False
    native = (320, 480)

    def __init__(self, path: Path):
        self._folder = path
        found: list[tuple[Path, Any, int]] = []
        splits: list[str | None] = []
        for file in self.scene_files(path):
            try:
                for scene in json.loads(file.read_text())["scenes"]:
                    name = scene["image_filename"]
                    split = scene.get("split") or self._split(path, name, file)
                    picture = self._picture(path, split, name, file)
                    found.append((picture, scene["objects"], len(scene["objects"])))
                    splits.append(split_named(file.name.removeprefix("CLEVR_").removesuffix("_scenes.json")))
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                if isinstance(error, UserError):
                    raise
                raise UserError(f"{file} is no CLEVR scenes file ({error!r}): download it again") from None
        self._scenes, self.parts = in_order(found, splits)
        if not self._scenes:
            raise UserError(f"{path}: its scenes files name no scene: download them again")
        most = max(objects for *_, objects in self._scenes)
        if most > MOST_OBJECTS:
            raise UserError(f"{path}: a scene of {most:,} objects is too large, {MOST_OBJECTS} are the most: remove it")
        self._entries = 1 + most

    @staticmethod
    def scene_files(path: Path) -> list[Path]:
        return visible(path / "scenes", "CLEVR_*_scenes.json")

    @classmethod
    def recognises(cls, path: Path) -> bool:
        return bool(cls.scene_files(path))

    @staticmethod
    def _split(folder: Path, name: str, file: Path) -> str:
        """Where a scene does not say: SPLIT of CLEVR_SPLIT_scenes.json; else, where no such pictures are, that of
        CLEVR_SPLIT_000000.png."""
        split = file.name.removeprefix("CLEVR_").removesuffix("_scenes.json")
        if (folder / "images" / split).is_dir():
            return split
        return name.removeprefix("CLEVR_").rpartition("_")[0] or split

    @staticmethod
    def _picture(folder: Path, split: str, name: str, file: Path) -> Path:
        """Judged by name here, and by where a link leads in ``_inside``."""
        if any(part in ("", ".", "..") or "/" in part or "\\" in part or "\0" in part for part in (split, name)):
            raise UserError(f"{file} names {split}/{name}, which lies outside the data folder: mend that name")
        return folder / "images" / split / name

    def share(self, done: int) -> float:
        return done / len(self._scenes)

    def scenes(self, start: int = 0) -> Iterator[Scene | BadRecordError]:
        for path, objects, count in self._scenes[start:]:
            try:
                if not path.is_file():
                    raise UserError(f"{path}: no such file, though the scenes name it: download the images again")
                if path.is_symlink() and not self._inside(path):
                    raise UserError(
                        f"{path} is a link that leads outside the data folder: put the picture itself there"
                    )
                yield Scene(read_picture(path), None, count, self._factors(objects))
            except UserError as error:
                yield BadRecordError(str(error))
            except OSError as error:  # a name that is too long
                yield BadRecordError(f"{path} cannot be read ({error.strerror}): mend its name in the scenes file")
            except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
                yield BadRecordError(f"{path}: its objects in the scenes file are malformed ({error!r}): mend them")

    def _inside(self, link: Path) -> bool:
        """Whether a picture that is a link stays in the data folder; ``images`` or a split may lie on another disk."""
        roots = (self._folder, self._folder / "images", link.parent)
        return any(link.resolve().is_relative_to(root.resolve()) for root in roots)

    def _factors(self, objects: Any) -> dict[str, np.ndarray]:
        """[entries] or [entries, 3] each, in the layout of CLEVR with masks: entry 0 is the background."""
        factors = {}
        for name, words in CODES.items():
            factors[name] = np.zeros(self._entries, np.uint8)
            for entry, thing in enumerate(objects, 1):
                factors[name][entry] = words.index(thing[name]) + 1 if name in thing else 0
        for name in NUMBERS:
            factors[name] = np.zeros((self._entries, *[3] * (name != "rotation")), np.float32)
            for entry, thing in enumerate(objects, 1):
                factors[name][entry] = thing.get(name, 0)
        return factors


class FolderReader:
    """Every picture below a folder, in the order of its names (those below ``train`` first); hidden files left out."""

    kind = "folder of images"
    crop = False
    published_split = False

    def __init__(self, path: Path):
        found = [p for p in visible(path) if p.suffix.lower() in SUFFIXES]
        self._paths, self.parts = in_order(found, [split_of(p.relative_to(path)) for p in found])
        self.count = len(self._paths)
        self.native = self._first_size() if self._paths else (0, 0)

    def _first_size(self) -> tuple[int, int]:
        """Height and width of the first picture that can be read; the error of the first where none can."""
        first: UserError | None = None
        for path in self._paths:
            try:
                return read_picture(path).shape[:2]
            except UserError as error:
                first = first or error
        assert first is not None
        raise first

    def share(self, done: int) -> float:
        return done / self.count

    def scenes(self, start: int = 0) -> Iterator[Scene | BadRecordError]:
        for path in self._paths[start:]:
            try:
                yield Scene(read_picture(path), None, None)
            except UserError as error:
                yield BadRecordError(str(error))
