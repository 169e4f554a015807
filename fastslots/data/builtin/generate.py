"""Packs built-in scenes: for ``fastslots data generate``, and into the cache for training on slow ones."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from fastslots.data.builtin import BUILTIN
from fastslots.data.builtin.base import BuiltinScenes
from fastslots.data.packed.cache import cache_root
from fastslots.data.packed.writer import write_packed
from fastslots.data.readers.scene import Scene
from fastslots.errors import UserError
from fastslots.threads import usable_cores

CACHED = 11_000
"""Scenes kept for ``--data scenes``: 5 % of them are val and 5 % test, as of any set. They take a few minutes of two
cores once."""
PIXELS_AT_ONCE = 1 << 22
"""Of the scenes that one process makes together: a few hundred MB while sprites are painted."""

Made = tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]


def make(name: str, seed: int, size: int, objects: tuple[int, int], count: int) -> BuiltinScenes:
    """The built-in data of a name; UserError for settings that it cannot have."""
    try:
        return BUILTIN[name](seed, size, objects, count)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None


def pack(
    name: str,
    out: Path,
    seed: int,
    size: int,
    objects: tuple[int, int],
    count: int,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Write ``count`` scenes into a packed folder, on all usable cores; the bytes do not depend on their number.

    A partial folder is continued. Raises UserError: settings, or a folder that cannot be written.
    """
    dataset = make(name, seed, size, objects, count)
    settings: dict[str, object] = {"seed": seed, "size": size, "objects": f"{objects[0]}-{objects[1]}", "count": count}
    write_packed(out, lambda done: _scenes(dataset, done), dataset.KIND, f"seed {seed}", settings, progress=progress)


def cache_folder(name: str, seed: int, size: int, objects: tuple[int, int]) -> Path:
    """Where ``cached`` keeps its scenes."""
    key = json.dumps([name, seed, size, objects, CACHED])
    return cache_root() / f"{name}-{hashlib.blake2b(key.encode(), digest_size=8).hexdigest()}"


def cached(name: str, seed: int, size: int, objects: tuple[int, int], progress: Callable[[int], None]) -> Path:
    """The packed folder of ``CACHED`` scenes in the user's cache, made where it is not there yet."""
    folder = cache_folder(name, seed, size, objects)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not folder.exists():
        pack(name, folder, seed, size, objects, CACHED, progress)
    return folder


def _scenes(dataset: BuiltinScenes, done: int) -> Iterator[Scene]:
    at_once = max(1, min(256, PIXELS_AT_ONCE // dataset.size**2))
    parts = [range(start, min(start + at_once, len(dataset))) for start in range(done, len(dataset), at_once)]
    workers = min(usable_cores(), len(parts))
    if workers < 2:
        yield from (scene for part in parts for scene in _unpacked(dataset.scenes(part)))
        return
    # Forked: a user's script need not be safe to import again, and the children only calculate with NumPy.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
        ahead = 2 * workers  # no more parts at once than fit into memory
        pending = [pool.submit(dataset.scenes, part) for part in parts[:ahead]]
        for number in range(len(parts)):
            made = pending.pop(0).result()
            if number + ahead < len(parts):
                pending.append(pool.submit(dataset.scenes, parts[number + ahead]))
            yield from _unpacked(made)


def _unpacked(made: Made) -> Iterator[Scene]:
    images, masks, factors = made
    for i in range(len(images)):
        objects = int((factors["shape"][i] > 0).sum())
        yield Scene(images[i], masks[i], objects, {name: values[i] for name, values in factors.items()})
