"""Batches from any step on, prepared ahead by a thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastslots.data.dataset import Split, read_rows
from fastslots.data.map_style import as_scenes, as_split
from fastslots.data.packed.ranges import AHEAD
from fastslots.data.sampling import batch_indices

RESIDENT_SHARE = 0.4
"""Of a GPU's free memory, what images that stay there may take; a model and its step need the rest."""


class Batch(NamedTuple):
    """One step's images."""

    step: int  # from 1
    images: Tensor  # uint8 [b, R, R, 3], or float [b, C, R, R] where the data set gives floats
    masks: Tensor | None  # uint8 [b, R, R], 0 = background


def to_float(images: Tensor) -> Tensor:
    """uint8 [b, R, R, 3] -> fp32 [b, 3, R, R] in [0, 1]; float [b, C, R, R] passes through as fp32."""
    if images.dtype == torch.uint8:
        # Channels first while a pixel is a byte, then in place: half the time of a strided conversion and a quotient.
        # A tensor, for a GPU multiplies by the reciprocal of a number: the last bit would differ from a CPU's.
        white = torch.full((), 255.0, device=images.device)
        return images.permute(0, 3, 1, 2).contiguous().to(torch.float32).div_(white)
    return images.float()


def read_batch(dataset: Any, indices: np.ndarray) -> tuple[Tensor, Tensor | None]:
    """Images and masks at ``indices`` of one of our data sets (``batch``) or of any torch map-style data set.

    Items of the latter may be an image, a tuple (image, mask, ...), or a dict with "image" and perhaps "mask"; an
    image is uint8 [R,R,3] or [3,R,R], or float [C,R,R] in [0, 1]; arrays, tensors or PIL pictures.

    Raises UserError naming the item that is none of it, and where some have a mask and others none.
    """
    return read_rows(as_scenes(dataset), indices)


def hold_images(split: Split, device: torch.device, limit: float) -> Tensor | None:
    """Images of a split as one tensor on ``device``, uint8 [n, R, R, 3] or features as they are kept; None where that
    takes over ``limit`` bytes.

    For sets on disk alone (those with ``info``): what is made on the fly has no end.
    """
    if split.dataset.info is None or not len(split):
        return None
    one = split[:1].read()[0]
    if len(split) * one.nbytes > limit:
        return None
    held = torch.empty(len(split), *one.shape[1:], dtype=one.dtype, device=device)
    for first in range(0, len(split), 1024):
        part = split[first : first + 1024]
        held[first : first + len(part)] = part.read(masks=False)[0].to(device)
    return held


class Loader:
    """Iterates over ``Batch`` for step = start_step, start_step + 1, ... without end.

    Args:
        dataset: a ``Split``, one of our data sets, or any torch map-style one (see ``read_batch``).
        indices: the rows to draw from; None for all.
        batch_size: images a step on this process; ``start``: where its slice of the global batch begins.
        prefetch: batches prepared ahead by a thread (``AHEAD`` by as many, and without masks, where a set in object
            storage is read by byte range); 0 prepares in the caller.
        device: where the batches go. For a GPU images are held there if ``RESIDENT_SHARE`` of its free memory is
            enough (and batches have no masks); else they wait in pinned memory, from which copies overlap with work.

    An error of the data set surfaces in the caller. Use as a context manager, or call ``close``.
    """

    def __init__(
        self,
        dataset: Any,
        seed: int,
        batch_size: int,
        start_step: int = 1,
        indices: range | np.ndarray | None = None,
        start: int = 0,
        prefetch: int = 2,
        device: torch.device | None = None,
    ):
        self._split = dataset if isinstance(dataset, Split) else as_split(dataset, indices)
        self._seed, self._batch_size, self._start = seed, batch_size, start
        self._step = start_step
        self._pin, self._held = False, None
        if device is not None and device.type == "cuda":
            self._pin = True
            self._held = hold_images(self._split, device, RESIDENT_SHARE * torch.cuda.mem_get_info(device)[0])
        self._closed = False
        far = bool(prefetch and self._split.dataset.by_range)
        self._ahead = max(prefetch, AHEAD) if far else prefetch
        self._threads = ThreadPoolExecutor(AHEAD if far else 1, "fastslots-loader") if prefetch else None
        self._batches: deque[Future[Batch]] = deque()
        self._prefetch()

    def read(self, step: int) -> Batch:
        """The batch of any step, now."""
        drawn = batch_indices(self._seed, step, self._batch_size, len(self._split), self._start)
        if self._held is not None:
            return Batch(step, self._held[torch.from_numpy(drawn).to(self._held.device)], None)
        images, masks = self._split.read(drawn, masks=False)
        return Batch(step, images.pin_memory() if self._pin else images, masks)

    def _prefetch(self) -> None:
        while self._threads and len(self._batches) < self._ahead:
            self._batches.append(self._threads.submit(self.read, self._step))
            self._step += 1

    def __iter__(self) -> Iterator[Batch]:
        while True:
            if self._closed:
                raise RuntimeError("this loader is closed: make another")
            if self._threads is None:
                yield self.read(self._step)
                self._step += 1
                continue
            try:
                batch = self._batches.popleft().result()
            except BaseException:
                self._closed = True
                raise
            self._prefetch()
            yield batch

    def close(self) -> None:
        self._closed = True
        if self._threads:
            self._threads.shutdown(cancel_futures=True)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
