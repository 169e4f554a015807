"""token_attention in C++: values and gradients against float64 on each instruction set of this machine, and the op's
contract. Errors are relative to the RMS of what is expected; the worst seen in fp32 is 3e-5 (gradient of a token),
eager PyTorch is off by 1.4e-5 there."""

from __future__ import annotations

import pytest
import torch

from fastslots import ops
from fastslots.testing import assert_close

cpu_backend = pytest.importorskip("fastslots.kernels.cpu_backend", reason="this installation has no C++ module")

SETS = [*((isa, torch.float32) for isa in cpu_backend.ISAS), ("portable", torch.float64)]
BOUNDS = {torch.float32: 8e-5, torch.float64: 1e-12}
SHAPES = {  # B, M, T, S: the presets' widths, then a tile of 96 tokens and its neighbours, and the edges
    **{"clevr6": (2, 28, 500, 128), "sprites": (2, 20, 131, 64), "clevrtex": (1, 44, 256, 128)},
    **{"sprites-mini": (8, 16, 64, 64), "tile": (1, 3, 96, 32), "tile-1": (1, 3, 95, 10), "tile+1": (1, 3, 97, 1)},
    **{"one-row": (3, 1, 33, 5), "no-images": (0, 3, 7, 8)},
}


@pytest.fixture(autouse=True)
def best_isa_and_threads_as_they_were():
    threads = torch.get_num_threads()
    yield
    cpu_backend.set_isa(None)
    torch.set_num_threads(threads)


def inputs_of(name, dtype=torch.float64, ramp=0.0):
    """rows and tokens; with ``ramp`` scores grow along the tokens, so that every tile holds the largest so far."""
    B, M, T, S = SHAPES[name]
    g = torch.Generator().manual_seed(0)
    rows, tokens = (torch.randn(B, n, S, generator=g, dtype=torch.float64) for n in (M, T))
    tokens = tokens + ramp * torch.linspace(-1, 1, T, dtype=torch.float64)[:, None]
    exact_in_fp32 = (t.float() for t in (2 * S**-0.5 * rows + ramp, tokens))
    return [t.to(dtype).requires_grad_() for t in exact_in_fp32]


def values_and_gradients(rows, tokens, backend="cpu"):
    gathered = ops.token_attention(rows, tokens, backend)
    g = torch.Generator().manual_seed(1)
    cotangent = torch.randn(gathered.shape, generator=g, dtype=torch.float64).to(gathered.dtype)
    return [gathered.detach(), *torch.autograd.grad(gathered, (rows, tokens), cotangent)]


def check_against_float64(rows, tokens):
    exact = values_and_gradients(rows, tokens, "reference")
    for isa, dtype in SETS:
        cpu_backend.set_isa(isa)
        found = values_and_gradients(rows.to(dtype), tokens.to(dtype))
        for i, (a, b) in enumerate(zip(found, exact, strict=True)):
            assert a.dtype == dtype
            assert_close(a, b, BOUNDS[dtype], f"{isa} {dtype} {i}")


@pytest.mark.parametrize("name", SHAPES)
def test_against_float64(name):
    check_against_float64(*inputs_of(name))


def test_growing_scores_and_strided_inputs():
    check_against_float64(*inputs_of("sprites", ramp=0.5))
    rows, tokens = inputs_of("tile-1")
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
    rows, tokens = inputs_of("tile+1", torch.float32)
    gathered = ops.token_attention(1e4 * rows, tokens, "cpu")
    torch.testing.assert_close(gathered, ops.token_attention(1e4 * rows, tokens, "reference"))
    for place in (0, 50, 96):
        broken = tokens.detach().clone()
        broken[0, place, 0] = float("nan")
        assert ops.token_attention(rows, broken, "cpu").isnan().all()


@pytest.mark.parametrize("isa", cpu_backend.ISAS)
@pytest.mark.parametrize("name", ["sprites", "sprites-mini", "tile+1"])
def test_same_bits_every_time_for_any_number_of_threads(isa, name):
    cpu_backend.set_isa(isa)
    inputs = inputs_of(name, torch.float32)
    torch.set_num_threads(1)
    once = values_and_gradients(*inputs)
    for threads in (1, 2, 3, 8) * 3:
        torch.set_num_threads(threads)
        for a, b in zip(values_and_gradients(*inputs), once, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_rounded_once(dtype):
    rows, tokens = inputs_of("sprites-mini", dtype)
    exact = values_and_gradients(rows.double(), tokens.double(), "reference")
    for a, b in zip(values_and_gradients(rows, tokens), exact, strict=True):
        assert a.dtype == dtype
        assert_close(a, b, 16 * torch.finfo(dtype).eps)


def test_derivatives_in_every_mode():
    rows, tokens = inputs_of("one-row")
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
    rows, tokens = inputs_of("one-row")

    def loss(rows, tokens):
        return ops.token_attention(rows, tokens).sin().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(rows, tokens), (rows, tokens))
    for a, b in zip(found, torch.autograd.grad(loss(rows, tokens), (rows, tokens)), strict=True):
        torch.testing.assert_close(a, b)


def test_what_is_refused_is_said():
    rows, tokens = inputs_of("one-row")
    assert ops.explain(rows, tokens, op="token_attention").backend == "cpu"
    many = torch.randn(1, 513, 4)
    assert "513 rows" in ops.explain(many, many, op="token_attention").reasons["cpu"]
    with pytest.raises(ValueError, match="at least one row, token"):
        ops.token_attention(rows, tokens[:, :0])
    with pytest.raises(ValueError, match=r"tokens has shape \[3, 33, 4\], expected \[3, 33, 5\]"):
        ops.token_attention(rows, tokens[..., :4])
    with pytest.raises(TypeError, match=r"tokens is torch.float32, but rows is torch.float64"):
        ops.token_attention(rows, tokens.float())
