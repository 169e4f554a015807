"""One scene as every reader gives it, and the preprocessing that they share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from PIL import Image

from fastslots.errors import UserError

CLEVR_SIZE = 128  # the convention of Slot Attention (arXiv 2006.15055) and of the paper's arrays
CLEVR_CROP = (29, 221, 64, 256)  # top, bottom, left, right of 240 x 320


@dataclass
class Scene:
    """image uint8 [H, W, 3]; mask uint8 [H, W] of entry numbers, 0 = background, or None; factors as in the file."""

    image: np.ndarray
    mask: np.ndarray | None
    objects: int | None  # how many; None where nothing tells
    factors: dict[str, np.ndarray] = field(default_factory=dict)


class BadRecordError(UserError):
    """A scene that cannot be read, while those after it can."""


class Reader(Protocol):
    """A data set on disk, read in order."""

    @property
    def kind(self) -> str: ...  # its name for people, e.g. "CLEVR with masks"
    @property
    def crop(self) -> bool: ...  # whether CLEVR's centred crop applies
    @property
    def published_split(self) -> bool: ...  # whether the authors' split applies (their npz)
    # May have: ``ignore_label``, of pixels that are not scored; ``read_as``, what was understood of a layout that could
    # be read otherwise; ``parts``, how many of the scenes train, validate and test, in this order (0: not said).
    @property
    def native(self) -> tuple[int, int]: ...  # height and width on disk (of the first scene, where they differ)

    def scenes(self, start: int = 0) -> Iterator[Scene | BadRecordError]:
        """Scenes in order, from scene ``start`` on; in place of one that is damaged, the error that says so.

        Raises UserError where nothing after a damaged place can be read.
        """
        ...

    def share(self, done: int) -> float:
        """How much of the set has been read after ``done`` scenes, 0 to 1."""
        ...


def default_size(reader: Reader) -> int:
    return CLEVR_SIZE if reader.crop else min(reader.native)


def preprocess(scene: Scene, crop: bool, size: int) -> Scene:
    """Crop to a square and resize: images bilinearly (antialiased), masks by nearest neighbour.

    Raises ValueError where CLEVR's crop reaches beyond the picture.
    """
    height, width = scene.image.shape[:2]
    if crop:
        scale = height / 240  # CLEVR v1.0 is larger by 4/3
        centre = width / 2
        top, bottom = round(CLEVR_CROP[0] * scale), round(CLEVR_CROP[1] * scale)
        half = (CLEVR_CROP[3] - CLEVR_CROP[2]) / 2 * scale
        left, right = round(centre - half), round(centre + half)
        if left < 0:
            raise ValueError(f"CLEVR's crop does not fit into {height} x {width} pixels")
    else:
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        bottom, right = top + side, left + side
    image = scene.image[top:bottom, left:right]
    mask = None if scene.mask is None else scene.mask[top:bottom, left:right]
    if image.shape[:2] != (size, size):
        image = np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize((size, size), Image.Resampling.BILINEAR))
        if mask is not None:
            nearest = Image.Resampling.NEAREST
            mask = np.asarray(Image.fromarray(np.ascontiguousarray(mask)).resize((size, size), nearest))
    return Scene(image, mask, scene.objects, scene.factors)


def labels_of(entries: np.ndarray, backgrounds: int = 1) -> np.ndarray:
    """Masks of entries [N, H, W] (0 or 255) -> label map uint8 [H, W]: 0 for the first ``backgrounds`` entries,
    then 1, 2, ...

    Where masks overlap, which no published set has, the highest entry owns the pixel; where there are none, the
    background.
    """
    labels = np.zeros(entries.shape[1:], np.uint8)
    for label, entry in enumerate(entries[backgrounds:], 1):  # 4x faster than argmax over the first axis
        np.maximum(labels, (entry != 0) * np.uint8(label), out=labels)
    return labels
