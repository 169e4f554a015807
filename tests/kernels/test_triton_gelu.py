"""GELU in 16 bits: its Φ (Abramowitz and Stegun 7.1.26) against erf, over every bf16 number; and the joint norm."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from fastslots.kernels.gpu._tiles import gelu_and_grad
from fastslots.ops.encoder_parts import joint_norm


@triton.jit
def _gelu_kernel(u_ptr, h_ptr, slope_ptr, SIXTEEN: tl.constexpr, BLOCK_L: tl.constexpr):
    offs = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    u = tl.load(u_ptr + offs)
    if SIXTEEN:
        h, slope = gelu_and_grad(u, tl.bfloat16)
    else:
        h, slope = gelu_and_grad(u, tl.float32)
    tl.store(h_ptr + offs, h)
    tl.store(slope_ptr + offs, slope)


@pytest.mark.parametrize("sixteen, bound", [(True, 6e-7), (False, 6e-7)], ids=["16-bit", "fp32"])
def test_gelu_of_every_bf16_number(sixteen, bound, device):
    """Absolute errors, relative above 1: GELU in 16 bits is off by 4.2e-7, which bf16 rounds away."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).float()
    u = every[every.isfinite() & (every.abs() < 1e30)]
    u = torch.cat([u, u.new_zeros(-len(u) % 4096)]).to(device)
    h, slope = torch.empty_like(u), torch.empty_like(u)
    _gelu_kernel[(len(u) // 4096,)](u, h, slope, SIXTEEN=sixteen, BLOCK_L=4096)
    wide = u.double()
    cdf = 0.5 * (1 + torch.erf(wide / math.sqrt(2)))
    bell = torch.exp(-0.5 * wide * wide) / math.sqrt(2 * math.pi)
    scale = wide.abs().clamp_min(1)
    assert ((h.double() - wide * cdf).abs() / scale).max() < bound
    assert (slope.double() - cdf - wide * bell).abs().max() < bound


@pytest.mark.parametrize("shape", [(2, 70, 45), (1, 1, 3), (3, 150, 64)])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("shares", [False, True], ids=["", "positions"])
def test_joint_norm_against_float64(shape, dtype, bound, shares, device):
    gen = torch.Generator().manual_seed(0)
    x = (50 + 2 * torch.randn(shape, generator=gen)).to(dtype)  # a mean far from 0, in which E[x²] − mean² would cancel
    x, dy = x.to(device), torch.randn(shape, generator=gen).to(device, dtype)
    ours, wide = x.clone().requires_grad_(), x.double().requires_grad_()
    shared, wide_shared = None, wide.new_zeros(shape[1:])
    if shares:
        shared = (3 * torch.randn(shape[1:], generator=gen)).to(device, dtype).requires_grad_()
        wide_shared = shared.detach().double().requires_grad_()
    y, expected = joint_norm(ours, backend="triton", shared=shared), F.layer_norm(wide + wide_shared, shape[1:])
    y.backward(dy)
    expected.backward(dy.double())
    assert y.dtype == dtype
    pairs = [(y, expected), (ours.grad, wide.grad)] + ([(shared.grad, wide_shared.grad)] if shares else [])
    for got, want in pairs:
        assert (got.detach().double() - want.detach()).abs().max() <= bound * max(1.0, want.detach().abs().max())


def test_joint_norm_passes_an_undefined_cotangent_on(device):
    """As autograd hands one down where nothing reads a result: it was taken for a tensor."""
    x = torch.randn(2, 5, 3, device=device, requires_grad=True)
    nothing = torch._C._functions.UndefinedGrad()(joint_norm(x, backend="triton"))
    assert torch.autograd.grad(nothing.sum(), x, allow_unused=True) == (None,)
