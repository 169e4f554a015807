"""CUDA graphs: a function of tensors is captured once for each key, then replayed on fresh inputs.

A tile of the decoder's loss is some hundred launches, many of a few microseconds, which a host issues more slowly than
a GPU runs them. Captured, a whole loss with all its tiles is one launch. A key is captured when it is seen for the
second time: shapes that come once (the last batch of an evaluation) cost nothing. Where a whole training step is
captured (``fastslots.train.device``), it takes the loss in, and nothing here is asked.

On by default for CUDA tensors; ``FASTSLOTS_CUDA_GRAPHS=0`` turns it off. Tests run everything here but
``capture_cuda`` itself, with a stand-in that calls the function again; ``tests/kernels/test_on_gpu.py`` compares a
captured loss with its operators where there is a GPU.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from fastslots.capture import Shared, captured, shared_memory, surroundings, wanted

Function = Callable[[Sequence[Tensor]], list[Tensor]]
Capture = Callable[[Function, list[Tensor]], tuple[Callable[[], None], list[Tensor]]]

__all__ = ["GRAPHS", "Graphs", "capture_cuda", "wanted"]


_memory: dict[Hashable, Shared] = {}
"""Of all graphs of a stream. They run one after another, and what a replay gives is copied at once, so that an
evaluation, training and a last batch, each a graph of gigabytes, take the memory of the largest."""


def capture_cuda(function: Function, inputs: list[Tensor]) -> tuple[Callable[[], None], list[Tensor]]:
    """-> replay() and the outputs that it overwrites. ``function`` must not wait for the device."""
    device = inputs[0].device
    key = device, torch.cuda.current_stream(device).cuda_stream
    try:
        if key not in _memory:
            _memory[key] = shared_memory(device)
        return captured(lambda: function(inputs), device, shared=_memory[key])
    except RuntimeError as error:
        _memory.pop(key, None)  # its stream may still be in a capture that could not be ended
        raise RuntimeError(
            f"the decoder's loss could not be captured in a CUDA graph ({error}): set FASTSLOTS_CUDA_GRAPHS=0"
        ) from error


class _Captured:
    """Input buffers of fixed addresses, the replay, and the outputs it writes."""

    def __init__(self, capture: Capture, function: Function, tensors: Sequence[Tensor]):
        self.inputs = [t.detach().clone(memory_format=torch.contiguous_format) for t in tensors]
        self.replay, self.outputs = capture(function, self.inputs)

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        for buffer, t in zip(self.inputs, tensors, strict=True):
            buffer.copy_(t.detach(), non_blocking=True)
        self.replay()
        # The next replay overwrites the outputs, and a caller may hold on to these (two losses, one backward).
        return [t.clone() for t in self.outputs]


class Graphs:
    """Captured functions by key; the ``capacity`` used last are kept."""

    def __init__(self, capture: Capture = capture_cuda, capacity: int = 4):
        self._capture, self._capacity = capture, capacity
        self._entries: OrderedDict[Hashable, _Captured | None] = OrderedDict()

    def __call__(self, key: Hashable, function: Function, tensors: Sequence[Tensor]) -> list[Tensor]:
        """``function(tensors)``, whose work must follow from ``key``, the shapes and types of ``tensors``, and what
        ``surroundings`` tells, alone."""
        key = (key, surroundings(tensors[0].device), *((tuple(t.shape), t.dtype, t.device) for t in tensors))
        seen = key in self._entries
        entry = self._entries.pop(key, None)
        if seen and entry is None:
            entry = _Captured(self._capture, function, tensors)
        self._entries[key] = entry
        while len(self._entries) > self._capacity:
            self._entries.popitem(last=False)
        return function(tensors) if entry is None else entry(tensors)


GRAPHS = Graphs()
"""Of this process."""
