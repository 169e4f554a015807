"""Many files or packed folders as one data set. Each is decoded, cached and mapped by itself, so a set may be larger
than memory, a new shard costs its own decoding alone, and a kill while decoding loses one shard's last scenes."""

from __future__ import annotations

import glob
import hashlib
import re
from pathlib import Path

import numpy as np

from fastslots.data.packed.dataset import DatasetInfo, PackedDataset, check_parts, is_packed
from fastslots.data.packed.ranges import gather
from fastslots.data.readers.named_splits import SPLITS
from fastslots.data.readers.npz import images_of
from fastslots.data.readers.pictures import SUFFIXES as PICTURES
from fastslots.data.storage.archives import is_archive, unpacked
from fastslots.data.storage.paths import is_hidden, matching
from fastslots.errors import UserError

SHARD = re.compile(r".*\.(tfrecords?(-\d+-of-\d+)?|npz|npy|hdf5|h5|parquet|arrow|tar|tar\.gz|tgz|zip)")


def find_shards(path: str | Path) -> list[Path]:
    """The files or folders that ``path`` means, in the order of their names: itself, or the shards that a pattern
    matches, or a folder or an archive holds. UserError where nothing is there."""
    try:
        if Path(path).exists():
            return _inside(Path(path))
        found = matching(str(path)) if glob.has_magic(str(path)) else []
        found = [shard for p in found if not images_of(p) for shard in ([p] if p.is_dir() else _inside(p))]
    except (OSError, ValueError) as error:  # too long a name, a null byte
        if isinstance(error, UserError):
            raise
        raise UserError(f"{str(path)!r} is no path ({error})") from None
    if not found:
        raise UserError(f"{path}: no such file or folder")
    return found


def _inside(path: Path) -> list[Path]:
    """A file itself, or the folder that an archive is; of a folder data files, or packed folders, directly in it (or in
    its folder ``data``, as Hugging Face's hub has them); the folder itself where it is a set (CLEVR v1.0)."""
    if not path.is_dir():
        if not path.is_file():  # a pipe would be waited for without end
            raise UserError(f"{path} is no regular file: copy its data into one")
        folder = unpacked(path) if is_archive(path) else path
        return _inside(folder) if folder.is_dir() else [path]
    if is_packed(path) or (path / "scenes").is_dir():
        return [path]
    if (path / "dataset_dict.json").is_file():
        names = ", ".join(sorted(p.name for p in path.iterdir() if p.is_dir()))
        raise UserError(f"{path} holds several splits ({names}): name one of these folders")
    entries = sorted(p for p in path.iterdir() if p.suffix != ".partial" and not is_hidden(p, path))
    tables = sorted((path / "data").glob("*.parquet"))
    found = [p for p in entries if is_packed(p)] or [p for p in entries if _is_shard(p)] or tables
    if any(p.suffix.lower() in PICTURES for p in entries):  # whose masks npy files may be
        found = [p for p in found if p.suffix != ".npy"]
    return [shard for p in found for shard in ([p] if p.is_dir() else _inside(p))] or [path]


def _is_shard(path: Path) -> bool:
    return bool(SHARD.fullmatch(path.name)) and path.is_file() and not images_of(path)


def published_parts(names: list[str]) -> list[str] | None:
    """The split that each file or folder is of, where their names say train and val (or validation) or test, and begin
    alike: clevrtex_train.npz, ...; train-00000-of-00002.parquet, ..."""
    found = [re.fullmatch(r"(.*[_-])?(train|val|validation|test)((?:[-.]\w+)*)", Path(name).name) for name in names]
    if not all(found) or len({m[1] for m in found if m}) > 1:
        return None
    splits = ["val" if m[2] == "validation" else m[2] for m in found if m]
    return splits if {"train"} < set(splits) else None


class PackedShards:
    """Map-style, as ``PackedDataset``: the scenes of several, in order.

    Those whose names say train, val or test are these splits, in this order, and may be without masks: in ``batch``
    these are background all over, and objects unknown.

    Raises UserError that names the shard which differs from the first in kind, size or masks.
    """

    def __init__(self, parts: list[PackedDataset], path: str, lost: int = 0):
        if not parts:
            raise UserError(f"{path}: none of its files can be read")
        splits = None if lost else published_parts([part.info.path for part in parts])
        if splits:
            order = sorted(zip(splits, parts, strict=True), key=lambda one: SPLITS.index(one[0]))
            splits, parts = [name for name, _ in order], [part for _, part in order]
        first = parts[0].info
        for part in parts:
            one, other = ((i.kind, i.size, i.has_masks or bool(splits)) for i in (first, part.info))
            if one != other:
                raise UserError(
                    f"{part.info.path} holds {_what(part.info)}, but {first.path} holds {_what(first)}: "
                    f"name sets of one kind"
                )
        self._parts, self.by_range = parts, any(part.by_range for part in parts)
        self._starts = np.cumsum([0, *map(len, parts)])
        counts = dict.fromkeys(SPLITS, 0)
        for part, name in zip(parts, splits or (), strict=bool(splits)):
            counts[name] += len(part)
        train, val, test = counts.values()
        check_parts((train, val, test), [name in (splits or ()) for name in SPLITS], path)
        self.objects = np.concatenate([part.objects for part in parts])
        fingerprint = hashlib.blake2b(" ".join(part.info.digest for part in parts).encode(), digest_size=16)
        self.info = DatasetInfo(
            kind=first.kind,
            path=path,
            count=len(self),
            total=sum(part.info.total for part in parts),
            size=first.size,
            has_masks=any(part.info.has_masks for part in parts),
            published_split=False,
            max_objects=first.max_objects,
            digest=fingerprint.hexdigest(),
            skipped=lost + sum(part.info.skipped for part in parts),
            parts=(train, val, test) if splits else None,
            ignore_label=next((p.info.ignore_label for p in parts if p.info.ignore_label is not None), None),
            read_as=first.read_as,
        )

    @property
    def ignore_label(self) -> int | None:
        return self.info.ignore_label

    @property
    def kept_objects(self) -> np.ndarray:
        """As of ``PackedDataset``."""
        return np.concatenate([part.kept_objects for part in self._parts])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> dict[str, object]:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._parts[part][index - int(self._starts[part])]

    def batch(self, indices: np.ndarray, masks: bool = True) -> tuple[np.ndarray, np.ndarray | None]:
        """images uint8 [n, R, R, 3], masks uint8 [n, R, R] or None (as of ``PackedDataset``), in the order asked for"""
        indices, size = np.asarray(indices), self.info.size
        owner = np.searchsorted(self._starts, indices, side="right") - 1
        places = [(part, owner == part) for part in np.unique(owner)]
        asks = [self._parts[part].asks(indices[rows] - self._starts[part], masks) for part, rows in places]
        read = iter(gather([ask for some in asks for ask in some]))  # of all parts together, where they are far away
        shapes = [(len(indices), size, size, 3), (len(indices), size, size)][: 1 + (masks and self.info.has_masks)]
        arrays = [np.empty(shape, np.uint8) for shape in shapes]
        for part, rows in places:
            for array in arrays[: 1 + self._parts[part].info.has_masks]:
                array[rows] = next(read)
            for array in arrays[1 + self._parts[part].info.has_masks :]:
                array[rows] = 0
        return arrays[0], arrays[1] if len(arrays) > 1 else None

    def factors_of(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Generating factors that all shards have, by name; zeros where a shard's scenes have fewer objects."""
        indices = np.asarray(indices)
        owner = np.searchsorted(self._starts, indices, side="right") - 1
        places = {int(part): np.flatnonzero(owner == part) for part in np.unique(owner)}
        found = {p: self._parts[p].factors_of(indices[rows] - self._starts[p]) for p, rows in places.items()}
        names = set.intersection(*map(set, found.values())) if found else set()
        out = {}
        for name in sorted(names):
            values = [part[name] for part in found.values()]
            if len({(v.ndim, v.shape[2:]) for v in values}) > 1:
                continue  # not the same thing under one name
            objects = max(v.shape[1] for v in values) if values[0].ndim > 1 else 0
            out[name] = np.zeros(
                (len(indices), objects, *values[0].shape[2:])[: values[0].ndim], np.result_type(*values)
            )
            for part, rows in places.items():
                own = found[part][name]
                if own.ndim > 1:
                    own = np.pad(own, [(0, 0), (0, objects - own.shape[1]), *[(0, 0)] * (own.ndim - 2)])
                out[name][rows] = own
        return out

    def verify(self) -> None:
        """UserError unless the arrays are those that were packed."""
        for part in self._parts:
            part.verify()


def _what(info: DatasetInfo) -> str:
    return f"{info.kind}, {info.size} x {info.size}, {'with' if info.has_masks else 'without'} masks"
