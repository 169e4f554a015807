"""Second derivatives through forward mode that are right.

PyTorch's forward derivative of a layer norm takes its mean and deviation for constants, so differentiating it again,
forwards or backwards, is silently wrong (seen in torch 2.13; ``tests/metrics/test_interaction_order.py`` shows it).
Inside ``second_order()`` layer norms are computed by their formula, which any order of derivative gets right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class second_order(TorchFunctionMode):  # noqa: N801  a context manager, named like torch.no_grad
    """Context in which forward derivatives may be differentiated once more.

    Raises ValueError on an instance norm, which has the same fault and no place in our decoders.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.instance_norm:
            raise ValueError("second derivatives of an instance norm are wrong in forward mode: use a layer norm")
        if func is F.layer_norm:
            return _layer_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    dims = tuple(range(-len(shape), 0))
    centred = x - x.mean(dims, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)
    if weight is not None:
        normed = normed * weight
    return normed if bias is None else normed + bias
