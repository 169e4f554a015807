"""interaction_penalty: against the double loop over slots, and near one-hot maps."""

from __future__ import annotations

import pytest
import torch

from fastslots import ops
from fastslots.testing import SHAPES, random_qkv

EVERY_SHAPE = pytest.mark.parametrize("shape", [pytest.param(shape, id=name) for name, shape in SHAPES.items()])


def pair_sum(slot_map: torch.Tensor) -> torch.Tensor:
    """The double loop over slots."""
    total = torch.zeros(slot_map.shape[:2], dtype=slot_map.dtype)
    for k in range(slot_map.shape[-1]):
        for j in range(k):
            total += slot_map[..., j] * slot_map[..., k]
    return total


@EVERY_SHAPE
def test_penalty_is_the_double_loop(shape):
    slot_map = ops.cross_attention(*random_qkv(shape))[1]
    expected = pair_sum(slot_map).mean() if shape.B else torch.zeros((), dtype=torch.float64)
    torch.testing.assert_close(ops.interaction_penalty(slot_map), expected, rtol=1e-13, atol=0)


def test_penalty_does_not_cancel_near_one_hot():
    """Every form is right in float64; in fp32 ½[(Σw)² − Σw²] loses a pixel's penalty, the running sum does not."""
    g = torch.Generator().manual_seed(0)
    shared = 40 * torch.randn(1, 1, 4096, 7, dtype=torch.float64, generator=g)  # the heads agree on a slot
    scores = shared + torch.randn(1, 12, 4096, 7, dtype=torch.float64, generator=g)
    exact = pair_sum(scores.softmax(-1).sum(1))
    w = scores.float().softmax(-1).sum(1)
    difference = (w.sum(-1) ** 2 - (w**2).sum(-1)) / 2
    near = exact < 1e-3
    assert near.any()
    bound = 1e-6 * exact[near].mean()  # seen: 3.5e-9, and 3e-3 by the difference
    assert (ops.interaction_penalty(w[near][None]) - exact[near].mean()).abs() < bound
    assert (difference[near].mean() - exact[near].mean()).abs() > 100 * bound


def test_penalty_gradient_is_the_formula():
    w = torch.rand(2, 5, 4, dtype=torch.float64, requires_grad=True)
    ops.interaction_penalty(w).backward()
    torch.testing.assert_close(w.grad, (w.sum(-1, keepdim=True) - w).detach() / 10)
