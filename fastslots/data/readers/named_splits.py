"""Which split a scene is of, where folders or files are named so: ``images/train``, ``instances_val2017.json``.

Sets come with their test images. Taken in the order of names, those would train ("test" comes before "train").
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias, TypeVar

SPLITS = ("train", "val", "test")
_MEANT = {"train": "train training", "val": "val valid validation dev", "test": "test testing"}
SPLIT_WORDS = {word: split for split, words in _MEANT.items() for word in words.split()}
Parts: TypeAlias = tuple[int, int, int]
"""Scenes of train, val and test, one after another; 0 for one that is not named."""
T = TypeVar("T")


def split_named(name: str) -> str | None:
    """The split that a folder's or list's name says, also with a year: "val2017" -> "val"."""
    match = re.fullmatch(r"([a-z]+)[-_ ]?\d*", name.lower())
    return SPLIT_WORDS.get(match[1]) if match else None


def split_of(path: Path) -> str | None:
    """By the folders of a file, relative to the set's. None where none says it, or two say different things."""
    found = {split_named(part) for part in path.parts[:-1]} - {None}
    return found.pop() if len(found) == 1 else None


def in_order(things: Sequence[T], splits: Sequence[str | None]) -> tuple[list[T], Parts | None]:
    """Those of train first, then val, then test, and how many each are.

    As they are, and None, unless each is of a split, some train, and others do not.
    """
    names = set(splits)
    if None in names or not {"train"} < names:
        return list(things), None
    ordered = {name: [thing for thing, split in zip(things, splits, strict=True) if split == name] for name in SPLITS}
    train, val, test = (len(of_split) for of_split in ordered.values())
    return [thing for of_split in ordered.values() for thing in of_split], (train, val, test)
