"""MOVi (Kubric, arXiv 2203.03570) as TensorFlow Datasets keeps it, without TensorFlow: each frame is a scene.

A record holds ``video`` and ``segmentations``, PNG files of 24 frames each; segmentation labels are the objects, 0 the
background.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fastslots.data.items import mask_of
from fastslots.data.readers.masked import count_objects, raw_mask
from fastslots.data.readers.pictures import read_picture
from fastslots.data.readers.scene import BadRecordError, Scene
from fastslots.data.readers.tfrecord import Records, byte_values
from fastslots.errors import UserError

FRAMES, MASKS = "video", "segmentations"
MOST_RECORD = 1 << 28  # bytes: 24 frames of 512 x 512 with depth, normals and flow take 40 MB


def looks_like_movi(path: Path) -> bool:
    """Whether the first record has frames and their segmentations."""
    records = Records(path, MOST_RECORD)
    try:
        for payload in records:
            return set(byte_values(payload, (FRAMES, MASKS))) == {FRAMES, MASKS}
    except (UserError, ValueError, KeyError):
        pass
    finally:
        records.close()
    return False


class MoviReader:
    kind = "MOVi"
    crop = False
    published_split = False
    read_as = "each frame of a video is a scene; objects are labelled by the record's segmentations"

    def __init__(self, path: Path):
        self._path = path
        self._records = Records(path, MOST_RECORD)
        first = next((s for s in self.scenes() if isinstance(s, Scene)), None)
        if first is None:
            raise UserError(f"{path}: no frame of it can be read: download it again")
        self.native = first.image.shape[:2]

    def share(self, done: int) -> float:
        return self._records.share

    def scenes(self, start: int = 0) -> Iterator[Scene | BadRecordError]:
        """Frames before ``start`` are skipped undecoded."""
        self._records.close()
        self._records = Records(self._path, MOST_RECORD)
        place = 0
        for number, payload in enumerate(self._records.items()):
            name = f"{self._path}: video {number}"
            if isinstance(payload, BadRecordError):
                yield payload
                continue
            try:
                files = byte_values(payload, (FRAMES, MASKS))
                frames, masks = files[FRAMES], files[MASKS]
                if len(frames) != len(masks):
                    raise ValueError(f"{len(frames)} frames and {len(masks)} segmentations")
            except (ValueError, KeyError) as error:
                yield BadRecordError(f"{name} has no frames with segmentations ({error}): download it again")
                continue
            for i in range(max(0, start - place), len(frames)):
                yield self._scene(frames[i], masks[i], f"{name}, frame {i}")
            place += len(frames)

    def _scene(self, frame: bytes, mask: bytes, name: str) -> Scene | BadRecordError:
        try:
            image = read_picture(Path(name), frame)
            labels = mask_of(np.squeeze(raw_mask(Path(name), mask)), image.shape[:2], f"{name}, segmentation")
            return Scene(image, labels, count_objects(labels, None))
        except UserError as error:
            return BadRecordError(str(error))
