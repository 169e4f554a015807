"""Writing the packed format: continued after a kill, never half there, by one process at a time.

Writing goes to NAME.partial, which is renamed when it is complete and on disk. Every ``FLUSH_EVERY`` scenes the arrays
are brought to the disk and ``progress.json`` says how far they got; a later call goes on from there.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from fastslots.data.packed import ARRAYS, MAGIC, UNKNOWN, VERSION, digest, is_packed, read_arrays
from fastslots.data.scene import BadRecordError, Scene
from fastslots.errors import UserError

FLUSH_EVERY = 256  # scenes of the source
_FRESH = {"read": 0, "done": 0, "bad": 0, "size": None, "has_masks": None}


def write_packed(
    folder: Path,
    scenes: Callable[[int], Iterator[Scene | BadRecordError | None]],
    kind: str,
    source: str,
    settings: dict[str, object],
    published_split: bool = False,
    progress: Callable[[int], None] = lambda read: None,
) -> None:
    """Write square scenes of one size, unless another process has written them while this one waited for it.

    Args:
        scenes: start -> one item for each scene of the source from ``start`` on; None for one that is left out, an
            error for one that could not be read (counted).
        settings: what decides the bytes; ``folder``.partial is continued only where they are the same.
        progress: called with the number of scenes of the source that are done.

    Raises UserError where the folder cannot be written; then (or after a kill) nothing stands at ``folder``.
    """
    partial = folder.with_name(folder.name + ".partial")
    settings = json.loads(json.dumps(settings | {"kind": kind, "source": source}))
    try:
        with locked(partial, folder):
            if is_packed(folder):
                shutil.rmtree(partial, ignore_errors=True)
                return
            with _Appender(partial, settings) as appender:
                for scene in scenes(appender.read):
                    appender.add(scene)
                    progress(appender.read)
                appender.finish(published_split)
            os.replace(partial, folder)
            for path in (folder / "lock", folder / "progress.json", *folder.glob("factors-*.npz")):
                path.unlink(missing_ok=True)  # only now: a kill before the rename finds all it needs to go on
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror or error}): free space or name another place "
            f"(FASTSLOTS_CACHE for decoded data)"
        ) from None


def cache_root() -> Path:
    """Where decoded and fetched data are kept: ``$FASTSLOTS_CACHE``, or ~/.cache/fastslots where that is not set."""
    return Path(os.environ.get("FASTSLOTS_CACHE") or "~/.cache/fastslots").expanduser()


@contextlib.contextmanager
def locked(partial: Path, folder: Path) -> Iterator[None]:
    """One writer at a time; the lock goes with the process that holds it."""
    partial.mkdir(parents=True, exist_ok=True)
    with open(partial / "lock", "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that writes {folder}", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
            partial.mkdir(exist_ok=True)  # the other one may have renamed it
            (partial / "lock").touch()
        except OSError:  # a file system without locks
            pass
        yield


class _Appender:
    """Appends scenes to the arrays of a partial folder and knows how many are safely there."""

    def __init__(self, folder: Path, settings: dict[str, object]):
        self._folder, self._state, self._settings = folder, folder / "progress.json", settings
        state = self._read_state()
        self.read, self._done, self._bad, self._size, self._has_masks = (state[key] for key in _FRESH)
        pixels = (self._size or 0) ** 2
        kept = (self._done * pixels * 3, self._done * pixels if self._has_masks else 0, self._done)
        self._files = {}
        for name, length in zip(ARRAYS, kept, strict=True):
            path = folder / name
            path.touch()
            os.truncate(path, length)
            self._files[name] = open(path, "ab")
        for path in self._chunks():
            if int(path.stem.removeprefix("factors-")) > self.read:
                path.unlink()
        self._factors: list[dict[str, np.ndarray]] = []  # since the last flush

    def _read_state(self) -> dict:
        """How far a writer with the same settings got: its arrays may be longer, never shorter."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            state = json.loads(self._state.read_text())
            lengths = [state["done"] * width for width in ((state["size"] or 0) ** 2 * 3, 1)]
            files = [(self._folder / name).stat().st_size for name in ("images.u8", "objects.u8")]
            if state["settings"] == self._settings and all(f >= n for f, n in zip(files, lengths, strict=True)):
                return {key: state[key] for key in _FRESH}
        return dict(_FRESH)

    def __enter__(self) -> _Appender:
        return self

    def __exit__(self, *_) -> None:
        for file in self._files.values():
            file.close()

    def add(self, scene: Scene | BadRecordError | None) -> None:
        if isinstance(scene, BadRecordError):
            self._bad += 1
        elif scene is not None:
            self._write(scene)
        self.read += 1
        if self.read % FLUSH_EVERY == 0:
            self._flush()

    def _write(self, scene: Scene) -> None:
        size, has_masks = scene.image.shape[0], scene.mask is not None
        if self._size is None:
            self._size, self._has_masks = size, has_masks
        if (size, has_masks) != (self._size, self._has_masks):
            source = self._settings["source"]
            raise UserError(f"{source}: scene {self.read} differs in size or masks from those before it: remove it")
        images, masks, objects = (self._files[name] for name in ARRAYS)
        images.write(np.ascontiguousarray(scene.image).data)
        if scene.mask is not None:
            masks.write(np.ascontiguousarray(scene.mask).data)
        objects.write(bytes([UNKNOWN if scene.objects is None else min(max(scene.objects, 0), UNKNOWN - 1)]))
        self._factors.append(scene.factors)
        self._done += 1

    def _flush(self) -> None:
        if self._factors:
            shapes = [{name: np.shape(value) for name, value in row.items()} for row in self._factors]
            names = list(shapes[0]) if all(shape == shapes[0] for shape in shapes) else []
            columns = {name: np.stack([row[name] for row in self._factors]) for name in names}
            write_arrays(self._folder / f"factors-{self.read}.npz", columns)
            self._factors = []
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        state = {"read": self.read, "done": self._done, "bad": self._bad}
        state |= {"size": self._size, "has_masks": self._has_masks}
        temporary = self._state.with_suffix(".tmp")
        temporary.write_text(json.dumps(state | {"settings": self._settings}))
        os.replace(temporary, self._state)

    def _chunks(self) -> list[Path]:
        return sorted(self._folder.glob("factors-*.npz"), key=lambda path: int(path.stem.removeprefix("factors-")))

    def finish(self, published_split: bool) -> None:
        self._flush()
        if not self._done:
            raise UserError(f"{self._settings['source']}: no images are left: raise --max_objects or name another set")
        if not self._has_masks:
            (self._folder / "masks.u8").unlink()
        chunks = [read_arrays(path) for path in self._chunks()]
        columns = {
            name: [chunk[name] for chunk in chunks]
            for name in chunks[0]
            if all(name in chunk and chunk[name].shape[1:] == chunks[0][name].shape[1:] for chunk in chunks)
        }
        if columns:
            joined = {name: np.concatenate(parts) for name, parts in columns.items()}
            write_arrays(self._folder / "factors.npz", joined)
        meta = {"magic": MAGIC, "version": VERSION, "kind": self._settings["kind"], "source": self._settings["source"]}
        meta |= {"skipped": self._bad, "count": self._done, "size": self._size, "has_masks": self._has_masks}
        meta |= {"max_objects": self._settings.get("max_objects") or 0, "published_split": published_split}
        with open(self._folder / "meta.json", "w") as file:
            json.dump(meta | {"digest": digest(self._folder)}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """An npz, brought to the disk. Not numpy.savez, whose own arguments take names like "file" from the columns."""
    with open(path, "wb") as file:
        with zipfile.ZipFile(file, "w") as archive:
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, np.ascontiguousarray(array), allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
