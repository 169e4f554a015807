"""CUDA graphs: work on tensors of fixed addresses is captured once, then replayed as one launch.

Kernels are compiled and states made by a call before the capture, on the stream that is then captured; the products'
workspace belongs to the graph; other threads may go on calling CUDA. Tests without a GPU drive everything around it by
stand-ins that record what they are asked.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

import torch

Outputs = TypeVar("Outputs")

_whole: ContextVar[bool] = ContextVar("fastslots_whole_step", default=False)


@contextlib.contextmanager
def whole_step() -> Iterator[None]:
    """Inside, a graph of all that is called is being made: parts of it make none of their own."""
    token = _whole.set(True)
    try:
        yield
    finally:
        _whole.reset(token)


def why_not(device: torch.device) -> str | None:
    """Why calls on this device go through no graph; None where they do."""
    if device.type != "cuda":
        return f"the tensors are on {device.type}"
    if os.environ.get("FASTSLOTS_CUDA_GRAPHS", "1") == "0":
        return "FASTSLOTS_CUDA_GRAPHS=0"
    return None


def how(device: torch.device) -> str:
    """How the calls of a part that may be one graph go, for people."""
    reason = why_not(device)
    return f"operator by operator ({reason})" if reason else "one CUDA graph from the second call of a shape on"


def wanted(device: torch.device) -> bool:
    """Whether a part of a step goes through a graph of its own; not inside another capture, which takes it in."""
    return why_not(device) is None and not _whole.get() and not torch.cuda.is_current_stream_capturing()


def surroundings(device: torch.device) -> Hashable:
    """What a replay takes from where it was captured, besides its tensors: the stream that it runs on, autocast,
    which algorithms products and convolutions may use, and whether its buffers are inference tensors. A part of the key
    of a graph."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    cast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
    cudnn = torch.backends.cudnn
    # Not ``allow_tf32``, which raises in a program that has used the newer interface.
    tf32 = torch.backends.cuda.matmul.fp32_precision, cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    modes = torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark
    return stream, cast, tf32, modes, torch.is_inference_mode_enabled()


class Shared(NamedTuple):
    """Memory of graphs of which one alone runs at a time, and whose outputs are read before the next one runs."""

    pool: Any
    stream: torch.cuda.Stream  # of every capture: a block that is free again goes to the stream alone that it was of
    keeper: torch.cuda.CUDAGraph  # empty: into a pool whose last graph is gone torch captures no other


def shared_memory(device: torch.device) -> Shared:
    with torch.cuda.device(device):
        shared = Shared(torch.cuda.graph_pool_handle(), torch.cuda.Stream(), torch.cuda.CUDAGraph())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch tells of a graph that is empty
            with _capture(shared.keeper, shared.pool, shared.stream):
                pass
    return shared


def captured(
    work: Callable[[], Outputs],
    device: torch.device,
    rehearsals: int = 1,
    rehearse: Callable[[], object] | None = None,
    shared: Shared | None = None,
) -> tuple[Callable[[], None], Outputs]:
    """Capture ``work`` -> what replays it, and its outputs, which every replay overwrites.

    Args:
        work: reads and writes tensors of fixed addresses; it must not wait for the device.
        rehearsals: calls before the capture, of ``rehearse`` (None: of ``work``).
        shared: with whose other graphs it shares its memory; None: it has its own.

    Raises RuntimeError where CUDA refuses to capture it; the work itself was not done then.
    """
    with torch.cuda.device(device):
        # A stream by name: torch's own default is made once, on whichever device captures first.
        stream = torch.cuda.Stream() if shared is None else shared.stream
        pool = None if shared is None else shared.pool
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                for _ in range(rehearsals):
                    (rehearse or work)()
        finally:
            torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with _capture(graph, pool, stream):
            outputs = work()
    return graph.replay, outputs


@contextlib.contextmanager
def _capture(graph: torch.cuda.CUDAGraph, pool: Any, stream: torch.cuda.Stream) -> Iterator[None]:
    before = torch.cuda.current_stream()
    try:
        # "thread_local": the loader, which pins memory, and NCCL's watchdog may go on calling CUDA meanwhile.
        with own_workspace(), torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            yield
    except BaseException:
        torch.cuda.set_stream(before)  # torch leaves its own the current one where a capture cannot be ended
        raise


@contextlib.contextmanager
def own_workspace() -> Iterator[None]:
    """A capture inside takes cuBLAS's workspace from the graph's own memory.

    Products keep the address of a workspace that torch holds for (handle, stream). One made before a capture lies in
    memory that others get when torch's compiler, which clears workspaces around its own graphs, gives it back: a replay
    would then write into their tensors. Cleared before, it is made anew inside; cleared after, nobody else uses it.
    """
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)  # absent from a torch for CPUs
    clear()
    try:
        yield
    finally:
        clear()
