"""The ops for others' models over the whole grid of sizes: dtype x K x d x mask x strides x backend, against float64.

L is 33, one panel of tokens and a tail of one, at every instruction set. Triton has sizes of its own elsewhere: its
interpreter takes a second for what takes C++ a millisecond.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from values import ISAS, cpu_backend

from fastslots.ops import cross_attention, slot_attention

SLOTS, WIDTHS = (1, 7, 16, 64, 77, 128), (16, 43, 64, 160)
BATCH, HEADS, LENGTH = 2, 2, 33
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24, torch.float64: 2.0**-53}
BOUNDS = {
    "cpu": {torch.float16: 2, torch.bfloat16: 2, torch.float32: 64, torch.float64: 64},
    "reference": {torch.float16: 16, torch.bfloat16: 16, torch.float32: 64, torch.float64: 64},
}
"""Unit roundoffs of the dtype, relative to the largest element that is expected. C++ rounds a 16-bit result once: 1 by
definition. The reference rounds every product. In fp32 the worst seen is 34 (portable, K 128, d 160: the output is a
mean of many values and smaller than they are)."""


def attention(q: Tensor, k: Tensor, v: Tensor, backend: str, mask: Tensor | None) -> tuple[Tensor, ...]:
    return cross_attention(q, k, v, backend=backend, slot_mask=mask)


def statistics(q: Tensor, k: Tensor, v: Tensor, backend: str, mask: Tensor | None) -> tuple[Tensor, ...]:
    weights = torch.tensor([0.5, -1.5], dtype=torch.promote_types(q.dtype, torch.float32))
    out, slot_map, rows = cross_attention(
        q, k, v, backend=backend, slot_mask=mask, head_weights=weights, statistics=("entropy", "lse")
    )
    return out, slot_map, rows["entropy"], rows["lse"]


def iteration(q: Tensor, k: Tensor, v: Tensor, backend: str, mask: Tensor | None) -> tuple[Tensor, ...]:
    """Slots in the place of keys: what few there are of comes second in the other ops."""
    return slot_attention(k, q, v, eps=1e-3, backend=backend, slot_mask=mask, return_map=True)


def drawn(K: int, d: int, op: Callable) -> list[Tensor]:
    generator = torch.Generator().manual_seed(K * 1000 + d)
    of_values = LENGTH if op is iteration else K
    return [torch.randn(BATCH, HEADS, n, d, generator=generator, dtype=torch.float64) for n in (LENGTH, K, of_values)]


def kept(K: int) -> Tensor:
    """An image without slots, and one with most of them."""
    mask = torch.rand(BATCH, K, generator=torch.Generator().manual_seed(K)) > 0.3
    mask[0], mask[1, 0] = False, True
    return mask


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "[B, H, L, d]": lambda t: t,
    "[B, L, H, d]": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "[B, H, d, L]": lambda t: t.mT.contiguous().mT,
}


def results(op: Callable, tensors: list[Tensor], backend: str, mask: Tensor | None) -> list[Tensor]:
    """Outputs, and gradients under cotangents that are the same numbers in every dtype."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    outputs = op(*leaves, backend, mask)
    generator = torch.Generator().manual_seed(0)
    cotangents = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in outputs]
    cotangents = [c.bfloat16().half().to(o.dtype) for c, o in zip(cotangents, outputs, strict=True)]
    return [o.detach() for o in outputs] + list(torch.autograd.grad(outputs, leaves, cotangents))


def ways(dtype: torch.dtype) -> Iterator[tuple[str, str, str]]:
    """(backend, instruction set, layout); doubles have the portable build alone, and torch knows its own strides."""
    yield "reference", "", "[B, H, L, d]"
    for isa in ISAS if dtype != torch.float64 else ("portable",):
        for layout in LAYOUTS:
            yield "cpu", isa, layout


def off(got: Tensor, expected: Tensor, unit: float) -> float:
    """The worst error in roundoffs. Of what is zero by right (a softmax of one slot has no gradient): of 1."""
    assert got.shape == expected.shape
    if not torch.isfinite(got).all():
        return float("inf")
    scale = expected.abs().max().item()
    return (got.double() - expected).abs().max().item() / (scale if scale > 1e-12 else 1.0) / unit


@pytest.mark.skipif(not ISAS, reason="this checkout has no C++ module")
@pytest.mark.parametrize("masked", [False, True], ids=["all slots", "masked"])
@pytest.mark.parametrize("K", SLOTS)
@pytest.mark.parametrize("op", [attention, statistics, iteration])
def test_values_and_gradients_at_every_size(op, K, masked):
    mask, wrong = kept(K) if masked else None, []
    for d, dtype in itertools.product(WIDTHS, DTYPES):
        narrow = [t.to(dtype) for t in drawn(K, d, op)]
        expected = results(op, [t.double() for t in narrow], "reference", mask)
        for backend, isa, layout in ways(dtype):
            cpu_backend.set_isa(isa or None)
            found = results(op, [LAYOUTS[layout](t) for t in narrow], backend, mask)
            for i, (got, want) in enumerate(zip(found, expected, strict=True)):
                units = off(got, want, UNIT[dtype])  # a map and rows are in fp32 and better than that
                if not units <= BOUNDS[backend][dtype]:
                    wrong.append(f"d {d} {dtype} {backend} {isa} {layout}: result {i} is off by {units:.1f}")
                if masked:
                    assert not got[0].any(), "an image without slots has zeros"
    assert not wrong, "\n".join(wrong[:20])
