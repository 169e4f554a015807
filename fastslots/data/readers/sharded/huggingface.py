"""Hugging Face's data sets as files: parquet as the hub keeps them, Arrow as ``save_to_disk`` writes. By pyarrow alone.

Pictures are columns of {bytes, path} or of bytes, masks such columns whose name says so, or nested lists; columns of
numbers are factors.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from fastslots.data.items import image_of
from fastslots.data.readers.masked import (
    IMAGE_WORDS,
    LOOKED_AT,
    MASK_WORDS,
    coding_of,
    count_objects,
    decoded,
    raw_mask,
)
from fastslots.data.readers.pictures import read_picture
from fastslots.data.readers.scene import BadRecordError, Scene
from fastslots.data.readers.sharded.webdataset import numeric
from fastslots.errors import UserError

PARQUET = b"PAR1"
SUFFIXES = (".parquet", ".arrow")
ROWS = 16  # read at once


class HuggingFaceReader:
    kind = "Hugging Face data set"
    crop = False
    published_split = False

    def __init__(self, path: Path):
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise UserError(f"{path} needs pyarrow: pip install 'fastslots[hf]'") from None
        self._arrow, self._path = pyarrow, path
        schema, self._count = self._describe()
        self._image, self._mask = self._columns(schema)
        self._factors = [f.name for f in schema if f.name not in (self._image, self._mask) and self._is_number(f.type)]
        sizes, masks = [], []
        for index, row in enumerate(islice(self._rows(), LOOKED_AT)):
            try:
                sizes.append(self._picture(row, index).shape[:2])
                if self._mask:
                    masks.append(self._raw_mask(row, index))
            except UserError:  # said where it is read as a scene
                continue
        self.native = sizes[0] if sizes else self._picture(next(self._rows(), {}), 0).shape[:2]
        self._coding = coding_of(masks)
        self.ignore_label = self._coding.ignore_label
        mask = f", masks in {self._mask!r}, which are {self._coding}" if self._mask else ", no masks"
        factors = f"; factors {', '.join(self._factors)}" if self._factors else ""
        self.read_as = f"images in column {self._image!r}{mask}{factors}"

    def _guarded(self, error: Exception) -> UserError:
        return UserError(f"{self._path} cannot be read as a table ({error}): download it again")

    def _describe(self) -> tuple[Any, int]:
        """The columns, and the number of rows (0 where that is known at the end alone)."""
        try:
            if self._is_parquet():
                file = self._arrow.parquet.ParquetFile(self._path)
                return file.schema_arrow, file.metadata.num_rows
            with self._arrow.memory_map(str(self._path)) as source:
                return self._arrow.ipc.open_stream(source).schema, 0
        except (self._arrow.ArrowException, OSError, ValueError) as error:
            raise self._guarded(error) from None

    def _is_parquet(self) -> bool:
        with open(self._path, "rb") as file:
            return file.read(4) == PARQUET

    def _rows(self) -> Iterator[dict[str, Any]]:
        names = [name for name in (self._image, self._mask, *self._factors) if name]
        try:
            if self._is_parquet():
                file = self._arrow.parquet.ParquetFile(self._path)
                batches = file.iter_batches(batch_size=ROWS, columns=names)
                for batch in batches:
                    yield from batch.to_pylist()
                return
            with self._arrow.memory_map(str(self._path)) as source:
                for batch in self._arrow.ipc.open_stream(source):
                    for first in range(0, len(batch), ROWS):
                        yield from batch.select(names).slice(first, ROWS).to_pylist()
        except (self._arrow.ArrowException, OSError, ValueError) as error:
            raise self._guarded(error) from None

    def _columns(self, schema: Any) -> tuple[str, str | None]:
        """The column of the images, and that of the masks. UserError where two could be."""
        images, masks = [], []
        for field in schema:
            words = set(re.split(r"[ ._-]+", field.name.lower()))
            picture, nested = self._is_picture(field.type), self._is_nested(field.type)
            if words & MASK_WORDS and (picture or nested):
                masks.append(field.name)
            elif picture or (nested and words & IMAGE_WORDS):
                images.append(field.name)
        named = [name for name in images if set(re.split(r"[ ._-]+", name.lower())) & IMAGE_WORDS]
        images = named or images
        for found, what in ((images, "images"), (masks, "masks")):
            if len(found) > 1:
                raise UserError(
                    f"{self._path}: columns {' and '.join(map(repr, found))} could both be the {what}: rename one (a "
                    f"mask to 'mask'), or leave it out"
                )
        if not images:
            raise UserError(f"{self._path}: no column holds pictures (it has {', '.join(schema.names)}): name another")
        return images[0], masks[0] if masks else None

    def _is_picture(self, kind: Any) -> bool:
        types = self._arrow.types
        if types.is_struct(kind):
            return {"bytes", "path"} <= {kind.field(i).name for i in range(kind.num_fields)}
        return bool(types.is_binary(kind) or types.is_large_binary(kind))

    def _is_nested(self, kind: Any) -> bool:
        """Lists of lists of numbers, as they are or as an extension type of arrays."""
        kind = getattr(kind, "storage_type", kind)
        depth = 0
        while hasattr(kind, "value_type") and self._arrow.types.is_nested(kind):
            kind, depth = kind.value_type, depth + 1
        return depth >= 2 and self._is_number(kind)

    def _is_number(self, kind: Any) -> bool:
        types = self._arrow.types
        if types.is_list(kind) or types.is_fixed_size_list(kind):
            kind = kind.value_type
        return bool(types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind))

    def _bytes(self, value: Any, place: Path) -> bytes:
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise UserError(f"{place} is not in the file (a path alone): save the set with its pictures embedded")
        return data

    def _picture(self, row: dict[str, Any], index: int) -> np.ndarray:
        place, value = Path(f"{self._path}: {self._image}[{index}]"), row.get(self._image)
        if isinstance(value, list):
            image = image_of(np.asarray(value, np.uint8 if _is_bytes(value) else None), str(place))
            return image if image.dtype == np.uint8 else (image.transpose(1, 2, 0) * 255 + 0.5).astype(np.uint8)
        return read_picture(place, self._bytes(value, place))

    def _raw_mask(self, row: dict[str, Any], index: int) -> np.ndarray:
        place, value = Path(f"{self._path}: {self._mask}[{index}]"), row.get(str(self._mask))
        if isinstance(value, list):
            return np.asarray(value)
        return raw_mask(place, self._bytes(value, place))

    def share(self, done: int) -> float:
        return done / self._count if self._count else 1 - 1 / (1 + done / 1000)

    def scenes(self, start: int = 0) -> Iterator[Scene | BadRecordError]:
        for index, row in enumerate(islice(self._rows(), start, None), start):
            try:
                image, mask = self._picture(row, index), None
                if self._mask:
                    name = f"{self._path}: {self._mask}[{index}]"
                    mask = decoded(self._raw_mask(row, index), self._coding, image.shape[:2], name)
                objects = None if mask is None else count_objects(mask, self.ignore_label)
                yield Scene(image, mask, objects, numeric({name: row[name] for name in self._factors}))
            except UserError as error:
                yield BadRecordError(str(error))


def _is_bytes(value: list[Any]) -> bool:
    """Whether nested lists hold whole numbers of 8 bits."""
    array = np.asarray(value)
    return array.dtype.kind in "iu" and array.size > 0 and 0 <= array.min() and array.max() <= 255
