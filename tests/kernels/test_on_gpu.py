"""What only a GPU can show of the kernels: ``pytest --device cuda``. Real sizes, TF32, graphs that CUDA captures, other
streams, memory. ``--device rehearsal`` runs the same in Triton's interpreter, at sizes for it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastslots.kernels.gpu.cross_attention import (
    attention_statistics_bwd,
    attention_statistics_fwd,
    cross_attention_bwd,
    cross_attention_fwd,
)
from fastslots.kernels.gpu.decoder_layer import decoder_layer_bwd, decoder_layer_fwd
from fastslots.kernels.gpu.decoder_loss import decoder_loss
from fastslots.kernels.gpu.graphs import Graphs
from fastslots.kernels.gpu.passes.joint_norm import joint_norm_bwd, joint_norm_fwd
from fastslots.kernels.gpu.slot_attention import slot_attention_bwd, slot_attention_fwd
from fastslots.kernels.gpu.token_attention import token_attention_bwd, token_attention_fwd
from fastslots.ops import reference
from fastslots.ops.decoder_loss import reference_decoder_loss
from fastslots.records import FeedForward, FoldedProjections, Statistics, StatisticsInputs
from fastslots.testing import (
    LossCase,
    Poison,
    Shape,
    TokenShape,
    assert_as_good,
    assert_within_units,
    in_dtype,
    layer_inputs,
    loss_inputs,
    on,
    random_qkv,
)

pytestmark = pytest.mark.gpu

CASE = LossCase(head=(180, 180, 3), dtype=torch.float32)
"""As clevr6 has it."""


class Work:
    """A kernel's forward and backward on inputs of its own, and the same by autograd of a formula.

    Args:
        kernels: inputs -> outputs and gradients, of the Triton kernels.
        formula: inputs -> outputs and gradients, of PyTorch's operators, in the dtype of its inputs.
    """

    def __init__(self, kernels: Callable, formula: Callable, inputs: Sequence[Tensor], kept: int = 0):
        """kept: so many inputs, the last, have no gradient: cotangents."""
        self.kernels, self._formula, self.inputs, self._kept = kernels, formula, list(inputs), kept

    def formula(self, dtype: torch.dtype) -> list[Tensor]:
        inputs = [t.detach().to(dtype) for t in self.inputs]
        leaves = [t.requires_grad_() for t in inputs[: len(inputs) - self._kept]]
        cotangents = inputs[len(leaves) :]
        outputs = self._formula(*leaves)
        return [*outputs, *torch.autograd.grad(outputs, leaves, cotangents)]


def of_layer(device: torch.device, dtype: torch.dtype, B: int, L: int) -> Work:
    x, folded, ff, _, dy, dmap = on(device, layer_inputs(Shape(B, 12, L, 7, 43, 180, 360), dtype, shared=True))

    def kernels(x, *rest):
        folded, ff, (dy, dmap) = FoldedProjections(*rest[:4]), FeedForward(*rest[4:10]), rest[10:]
        grads = decoder_layer_bwd(dy, dmap, x, folded, ff)
        return [*decoder_layer_fwd(x, folded, ff), grads.x, *grads.folded, *grads.ff]

    def formula(x, *rest):
        return reference.decoder_layer(x, FoldedProjections(*rest[:4]), FeedForward(*rest[4:]), None)

    return Work(kernels, formula, [x, *folded, *ff, dy, dmap], 2)


def of_attention(device: torch.device, dtype: torch.dtype, B: int, L: int) -> Work:
    shape = Shape(B, 12, L, 7, 43, 180, 360)
    g = torch.Generator().manual_seed(1)
    dout, dmap = torch.randn(B, 12, L, 43, generator=g).to(dtype), torch.randn(B, L, 7, generator=g)

    def kernels(q, k, v, dout, dmap):
        return [*cross_attention_fwd(q, k, v, 0.1), *cross_attention_bwd(dout, dmap, q, k, v, 0.1)]

    inputs = on(device, [*random_qkv(shape, dtype), dout, dmap])
    return Work(kernels, lambda q, k, v: reference.cross_attention(q, k, v, 0.1), inputs, 2)


def of_text(device: torch.device, dtype: torch.dtype, B: int, L: int) -> Work:
    """77 keys, with statistics of the rows, as diffusion models have them."""
    H, K, d = 8 if device.type == "cuda" else 2, 77, 64
    g = torch.Generator().manual_seed(4)
    q, k, v, weights, dout = (
        torch.randn(*size, generator=g).to(dtype)
        for size in ((B, H, L, d), (B, H, K, d), (B, H, K, d), (H,), (B, H, L, d))
    )
    grads = [torch.randn(*size, generator=g) for size in ((B, L, K), (B, H, L), (B, H, L))]

    def kernels(q, k, v, weights, *grads):
        inputs = StatisticsInputs(q, k, v, None, weights, 0.1, rows=True)
        return [*attention_statistics_fwd(inputs), *attention_statistics_bwd(Statistics(*grads), inputs, True)]

    def formula(q, k, v, weights):
        return reference.attention_statistics(StatisticsInputs(q, k, v, None, weights, 0.1, rows=True))

    return Work(kernels, formula, on(device, [q, k, v, weights, dout, *grads]), 4)


def of_slots(device: torch.device, dtype: torch.dtype, B: int, L: int) -> Work:
    g = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(B, 1, n, 64, generator=g).to(dtype) for n in (7, L, L))
    du, dmap = torch.randn(B, 1, 7, 64, generator=g).to(dtype), torch.randn(B, L, 7, generator=g)

    def kernels(q, k, v, du, dmap):
        updates, totals, slot_map = slot_attention_fwd(q, k, v, 0.2, 1e-8, None, True)
        return [updates, slot_map, *slot_attention_bwd(du, dmap, (q, k, v), (updates, totals), 0.2, 1e-8, None)]

    def formula(q, k, v):
        return reference.slot_attention(q, k, v, 0.2, 1e-8)

    return Work(kernels, formula, on(device, [q, k, v, du, dmap]), 2)


def of_tokens(device: torch.device, dtype: torch.dtype, B: int, T: int) -> Work:
    shape = TokenShape(B, 28, T, 128)
    g = torch.Generator().manual_seed(2)
    rows, dgathered = (torch.randn(B, shape.M, shape.S, generator=g).to(dtype) for _ in range(2))
    tokens = (torch.randn(B, T, shape.S, generator=g) + 0.3).to(dtype)

    def kernels(rows, tokens, dgathered):
        gathered, lse = token_attention_fwd(rows, tokens)
        return [gathered, *token_attention_bwd(dgathered, rows, tokens, gathered, lse)]

    def formula(rows, tokens):
        return ((rows @ tokens.mT).softmax(-1) @ tokens,)

    return Work(kernels, formula, on(device, [rows * 0.2, tokens, dgathered]), 1)


def of_norm(device: torch.device, dtype: torch.dtype, B: int, T: int) -> Work:
    g = torch.Generator().manual_seed(3)
    x, dy = ((torch.randn(B, T, 128, generator=g) + 0.5).to(dtype) for _ in range(2))

    def kernels(x, dy):
        y, rstd = joint_norm_fwd(x, 1e-5)
        return [y, joint_norm_bwd(dy, y, rstd)]

    return Work(kernels, lambda x: (torch.nn.functional.layer_norm(x, x.shape[1:]),), on(device, [x, dy]), 1)


WORKS = {
    "layer": of_layer, "attention": of_attention, "text": of_text, "slots": of_slots, "tokens": of_tokens,
    "norm": of_norm,
}  # fmt: skip
EVERY = pytest.mark.parametrize("of", WORKS.values(), ids=WORKS)


def size(device: torch.device) -> tuple[int, int]:
    """Images, and pixels or tokens of each: as many as clevr6 has; where kernels are interpreted, a few tiles."""
    return (4, 128 * 128 - 3) if device.type == "cuda" else (2, 133)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@EVERY
def test_at_the_size_of_clevr6(of, dtype, device):
    """Thousands of programs, and sums over all their parts. fp32 is about as good as PyTorch's own operators."""
    work = of(device, dtype, *size(device))
    exact = work.formula(torch.float64)
    with Poison():
        found = work.kernels(*work.inputs)
    if dtype == torch.float32:
        assert_as_good(found, work.formula(torch.float32), exact, dtype)
    else:
        assert_within_units(found, exact, dtype)


@EVERY
def test_the_same_bits_each_time(of, device):
    """Where two programs wrote one place, or one read what another writes, some of these would differ."""
    work = of(device, torch.bfloat16, *size(device))
    first = work.kernels(*work.inputs)
    for _ in range(20 if device.type == "cuda" else 1):
        assert all(torch.equal(a, b) for a, b in zip(work.kernels(*work.inputs), first, strict=True))


@contextlib.contextmanager
def tf32() -> Iterator[None]:
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("of", [of_layer, of_attention, of_tokens], ids=["layer", "attention", "tokens"])
def test_tf32_where_it_is_allowed_and_ieee_elsewhere(of, device):
    """TF32 keeps 10 bits of an operand's fraction, which tensor cores cut off: a roundoff of 2⁻¹⁰, four of bf16's."""
    work = of(device, torch.float32, *size(device))
    exact = work.formula(torch.float64)
    ieee = work.kernels(*work.inputs)
    assert_as_good(ieee, work.formula(torch.float32), exact, torch.float32)
    with tf32():
        found = work.kernels(*work.inputs)
    for i, (a, b) in enumerate(zip(found, exact, strict=True)):
        worst = ((a.double() - b).abs().max() / b.abs().max()).item()
        assert worst < 6 * 2.0**-10, f"output {i}: {worst:.1e}"
    if device.type == "cuda":
        assert not torch.equal(found[0], ieee[0]), "TF32 was allowed and not used"


@EVERY
def test_on_another_stream(of, device):
    """Launches go where the caller's stream is, behind what it has in its queue."""
    work = of(device, torch.bfloat16, *size(device))
    expected = work.kernels(*work.inputs)
    if device.type == "cpu":
        return
    side = torch.cuda.Stream(device)
    with torch.cuda.stream(side):
        late = torch.zeros(8192, 8192, device=device)
        for _ in range(20):
            late = late @ late
        moved = [t + late[0, 0].to(t.dtype) for t in work.inputs]  # the kernels' inputs come after all that
        found = work.kernels(*moved)
    torch.cuda.current_stream(device).wait_stream(side)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def loss_of(device: torch.device, dtype: torch.dtype, seed: int = 0):
    shape = Shape(3, 12, 4096 + 5, 7, 43, 180, 360) if device.type == "cuda" else Shape(2, 3, 70, 4, 5, 20, 24)
    inputs = loss_inputs(shape, CASE, seed)
    tensors = inputs.tensors()
    return on(device, inputs.with_tensors(tensors | {"queries": tensors["queries"].to(dtype)}))


@pytest.mark.parametrize("rows", [None, 5000], ids=["one-tile", "tiles"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_the_loss_of_a_decoder(dtype, rows, device, monkeypatch):
    monkeypatch.setenv("FASTSLOTS_CUDA_GRAPHS", "0")
    rows = rows and (rows if device.type == "cuda" else 90)
    inputs = loss_of(device, dtype)
    need = list(inputs.tensors())
    recon, interaction, grads = decoder_loss(inputs, need, rows=rows)
    flat = [recon, interaction, *grads.values()]
    results = {}
    for wide in (torch.float64, torch.float32):
        expected = reference_decoder_loss(in_dtype(inputs, wide), need)
        results[wide] = [*expected[:2], *(expected.grads[name] for name in need)]
    if dtype == torch.float32:
        assert_as_good(flat, results[torch.float32], results[torch.float64], torch.float32)
    else:
        assert_within_units(flat, results[torch.float64], dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_a_captured_loss_gives_the_bits_of_its_operators(dtype, device, monkeypatch):
    """On new values, under a loss scale and weights that change, after others have used the memory that was free."""

    def again(function, inputs):
        outputs = function(inputs)

        def replay():
            for out, value in zip(outputs, function(inputs), strict=True):
                out.copy_(value)

        return replay, outputs

    graphs = Graphs() if device.type == "cuda" else Graphs(again)
    for seed in range(4):
        inputs = replace(loss_of(device, dtype, seed), interaction_weight=0.1 * seed)
        need = list(inputs.tensors())
        scale = torch.full((), 2.0**seed, device=device)
        recon, interaction, grads = decoder_loss(inputs, need, scale, graphs=graphs)
        monkeypatch.setenv("FASTSLOTS_CUDA_GRAPHS", "0")
        plain = decoder_loss(inputs, need, scale)
        monkeypatch.delenv("FASTSLOTS_CUDA_GRAPHS")
        assert torch.equal(recon, plain.recon) and torch.equal(interaction, plain.interaction)
        assert all(torch.equal(grads[name], plain.grads[name]) for name in need)
        torch.full((1 << 20,), float("nan"), device=device)


def test_no_weight_of_a_head_is_stored(device):
    """What attention takes beside its inputs and results does not grow by heads x pixels x slots."""
    if device.type == "cpu":
        pytest.skip("memory of a GPU")
    B, H, L = 4, 12, 128 * 128
    peaks = {}
    for K in (4, 16):
        x, folded, ff, _, dy, dmap = on(device, layer_inputs(Shape(B, H, L, K, 43, 180, 360), torch.bfloat16))
        for _ in range(2):  # the second, when everything is compiled and each pool has its memory
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            decoder_layer_fwd(x, folded, ff)
            decoder_layer_bwd(dy, dmap, x, folded, ff)
            peaks[K] = torch.cuda.max_memory_allocated() - before
    maps = B * L * (16 - 4) * 4  # a slot map, and its gradient
    weights = B * H * L * (16 - 4) * 2  # in bf16
    assert peaks[16] - peaks[4] < 2 * maps + weights // 4, f"{peaks} bytes; the weights of all heads take {weights}"
