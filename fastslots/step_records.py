"""What the kernels of a whole training step are handed: the records beside those of ``fastslots/records.py``.

Axes: B images, K slots, P pixels of an image that a step decodes, Z numbers of a slot.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor


class StepModel(NamedTuple):
    """A model whose step is one call of a kernel (``fastslots/train/fused``), which reads and writes its arrays where
    they lie: they are contiguous, and stay there."""

    # weights, grads (lists, as in EncoderInputs), queries, queries_grad, grid, places, token_of
    encoder: Mapping[str, Any]
    decoder: Mapping[str, Tensor]
    grads: Mapping[str, Tensor]  # of the decoder
    settings: Mapping[str, Any]  # sizes and numbers, as ``kernels/cpu/step_bindings.cpp`` names them
    quantiles: Tensor  # int32 [2^16] of the normal distribution (fastslots/train/draws.py)


class StepDraws(NamedTuple):
    """The random numbers of such a step. What is None is drawn by the kernel, as ``fastslots/train/draws.py`` does."""

    noise: Tensor | None  # [B, K, Z]
    pixels: Tensor | None  # [B, P]
    pixel_weight: Tensor | None  # [B, P], of given pixels
    keys: tuple[int, int]  # of noise and pixels, in 0..2^64 - 1
    first: int  # the place of the first image in the global batch
    pixel_count: int  # P, pixels an image
