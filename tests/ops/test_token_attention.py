"""token_attention: values and gradients against float64, in C++ on each instruction set and in Triton, which is
interpreted or runs on a GPU.

Errors of C++ are relative to the RMS of what is expected; the worst seen in fp32 is 3e-5 (gradient of a token), eager
PyTorch is off by 1.4e-5 there.
"""

from __future__ import annotations

import pytest
import torch
from values import ISAS, SETS, cpu_backend, values_and_gradients

from fastslots import ops
from fastslots.kernels import gpu_backend
from fastslots.kernels.gpu import launch
from fastslots.kernels.gpu.token_attention import token_attention_bwd, token_attention_fwd
from fastslots.ops import reference
from fastslots.ops.encoder_parts import attend
from fastslots.records import describe
from fastslots.testing import (
    INTERPRETED_TOKEN_SHAPES,
    TOKEN_SHAPES,
    UNIT,
    LargestTensor,
    Poison,
    assert_close,
    assert_within_units,
    on,
)

BOUNDS = {torch.float32: 8e-5, torch.float64: 1e-12}


def token_inputs(name, dtype=torch.float64, ramp=0.0):
    """rows and tokens; with ``ramp`` scores grow along the tokens, so that every tile holds the largest so far."""
    B, M, T, S = TOKEN_SHAPES[name]
    g = torch.Generator().manual_seed(0)
    rows, tokens = (torch.randn(B, n, S, generator=g, dtype=torch.float64) for n in (M, T))
    tokens = tokens + ramp * torch.linspace(-1, 1, T, dtype=torch.float64)[:, None]
    exact_in_fp32 = (t.float() for t in (2 * S**-0.5 * rows + ramp, tokens))
    return [t.to(dtype).requires_grad_() for t in exact_in_fp32]


def gradients(rows, tokens, backend="cpu"):
    return values_and_gradients(lambda *t: ops.token_attention(*t, backend), (rows, tokens), seed=1)


# ---- C++ -------------------------------------------------------------------------------------------------------------


def check_against_float64(rows, tokens):
    exact = gradients(rows, tokens, "reference")
    for isa, dtype in SETS:
        cpu_backend.set_isa(isa)
        found = gradients(rows.to(dtype), tokens.to(dtype))
        for i, (a, b) in enumerate(zip(found, exact, strict=True)):
            assert a.dtype == dtype
            assert_close(a, b, BOUNDS[dtype], f"{isa} {dtype} {i}")


@pytest.mark.parametrize("name", TOKEN_SHAPES)
def test_cpp_values_and_every_gradient(name):
    check_against_float64(*token_inputs(name))


def test_growing_scores_and_strided_inputs():
    check_against_float64(*token_inputs("sprites", ramp=0.5))
    rows, tokens = token_inputs("tile-1")
    check_against_float64(rows.mT.contiguous().mT, tokens.expand(1, 95, 10).mT.contiguous().mT)
    check_against_float64(rows[:, :1].expand(-1, 3, -1), tokens[:, ::2])


def test_one_token_has_all_the_weight():
    rows, tokens = torch.randn(2, 5, 10, requires_grad=True), torch.randn(2, 1, 10, requires_grad=True)
    gathered = ops.token_attention(rows, tokens, "cpu")
    torch.testing.assert_close(gathered, tokens.expand_as(gathered))
    drows, dtokens = torch.autograd.grad(gathered.sum(), (rows, tokens))
    torch.testing.assert_close(drows, torch.zeros_like(drows), rtol=0, atol=1e-4)
    torch.testing.assert_close(dtokens, torch.full_like(dtokens, 5.0), rtol=0, atol=1e-4)


def test_scores_that_would_overflow_and_nan():
    rows, tokens = token_inputs("tile+1", torch.float32)
    gathered = ops.token_attention(1e4 * rows, tokens, "cpu")
    torch.testing.assert_close(gathered, ops.token_attention(1e4 * rows, tokens, "reference"))
    for place in (0, 50, 96):
        broken = tokens.detach().clone()
        broken[0, place, 0] = float("nan")
        assert ops.token_attention(rows, broken, "cpu").isnan().all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["sprites", "sprites-mini", "tile+1"])
def test_same_bits_every_time_for_any_number_of_threads(isa, name):
    cpu_backend.set_isa(isa)
    inputs = token_inputs(name, torch.float32)
    torch.set_num_threads(1)
    once = gradients(*inputs)
    for threads in (1, 2, 3, 8) * 3:
        torch.set_num_threads(threads)
        for a, b in zip(gradients(*inputs), once, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_rounded_once(dtype):
    rows, tokens = token_inputs("sprites-mini", dtype)
    exact = gradients(rows.double(), tokens.double(), "reference")
    for a, b in zip(gradients(rows, tokens), exact, strict=True):
        assert a.dtype == dtype
        assert_close(a, b, 16 * torch.finfo(dtype).eps)


def test_derivatives_in_every_mode():
    rows, tokens = token_inputs("one-row")
    assert torch.autograd.gradcheck(lambda *a: ops.token_attention(*a, backend="cpu"), (rows, tokens))
    torch.library.opcheck(torch.ops.fastslots.token_attention.default, (rows, tokens, "cpu"))
    _, tangent = torch.func.jvp(lambda t: ops.token_attention(rows, t), (tokens,), (torch.ones_like(tokens),))
    assert tangent.abs().max() > 0
    with pytest.raises(ValueError, match="no rule for forward-mode"):
        torch.func.jvp(lambda t: ops.token_attention(rows, t, "cpu"), (tokens,), (torch.ones_like(tokens),))
    squares = ops.token_attention(rows, tokens).square().sum()
    (grad,) = torch.autograd.grad(squares, tokens, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.autograd.grad(grad.sum(), rows)


def test_compiled_without_graph_breaks():
    rows, tokens = token_inputs("one-row")

    def loss(rows, tokens):
        return ops.token_attention(rows, tokens).sin().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(rows, tokens), (rows, tokens))
    for a, b in zip(found, torch.autograd.grad(loss(rows, tokens), (rows, tokens)), strict=True):
        torch.testing.assert_close(a, b)


def test_what_cpp_refuses_is_said():
    rows, tokens = token_inputs("one-row")
    assert ops.explain(rows, tokens, op="token_attention").backend == "cpu"
    many = torch.randn(1, 513, 4)
    assert "513 rows" in ops.explain(many, many, op="token_attention").reasons["cpu"]
    with pytest.raises(ValueError, match="at least one row, token"):
        ops.token_attention(rows, tokens[:, :0])
    with pytest.raises(ValueError, match=r"tokens has shape \[3, 33, 4\], expected \[3, 33, 5\]"):
        ops.token_attention(rows, tokens[..., :4])
    with pytest.raises(TypeError, match=r"tokens is torch.float32, but rows is torch.float64"):
        ops.token_attention(rows, tokens.float())


# ---- Triton ----------------------------------------------------------------------------------------------------------


def kernel_inputs(shape, dtype, spread=2.0, rows_dtype=None):
    """rows, tokens, dgathered; ``spread`` is the standard deviation of a score."""
    B, M, T, S = shape
    gen = torch.Generator().manual_seed(0)
    rows = (torch.randn(B, M, S, generator=gen) * spread * S**-0.5).to(rows_dtype or dtype)
    tokens = (torch.randn(B, T, S, generator=gen) + 0.3).to(dtype)
    return rows, tokens, torch.randn(B, M, S, generator=gen).to(rows_dtype or dtype)


def expected(rows, tokens, dgathered):
    rows, tokens = rows.double().requires_grad_(), tokens.double().requires_grad_()
    scores = rows @ tokens.mT
    gathered = scores.softmax(-1) @ tokens
    return (gathered, scores.logsumexp(-1), *torch.autograd.grad(gathered, (rows, tokens), dgathered.double()))


def run(rows, tokens, dgathered):
    with Poison():
        gathered, lse = token_attention_fwd(rows, tokens)
        return gathered, lse, *token_attention_bwd(dgathered, rows, tokens, gathered, lse)


def within(got, want, dtype):
    assert_within_units(got, want, dtype, zero=1e-12, zero_units=32)  # one token: its weight is 1 whatever the rows


@pytest.mark.parametrize("dtype", UNIT, ids=launch.DTYPES.get)
@pytest.mark.parametrize("shape", INTERPRETED_TOKEN_SHAPES.values(), ids=INTERPRETED_TOKEN_SHAPES)
def test_triton_values_and_every_gradient(shape, dtype, device):
    case = on(device, kernel_inputs(shape, dtype))
    within(run(*case), expected(*case), dtype)


def test_fp32_rows_over_bf16_tokens_keep_their_dtype(device):
    """What autocast leaves: gathered and drows come back in fp32, the products run in bf16."""
    case = on(device, kernel_inputs((2, 28, 200, 128), torch.bfloat16, rows_dtype=torch.float32))
    got = run(*case)
    assert [t.dtype for t in got] == [torch.float32] * 3 + [torch.bfloat16]
    within(got, expected(*case), torch.bfloat16)


def test_extreme_scores_stay_finite(device):
    """Scores of ±300 to ±1,000, where exp without a running maximum overflows, and tokens past the end (T is odd),
    whose score of 0 would be exp(1,000) against a very negative lse."""
    rows, tokens, dgathered = on(device, kernel_inputs((1, 7, 131, 32), torch.float32, spread=300.0))
    tokens[:, :, 0], rows[:, :, 0] = 10.0, -100.0
    got = run(rows, tokens, dgathered)
    assert all(t.isfinite().all() for t in got) and got[1].max() < -100
    torch.testing.assert_close(got[0].double(), expected(rows, tokens, dgathered)[0], atol=1e-3, rtol=1e-3)


def test_weights_are_a_softmax(device):
    """Tokens of one column of ones gather exactly that one; a shift of all scores of a row changes nothing."""
    rows, tokens, _ = on(device, kernel_inputs((2, 28, 200, 24), torch.float32))
    tokens[..., 0] = 1.0
    gathered, lse = token_attention_fwd(rows, tokens)
    assert (gathered[..., 0] - 1).abs().max() < 1e-6
    rows[..., 0] += 5.0
    shifted, lse2 = token_attention_fwd(rows, tokens)
    torch.testing.assert_close(shifted, gathered, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(lse2, lse + 5.0, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_weights_sum_to_one(dtype, device):
    """As they are rounded: a column of ones is gathered to fp32's last bits. Over a sum of unrounded weights it was
    0.2 % off in bf16, and tokens of mean 4 made a quarter of the rows' gradient of it."""
    rows, tokens, _ = on(device, kernel_inputs((2, 28, 200, 24), dtype))
    tokens[..., 0] = 1.0
    gathered, _ = token_attention_fwd(rows, tokens)
    assert (gathered[..., 0] - 1).abs().max() < 1e-6


@pytest.mark.parametrize("block_l, block_c, block_d", [(16, 32, 32), (128, 16, 64), (32, 128, 128)])
def test_block_sizes_change_nothing_but_rounding(block_l, block_c, block_d, device):
    case = on(device, kernel_inputs((2, 20, 150, 72), torch.float32))
    with launch.override(launch.LaunchConfig(block_l, block_c, 4, 1, block_d=block_d)):
        got = run(*case)
    within(got, expected(*case), torch.float32)


def test_repeats_are_bit_equal(device):
    case = on(device, kernel_inputs((1, 28, 200, 64), torch.bfloat16))
    assert all(torch.equal(a, b) for a, b in zip(run(*case), run(*case), strict=True))


def test_strided_inputs(device):
    rows, tokens, dgathered = on(device, kernel_inputs((2, 12, 100, 32), torch.float32))
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (rows, tokens, dgathered)]
    assert all(torch.equal(a, b) for a, b in zip(run(*strided), run(rows, tokens, dgathered), strict=True))


@pytest.mark.parametrize("B, M, T", [(0, 4, 16), (2, 4, 0), (2, 0, 16)], ids=["no-images", "no-tokens", "no-rows"])
def test_empty_inputs(B, M, T, device):
    gathered, lse, drows, dtokens = run(*on(device, kernel_inputs((B, M, T, 20), torch.float32)))
    assert gathered.shape == drows.shape == (B, M, 20) and dtokens.shape == (B, T, 20) and lse.shape == (B, M)
    for t in (gathered, drows, dtokens):
        assert (t == 0).all() or (M and T)


def test_no_tensor_of_rows_times_tokens():
    """M > S, so a tensor [B, M, T] would be the largest of all: nothing may reach its size."""
    B, M, T, S = 32, 100, 2**14, 64
    rows, tokens = torch.empty(B, M, S, device="meta"), torch.empty(B, T, S, device="meta")
    with launch.record("sm_90") as launches, LargestTensor() as largest:
        gathered, lse = token_attention_fwd(rows, tokens)
        token_attention_bwd(rows, rows, tokens, gathered, lse)
    assert [item.name for item in launches] == [f"token_attention_{n}" for n in ("fwd", "combine", "bwd")]
    assert 0 < largest.elements < B * M * T
    with LargestTensor() as largest:  # the test can fail: the plain product makes one
        (rows @ tokens.mT).softmax(-1)
    assert largest.elements >= B * M * T


def test_triton_serves_the_public_op(device):
    rows, tokens, dgathered = on(device, kernel_inputs((2, 9, 50, 24), torch.float32))
    got, want = [], []
    for backend, out in (("triton", got), ("reference", want)):
        leaves = [t.clone().requires_grad_() for t in (rows, tokens)]
        gathered = ops.token_attention(*leaves, backend=backend)
        out += [gathered, *torch.autograd.grad(gathered, leaves, dgathered)]
    for a, r in zip(got, want, strict=True):
        torch.testing.assert_close(a, r, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "M, S, dtype, reason",
    [(28, 128, torch.float32, None), (128, 128, torch.bfloat16, None), (16, 384, torch.float16, None),
     (129, 64, torch.float32, "129 rows"), (100, 192, torch.float32, "100 rows"), (4, 400, torch.float32, "wider"),
     (28, 128, torch.float64, "float64")],
)  # fmt: skip
def test_what_triton_serves(M, S, dtype, reason, device):
    got = gpu_backend.why_not(describe("token_attention", (torch.empty(1, M, S, dtype=dtype, device=device),) * 2))
    assert got is None if reason is None else reason in got


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
def test_layers_add_to_one_gradient_of_the_tokens(dtype, bound, device, monkeypatch):
    """Through the tokens that each call hands on, and of calls whose result nothing reads; autograd adds none."""
    gen = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(shape, generator=gen).to(device)  # noqa: E731
    first, weights = 0.2 * make(2, 5, 24), make(4, 2, 5, 24)  # small scores: a sharp softmax blows roundings up
    tokens = make(2, 70, 24).to(dtype)

    def run(attend, tokens, rows):
        tokens, rows = tokens.clone().requires_grad_(), rows.clone().requires_grad_()
        passed, x, total = tokens, rows, 0.0
        for i, weight in enumerate(weights):
            gathered, passed = attend(x.to(tokens.dtype), passed)
            if i != 2:  # the third layer's result is read by no one
                x = x + 0.3 * gathered.to(x.dtype)
                total = total + (x * weight.to(x)).sum()
        total = total + (passed.to(x.dtype) * 0.1).sum()  # somebody reads the tokens after the last layer
        return total, *torch.autograd.grad(total, (tokens, rows))

    def plain(rows, tokens):
        return reference.token_attention(rows, tokens), tokens

    added, real = [], launch.run

    def noted(kernel, grid, args, constexprs, config):
        if launch.kernel_name(kernel) == "token_attention_bwd":
            added.append(constexprs["ADD"])
        real(kernel, grid, args, constexprs, config)

    monkeypatch.setattr(launch, "run", noted)
    got = run(lambda rows, tokens: attend(rows, tokens, "triton"), tokens, first)
    want = run(plain, tokens.double(), first.double())
    for a, b in zip(got[1:], want[1:], strict=True):
        assert (a.double() - b).abs().max() <= bound * b.abs().max()
    assert added == [True, True, True]


def test_layers_that_add_refuse_second_derivatives(device):
    rows, tokens = torch.ones(1, 2, 8, device=device, requires_grad=True), torch.ones(1, 4, 8, device=device)
    gathered, _ = attend(rows, tokens, "triton")
    (grad,) = torch.autograd.grad(gathered.square().sum(), rows, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        grad.sum().backward()
