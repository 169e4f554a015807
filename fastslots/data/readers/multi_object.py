"""TFRecord sets of multi_object_datasets (DeepMind): CLEVR with masks, Multi-dSprites, Tetrominoes, Objects Room."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastslots.data.readers.scene import BadRecordError, Scene, labels_of
from fastslots.data.readers.tfrecord import Records, parse_example
from fastslots.errors import UserError

SKIPPED = ("image", "mask")


@dataclass(frozen=True)
class Layout:
    kind: str
    image: tuple[int, int, int]  # height, width, channels
    entries: int
    entries_last: bool = False  # mask [H, W, N, 1] instead of [N, H, W, 1]
    crop: bool = False
    backgrounds: int = 1  # entries that come before the objects

    @property
    def sizes(self) -> tuple[int, int]:
        height, width, channels = self.image
        return height * width * channels, height * width * self.entries


LAYOUTS = (
    Layout("CLEVR with masks", (240, 320, 3), 11, crop=True),
    Layout("Multi-dSprites, binarised", (64, 64, 1), 4, entries_last=True),
    Layout("Multi-dSprites, coloured on grayscale", (64, 64, 3), 6, entries_last=True),
    Layout("Multi-dSprites, coloured on coloured", (64, 64, 3), 5, entries_last=True),
    # Sky, floor and two halves of the walls come first; its test sets have other numbers of entries
    Layout("Objects Room", (64, 64, 3), 7, backgrounds=4),
    Layout("Objects Room, empty", (64, 64, 3), 4, backgrounds=4),
    Layout("Objects Room, up to six objects", (64, 64, 3), 10, backgrounds=4),
    Layout("Tetrominoes", (35, 35, 3), 4),
)


class MultiObjectReader:
    """One of the layouts above, told by the sizes of its first image and mask."""

    published_split = False

    def __init__(self, path: Path):
        self._path = path
        self._records = Records(path)
        damaged, first = None, None
        for found in self._examples(0):  # the first sound record tells the layout
            if not isinstance(found, BadRecordError):
                first = found
                break
            damaged = damaged or found
        if first is None:
            raise damaged or UserError(f"{path}: holds no record: download the file again")
        sizes = tuple(len(first.get(name, ())) for name in SKIPPED)
        layouts = [layout for layout in LAYOUTS if layout.sizes == sizes]
        if not layouts:
            known = ", ".join(layout.kind for layout in LAYOUTS)
            raise UserError(f"{path}: image and mask of {sizes[0]} and {sizes[1]} values are none of: {known}")
        self._layout = layouts[0]
        self.kind, self.crop = self._layout.kind, self._layout.crop
        self.native = self._layout.image[:2]

    def share(self, done: int) -> float:
        return self._records.share

    def _examples(self, start: int) -> Iterator[dict[str, np.ndarray] | BadRecordError]:
        """Records from ``start`` on; those before it are read, since GZIP has no random access, but not parsed."""
        self._records.close()
        self._records = Records(self._path)
        for index, item in enumerate(self._records.items()):
            if index < start:
                continue
            if isinstance(item, BadRecordError):
                yield item
                continue
            try:
                yield parse_example(item)
            except (ValueError, KeyError) as error:
                yield self._bad(index, f"is no tf.train.Example ({error})")

    def scenes(self, start: int = 0) -> Iterator[Scene | BadRecordError]:
        for index, features in enumerate(self._examples(start), start):
            if isinstance(features, BadRecordError):
                yield features
                continue
            try:
                yield self._scene(features)
            except ValueError as error:
                yield self._bad(index, str(error))

    def _bad(self, index: int, what: str) -> BadRecordError:
        return BadRecordError(f"{self._path}: record {index} {what}: download the file again")

    def _scene(self, features: dict[str, np.ndarray]) -> Scene:
        layout = self._layout
        sizes = tuple(len(features.get(name, ())) for name in SKIPPED)
        if sizes != layout.sizes:
            raise ValueError(
                f"has image and mask of {sizes[0]} and {sizes[1]} values, expected {layout.sizes[0]} and "
                f"{layout.sizes[1]} ({layout.kind})"
            )
        image = features["image"].reshape(layout.image)
        height, width, channels = layout.image
        if layout.entries_last:
            entries = features["mask"].reshape(height, width, layout.entries).transpose(2, 0, 1)
        else:
            entries = features["mask"].reshape(layout.entries, height, width)
        factors = {name: value for name, value in features.items() if name not in SKIPPED}
        for name, value in factors.items():
            if len(value) % layout.entries or not np.isfinite(value).all():
                raise ValueError(
                    f"has {len(value)} values of {name} for {layout.entries} entries, or values not finite"
                )
        # Without visibility an entry counts as present where its mask has a pixel.
        present: np.ndarray = factors["visibility"] if "visibility" in factors else np.any(entries, (1, 2))
        return Scene(
            image.repeat(3, 2) if channels == 1 else image,
            labels_of(entries, layout.backgrounds),
            int(present[layout.backgrounds :].sum()),
            {name: self._factor(value) for name, value in factors.items()},
        )

    def _factor(self, value: np.ndarray) -> np.ndarray:
        """[entries] or [entries, width]"""
        return value if len(value) == self._layout.entries else value.reshape(self._layout.entries, -1)
