"""Checkpoints: one safetensors file each, no pickle; written whole or not at all, verified by checksum when read."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from fastslots.errors import UserError
from fastslots.files import forget_cached, read_file, set_aside, write_atomic
from fastslots.runs.folder import RunFolder

MOST_PENDING = 2  # works of a Writer that may wait, each with its snapshot in memory


@dataclass
class Checkpoint:
    """All that a resume needs; batches, noise and pixel subsets follow from (seed, step)."""

    step: int  # the last finished one
    tensors: dict[str, Tensor]  # "model.*" and "optimizer.*", on the CPU
    numbers: dict[str, float]  # the optimiser's plain numbers
    extra: dict[str, Any]  # JSON: best score so far, loss scaler

    def to_bytes(self) -> bytes:
        """A safetensors file whose metadata holds the rest and a checksum of everything."""
        header = {"step": self.step, "numbers": self.numbers, "extra": self.extra}
        metadata = {"header": json.dumps(header), "digest": _digest(self.tensors, header)}
        return safetensors.torch.save(self.tensors, metadata=metadata)

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with ``prefix``, by the rest of their names."""
        return {name.removeprefix(prefix): value for name, value in self.tensors.items() if name.startswith(prefix)}

    @classmethod
    def from_bytes(cls, data: bytes) -> Checkpoint:
        """ValueError where the bytes are not those of ``to_bytes``."""
        try:
            tensors = safetensors.torch.load(data)
            metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
            header = json.loads(metadata["header"])
            if metadata["digest"] != _digest(tensors, header):
                raise ValueError("checksum differs")
            if type(header["step"]) is not int:
                raise ValueError(f"step is {header['step']!r}")
            return cls(header["step"], tensors, header["numbers"], header["extra"])
        except (SafetensorError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"no checkpoint: {error}") from None


def snapshot(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, which the next step does not change."""
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}


def save_checkpoint(folder: RunFolder, checkpoint: Checkpoint, keep: int) -> Path:
    """Write a run's checkpoint and drop all but the newest ``keep``.

    Nothing is dropped before the new one has been read back from the disk and verified. Raises UserError where it was
    not written, or does not verify: it is set aside then, and those before it stay.
    """
    path = folder.checkpoint(checkpoint.step)
    write_atomic(path, checkpoint.to_bytes())
    try:
        forget_cached(path)
        load_checkpoint(path)
    except UserError as error:
        raise UserError(f"{error}, just after it was written: it is set aside as {set_aside(path)}") from None
    for step, other in folder.checkpoint_files():
        if step > checkpoint.step:  # this run went on from one before it, for it could not be read
            set_aside(other)
    older = [other for step, other in folder.checkpoint_files() if step <= checkpoint.step]
    torn = folder.checkpoints.glob(".step_*.partial")  # of a kill: each would take a checkpoint's room for good
    for other in [*older[:-keep], *torn]:
        with contextlib.suppress(OSError):  # somebody else has removed it
            other.unlink()
    return path


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and verify; UserError where the file is damaged."""
    try:
        return Checkpoint.from_bytes(read_file(path))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error})") from None


def latest_checkpoint(folder: RunFolder) -> tuple[Checkpoint | None, dict[Path, str]]:
    """The newest checkpoint that verifies, and newer ones that do not, each with the reason."""
    damaged: dict[Path, str] = {}
    for _, path in reversed(folder.checkpoint_files()):
        try:
            return load_checkpoint(path), damaged
        except UserError as error:
            damaged[path] = str(error)
    return None, damaged


def checkpoint_to_resume(folder: RunFolder, damaged: dict[Path, str], restart: bool) -> bytes:
    """The newest good checkpoint of a run, or nothing where it has none; ``damaged`` gets newer ones and the reasons.

    restart: where none of them can be read, set the logs aside too, so that nothing of the run is lost.

    Raises UserError where none can be read and ``restart`` was not asked for, which touches nothing; and where it was,
    without need.
    """
    newest, reasons = latest_checkpoint(folder)
    if newest and restart:
        raise UserError(f"{folder.path} has a good checkpoint, of step {newest.step:,}: leave out --restart")
    if reasons and not newest:
        if not restart:
            others = f" nor can the {len(reasons) - 1} before it" if len(reasons) > 1 else " and there is no other"
            raise UserError(
                f"{next(iter(reasons.values()))},{others}: mend the disk, or add --restart to set what is there aside "
                f"and begin at step 0"
            )
        for log in (folder.metrics, folder.machine_log):
            if log.exists():
                set_aside(log)
    damaged.update(reasons)
    return newest.to_bytes() if newest else b""


def _digest(tensors: dict[str, Tensor], header: dict[str, Any]) -> str:
    digest = hashlib.blake2b(json.dumps(header, sort_keys=True).encode(), digest_size=16)
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Writer:
    """Writes files behind the training loop, in order, on one thread.

    What cannot be written (a full disk) is reported and the run goes on: ``write_atomic`` leaves what was there before.
    """

    def __init__(self, report: Callable[[str], None]):
        self._report = report
        self._thread = ThreadPoolExecutor(1, "fastslots-writer")  # joined at exit, whatever ends the process
        self._pending: deque[Future[object]] = deque()
        self._failure: UserError | None = None  # of the newest work, where it failed

    def submit(self, work: Callable[[], object]) -> None:
        """Run ``work`` soon; it must own what it writes. Waits where the disk is slower than the run."""
        self._pending.append(self._thread.submit(work))
        while self._pending and (self._pending[0].done() or len(self._pending) > MOST_PENDING):
            self._collect()

    def finish(self) -> None:
        """Wait for everything; UserError where the newest work was not written."""
        while self._pending:
            self._collect()
        if self._failure:
            raise self._failure

    def close(self) -> None:
        """Wait, and report what failed."""
        while self._pending:
            self._collect()
        self._thread.shutdown()

    def _collect(self) -> None:
        self._failure = None
        try:
            self._pending.popleft().result()
        except UserError as error:
            self._failure = error
            self._report(f"warning   {error}. Training goes on; what was written before is kept")
