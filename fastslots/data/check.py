"""The fingerprint of a data set: what it is, what is in it, and what looks wrong."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from fastslots.data.open import is_packed_at, open_dataset, pack
from fastslots.data.packed.dataset import UNKNOWN, DatasetInfo, PackedDataset, is_packed
from fastslots.data.packed.shards import PackedShards, find_shards
from fastslots.data.packed.urls import is_remote
from fastslots.data.splits import split_indices
from fastslots.errors import UserError

SAMPLE = 1_000  # images whose pixels are looked at
QUICK = 500  # scenes that --quick reads
BLOCK = 256  # images read at once


@dataclass(frozen=True)
class Report:
    """``str()`` is for people; ``warnings`` are what looks wrong without being an error."""

    info: DatasetInfo
    objects: dict[int, int]  # objects of a scene -> scenes; empty where nothing tells
    mean_colour: tuple[float, ...]  # 0..255
    std: float
    labels: int  # highest mask label seen
    sampled: int
    splits: str
    quick: bool  # only the first scenes were read
    unmasked: int  # images without a mask, where others have one
    warnings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        info = self.info
        histogram = ", ".join(f"{k}: {n:,}" for k, n in self.objects.items()) or "not known"
        masks = f"yes, labels up to {self.labels}"
        masks += f"; {self.unmasked:,} images have none" if self.unmasked else ""
        lines = {
            "data set": info.kind,
            "path": info.path,
            "images": f"{info.count:,}" + (f" of {info.total:,}" if info.count < info.total else ""),
            "read as": info.read_as,
            "size": f"{info.size} x {info.size}",
            "masks": masks if info.has_masks else "no: J-ARI, JIS and ARI need them",
            "objects": histogram,
            "colour": "mean " + ", ".join(f"{c:.1f}" for c in self.mean_colour) + f", std {self.std:.1f}",
            "split": self.splits,
            "fingerprint": info.digest,
        }
        text = "\n".join(f"{name:<12} {value}" for name, value in lines.items() if value)
        if self.quick:
            text += f"\n(the first {info.total:,} scenes alone were read: damage further on would not be seen)"
        if self.sampled < info.count:
            text += f"\n(colours and labels of {self.sampled:,} images, evenly spaced)"
        return "\n".join([text, *(f"warning: {warning}" for warning in self.warnings)])


def check(
    path: str | Path,
    max_objects: int | None = None,
    size: int | None = None,
    quick: bool = False,
    on_bad_record: str = "stop",
    ignore_label: int | None = None,
) -> Report:
    """Open a data set as training would and look at it.

    Args:
        max_objects, size, on_bad_record: as in ``open_dataset``.
        quick: read the first ``QUICK`` scenes (of the first shard) alone and keep nothing; without it the whole set is
            read, and what training will map is kept. Of a set in object storage: look at some of its images, without
            comparing the checksum of those that are not in the cache.
        ignore_label: mask label of pixels that are not scored, which is no object; None: as the data say.

    Raises:
        UserError: where training would refuse the data.
    """
    if is_remote(path):
        far = open_dataset(path, max_objects, size, on_bad_record)
        if not quick:
            far.verify()
        return _look(far, far.info, max_objects, False, ignore_label)
    shards = find_shards(path)
    if not quick or is_packed_at(shards[0], size):
        opened = open_dataset(path, max_objects, size, on_bad_record)
        if is_packed(shards[0]):
            opened.verify()
        return _look(opened, opened.info, max_objects, False, ignore_label)
    with tempfile.TemporaryDirectory(prefix="fastslots-") as folder:
        pack(shards[0], Path(folder) / "head", size, first=QUICK, on_bad_record=on_bad_record)
        dataset = PackedDataset(Path(folder) / "head", max_objects, str(path))
        return _look(dataset, dataset.info, max_objects, dataset.info.total == QUICK, ignore_label)


def _look(
    dataset: PackedDataset | PackedShards,
    info: DatasetInfo,
    max_objects: int | None,
    quick: bool,
    unscored: int | None,
) -> Report:
    if not len(dataset):
        raise UserError(f"{info.path}: no scene has at most {max_objects} objects: raise --max_objects")
    rows = np.unique(np.linspace(0, len(dataset) - 1, min(SAMPLE, len(dataset))).astype(int))
    images, masks = dataset.batch(rows)
    counts = dataset.objects
    if unscored is not None and unscored != info.ignore_label:
        info, counts = replace(info, ignore_label=unscored), _without(unscored, dataset)
    counts = counts[counts != UNKNOWN]
    kept = counts[counts <= max_objects] if max_objects else counts
    values, scenes = np.unique(kept, return_counts=True)
    objects = {int(k): int(n) for k, n in zip(values, scenes, strict=True)}
    colour = tuple(float(c) for c in images.mean((0, 1, 2)))
    if masks is not None and info.ignore_label is not None:
        masks = np.where(masks == info.ignore_label, 0, masks)
    std, labels = float(images.std((1, 2, 3)).mean()), 0 if masks is None else int(masks.max())
    known = split_indices(len(dataset), info.published_split, info.parts)
    splits = "known when the whole set is read" if quick else str(known)
    unmasked = 0 if masks is None else int((dataset.objects == UNKNOWN).sum())
    warnings = _warnings(info, objects, std, images, masks)
    if info.skipped:
        warnings.append(f"{info.skipped:,} damaged records were left out (on_bad_record skip)")
    if masks is not None:
        # Against the fullest scene, not the scene itself: a crop that hides an object leaves a gap in labels.
        most = int(counts.max(initial=0))
        beyond = masks.max((1, 2)) > most
        if beyond.any():
            warnings.append(
                f"{int(beyond.sum())} of {len(rows)} masks have labels up to {labels}, though no scene has more than "
                f"{most} objects (first: image {int(rows[beyond.argmax()])}): expected 1, 2, ... and 0 = background"
            )
    if quick:
        info = replace(info, digest="known when the whole set is read")
    elif len(dataset) < 20 and not info.parts:
        warnings.append("under 20 images: evaluation uses the training images")
    return Report(info, objects, colour, std, labels, len(rows), splits, quick, unmasked, warnings)


def _without(label: int, dataset: PackedDataset | PackedShards) -> np.ndarray:
    """Objects of each scene that the object filter leaves, where those of ``label`` are none."""
    objects = dataset.kept_objects.copy()
    for first in range(0, len(dataset), BLOCK):
        rows = np.arange(first, min(first + BLOCK, len(dataset)))
        masks = dataset.batch(rows)[1]
        if masks is not None:
            shown = rows[(masks == label).any((1, 2))]
            objects[shown] -= ((objects[shown] != UNKNOWN) & (objects[shown] > 0)).astype(np.uint8)
    return objects


def _warnings(
    info: DatasetInfo, objects: dict[int, int], std: float, images: np.ndarray, masks: np.ndarray | None
) -> list[str]:
    found = []
    if info.kind == "CLEVR v1.0":
        found.append("another render than CLEVR with masks, and without masks: results are not comparable")
    if info.kind.startswith("CLEVR with masks") and max(objects, default=0) > 6:
        found.append("scenes with more than 6 objects (CLEVR10): published results are of CLEVR6, --max_objects 6")
    if std < 1 or (len(images) > 1 and (images == images[:1]).all()):
        found.append("the images are (almost) all equal or of one colour")
    if masks is not None and not masks.any():
        found.append("every mask is background")
    return found
