"""Sets made of picture files: CLEVR v1.0 (with its scenes JSON) and any folder of images. Neither has masks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from fastslots.data.scene import Scene
from fastslots.errors import UserError

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
MAX_PIXELS = 1 << 26  # a picture that claims more is refused before it is decoded


def read_picture(path: Path) -> np.ndarray:
    """uint8 [H, W, 3]; transparency is dropped. UserError where it is no picture."""
    try:
        with Image.open(path) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise UserError(f"{path}: {picture.width} x {picture.height} pixels are more than this reads")
            return np.asarray(picture.convert("RGB"))
    except UserError:
        raise
    except Exception as error:  # Pillow's plugins raise many types on bad bytes
        raise UserError(f"{path} cannot be read as a picture ({error}): replace or remove it") from None


class ClevrReader:
    """CLEVR v1.0: ``images/SPLIT/*.png`` and ``scenes/CLEVR_SPLIT_scenes.json``."""

    kind = "CLEVR v1.0"
    crop = True
    published_split = False

    def __init__(self, path: Path):
        self._folder = path
        self._scenes = []
        for file in sorted((path / "scenes").glob("CLEVR_*_scenes.json")):
            try:
                scenes = json.loads(file.read_text())["scenes"]
                self._scenes += [(scene["split"], scene["image_filename"], scene["objects"]) for scene in scenes]
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise UserError(f"{file} is no CLEVR scenes file ({error!r}): download it again") from None
        self.count = len(self._scenes)
        self.native = (320, 480)

    @staticmethod
    def recognises(path: Path) -> bool:
        return any((path / "scenes").glob("CLEVR_*_scenes.json"))

    def scenes(self) -> Iterator[Scene]:
        root = (self._folder / "images").resolve()
        for split, name, objects in self._scenes:
            path = (root / str(split) / str(name)).resolve()
            if not path.is_relative_to(root):
                raise UserError(f"{self._folder}: the scenes name {name!r}, which lies outside the data folder")
            if not path.is_file():
                raise UserError(f"{path}: no such file, though the scenes name it: download the images again")
            factors = {key: np.array([o[key] for o in objects]) for key in ("3d_coords", "rotation") if objects}
            yield Scene(read_picture(path), None, len(objects), factors)


class FolderReader:
    """Every picture below a folder, in the order of its names."""

    kind = "folder of images"
    crop = False
    published_split = False

    def __init__(self, path: Path):
        self._paths = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        self.count = len(self._paths)
        self.native = read_picture(self._paths[0]).shape[:2] if self._paths else (0, 0)

    def scenes(self) -> Iterator[Scene]:
        for path in self._paths:
            yield Scene(read_picture(path), None, None)
