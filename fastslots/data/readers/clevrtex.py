"""ClevrTex (arXiv 2111.10265): ``NAME.png``, ``NAME_flat.png`` (a palette of labels) and ``NAME.json``, in any folders.

Scenes are cropped to the centred square of 0.8 of their height, as is usual (192 of 240 x 320).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from fastslots.data.readers.pictures import FORMATS, read_picture
from fastslots.data.readers.scene import BadRecordError, Scene
from fastslots.data.storage.paths import is_hidden, visible
from fastslots.errors import UserError

CROP = 0.8
FLAT = "_flat.png"


class ClevrTexReader:
    kind = "ClevrTex"
    crop = False  # its own is made here
    published_split = False

    def __init__(self, path: Path):
        self._masks = self.mask_files(path)
        side = round(CROP * min(self._image(self._masks[0]).shape[:2]))
        self.native = (side, side)

    @staticmethod
    def mask_files(path: Path) -> list[Path]:
        return [p for p in visible(path, f"*{FLAT}") if _picture_of(p).is_file()]

    @classmethod
    def recognises(cls, path: Path) -> bool:
        return any(_picture_of(p).is_file() for p in path.rglob(f"*{FLAT}") if not is_hidden(p, path))

    def share(self, done: int) -> float:
        return done / len(self._masks)

    def scenes(self, start: int = 0) -> Iterator[Scene | BadRecordError]:
        for path in self._masks[start:]:
            try:
                image, mask = self._image(path), _labels(path)
                if mask.shape != image.shape[:2]:
                    raise UserError(f"{path} is of another size than its picture: download both again")
                yield Scene(_cropped(image), _cropped(mask), _count(path, mask))
            except UserError as error:
                yield BadRecordError(str(error))

    @staticmethod
    def _image(mask: Path) -> np.ndarray:
        return read_picture(_picture_of(mask))


def _picture_of(mask: Path) -> Path:
    return mask.with_name(mask.name.removesuffix(FLAT) + ".png")


def _labels(path: Path) -> np.ndarray:
    """uint8 [H, W] labels, 0 = background; the colours of the palette mean nothing."""
    read_picture(path)  # refuses what is too large or damaged, with its mend
    with Image.open(path, formats=FORMATS) as picture:
        if picture.mode not in ("P", "L"):
            raise UserError(
                f"{path} is a picture of mode {picture.mode}, expected a palette of labels: download it again"
            )
        return np.asarray(picture)


def _count(mask: Path, labels: np.ndarray) -> int:
    """Objects of the scene, by its JSON where that is there; else those that the whole mask shows."""
    path = mask.with_name(mask.name.removesuffix(FLAT) + ".json")
    if not path.is_file():
        return len(np.unique(labels[labels > 0]))
    try:
        return len(json.loads(path.read_text())["objects"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is no ClevrTex scene ({error!r}): download it again") from None


def _cropped(picture: np.ndarray) -> np.ndarray:
    height, width = picture.shape[:2]
    side = round(CROP * min(height, width))
    top, left = (height - side) // 2, (width - side) // 2
    return picture[top : top + side, left : left + side]
