"""Writing the packed format: continued after a kill, never half there, by one process at a time.

Writing goes to NAME.partial, which is renamed when it is complete and on disk. Every ``FLUSH_EVERY`` scenes the arrays
are brought to the disk and ``progress.json`` says how far they got; a later call goes on from there.
"""

from __future__ import annotations

import contextlib
import copy
import fcntl
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np

from fastslots.data.packed.dataset import (
    ARRAYS,
    MAGIC,
    UNKNOWN,
    VERSION,
    check_parts,
    digest,
    is_packed,
    read_arrays,
)
from fastslots.data.readers.scene import BadRecordError, Scene
from fastslots.errors import UserError
from fastslots.files import refuse_links
from fastslots.notices import notice

FLUSH_EVERY = 256  # scenes of the source
_FRESH = {"read": 0, "done": 0, "bad": 0, "size": None, "has_masks": None, "kept": [0, 0, 0]}


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
                for scene in scenes(appender.state["read"]):
                    appender.add(scene)
                    progress(appender.state["read"])
                appender.finish(published_split)
            os.replace(partial, folder)
            for path in (folder / "lock", folder / "progress.json", *folder.glob("factors-*.npz")):
                path.unlink(missing_ok=True)  # only now: a kill before the rename finds all it needs to go on
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror or error}): free space or name another place "
            f"(FASTSLOTS_CACHE for decoded data)"
        ) from None


@contextlib.contextmanager
def locked(partial: Path, folder: Path) -> Iterator[None]:
    """One writer at a time; the lock goes with the process that holds it. UserError where links stand in ``partial``,
    which may have come with somebody else's folder."""
    refuse_links(partial)
    partial.mkdir(parents=True, exist_ok=True)
    with open(partial / "lock", "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            notice(f"waiting for another process that writes {folder}")
            fcntl.flock(file, fcntl.LOCK_EX)
            partial.mkdir(exist_ok=True)  # the other one may have renamed it
            (partial / "lock").touch()
        except OSError:  # a file system without locks
            pass
        yield


Folder = TypeVar("Folder", bound="PartialFolder")  # typing.Self is of Python 3.11


class PartialFolder:
    """Arrays that grow in a folder, and a note of how much of them is safely on the disk.

    The note, progress.json, holds ``state`` and the settings; a later writer with the same settings goes on from there.

    Args:
        fresh: the state of an empty folder; its "done" counts the items that are written.
        widths: state -> bytes of an item in each array.
    """

    def __init__(
        self,
        folder: Path,
        settings: dict[str, Any],
        fresh: dict[str, Any],
        widths: Callable[[dict[str, Any]], dict[str, int]],
    ):
        self.folder, self.settings, self._note = folder, settings, folder / "progress.json"
        self.state = self._read(fresh, widths)
        self._files: dict[str, BinaryIO] = {}
        for name, width in widths(self.state).items():
            (folder / name).touch()
            os.truncate(folder / name, self.state["done"] * width)
            self._files[name] = open(folder / name, "ab")

    def _read(self, fresh: dict[str, Any], widths: Callable[[dict[str, Any]], dict[str, int]]) -> dict[str, Any]:
        """How far a writer with the same settings got: its arrays may be longer, never shorter."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            note = json.loads(self._note.read_text())
            state = {name: note[name] for name in fresh}
            lengths = {name: state["done"] * width for name, width in widths(state).items()}
            there = all((self.folder / name).stat().st_size >= length for name, length in lengths.items())
            if there and note["settings"] == self.settings:
                return state
        return dict(fresh)

    def __enter__(self: Folder) -> Folder:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def append(self, name: str, items: np.ndarray | bytes) -> None:
        self._files[name].write(np.ascontiguousarray(items).data if isinstance(items, np.ndarray) else items)

    def flush(self) -> None:
        """Bring what was appended to the disk, then the note that it is there."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        temporary = self._note.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.state | {"settings": self.settings}))
        os.replace(temporary, self._note)

    def describe(self, meta: dict[str, object], names: Iterable[str]) -> None:
        """Write meta.json, with the digest of these arrays."""
        with open(self.folder / "meta.json", "w") as file:
            json.dump(meta | {"digest": digest(self.folder, names)}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())


def _widths(state: dict[str, Any]) -> dict[str, int]:
    pixels = (state["size"] or 0) ** 2
    return dict(zip(ARRAYS, (3 * pixels, pixels if state["has_masks"] else 0, 1), strict=True))


class _Appender(PartialFolder):
    """Scenes into the arrays of a packed folder."""

    def __init__(self, folder: Path, settings: dict[str, Any]):
        super().__init__(folder, settings, copy.deepcopy(_FRESH), _widths)
        self._ends = np.cumsum(settings.get("parts") or [0, 0, 0])
        for path in self._chunks():
            if int(path.stem.removeprefix("factors-")) > self.state["read"]:
                path.unlink()
        self._factors: list[dict[str, np.ndarray]] = []  # since the last flush

    def add(self, scene: Scene | BadRecordError | None) -> None:
        if isinstance(scene, BadRecordError):
            self.state["bad"] += 1
        elif scene is not None:
            self._write(scene)
        self.state["read"] += 1
        if self.state["read"] % FLUSH_EVERY == 0:
            self.flush()

    def _write(self, scene: Scene) -> None:
        state, form = self.state, {"size": scene.image.shape[0], "has_masks": scene.mask is not None}
        if state["size"] is None:
            state |= form
        if any(state[name] != value for name, value in form.items()):
            source = self.settings["source"]
            raise UserError(f"{source}: scene {state['read']} differs in size or masks from those before it: remove it")
        self.append("images.u8", scene.image)
        if scene.mask is not None:
            self.append("masks.u8", scene.mask)
        known = UNKNOWN if scene.objects is None else min(max(scene.objects, 0), UNKNOWN - 1)
        self.append("objects.u8", bytes([known]))
        self._factors.append(scene.factors)
        state["done"] += 1
        if state["read"] < self._ends[-1]:
            state["kept"][int(np.searchsorted(self._ends, state["read"], side="right"))] += 1

    def flush(self) -> None:
        if self._factors:
            shapes = [{name: np.shape(value) for name, value in row.items()} for row in self._factors]
            names = list(shapes[0]) if all(shape == shapes[0] for shape in shapes) else []
            columns = {name: np.stack([row[name] for row in self._factors]) for name in names}
            write_arrays(self.folder / f"factors-{self.state['read']}.npz", columns)
            self._factors = []
        super().flush()

    def _chunks(self) -> list[Path]:
        return sorted(self.folder.glob("factors-*.npz"), key=lambda path: int(path.stem.removeprefix("factors-")))

    def finish(self, published_split: bool) -> None:
        self.flush()
        state, settings = self.state, self.settings
        if not state["done"]:
            raise UserError(f"{settings['source']}: no images are left: raise --max_objects or name another set")
        if not state["has_masks"]:
            (self.folder / "masks.u8").unlink()
        chunks = [read_arrays(path) for path in self._chunks()]
        columns = {
            name: [chunk[name] for chunk in chunks]
            for name in chunks[0]
            if all(name in chunk and chunk[name].shape[1:] == chunks[0][name].shape[1:] for chunk in chunks)
        }
        if columns:
            joined = {name: np.concatenate(parts) for name, parts in columns.items()}
            write_arrays(self.folder / "factors.npz", joined)
        meta = {"magic": MAGIC, "version": VERSION, "kind": settings["kind"], "source": settings["source"]}
        meta |= {"skipped": state["bad"] + settings.get("skipped", 0), "count": state["done"]}
        meta |= {"size": state["size"], "has_masks": state["has_masks"]}
        meta |= {"max_objects": settings.get("max_objects") or 0, "published_split": published_split}
        meta |= {name: settings[name] for name in ("ignore_label", "read_as") if settings.get(name) is not None}
        if settings.get("parts"):
            check_parts(state["kept"], settings["parts"], settings["source"])
            meta["parts"] = state["kept"]
        self.describe(meta, ARRAYS)


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """An npz, brought to the disk. Not numpy.savez, whose own arguments take names like "file" from the columns."""
    with open(path, "wb") as file:
        with zipfile.ZipFile(file, "w") as archive:
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, np.ascontiguousarray(array), allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
