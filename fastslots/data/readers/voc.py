"""Pascal VOC's root: ``JPEGImages``, ``SegmentationObject`` (or ``SegmentationClass``), and lists in ``ImageSets``."""

from __future__ import annotations

from pathlib import Path

from fastslots.data.readers.named_splits import SPLITS, Parts, in_order
from fastslots.data.readers.pictures import SUFFIXES
from fastslots.data.storage.paths import is_hidden, visible
from fastslots.errors import UserError

IMAGES, MASKS = "JPEGImages", ("SegmentationObject", "SegmentationClass")
LISTS = Path("ImageSets") / "Segmentation"


def voc_root(folder: Path) -> Path | None:
    """``folder``, or the one set that lies up to two folders below (``VOCdevkit/VOC2012``). UserError where several
    do."""
    if _is_root(folder):
        return folder
    below = [p.parent for depth in ("*", "*/*") for p in folder.glob(f"{depth}/{IMAGES}") if not is_hidden(p, folder)]
    found = sorted(p for p in below if _is_root(p))
    if len(found) > 1:
        names = ", ".join(str(p.relative_to(folder)) for p in found)
        raise UserError(f"{folder} holds several sets of Pascal VOC ({names}): name one of these folders")
    return found[0] if found else None


def _is_root(folder: Path) -> bool:
    return (folder / IMAGES).is_dir() and any((folder / name).is_dir() for name in MASKS)


def find_pairs(root: Path) -> tuple[list[tuple[Path, Path]], str, Parts | None]:
    """Pictures with their masks, how they were found, and the split that the lists make of them.

    Pictures without a mask belong to the set, and are left out. UserError where a mask has no picture.
    """
    masks = next(root / name for name in MASKS if (root / name).is_dir())
    by_stem = {p.stem: p for p in visible(root / IMAGES) if p.suffix.lower() in SUFFIXES}
    of_stem = {p.stem: p for p in visible(masks) if p.suffix.lower() in SUFFIXES}
    names, parts, listed = _listed(root, list(of_stem))
    missing = next((name for name in names if name not in by_stem), None)
    if missing:
        raise UserError(f"{root / IMAGES} lacks the picture of {masks / missing}.png: unpack the set again")
    left = len(by_stem) - len(names)
    how = f"pictures in {IMAGES}, masks in {masks.name}{listed}; {left:,} pictures without a mask left out"
    return [(by_stem[name], of_stem[name]) for name in names], how, parts


def _listed(root: Path, masked: list[str]) -> tuple[list[str], Parts | None, str]:
    """Names with a mask, in the order of the lists train, val and test; else of trainval alone; else all."""
    known = set(masked)
    lists = {name: [n for n in _names(root / LISTS / f"{name}.txt") if n in known] for name in (*SPLITS, "trainval")}
    both = lists.pop("trainval")
    of_name = {name: split for split, names in reversed(lists.items()) for name in names}  # train's, if it is in two
    names, parts = in_order(list(of_name), list(of_name.values()))
    if parts is None:
        return both or masked, None, ""
    used = [split for split, names in lists.items() if names]
    return names, parts, f", as the lists {', '.join(used[:-1])} and {used[-1]} of {LISTS} have them"


def _names(path: Path) -> list[str]:
    """The first word of each line; none where there is no such list."""
    if not path.is_file():
        return []
    return [line.split()[0] for line in path.read_text(errors="replace").splitlines() if line.strip()]
