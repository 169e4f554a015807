"""Cases, inputs and error bounds that tests and benchmarks share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastslots.records import FeedForward, FoldedProjections


class Shape(NamedTuple):
    """One case: B images, H heads, L pixels, K slots, d head width, D query width, F feed-forward width."""

    B: int
    H: int
    L: int
    K: int
    d: int
    D: int
    F: int


# The presets' widths at few pixels (odd, so that every tile has a tail: no kernel looks further), then the edges.
SHAPES: dict[str, Shape] = {
    "sprites": Shape(2, 12, 77, 5, 43, 180, 360),
    "clevr6": Shape(2, 12, 131, 7, 43, 180, 360),
    "clevrtex": Shape(2, 12, 65, 11, 43, 360, 720),
    "sprites-mini": Shape(3, 4, 64, 4, 16, 64, 128),
    "one-pixel": Shape(2, 2, 1, 3, 5, 10, 20),
    "one-slot": Shape(2, 3, 9, 1, 4, 12, 24),
    "sixteen-slots": Shape(1, 2, 33, 16, 8, 16, 32),
    "many-slots": Shape(1, 4, 17, 20, 4, 16, 16),  # K > d and H·K > D: no size coincides with another
    "one-wide": Shape(2, 2, 8, 3, 1, 2, 3),
    "no-images": Shape(0, 2, 8, 3, 4, 8, 16),
}


def random_qkv(shape: Shape, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """q [B,H,L,d], k, v [B,H,K,d]; scores wide enough that the softmax is far from uniform."""
    g = torch.Generator().manual_seed(seed)
    B, H, L, K, d, _, _ = shape
    q = 2 * torch.randn(B, H, L, d, generator=g, dtype=torch.float64)
    k, v = torch.randn(2, B, H, K, d, generator=g, dtype=torch.float64)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def random_layer(
    shape: Shape, dtype: torch.dtype = torch.float64, seed: int = 0, shared_queries: bool = False
) -> tuple[Tensor, FoldedProjections, FeedForward]:
    """x [B or 1, L, D], folded projections and feed-forward weights of one decoder layer."""
    g = torch.Generator().manual_seed(seed)

    def draw(*size: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        return (shift + scale * torch.randn(*size, generator=g, dtype=torch.float64)).to(dtype)

    B, H, L, K, _, D, F = shape
    x = draw(1 if shared_queries else B, L, D, shift=0.3)  # a mean, so that a norm that forgets it fails
    folded = FoldedProjections(
        draw(B, D, H, K, scale=2 * D**-0.5), draw(B, H, K), draw(B, H, K, D, scale=H**-0.5), draw(D)
    )
    norm_weight, norm_bias = draw(D, scale=0.2, shift=1.0), draw(D, scale=0.2)
    w1, b1, w2, b2 = draw(F, D, scale=D**-0.5), draw(F), draw(D, F, scale=F**-0.5), draw(D)
    ff = FeedForward(norm_weight, norm_bias, w1, b1, w2, b2)
    return x, folded, ff


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


class Poison(TorchDispatchMode):
    """Fills every uninitialised tensor with NaN, so that an element no kernel writes is seen."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if "empty" in func.name() and isinstance(out, Tensor) and out.is_floating_point():
            out.fill_(float("nan"))
        return out
