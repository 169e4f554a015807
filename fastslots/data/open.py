"""Any known data set, recognised by content, as one that training maps into memory.

What is not packed, or packed at another size than is asked for, is decoded once into a cache of packed folders,
``$FASTSLOTS_CACHE`` or ~/.cache/fastslots, keyed by path, size, time and preprocessing; so every format trains at the
same speed, and a file and its packed form give the same bits in the same order.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from fastslots.data.packed.as_reader import PackedReader
from fastslots.data.packed.cache import cache_root
from fastslots.data.packed.dataset import VERSION, PackedDataset, is_packed, read_meta
from fastslots.data.packed.remote import openers
from fastslots.data.packed.shards import PackedShards, find_shards, published_parts
from fastslots.data.packed.urls import is_remote
from fastslots.data.packed.writer import write_packed
from fastslots.data.readers.npz import mask_file
from fastslots.data.readers.scene import BadRecordError, Reader, Scene, default_size, preprocess
from fastslots.data.storage.paths import stamp, visible
from fastslots.errors import UserError
from fastslots.files import refuse_links
from fastslots.notices import Progress, notice

KNOWN = (
    "npz in the authors' layout, npy, TFRecord of multi_object_datasets or MOVi, CLEVR v1.0 folder, ClevrTex folder, "
    "object-centric-library HDF5, folder of images with or without masks, Pascal VOC, COCO, WebDataset, Hugging Face's "
    "parquet or Arrow, a zip or tar of these, `fastslots data pack` folder"
)


PREPROCESSING = 2
"""Raised when crop or resize change, so that no cache made before is taken for one made after."""


ON_BAD_RECORD = ("stop", "skip")


def open_dataset(
    path: str | Path, max_objects: int | None = None, size: int | None = None, on_bad_record: str = "stop"
) -> PackedDataset | PackedShards:
    """Open a data set of any format in ``KNOWN``.

    Args:
        path: file or folder; or many as one set, in the order of their names: a pattern (``clevr/*.tfrecords``), or a
            folder that holds data files, or packed folders, of one kind (three whose names end in train, val and test
            are these splits); or the URL of one of the latter in object storage (``s3://bucket/clevr``).
        max_objects: keep scenes with at most so many (CLEVR6: 6).
        size: side in pixels; None: 128 for CLEVR (after its centred crop), else the set's own.
        on_bad_record: "stop" raises at the first damaged record; "skip" leaves it out, says so and counts it
            (``ds.info.skipped``), and where nothing after it can be read leaves out the rest of that file.

    Returns:
        A map-style data set: ``ds[i]`` -> {"image": uint8 [R,R,3], "mask": uint8 [R,R] or absent, "factors": {...}};
        ``ds.batch(indices)``; ``ds.info``.

    Raises:
        UserError: naming file (record, member) and mend.
    """
    _check_arguments(path, max_objects, size, on_bad_record)
    if is_remote(path):
        shards = [partial(_of_size, opener, size) for opener in openers(str(path), max_objects)]
    else:
        shards = [partial(_open_one, shard, max_objects, size, on_bad_record) for shard in find_shards(path)]
    if len(shards) == 1:
        return shards[0]()
    parts, lost = [], 0
    for open_shard in shards:
        try:
            parts.append(open_shard())
        except UserError as error:
            if on_bad_record == "stop":
                raise
            notice(f"left out: {error}")
            lost += 1
    return PackedShards(parts, str(path), lost)


def _open_one(path: Path, max_objects: int | None, size: int | None, on_bad_record: str) -> PackedDataset:
    if is_packed_at(path, size):
        return PackedDataset(path, max_objects)
    reader = recognise(path)
    side = size or default_size(reader)
    understood = [getattr(reader, name, None) for name in ("parts", "ignore_label")]
    folder = cache_folder(path, side, on_bad_record, understood)
    if not is_packed(folder):
        notice(f"decoding {path} once into {folder}")
        _pack(reader, path, folder, side, None, None, on_bad_record)
    return PackedDataset(folder, max_objects, str(path))


def is_packed_at(path: Path, size: int | None) -> bool:
    """Whether a packed folder serves as it is; None: at whatever size."""
    return is_packed(path) and size in (None, read_meta(path)["size"])


def _of_size(opener: Callable[[], PackedDataset], size: int | None) -> PackedDataset:
    dataset = opener()
    if size not in (None, dataset.info.size):
        raise UserError(
            f"{dataset.info.path} was packed at {dataset.info.size} x {dataset.info.size}, not {size}, and sets in "
            f"object storage are not resized: run `fastslots data pack IN OUT --size {size}` and upload OUT"
        )
    return dataset


def pack(
    path: str | Path,
    folder: Path,
    size: int | None = None,
    max_objects: int | None = None,
    first: int | None = None,
    on_bad_record: str = "stop",
    ignore_label: int | None = None,
) -> None:
    """Decode, crop and resize a data set (``first``: only so many scenes) into a packed folder, with progress.

    A packed one is filtered and resized again.

    Of many shards each becomes a packed folder of its own in ``folder``, which opens as one set.
    """
    _check_arguments(path, max_objects, size, on_bad_record)
    for place in (path, folder):
        if is_remote(place):
            raise UserError(f"{place}: packing reads and writes local folders: download the data, pack, and upload OUT")
    shards = find_shards(path)
    unfinished = folder.with_name(folder.name + ".partial")
    refuse_links(unfinished)
    splits = published_parts([str(shard) for shard in shards])
    names = (
        splits
        if splits and len(splits) == len({*splits})
        else [f"{part}-{i:05d}" for i, part in enumerate(splits or ["shard"] * len(shards))]
    )
    for name, shard in zip(names, shards, strict=True):
        target = folder if len(shards) == 1 else unfinished / name
        if not is_packed(target):  # else it is there from a call that was interrupted
            reader = recognise(shard)
            side = size or default_size(reader)
            _pack(reader, shard, target, side, max_objects, first, on_bad_record, ignore_label)
    if len(shards) > 1:
        os.replace(unfinished, folder)


def _check_arguments(path: str | Path, max_objects: int | None, size: int | None, on_bad_record: str) -> None:
    if size is not None and not 1 <= size <= 4096:
        raise UserError(f"{path}: a side of {size} pixels is asked for: give 1 to 4096")
    if max_objects is not None and max_objects < 0:
        raise UserError(f"{path}: at most {max_objects} objects are asked for: give at least 1, or 0 for no limit")
    if on_bad_record not in ON_BAD_RECORD:
        raise UserError(f"on_bad_record must be one of {', '.join(ON_BAD_RECORD)}, got {on_bad_record!r}")


def _pack(
    reader: Reader,
    path: Path,
    folder: Path,
    side: int,
    max_objects: int | None,
    first: int | None,
    on_bad_record: str,
    ignore_label: int | None = None,
) -> None:
    if isinstance(reader, PackedReader):
        max_objects = reader.at_most(max_objects)

    def scenes(start: int) -> Iterator[Scene | BadRecordError | None]:
        for index, item in enumerate(decoded(reader, path, side, start, ignore_label), start):
            if index == first:
                return
            if isinstance(item, BadRecordError):
                if on_bad_record == "stop":
                    raise item
                notice(f"left out: {item}")
            elif max_objects and _objects(item, path) > max_objects:
                yield None
                continue
            yield item

    settings: dict[str, object] = {"size": side, "max_objects": max_objects, "stamp": _stamp(path)}
    settings |= {"preprocessing": PREPROCESSING, "first": first, "on_bad_record": on_bad_record}
    settings |= {name: getattr(reader, name, None) for name in ("ignore_label", "read_as")}
    settings |= {} if ignore_label is None else {"ignore_label": ignore_label}
    if first is None and (parts := getattr(reader, "parts", None)):
        settings["parts"] = parts
    if isinstance(reader, PackedReader):
        settings["skipped"] = reader.skipped
    with Progress(reader.share) as progress:
        write_packed(folder, scenes, reader.kind, str(path), settings, reader.published_split, progress)


def _objects(scene: Scene, path: Path) -> int:
    if scene.objects is None:
        raise UserError(f"{path}: nothing tells how many objects its scenes have: set --max_objects 0")
    return scene.objects


def decoded(
    reader: Reader, path: Path, side: int, start: int = 0, unscored: int | None = None
) -> Iterator[Scene | BadRecordError]:
    """Cropped and resized scenes from ``start`` on; an error in place of a damaged one, or of all that follow it.

    unscored: a mask label that is no object, beside the one that the reader knows."""
    counted = unscored is not None and unscored != getattr(reader, "ignore_label", None)
    index = start
    try:
        for index, scene in enumerate(reader.scenes(start), start):
            if isinstance(scene, BadRecordError):
                yield scene
                continue
            if counted and scene.objects and scene.mask is not None and (scene.mask == unscored).any():
                scene.objects -= 1
            try:
                yield preprocess(scene, reader.crop, side)
            except ValueError as error:
                yield BadRecordError(f"{path}: scene {index}: {error}: remove it")
    except UserError as error:  # nothing after this place can be read
        yield BadRecordError(str(error))


def recognise(path: Path) -> Reader:
    """The reader of a file or folder, chosen by what is in it. UserError where nothing known is."""
    if path.exists() and not (path.is_dir() or path.is_file()):
        raise UserError(f"{path} is no regular file: copy its data into one")
    try:
        return _recognise_folder(path) if path.is_dir() else _recognise_file(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): check its permissions") from None


def _recognise_folder(path: Path) -> Reader:
    from fastslots.data.readers.clevrtex import ClevrTexReader
    from fastslots.data.readers.coco import CocoReader, annotation_files
    from fastslots.data.readers.masked import MaskedReader, find_layout
    from fastslots.data.readers.pictures import ClevrReader, FolderReader

    if is_packed(path):
        return PackedReader(path)
    if ClevrReader.recognises(path):
        return ClevrReader(path)
    if ClevrTexReader.recognises(path):
        return ClevrTexReader(path)
    if any(path.glob("*.mdb")):
        raise UserError(f"{path} is an LMDB of pickles, which are never loaded: convert it to npz or HDF5")
    if annotations := annotation_files(path):
        return CocoReader(path, annotations)
    if layout := find_layout(path):
        return MaskedReader(path, layout)
    folder = FolderReader(path)
    if folder.count:
        return folder
    raise UserError(f"{path}: holds no images and no data set that is known ({KNOWN})")


def _recognise_file(path: Path) -> Reader:
    with open(path, "rb") as file:
        head = file.read(8)
    from fastslots.data.readers.coco import CocoReader, annotation_files
    from fastslots.data.readers.hdf5 import MAGIC, Hdf5Reader
    from fastslots.data.readers.multi_object import MultiObjectReader
    from fastslots.data.readers.npz import NpyReader, NpzReader
    from fastslots.data.readers.sharded import huggingface, movi, webdataset
    from fastslots.data.readers.tfrecord import looks_like_tfrecord, read_head

    if head[:4] == b"PK\x03\x04":
        return NpzReader(path)
    if head == MAGIC:
        return Hdf5Reader(path)
    if head[:6] == b"\x93NUMPY":
        return NpyReader(path)
    if head[:4] == huggingface.PARQUET or path.suffix in huggingface.SUFFIXES:
        return huggingface.HuggingFaceReader(path)
    if looks_like_tfrecord(read_head(path)) or path.suffix in (".tfrecord", ".tfrecords"):
        return movi.MoviReader(path) if movi.looks_like_movi(path) else MultiObjectReader(path)
    if webdataset.is_tar(path):
        return webdataset.WebDatasetReader(path)
    if annotations := annotation_files(path):
        return CocoReader(path, annotations)
    if head[:1] == b"\x80" or path.suffix in (".pkl", ".pickle", ".mdb"):
        raise UserError(f"{path} looks like a pickle or an LMDB of them, which are never loaded: convert it to npz")
    raise UserError(f"{path}: not recognised; known are: {KNOWN}")


def cache_folder(path: Path, size: int, on_bad_record: str = "stop", understood: Sequence[object] = ()) -> Path:
    """Where the decoded form of a file or folder lies: keyed by path, size, time, preprocessing, and by what its reader
    has ``understood`` of it, where that is anything."""
    # added, so that caches made before there was a choice serve
    added: list[object] = ["skip"] if on_bad_record == "skip" else []
    added += [understood] if any(part is not None for part in understood) else []
    key = json.dumps([str(path.resolve()), _stamp(path), size, PREPROCESSING, VERSION, *added])
    return cache_root() / hashlib.blake2b(key.encode(), digest_size=12).hexdigest()


def _stamp(path: Path) -> str:
    """Of the names, sizes and times of all files that a set is made of: of a file with its masks, or of a folder."""
    if path.is_dir():
        return stamp(visible(path), path)
    return stamp([p for p in (path, mask_file(path)) if p], path.parent)
