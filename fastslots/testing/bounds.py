"""How far a result may be from what is expected, relative to the size of what is expected."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
"""Unit roundoff of an element type."""
MAX_UNITS = {torch.float16: 6, torch.bfloat16: 6, torch.float32: 32}
RMS_UNITS = {torch.float16: 4, torch.bfloat16: 4, torch.float32: 16}
"""Bounds of the Triton kernels in unit roundoffs, relative to the largest and to the RMS reference value."""
FLOOR = {torch.float32: 1e-5, torch.float64: 1e-13}
"""What the C++ kernels may be off by, relative to the RMS of what is expected, where eager PyTorch is exact."""


def errors(actual: Tensor, expected: Tensor) -> tuple[float, float]:
    """(maximum, RMS) error, both relative to the RMS of what was expected; a non-finite value gives inf."""
    if actual.shape != expected.shape:
        raise AssertionError(f"shape {list(actual.shape)}, expected {list(expected.shape)}")
    if not actual.numel():
        return 0.0, 0.0
    if not torch.isfinite(actual).all():
        return float("inf"), float("inf")
    difference = (actual.double() - expected.double()).abs()
    rms = expected.double().square().mean().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    return (difference.max() / rms).item(), (difference.square().mean().sqrt() / rms).item()


def assert_close(actual: Tensor, expected: Tensor, bound: float, name: str = "") -> None:
    """Maximum error below ``bound`` and RMS error below a quarter of it, both printed with the worst place."""
    worst, rms = errors(actual, expected)
    print(f"{name or 'value'}: max {worst:.2e} rms {rms:.2e} (bound {bound:.1e})")
    if worst <= bound and rms <= bound / 4:
        return
    flat = (actual.double() - expected.double()).abs().nan_to_num(float("inf")).flatten()
    place = torch.unravel_index(flat.argmax(), actual.shape) if actual.ndim else ()
    raise AssertionError(f"{name}: max {worst:.3e}, rms {rms:.3e} over {bound:.1e}, worst at {[int(i) for i in place]}")


def assert_within_units(
    actual: Sequence[Tensor],
    expected: Sequence[Tensor],
    dtype: torch.dtype,
    zero: float = 0.0,
    zero_units: float = 16,
) -> None:
    """Each output within ``MAX_UNITS`` and ``RMS_UNITS`` of what is expected, in float64; where nothing is expected to
    be above ``zero``, within ``zero_units`` roundoffs of 1."""
    for i, (a, r) in enumerate(zip(actual, expected, strict=True)):
        assert a.shape == r.shape
        error, scale = (a.double() - r).abs(), r.abs()
        if (
            scale.numel() and scale.max() <= zero
        ):  # one slot, or one token: softmax is constant and its gradient an exact zero
            assert error.max() < zero_units * UNIT[dtype], f"output {i}: {error.max():.1e} where zero was expected"
            continue
        worst = (error.max() / scale.max() / UNIT[dtype]).item()
        rms = (error.square().mean().sqrt() / scale.square().mean().sqrt() / UNIT[dtype]).item()
        assert worst < MAX_UNITS[dtype] and rms < RMS_UNITS[dtype], f"output {i}: max {worst:.1f} u, rms {rms:.2f} u"


def assert_slots_within_units(
    actual: Sequence[Tensor], expected: Sequence[Tensor], axes: Sequence[int], dtype: torch.dtype
) -> None:
    """The worst element of each slot within twice ``MAX_UNITS`` of the slot's own largest.

    Beside the largest of many slots, one with little weight is small, and a term that its sums leave out smaller than
    a roundoff.
    """
    for i, (a, r, axis) in enumerate(zip(actual, expected, axes, strict=True)):
        if not r.numel():
            continue
        a, r = a.double().movedim(axis, 0).flatten(1), r.double().movedim(axis, 0).flatten(1)
        worst = (a - r).abs().amax(1) / (2 * MAX_UNITS[dtype] * UNIT[dtype])
        allowed = r.abs().amax(1)
        allowed = torch.where(allowed > 0, allowed, 1.0)  # a softmax of one slot has gradients of 0
        for slot, (error, most) in enumerate(zip(worst.tolist(), allowed.tolist(), strict=True)):
            assert error <= most, f"slot {slot} of tensor {i}: {error / most:.2f} of what is allowed"


def assert_as_good(
    actual: Sequence[Tensor], eager: Sequence[Tensor], exact: Sequence[Tensor], dtype: torch.dtype, name: str = ""
) -> None:
    """Each tensor about as near to ``exact`` as ``eager`` is, which ran in the same dtype: four times its error, and
    ``FLOOR``."""
    sizes = [b.square().mean().sqrt().item() if b.numel() else 0.0 for b in exact]
    for i, (a, e, b, size) in enumerate(zip(actual, eager, exact, sizes, strict=True)):
        # What is far below the others is left over when larger terms cancel (norms 2 wide, one slot): their rounding.
        floor = FLOOR[dtype] * max(1.0, 1e-2 * max(sizes) / max(size, 1e-30))
        assert_close(a, b, 4 * max(errors(e, b)[0], 4 * errors(e, b)[1]) + floor, f"{name} {i}")
