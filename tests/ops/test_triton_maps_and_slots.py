"""The Triton kernels of attention with statistics and of slot attention against float64: K, d, dtype, layout."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from fastslots import ops
from fastslots.kernels.gpu import launch
from fastslots.kernels.gpu.cross_attention import attention_statistics_bwd, attention_statistics_fwd
from fastslots.kernels.gpu.slot_attention import slot_attention_bwd, slot_attention_fwd
from fastslots.ops import reference
from fastslots.records import Statistics, StatisticsInputs
from fastslots.testing import UNIT, LargestTensor, Poison, assert_within_units, on

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
PAIRS = [(1, 16), (7, 43), (16, 64), (64, 160), (77, 40), (77, 160), (128, 64)]
"""K and d: every size of the C++ kernels' grid once, and those of text tokens."""
GRID = list(itertools.product((1, 7, 16, 64, 77, 128), (16, 43, 64, 160)))
QUICK = [(K, d, dtype) for (K, d), dtype in zip(PAIRS, itertools.cycle((FP32, BF16, FP16)), strict=False)]


def drawn(seed: int, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def kept(B: int, K: int) -> Tensor:
    """The first image has no slot, the others most of them."""
    mask = torch.rand(B, K, generator=torch.Generator().manual_seed(K)) > 0.3
    mask[0], mask[1:, 0] = False, True
    return mask


def wide(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().double().requires_grad_() for t in tensors]


def cases(quick: list[tuple[int, int, torch.dtype]], most: int) -> list:
    """Those, and all others of the grid, which take minutes in the interpreter."""
    others = [(K, d, t) for (K, d), t in itertools.product(GRID, (FP32, BF16, FP16)) if (K, d, t) not in quick]
    marked = [pytest.param(*case, marks=pytest.mark.long) for case in others if case[0] <= most]
    return [*quick, *marked]


# ---- cross-attention with heads' weights and statistics --------------------------------------------------------------


@pytest.mark.parametrize("K, d, dtype", cases(QUICK, 128))
def test_attention_and_statistics(K, d, dtype, device):
    B, H, L = 2, 2, 37
    q, dout = (t.transpose(1, 2) for t in drawn(0, dtype, (B, L, H, d), (B, L, H, d)))  # as a projection leaves them
    k, v = drawn(1, dtype, (B, H, K, d), (B, H, K, d))
    weights, dmap, dentropy, dlse = drawn(2, FP32, (H,), (B, L, K), (B, H, L), (B, H, L))
    mask = kept(B, K) if d != 64 else None
    q, k, v, mask, weights, dout, dmap, dentropy, dlse = on(
        device, (q, k, v, mask, weights, dout, dmap, dentropy, dlse)
    )
    inputs = StatisticsInputs(q, k, v, mask, weights, 0.5 * d**-0.5, rows=True)
    with Poison():
        result = attention_statistics_fwd(inputs)
        grads = attention_statistics_bwd(Statistics(dout, dmap, dentropy, dlse), inputs, True)
    leaves = wide(q, k, v, weights)
    exact = inputs._replace(q=leaves[0], k=leaves[1], v=leaves[2], head_weights=leaves[3])
    expected = reference.attention_statistics(exact)
    terms = torch.autograd.grad(expected.slot_map, leaves[3], dmap.double().abs(), retain_graph=True)[0]
    expected_grads = torch.autograd.grad(expected, leaves, [t.double() for t in (dout, dmap, dentropy, dlse)])
    # One slot has all of the weight: its entropy is 0, and of the score's gradient only that of lse is left.
    assert_within_units((result.out, *grads[:3]), (expected.out, *expected_grads[:3]), dtype, zero=1e-12)
    assert_within_units(result[1:], expected[1:], FP32, zero=1e-12)
    # A sum of thousands of terms of both signs: it may be far smaller than they are, and its error is theirs.
    assert ((grads[3] - expected_grads[3]).abs() < 2 * UNIT[FP32] * terms).all()
    if mask is not None:
        assert not any(t[0].any() for t in (*result, *grads[:3])), "an image without slots has zeros"


def test_chosen_heads_and_no_statistics(device):
    """Weights alone: the last results are empty, and no kernel writes them."""
    q, k, v = on(device, drawn(0, FP32, (1, 3, 20, 16), (1, 3, 5, 16), (1, 3, 5, 16)))
    chosen = torch.tensor([0.0, 1.0, 0.0], device=device)
    out, slot_map, entropy, lse = attention_statistics_fwd(StatisticsInputs(q, k, v, None, chosen, 0.3, rows=False))
    plain = ops.cross_attention(q[:, 1:2], k[:, 1:2], v[:, 1:2], 0.3, "triton")
    assert not entropy.numel() and not lse.numel()
    assert torch.equal(slot_map, plain[1]) and torch.equal(out[:, 1:2], plain[0])


# ---- slot attention --------------------------------------------------------------------------------------------------

SLOTS = [(1, 16, FP32), (7, 64, BF16), (7, 43, FP16), (11, 64, FP32), (16, 160, BF16), (32, 43, FP32), (32, 64, FP16)]


@pytest.mark.parametrize("K, d, dtype", cases(SLOTS, 32))
def test_an_iteration_of_slot_attention(K, d, dtype, device):
    """Several heads and their map; keys of another layout than values; an ε that fp16 lacks, or a large one."""
    B, H, L = 2, 1 if d == 64 else 2, 85
    q, k, v = drawn(3, dtype, (B, H, K, d), (B, L, H, d), (B, H, L, d))
    k, v = k.transpose(1, 2), v + 1  # of a mean: what is taken off is as large as what is left
    du, dmap = drawn(4, dtype, (B, H, K, d))[0], drawn(5, FP32, (B, L, K))[0]
    mask, eps = (kept(B, K), 1e-8) if d != 64 else (None, 1e-2)
    q, k, v, du, dmap, mask = on(device, (q, k, v, du, dmap, mask))
    scale = 2 * d**-0.5
    with Poison():
        updates, totals, slot_map = slot_attention_fwd(q, k, v, scale, eps, mask, True)
        grads = slot_attention_bwd(du, dmap, (q, k, v), (updates, totals), scale, eps, mask)
    leaves = wide(q, k, v)
    expected = reference.slot_attention(*leaves, scale, eps, mask)
    expected_grads = torch.autograd.grad(expected, leaves, (du.double(), dmap.double()))
    assert_within_units((updates, *grads), (expected[0], *expected_grads), dtype, zero=1e-12)
    assert_within_units((slot_map,), expected[1:], FP32)
    if mask is not None:
        assert not updates[0].any() and not any(g[0].any() for g in grads), "an image without slots has zeros"


@pytest.mark.parametrize("dtype", [FP32, FP16])
def test_the_folded_form_reads_its_tokens_once(dtype, device):
    """Tokens of several parts, without a map: one tensor is keys and values, shared by the heads."""
    B, H, K, L, d = 1, 2, 5, 300, 24
    q, tokens = on(device, drawn(6, dtype, (B, H, K, d), (B, 1, L, d)))
    n = tokens.expand(B, H, L, d)
    (du,) = on(device, drawn(7, dtype, (B, H, K, d)))
    with launch.record("interpreter") as launches:
        slot_attention_fwd(q, n, n, 0.3, 1e-8, None, False)
    assert launches[0].constexprs["SAME"] and launches[0].args["k_ptr"] is n and launches[0].grid[0] > 1
    with Poison():
        updates, totals, _ = slot_attention_fwd(q, n, n, 0.3, 1e-8, None, False)
        grads = slot_attention_bwd(du, None, (q, n, n), (updates, totals), 0.3, 1e-8, None)
    leaves = wide(q, n, n)
    expected = reference.slot_attention(*leaves, 0.3, 1e-8)[0]
    expected_grads = torch.autograd.grad(expected, leaves, du.double())
    assert_within_units((updates, *grads), (expected, *expected_grads), dtype)


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_a_slot_that_wins_nothing_takes_the_mean(dtype, device):
    """Its weights are all ε: 1e-8, of which fp16 knows nothing."""
    q, v = torch.zeros(1, 1, 2, 16), torch.randn(1, 1, 64, 16, generator=torch.Generator().manual_seed(0)) + 2
    q[0, 0, 0, 0], k = 8.0, torch.full_like(v, 8.0)
    q, k, v = on(device, [t.to(dtype) for t in (q, k, v)])
    updates, totals, _ = slot_attention_fwd(q, k, v, 1.0, 1e-8, None, False)
    torch.testing.assert_close(updates, v.float().mean(2, keepdim=True).expand_as(updates), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(totals[0, 0], torch.tensor([64.0, 64e-8], device=device), rtol=2.0**-7, atol=0)


# ---- both ------------------------------------------------------------------------------------------------------------


def calls(device: torch.device):
    """Each public op, as a function of its tensors, on small ones."""
    q, k, v = on(device, drawn(8, FP32, (2, 2, 21, 8), (2, 2, 3, 8), (2, 2, 3, 8)))
    weights = torch.tensor([0.5, -2.0], device=device)

    def statistics(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        out, slot_map, rows = ops.cross_attention(
            q, k, v, backend="triton", head_weights=w, statistics=("entropy", "lse")
        )
        return out, slot_map, *rows.values()

    def iteration(k: Tensor, q: Tensor) -> tuple[Tensor, ...]:
        return ops.slot_attention(k, q, q, eps=1e-3, backend="triton", return_map=True)

    return {"statistics": (statistics, (q, k, v, weights)), "iteration": (iteration, (k, q))}


@pytest.mark.parametrize("name", ["statistics", "iteration"])
def test_compiled_code_has_the_bits_of_eager(name, device):
    function, tensors = calls(device)[name]
    leaves = [t.requires_grad_() for t in tensors]

    def loss(*t: Tensor) -> Tensor:
        return sum((o.square().sum() for o in function(*t)), start=torch.zeros((), device=device))

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got, want = (torch.autograd.grad(f(*leaves), leaves) for f in (compiled, loss))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    again = torch.autograd.grad(loss(*leaves), leaves)
    assert all(torch.equal(a, b) for a, b in zip(again, want, strict=True))


def test_operators_keep_torchs_contract(device):
    q, k, v = on(device, drawn(9, FP32, (1, 2, 9, 8), (1, 2, 3, 8), (1, 2, 3, 8)))
    mask, weights = torch.tensor([[True, False, True]], device=device), torch.ones(2, device=device)
    leaves = [t.requires_grad_() for t in (q, k, v, weights)]
    check = torch.library.opcheck
    check(torch.ops.fastslots.attention_statistics, (*leaves[:3], mask, leaves[3], 0.5, True, "triton"))
    check(torch.ops.fastslots.slot_attention, (leaves[1], leaves[0], leaves[0], 0.5, 1e-3, mask, True, "triton"))


@pytest.mark.parametrize(("B", "L"), [(0, 5), (2, 0)], ids=["no image", "no pixel"])
def test_empty_tensors_have_a_backward(B, L, device):
    q, k = (torch.ones(B, 2, n, 4, device=device, requires_grad=True) for n in (L, 3))
    out, slot_map, rows = ops.cross_attention(q, k, k, backend="triton", statistics=("lse",))
    updates, owners = ops.slot_attention(k, q, q, backend="triton", return_map=True)
    results = (out, slot_map, rows["lse"], updates, owners)
    sum((t.sum() for t in results), start=torch.zeros((), device=device)).backward()
    assert q.grad.shape == q.shape and torch.equal(k.grad, torch.zeros_like(k)) and not updates.any()


def test_nothing_of_the_size_of_all_weights_is_made():
    """K > d: a tensor of all weights would be the largest."""
    B, H, L, K, d = 2, 4, 2**14, 24, 8
    q, k = (torch.empty(B, H, n, d, device="meta") for n in (L, K))
    rows, dmap = torch.empty(B, H, L, device="meta"), torch.empty(B, L, K, device="meta")
    inputs = StatisticsInputs(q, k, k, None, torch.empty(H, device="meta"), 1.0, rows=True)
    one = k[:, :1], q[:, :1], q[:, 1:2]
    with launch.record("sm_90"), LargestTensor() as seen:
        attention_statistics_fwd(inputs)
        attention_statistics_bwd(Statistics(q, dmap, rows, rows), inputs, True)
    assert 0 < seen.elements < B * H * L * K
    with launch.record("sm_90"), LargestTensor() as seen:
        *saved, _ = slot_attention_fwd(*one, 1.0, 1e-8, None, False)
        slot_attention_bwd(one[0], None, one, tuple(saved), 1.0, 1e-8, None)
    assert 0 < seen.elements < B * L * K


@pytest.mark.parametrize(
    ("op", "K", "d", "says"),
    [
        ("cross_attention", 129, 64, "129 slots are more than 128"),
        ("attention_statistics", 77, 200, "77 slots take rows of at most 192 elements, not 200"),
        ("slot_attention", 33, 64, "33 slots are more than 32"),
        ("slot_attention", 7, 400, "rows of 400 elements are wider than 384"),
    ],
)
def test_what_is_refused_is_named(op, K, d, says):
    many, few = torch.empty(1, 1, 4, d), torch.empty(1, 1, K, d)
    tensors = (few, many, many) if op == "slot_attention" else (many, few, few)
    assert says in ops.explain(*tensors, op=op).reasons["triton"]
