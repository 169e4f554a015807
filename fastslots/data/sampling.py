"""Random numbers that depend on (seed, step, i) alone: no epochs, exact resume, the same on any number of processes.

A counter-based generator: splitmix64's finaliser (Steele et al., OOPSLA 2014) over mixed counters. Written out rather
than taken from a library, so that no version of one ever changes what a run has seen.
"""

from __future__ import annotations

from enum import IntEnum, unique

import numpy as np

_GOLDEN = 0x9E3779B97F4A7C15


@unique
class Purpose(IntEnum):
    """What a seed is for: no two alike, or their random numbers would be. Values are frozen: each run's randomness
    follows from them."""

    NOISE = 1
    PIXELS = 2
    JACOBIAN = 3
    QUERIES = 4
    OWN_PARTS = 5  # dropout and the like in a model or a loss of the user's own
    AUGMENTATION = 6
    TRAIN = 11  # built-in data of the splits
    VAL = 12
    TEST = 13
    EVALUATION = 21


def mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser: a bijection of uint64 whose output bits look independent."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = x ^ (x >> np.uint64(31))
    return mixed


def random_u64(*counters: int | np.ndarray) -> np.ndarray:
    """uint64 that depend on every counter and their order; counters broadcast."""
    with np.errstate(over="ignore"):
        state = np.zeros((), np.uint64)
        for counter in counters:
            value = np.asarray(counter, dtype=np.int64).astype(np.uint64)
            state = mix((state ^ mix(value + np.uint64(_GOLDEN))) + np.uint64(_GOLDEN))
        return state


def batch_indices(seed: int, step: int, batch_size: int, n: int, start: int = 0) -> np.ndarray:
    """Images of a step: ``batch_size`` independent uniform draws from range(n), int64.

    Image i depends on (seed, step, i) alone; ``start`` gives a process its slice of the global batch. The bias of the
    multiply-shift draw is below n / 2^32.
    """
    draws = random_u64(seed, step, np.arange(start, start + batch_size))
    return ((draws >> np.uint64(32)) * np.uint64(n) >> np.uint64(32)).astype(np.int64)


def step_seed(seed: int, step: int, purpose: Purpose) -> int:
    """A seed for torch's generator, of a step (or an image) and one purpose."""
    return int(random_u64(seed, step, purpose) >> np.uint64(1))
