"""The first compile of Triton kernels takes seconds each: says so while it lasts, once a program."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import triton

EVERY = 5.0
"""Seconds from one line about progress to the next."""


@contextlib.contextmanager
def told(say: Callable[[str], None], now: Callable[[], float] = time.monotonic) -> Iterator[None]:
    """Kernels that are compiled inside are told of: at the first of them, every few seconds, and how many they were.

    Nothing is said where all come from Triton's cache on disk, as from the second run on a machine.
    """
    start = last = now()
    compiled = 0
    before = triton.knobs.compilation.listener

    def listener(*args: Any, cache_hit: bool, **rest: Any) -> None:
        nonlocal compiled, last
        if before is not None:
            before(*args, cache_hit=cache_hit, **rest)
        if cache_hit:
            return
        compiled += 1
        if compiled == 1:
            say("compiling Triton kernels, a second or two each (first run of this model on this GPU) ...")
        elif now() - last >= EVERY:
            say(f"compiling Triton kernels: {compiled} after {now() - start:.0f} s ...")
        else:
            return
        last = now()

    triton.knobs.compilation.listener = listener
    try:
        yield
    finally:
        triton.knobs.compilation.listener = before
        if compiled:
            say(f"compiled {compiled} Triton kernels in {now() - start:.0f} s; later runs take them from {cache()}")


def cache() -> str:
    """Where Triton keeps them."""
    return str(triton.knobs.cache.dir)
