"""Eight scenes, and files of them as users hold them: for tests of readers and of packed sets."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
from wire import message

from fastslots.data import SpritesDataset
from fastslots.data.readers.tfrecord import masked_crc

SPRITES = SpritesDataset(5, 64, (2, 4), 8)
IMAGES, MASKS, FACTORS = SPRITES.scenes(range(8))


def example(features: dict[str, object], one_value: bool = False) -> bytes:
    entries = b""
    for name, value in features.items():
        if isinstance(value, bytes):
            values = [value] if one_value else [bytes([b]) for b in value]
            feature = message(1, b"".join(message(1, v) for v in values))
        else:
            feature = message(2, message(1, np.asarray(value, "<f4").tobytes()))
        entries += message(1, message(1, name.encode()) + message(2, feature))
    return message(1, entries)


def frame(payload: bytes) -> bytes:
    length = struct.pack("<Q", len(payload))
    return length + struct.pack("<I", masked_crc(length)) + payload + struct.pack("<I", masked_crc(payload))


def multi_dsprites(one_value: bool = False) -> list[bytes]:
    """Eight scenes in the layout of coloured on coloured: entities on the third axis."""
    records = []
    for i in range(8):
        entries = (MASKS[i][..., None] == np.arange(5)).astype(np.uint8) * 255
        visibility = (np.arange(5) <= MASKS[i].max()).astype(np.float32)
        factors = {"visibility": visibility, "x": np.arange(5.0), "color": np.arange(15.0)}
        records.append(example({"image": IMAGES[i].tobytes(), "mask": entries.tobytes(), **factors}, one_value))
    return records


def write_tfrecord(path: Path, zipped: bool = True, **options) -> Path:
    data = b"".join(frame(record) for record in multi_dsprites(**options))
    path.write_bytes(gzip.compress(data, 1) if zipped else data)
    return path


def shards_of(folder: Path, count: int = 3) -> Path:
    """The eight scenes over ``count`` TFRecords, uneven."""
    folder.mkdir()
    records = [frame(record) for record in multi_dsprites()]
    for number in range(count):
        part = records[8 * number // count : 8 * (number + 1) // count]
        (folder / f"clips-{number}-of-{count}.tfrecord").write_bytes(b"".join(part))
    return folder


def same_scenes(dataset, kind: str, masks: bool = True):
    assert dataset.info.kind.startswith(kind)
    assert len(dataset) == 8 and dataset.info.size == 64
    images, found = dataset.batch(np.arange(8))
    assert np.array_equal(images, IMAGES)
    assert np.array_equal(found, MASKS) if masks else found is None
    assert np.array_equal(dataset[3]["image"], IMAGES[3]) and ("mask" in dataset[3]) == masks
