"""What a training step asks of CUDA; tests put a stand-in in its place that records the asking."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from fastslots import capture

REHEARSALS = 2
"""Calls before a capture: the first compiles kernels and makes gradients, the second is as all that follow."""


class Queue(Protocol):
    """The work that a device has been given and not yet done."""

    def upload(self, images: Tensor) -> Tensor:
        """A batch on the device, copied beside the work that is in the queue."""

    def later(self, values: Tensor) -> Callable[[], list[float]]:
        """What reads these values when it is called; they may change after this returns."""

    def capture(self, work: Callable[[], object], rehearse: Callable[[], object]) -> Callable[[], None]:
        """What does ``work`` again, all of it as one launch. It is rehearsed before, and not done now."""


class Cuda:
    """The queue of one GPU."""

    def __init__(self, device: torch.device):
        self._device = device
        self._copies = torch.cuda.Stream(device)

    def upload(self, images: Tensor) -> Tensor:
        if images.device == self._device:
            return images
        with torch.cuda.stream(self._copies):
            there = images.to(self._device, non_blocking=True)
        here = torch.cuda.current_stream(self._device)
        here.wait_stream(self._copies)
        there.record_stream(here)  # the memory is the copying stream's: not again its own before this one has read it
        return there

    def later(self, values: Tensor) -> Callable[[], list[float]]:
        kept = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        kept.copy_(values, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(self._device))

        def read() -> list[float]:
            copied.synchronize()
            return kept.tolist()

        return read

    def capture(self, work: Callable[[], object], rehearse: Callable[[], object]) -> Callable[[], None]:
        try:
            with capture.whole_step():
                return capture.captured(work, self._device, REHEARSALS, rehearse)[0]
        except RuntimeError:
            torch.cuda.synchronize(self._device)  # raises where not the capture failed but the device
            raise
