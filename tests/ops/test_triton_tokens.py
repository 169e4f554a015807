"""Token attention (few rows, many tokens) in Triton's interpreter: values and gradients against float64.

Bounds are multiples of the unit roundoff, relative to the largest and to the RMS value of the reference.
"""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is first imported

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastslots import ops
from fastslots.kernels import gpu_backend
from fastslots.kernels.gpu import launch
from fastslots.kernels.gpu._tiles import INTERPRETED
from fastslots.kernels.gpu.token_attention import token_attention_bwd, token_attention_fwd
from fastslots.records import describe
from fastslots.testing import Poison

UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
MAX_UNITS = {torch.float16: 6, torch.bfloat16: 6, torch.float32: 32}
RMS_UNITS = {torch.float16: 4, torch.bfloat16: 4, torch.float32: 16}

# B, M, T, S: every tile size is 64 tokens or fewer here, so every T but the first two has a tail.
SHAPES = {
    "clevr6": (2, 28, 128, 128),
    "sprites": (1, 20, 128, 64),
    "clevrtex": (2, 44, 90, 128),
    "one-token": (2, 6, 1, 20),
    "one-row": (1, 1, 65, 24),
    "odd-width": (2, 9, 129, 37),
    "128-rows": (1, 128, 70, 128),
    "wide": (1, 5, 50, 300),
}


@pytest.fixture(autouse=True)
def _interpreted():
    assert INTERPRETED.value, "triton was imported before TRITON_INTERPRET was set: run these tests in a new process"


def inputs(shape, dtype, spread=2.0, rows_dtype=None):
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


def assert_close(got, want, dtype):
    for name, a, r in zip(("gathered", "lse", "drows", "dtokens"), got, want, strict=True):
        assert a.shape == r.shape
        error, scale = (a.double() - r).abs(), r.abs()
        if name == "drows" and r.abs().max() < 1e-12:  # one token: A is 1 whatever the rows
            assert error.max() < 32 * UNIT[dtype] and error.isfinite().all()
            continue
        worst = (error.max() / scale.max() / UNIT[dtype]).item()
        rms = (error.square().mean().sqrt() / scale.square().mean().sqrt() / UNIT[dtype]).item()
        assert worst < MAX_UNITS[dtype] and rms < RMS_UNITS[dtype], f"{name}: max {worst:.1f} u, rms {rms:.2f} u"


@pytest.mark.parametrize("dtype", UNIT, ids=launch.DTYPES.get)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_matches_float64(shape, dtype):
    case = inputs(shape, dtype)
    assert_close(run(*case), expected(*case), dtype)


def test_fp32_rows_over_bf16_tokens_keep_their_dtype():
    """What autocast leaves: gathered and drows come back in fp32, the products run in bf16."""
    case = inputs((2, 28, 200, 128), torch.bfloat16, rows_dtype=torch.float32)
    got = run(*case)
    assert [t.dtype for t in got] == [torch.float32] * 3 + [torch.bfloat16]
    assert_close(got, expected(*case), torch.bfloat16)


def test_extreme_scores_stay_finite():
    """Scores of ±300 to ±1,000, where exp without a running maximum overflows, and tokens past the end (T is odd),
    whose score of 0 would be exp(1,000) against a very negative lse."""
    rows, tokens, dgathered = inputs((1, 7, 131, 32), torch.float32, spread=300.0)
    tokens[:, :, 0], rows[:, :, 0] = 10.0, -100.0
    got = run(rows, tokens, dgathered)
    assert all(t.isfinite().all() for t in got) and got[1].max() < -100
    torch.testing.assert_close(got[0].double(), expected(rows, tokens, dgathered)[0], atol=1e-3, rtol=1e-3)


def test_weights_are_a_softmax():
    """Tokens of one column of ones gather exactly that one; a shift of all scores of a row changes nothing."""
    rows, tokens, _ = inputs((2, 28, 200, 24), torch.float32)
    tokens[..., 0] = 1.0
    gathered, lse = token_attention_fwd(rows, tokens)
    assert (gathered[..., 0] - 1).abs().max() < 1e-6
    rows[..., 0] += 5.0
    shifted, lse2 = token_attention_fwd(rows, tokens)
    torch.testing.assert_close(shifted, gathered, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(lse2, lse + 5.0, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("block_l, block_c, block_d", [(16, 32, 32), (128, 16, 64), (32, 128, 128)])
def test_block_sizes_change_nothing_but_rounding(block_l, block_c, block_d):
    case = inputs((2, 20, 150, 72), torch.float32)
    with launch.override(launch.LaunchConfig(block_l, block_c, 4, 1, block_d=block_d)):
        got = run(*case)
    assert_close(got, expected(*case), torch.float32)


def test_repeats_are_bit_equal():
    case = inputs((1, 28, 200, 64), torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(run(*case), run(*case), strict=True))


def test_strided_inputs():
    rows, tokens, dgathered = inputs((2, 12, 100, 32), torch.float32)
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (rows, tokens, dgathered)]
    assert all(torch.equal(a, b) for a, b in zip(run(*strided), run(rows, tokens, dgathered), strict=True))


@pytest.mark.parametrize("B, M, T", [(0, 4, 16), (2, 4, 0), (2, 0, 16)], ids=["no-images", "no-tokens", "no-rows"])
def test_empty_inputs(B, M, T):
    gathered, lse, drows, dtokens = run(*inputs((B, M, T, 20), torch.float32))
    assert gathered.shape == drows.shape == (B, M, 20) and dtokens.shape == (B, T, 20) and lse.shape == (B, M)
    for t in (gathered, drows, dtokens):
        assert (t == 0).all() or (M and T)


def test_no_tensor_of_rows_times_tokens():
    """M > S, so a tensor [B, M, T] would be the largest of all: nothing may reach its size."""
    B, M, T, S = 32, 100, 2**14, 64
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else (out,):
                if isinstance(t, torch.Tensor):
                    sizes.append(t.untyped_storage().nbytes() // t.element_size())
            return out

    rows, tokens = torch.empty(B, M, S, device="meta"), torch.empty(B, T, S, device="meta")
    with launch.record("sm_90") as launches, Sizes():
        gathered, lse = token_attention_fwd(rows, tokens)
        token_attention_bwd(rows, rows, tokens, gathered, lse)
    assert [item.name for item in launches] == [f"token_attention_{n}" for n in ("fwd", "combine", "bwd")]
    assert 0 < max(sizes) < B * M * T
    sizes.clear()
    with Sizes():  # the test can fail: the plain product makes one
        (rows @ tokens.mT).softmax(-1)
    assert max(sizes) >= B * M * T


def test_public_op_serves_and_differentiates():
    rows, tokens, dgathered = inputs((2, 9, 50, 24), torch.float32)
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
def test_what_is_served(M, S, dtype, reason):
    got = gpu_backend.why_not(describe("token_attention", (torch.empty(1, M, S, dtype=dtype),) * 2))
    assert got is None if reason is None else reason in got
