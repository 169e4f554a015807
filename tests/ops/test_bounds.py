"""The bounds that kernels are held to notice what they are for: a slot's last term that a kernel leaves out."""

from __future__ import annotations

import pytest
import torch

from fastslots.ops import reference
from fastslots.records import FoldedProjections
from fastslots.testing import INTERPRETED_SHAPES, assert_slots_within_units, assert_within_units, layer_inputs

CASES = [
    *((name, dtype) for name in ("clevr6", "sprites", "clevrtex") for dtype in (torch.bfloat16, torch.float32)),
    *((name, torch.float32) for name in ("17-slots", "64-slots")),  # some weigh less than bf16's roundoff
]


def gradients(shape, pixels: slice) -> list[torch.Tensor]:
    """dG, dg, dU of some pixels, in float64: the weights' gradients are sums over pixels."""
    x, folded, _, _, dy, dmap = layer_inputs(shape, torch.float64)
    leaves = [t.double().requires_grad_() for t in folded]
    y, slot_map = reference.folded_cross_attention(x[:, pixels], FoldedProjections(*leaves), None)
    return list(torch.autograd.grad([y, slot_map], leaves[:3], [dy[:, pixels], dmap[:, pixels].double()]))


@pytest.mark.parametrize("name, dtype", CASES)
def test_a_slots_last_term_is_missed(name, dtype):
    shape = INTERPRETED_SHAPES[name]
    full, last = gradients(shape, slice(None)), gradients(shape, slice(-1, None))
    axes = (3, 2, 2)
    assert_slots_within_units(full, full, axes, dtype)
    for slot in range(shape.K):
        for i, axis in enumerate(axes):
            short = [t.clone() for t in full]
            short[i].select(axis, slot).sub_(last[i].select(axis, slot))
            with pytest.raises(AssertionError, match=f"slot {slot} of tensor {i}"):
                assert_slots_within_units(short, full, axes, dtype)


def test_a_value_that_is_no_number_is_missed():
    full = gradients(INTERPRETED_SHAPES["17-slots"], slice(None))
    broken = [full[0].clone(), *full[1:]]
    broken[0].view(-1)[-1] = float("nan")
    for check in (assert_within_units, lambda a, r, dtype: assert_slots_within_units(a, r, (3, 2, 2), dtype)):
        with pytest.raises(AssertionError, match="nan"):
            check(broken, full, torch.bfloat16)
