"""WebDataset: tars in which the files of a sample follow one another, KEY.png, KEY.mask.png, KEY.json, ...

A key is a name up to the first dot after its folder. Pickles (.pyd, .pkl) are never loaded.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from fastslots.data.items import to_uint8
from fastslots.data.readers.masked import (
    IMAGE_WORDS,
    LOOKED_AT,
    MASK_WORDS,
    coding_of,
    count_objects,
    decoded,
    raw_mask,
)
from fastslots.data.readers.npz import MOST_BYTES, read_npy
from fastslots.data.readers.pictures import SUFFIXES, read_picture
from fastslots.data.readers.scene import BadRecordError, Scene
from fastslots.data.storage.paths import HIDDEN
from fastslots.errors import UserError

_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")
Sample = tuple[str, dict[str, bytes]]


def looks_like_webdataset(path: Path) -> bool:
    """Whether samples of a tar have a mask or several files; else, and where names rather than extensions say what is
    a mask (NAME_mask.png, ClevrTex's NAME_flat.png), it is an archive of a folder."""
    found = False
    try:
        for key, files in islice(_samples(path), 4):
            if set(re.split(r"[_/-]", key.lower())) & (MASK_WORDS | {"flat"}):
                return False
            found |= len(files) > 1 or any(_role(name) == "mask" for name in files)
    except UserError:
        pass
    return found


def is_tar(path: Path) -> bool:
    try:
        return tarfile.is_tarfile(path)
    except OSError:
        return False


def _samples(path: Path) -> Iterator[Sample]:
    """(key, extension -> bytes), in order. UserError where the tar is damaged, from that place on."""
    key: str | None = None
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r|*") as archive:
            for member in archive:
                match = _NAME.fullmatch(member.name.removeprefix("./"))
                if not member.isfile() or not match or any(p[0] == "." or p in HIDDEN for p in Path(match[1]).parts):
                    continue
                if member.size > MOST_BYTES:
                    raise UserError(f"{path}: {member.name} of {member.size:,} bytes is too large: make it smaller")
                if match[1] != key and files:
                    yield str(key), files
                    files = {}
                key = match[1]
                file = archive.extractfile(member)
                files[match[2].lower()] = file.read() if file else b""
        if files:
            yield str(key), files
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is damaged ({error}): download it again") from None


def _role(name: str) -> str:
    """ "image", "mask", "numbers" or "" of an extension such as mask.png, json or cls."""
    *words, kind = name.split(".")
    words = [w for word in words for w in re.split(r"[_-]", word)]
    if f".{kind}" in SUFFIXES or kind == "npy":
        if any(word in MASK_WORDS for word in words):
            return "mask"
        return "image" if not words or any(word in IMAGE_WORDS for word in words) else ""
    return "numbers" if kind in ("json", "cls") else ""


class WebDatasetReader:
    kind = "WebDataset"
    crop = False
    published_split = False

    def __init__(self, path: Path):
        self._path, self._done = path, 0
        sizes, masks, roles, first = [], [], {}, None
        for key, files in islice(_samples(path), LOOKED_AT):
            try:
                roles = self._roles(key, files)
                if "image" in roles:
                    sizes.append(self._image(key, roles["image"], files).shape[:2])
                if "mask" in roles:
                    masks.append(raw_mask(Path(f"{path}/{key}.{roles['mask']}"), files[roles["mask"]]))
            except UserError as error:  # said where it is read as a scene
                first = first or error
        if not sizes:
            raise first or UserError(
                f"{path}: no sample has a picture (KEY.png, KEY.jpg, KEY.image.png): name another tar"
            )
        self.native = sizes[0]
        self._coding = coding_of(masks)
        self.ignore_label = self._coding.ignore_label
        found = ", ".join(f"{role}s in .{name}" for role, name in roles.items())
        self.read_as = found + (f"; masks are {self._coding}" if masks else "")

    def _roles(self, key: str, files: dict[str, bytes]) -> dict[str, str]:
        """role -> extension. UserError where two could be the same."""
        roles: dict[str, str] = {}
        for name in files:
            role = _role(name)
            if role in ("image", "mask"):
                if role in roles:
                    raise UserError(
                        f"{self._path}: sample {key} has .{roles[role]} and .{name}, which could both be its {role}: "
                        f"leave one out"
                    )
                roles[role] = name
        return roles

    def _image(self, key: str, name: str, files: dict[str, bytes]) -> np.ndarray:
        place = Path(f"{self._path}/{key}.{name}")
        if not name.endswith("npy"):
            return read_picture(place, files[name])
        image = to_uint8(np.asarray(read_npy(place, files[name])), str(place))
        if image.ndim != 3 or image.shape[2] != 3:
            raise UserError(f"{place} has shape {list(image.shape)}, expected [H, W, 3]: save it so")
        return image

    def share(self, done: int) -> float:
        return 1 - 1 / (1 + done / 1000)  # a tar does not say how many samples it has

    def scenes(self, start: int = 0) -> Iterator[Scene | BadRecordError]:
        for key, files in islice(_samples(self._path), start, None):
            try:
                yield self._scene(key, files)
            except UserError as error:
                yield BadRecordError(str(error))

    def _scene(self, key: str, files: dict[str, bytes]) -> Scene:
        roles = self._roles(key, files)
        if "image" not in roles:
            raise UserError(f"{self._path}: sample {key} has no picture (it has {', '.join(files)}): remove it")
        image, mask = self._image(key, roles["image"], files), None
        if "mask" in roles:
            place = Path(f"{self._path}/{key}.{roles['mask']}")
            mask = decoded(raw_mask(place, files[roles["mask"]]), self._coding, image.shape[:2], str(place))
        objects = None if mask is None else count_objects(mask, self.ignore_label)
        return Scene(image, mask, objects, _numbers(files))


def _numbers(files: dict[str, bytes]) -> dict[str, np.ndarray]:
    """Factors: what is a number, or a list of them, in KEY.json; the class of KEY.cls."""
    found: dict[str, Any] = {}
    try:
        if "json" in files:
            values = json.loads(files["json"])
            found |= values if isinstance(values, dict) else {}
        if "cls" in files:
            found["cls"] = int(files["cls"])
    except (ValueError, RecursionError):
        return {}
    return numeric(found)


def numeric(values: dict[str, Any]) -> dict[str, np.ndarray]:
    """Those that are numbers, or lists of numbers of one shape."""
    out = {}
    for name, value in values.items():
        try:
            array = np.asarray(value)
        except ValueError:
            continue
        if array.dtype.kind in "iufb" and array.size:
            out[name] = array
    return out
