"""Bias with GELU, bias with a norm, and the output head's norm: one pass over rows each, against float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from fastslots.kernels.gpu import launch, output_head
from fastslots.kernels.gpu.passes import bias_gelu as gelu_pass
from fastslots.kernels.gpu.passes import row_norm as norm_pass
from fastslots.kernels.tools import cost
from fastslots.models.encoder import convolved, normed_tokens
from fastslots.ops import encoder_parts
from fastslots.ops.encoder_parts import bias_gelu, bias_norm
from fastslots.ops.parts.token_mlp import token_mlp, token_mlp_operator
from fastslots.ops.reference import output_head as reference_head
from fastslots.records import OutputHead

DTYPES = {"fp32": (torch.float32, 2.0**-20), "bf16": (torch.bfloat16, 2.0**-7), "fp16": (torch.float16, 2.0**-10)}
"""And the largest error of one number, as a share of the largest (of one, where that is larger)."""


@pytest.fixture(params=list(DTYPES))
def kind(request):
    return DTYPES[request.param]


@pytest.fixture(params=[1056, 3], ids=["tile-a-program", "tiles-a-program"])
def programs(request, monkeypatch):
    for module in (gelu_pass, norm_pass):
        monkeypatch.setattr(module, "PROGRAMS", request.param)


def close(got, want, bound):
    got, want = got.detach().double(), want.detach().double()
    assert got.shape == want.shape
    assert (got - want).abs().max() <= bound * max(1.0, want.abs().max()), (got - want).abs().max()


def randn(*shape, seed=0, mean=0.0):
    return mean + torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(2, 70, 45), (133, 64), (5, 180), (3, 7, 200)], ids=str)
@pytest.mark.parametrize("function", [bias_gelu, bias_norm], ids=["gelu", "norm"])
def test_against_float64(function, shape, kind, programs, device):
    dtype, bound = kind
    x, dy, bias = (randn(*s, seed=i).to(device) for i, s in enumerate((shape, shape, shape[-1:])))
    if function is bias_norm:
        x, bias = x + 3, 2 * bias - 5  # means that are far from 0
    ours = x.to(dtype).requires_grad_()
    wide = ours.detach().double().requires_grad_()
    bias, wide_bias = bias.requires_grad_(), bias.double().detach().requires_grad_()
    y = function(ours, bias, backend="triton")
    y.backward(dy.to(dtype))
    sums = wide + wide_bias
    want = F.gelu(sums) if function is bias_gelu else F.layer_norm(sums, shape[-1:])
    want.backward(dy.to(dtype).double())
    assert y.dtype == ours.grad.dtype == dtype and bias.grad.dtype == torch.float32
    close(y, want, bound)
    close(ours.grad, wide.grad, bound)
    # Summed up in fp32 from numbers that nothing has rounded, but for what the cheap Φ is off in 16 bits.
    close(bias.grad, wide_bias.grad, 2e-5)


@pytest.mark.parametrize("function", [bias_gelu, bias_norm], ids=["gelu", "norm"])
def test_the_same_call_gives_the_same_bits_and_rows_may_lie_apart(function, device, programs):
    base = randn(64, 2 * 90).to(device, torch.bfloat16)
    grads = []
    for x in (base[:, ::2], base[:, ::2], base[:, ::2].contiguous()):
        x, bias = x.detach().requires_grad_(), randn(90, seed=2).to(device).requires_grad_()
        y = function(x, bias, backend="triton")
        y.backward(randn(90, 64, seed=3).to(device, torch.bfloat16).t())
        grads.append((y.detach(), x.grad, bias.grad))
    for others in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], others, strict=True))


@pytest.mark.parametrize("function", [bias_gelu, bias_norm], ids=["gelu", "norm"])
def test_no_rows_and_an_undefined_cotangent(function, device):
    bias = torch.zeros(8, device=device, requires_grad=True)
    assert function(torch.zeros(0, 8, device=device), bias, backend="triton").shape == (0, 8)
    x = randn(4, 8).to(device).requires_grad_()
    nothing = torch._C._functions.UndefinedGrad()(function(x, bias, backend="triton"))
    assert torch.autograd.grad(nothing.sum(), (x, bias), allow_unused=True) == (None, None)


def test_operators_keep_the_rules(device):
    x, bias = randn(6, 24).to(device).requires_grad_(), randn(24, seed=1).to(device).requires_grad_()
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(encoder_parts.bias_gelu_operator, (x, bias, "triton"), test_utils=tests)
    torch.library.opcheck(encoder_parts.bias_norm_operator, (x, bias, 1e-5, "triton"), test_utils=tests)


def test_backends_say_why_not():
    x = torch.zeros(2, 500)
    with pytest.raises(ValueError, match="wider than 384"):
        bias_norm(x, x[0], backend="triton")
    with pytest.raises(ValueError, match="no kernel for bias_gelu"):
        bias_gelu(x, x[0], backend="cpu")
    assert torch.equal(bias_gelu(x + 1, x[0] + 1), F.gelu(x + 2))


# ---- the token MLP --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(45, 90, 45), (128, 128, 128), (70, 20, 33)], ids=str)
@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_token_mlp_against_float64(sizes, kind, device):
    dtype, bound = DTYPES[kind]
    D, F_, OUT = sizes
    x, dy = (randn(2, 71, D).to(device, dtype), randn(2, 71, OUT, seed=1).to(device, dtype))
    parts = [randn(F_, D, seed=2) / D**0.5, randn(F_, seed=3), randn(OUT, F_, seed=4) / F_**0.5, randn(OUT, seed=5)]
    weights = [t.to(device, dtype).float().requires_grad_() for t in parts]
    x.requires_grad_()
    wide = [t.detach().double().requires_grad_() for t in (x, *weights)]
    y = token_mlp(x, weights[:2], weights[2:], backend="triton")
    want = F.layer_norm(F.linear(F.gelu(F.linear(wide[0], *wide[1:3])), *wide[3:]), (OUT,))
    y.backward(dy)
    want.backward(dy.double())
    assert y.dtype == x.grad.dtype == dtype
    close(y, want, 2 * bound)
    for got, leaf in zip((x, *weights), wide, strict=True):
        close(got.grad, leaf.grad, 6 * bound)
    again = torch.autograd.grad(token_mlp(x, weights[:2], weights[2:], backend="triton"), (x, *weights), dy)
    assert all(torch.equal(a, t.grad) for a, t in zip(again, (x, *weights), strict=True))
    with torch.no_grad():
        assert torch.equal(token_mlp(x, weights[:2], weights[2:], backend="triton"), y)


def test_token_mlp_is_for_16_bits_and_keeps_the_rules_of_operators(device):
    x = randn(6, 24).to(device)
    weights = [randn(8, 24, seed=1), randn(8, seed=2), randn(24, 8, seed=3), randn(24, seed=4)]
    weights = [t.to(device).requires_grad_() for t in weights]
    assert token_mlp(x, weights[:2], weights[2:], backend="triton") is None
    assert token_mlp(x.bfloat16(), weights[:2], weights[2:], backend="auto" if device == "cpu" else "reference") is None
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    x = x.bfloat16().requires_grad_()
    torch.library.opcheck(token_mlp_operator, (x, *weights, 1e-5, True, "triton"), test_utils=tests)


# ---- the output head ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("D, C", [(70, 3), (180, 3), (64, 8), (5, 1)], ids=str)
def test_output_head_against_float64(D, C, kind, programs, device):
    dtype, bound = kind
    x, dpixels = randn(53, D, mean=2).to(device, dtype), randn(53, C, seed=1).to(device, dtype)
    scale = 1 / math.sqrt(D)
    weights = [(scale * randn(out, D, seed=3 + i)).to(device, dtype).float() for i, out in enumerate((D, D, C))]
    biases = [randn(out, seed=6 + i).to(device, dtype).float() for i, out in enumerate((D, D, C))]
    head = OutputHead(1 + 0.1 * randn(D, seed=9).to(device), randn(D, seed=10).to(device), weights, biases)
    packed = output_head.pack_head(head, dtype)
    pixels, saved = output_head.output_head_fwd(x, packed, 1e-5)
    assert dtype == torch.float32 or all(t.shape[1] * t.element_size() % 16 == 0 for t in saved.inputs + packed.weights)
    assert all(not t[:, D:].any() for t in saved.inputs)
    dx, grads = output_head.output_head_bwd(dpixels, packed, saved, True)
    assert not dx[:, D:].any()
    dx = dx[:, :D]
    leaves = [t.double().requires_grad_() for t in (x, *head[:2], *weights, *biases)]
    wide = OutputHead(leaves[1], leaves[2], leaves[3:6], leaves[6:])
    want = reference_head(leaves[0], wide, 1e-5)
    want.backward(dpixels.double())
    close(pixels, want, 8 * bound)
    for got, leaf in zip((dx, *grads[:2], *grads.weights, *grads.biases), leaves, strict=True):
        close(got, leaf.grad, 8 * bound)
        assert got is dx or (got.dtype == torch.float32 and got.is_contiguous())


# ---- the encoder ----------------------------------------------------------------------------------------------------


def test_the_encoders_parts_are_its_modules(device):
    """``convolved`` is the CNN and ``normed_tokens`` the token MLP with its norm, gradients too."""
    cnn = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.GELU(), nn.Conv2d(8, 12, 5, 1, 2), nn.GELU()).to(device)
    mlp = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12)).to(device)
    images = randn(2, 3, 10, 10).to(device).contiguous(memory_format=torch.channels_last)

    def run(parts):
        cnn.zero_grad()
        mlp.zero_grad()
        x = convolved(images, cnn, "triton") if parts else cnn(images)
        x = x.flatten(2).transpose(1, 2)
        tokens = normed_tokens(x, mlp, "triton") if parts else F.layer_norm(mlp(x), (12,))
        (tokens * randn(*tokens.shape, seed=4).to(device)).sum().backward()
        return [tokens, *(p.grad.clone() for p in (*cnn.parameters(), *mlp.parameters()))]

    for got, want in zip(run(True), run(False), strict=True):
        close(got, want, 1e-4)  # cuDNN and cuBLAS add in other orders


# ---- what the launches move -----------------------------------------------------------------------------------------


def test_16_bit_rows_move_once():
    """Of clevr6's rows, a forward's bytes are two rows', a backward's three, but for what belongs to no row."""
    with launch.record("sm_90") as launches, torch.device("meta"):
        u, bias = torch.empty(524288, 128, dtype=torch.bfloat16), torch.empty(128)
        gelu_pass.bias_gelu_bwd(gelu_pass.bias_gelu_fwd(u, bias), u, bias)
        y, mean, rstd = norm_pass.bias_norm_fwd(u, bias, 1e-5)
        norm_pass.bias_norm_bwd(y, u, bias, mean, rstd)
    rows = u.numel() * 2
    moved = {item.name: cost.launch_cost(item).bytes / rows for item in launches}
    assert moved == pytest.approx(
        {"bias_gelu_fwd": 2, "bias_gelu_bwd": 3, "row_norm_fwd": 2, "row_norm_bwd": 3}, rel=0.02
    )
