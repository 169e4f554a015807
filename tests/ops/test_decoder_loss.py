"""decoder_loss: C++ and Triton against the tiled reference in float64; which gradients are made; bits and memory."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import cache

import pytest
import torch
from values import ISAS, compare_sets, cpu_backend

from fastslots import ops
from fastslots.kernels.gpu import decoder_loss as gpu_decoder_loss
from fastslots.kernels.gpu import launch
from fastslots.kernels.gpu.decoder_loss import decoder_loss
from fastslots.models import SlotVAE, SlotVAEConfig
from fastslots.ops import reference
from fastslots.ops.decoder_loss import reference_decoder_loss
from fastslots.records import FeedForward, FoldedProjections
from fastslots.testing import (
    SHAPES,
    UNALIGNED,
    LossCase,
    Operations,
    Shape,
    assert_close,
    assert_within_units,
    in_dtype,
    loss_inputs,
    on,
)

FP32 = LossCase(dtype=torch.float32)


# ---- C++ -------------------------------------------------------------------------------------------------------------


def loss_and_gradients(inputs):
    recon, interaction, grads = cpu_backend.decoder_loss(inputs, list(inputs.tensors()))
    return [recon, interaction, *grads.values()]


@pytest.mark.parametrize(
    "name, options",
    [
        *(pytest.param(name, {}, id=name) for name in SHAPES),
        pytest.param("sprites-mini", dict(shared=False, weighted=True), id="sprites-mini-weighted"),
        pytest.param("one-pixel", dict(shared=False, weighted=True), id="one-pixel-weighted"),
        pytest.param("sixteen-slots", dict(masked=True, layers=1), id="sixteen-slots-masked"),
        pytest.param("many-slots", dict(weighted=True, masked=True, layers=3), id="many-slots-masked"),
    ],
)
def test_cpp_values_and_every_gradient(name, options):
    inputs = loss_inputs(SHAPES[name], LossCase(**options))
    need = list(inputs.tensors())

    def run(backend, inputs):
        loss = reference_decoder_loss if backend == "reference" else cpu_backend.decoder_loss
        recon, interaction, grads = loss(inputs, need, 3.0)
        return [recon, interaction, *(grads[name] for name in need)]

    compare_sets(run, in_dtype, inputs)


def test_only_the_gradients_asked_for():
    inputs = loss_inputs(SHAPES["sprites-mini"], FP32)
    recon, interaction, every = cpu_backend.decoder_loss(inputs, list(inputs.tensors()))
    for name, expected in every.items():
        *_, grads = cpu_backend.decoder_loss(inputs, [name])
        assert list(grads) == [name] and torch.equal(grads[name], expected)
    assert cpu_backend.decoder_loss(inputs, []) == (recon, interaction, {})


@pytest.mark.parametrize(
    "name", ["queries", "layers.0.G", "layers.0.U", "layers.0.norm_weight", "layers.0.b1", "head.biases.1"]
)
def test_nan_comes_through(name):
    for isa in ISAS:
        cpu_backend.set_isa(isa)
        inputs = loss_inputs(SHAPES["one-slot"], LossCase(dtype=torch.float32))
        tensors = {name: t.clone() for name, t in inputs.tensors().items()}
        tensors[name].view(-1)[-1] = float("nan")
        assert cpu_backend.decoder_loss(inputs.with_tensors(tensors), list(tensors)).recon.isnan()


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("isa", ISAS)
def test_same_bits_every_time_for_any_number_of_threads(isa, shared):
    cpu_backend.set_isa(isa)
    shape = SHAPES["sprites-mini"]._replace(B=8, L=200)
    inputs = loss_inputs(shape, LossCase(shared=shared, weighted=True, dtype=torch.float32))
    torch.set_num_threads(1)
    once = loss_and_gradients(inputs)
    for threads in (1, 2, 3, 8) * 3:
        torch.set_num_threads(threads)
        for a, b in zip(loss_and_gradients(inputs), once, strict=True):
            assert torch.equal(a, b)


def test_the_reference_agrees_through_the_whole_public_loss():
    inputs = loss_inputs(SHAPES["sprites"], LossCase(dtype=torch.float32))
    tensors = {name: t.detach().requires_grad_() for name, t in inputs.tensors().items()}
    flat = list(tensors.values())
    auto = ops.decoder_loss(inputs.with_tensors(tensors))
    plain = ops.decoder_loss(inputs.with_tensors(tensors), backend="reference")
    torch.testing.assert_close(auto.total, plain.total, rtol=1e-5, atol=1e-5)
    for a, b in zip(torch.autograd.grad(auto.total, flat), torch.autograd.grad(plain.total, flat), strict=True):
        assert_close(a, b, 1e-4)
    slot_map = reference.decode(inputs.decoder)[1]
    torch.testing.assert_close(auto.interaction, reference.interaction_penalty(slot_map), rtol=1e-5, atol=1e-6)


def test_cpp_gradients_are_the_slopes_of_the_values_in_double():
    inputs = loss_inputs(SHAPES["one-slot"]._replace(L=3, K=2), LossCase(layers=1, head=(4, 2), weighted=True))
    tensors = inputs.tensors()
    grads = cpu_backend.decoder_loss(inputs, list(tensors)).grads

    def total(tensors):
        recon, interaction, _ = cpu_backend.decoder_loss(inputs.with_tensors(tensors), [])
        return inputs.recon_weight * recon + inputs.interaction_weight * interaction

    assert list(grads) == list(tensors)
    for i, (name, grad) in enumerate(grads.items()):
        step = 1e-6 * torch.randn(grad.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
        up, down = (tensors | {name: tensors[name] + sign * step} for sign in (1, -1))
        torch.testing.assert_close((total(up) - total(down)) / 2, (grad * step).sum(), rtol=1e-5, atol=1e-13)


def peaks(program: str, *arguments: int) -> list[int]:
    """What a call adds to the peak of a process, KiB, for each argument; the program prints it."""
    found = []
    for argument in arguments:
        command = [sys.executable, "-c", program, str(argument)]
        found.append(int(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    return found


def test_memory_of_given_queries_grows_by_their_gradients():
    program = """
import resource, sys, torch
from fastslots.kernels import cpu_backend
from fastslots.testing import SHAPES, LossCase, loss_inputs
inputs = loss_inputs(SHAPES["clevr6"]._replace(L=int(sys.argv[1])), LossCase(dtype=torch.float32))
torch.set_num_threads(1)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
cpu_backend.decoder_loss(inputs, list(inputs.tensors()))
print(peak() - before)
"""
    few, many = peaks(program, 1024, 8192)
    per_head = 2 * 12 * 7 * (8192 - 1024) * 4 // 1024  # KiB of one layer's weights over all pixels: 4.7 MiB
    queries = 180 * (8192 - 1024) * 4 // 1024
    assert many - few < queries + per_head // 2


def test_memory_of_the_decoders_step_is_flat_in_the_number_of_pixels():
    """Not even the queries exist for all pixels: nothing 180 wide, though their inputs and targets do."""
    program = """
import resource, sys, torch
from fastslots.models import SlotVAEConfig
from fastslots.models.decoder import Decoder
torch.set_num_threads(1)
decoder = lambda side: Decoder(SlotVAEConfig.preset("clevr6", resolution=side))
def step(decoder):
    images = torch.zeros(1, 3, decoder.resolution, decoder.resolution)
    decoder.loss(torch.randn(1, 7, 64), images, 1.0, 0.1).total.backward()
step(decoder(16))
ours = decoder(int(sys.argv[1]))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
step(ours)
print(peak() - before)
"""
    few, many = peaks(program, 32, 112)
    print(few, many)
    assert many - few < 180 * (112**2 - 32**2) * 4 // 1024 // 2  # half of the queries alone


# ---- Triton ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False], ids=["shared-queries", "own-queries"])
@pytest.mark.parametrize("rows", [4096, 24], ids=["images", "parts-of-images"])
@pytest.mark.parametrize("head", [(20, 3), (70, 26, 3)], ids=["plain-head", "head-with-its-loss"])
def test_triton_values_and_every_gradient(rows, shared, head, device):
    """Every gradient of the tiled loss, with pixel weights and a loss scale, against autograd in float64."""
    case = LossCase(shared=shared, weighted=True, masked=True, head=head, dtype=torch.float32)
    inputs = replace(loss_inputs(Shape(3, 3, 40, 4, 5, 20, 24), case), interaction_weight=torch.tensor(0.3))
    inputs = on(device, inputs)
    need = list(inputs.tensors())
    recon, interaction, grads = decoder_loss(inputs, need, grad_scale=8.0, rows=rows)
    expected = reference_decoder_loss(in_dtype(inputs, torch.float64), need, grad_scale=8.0)
    wide = (*expected[:2], *(expected.grads[name] for name in need))
    assert_within_units((recon, interaction, *grads.values()), wide, torch.float32)
    forward_only = decoder_loss(inputs, [], rows=rows)
    assert forward_only.grads == {}
    torch.testing.assert_close(forward_only[:2], (recon, interaction))


def test_triton_serves_the_public_op(device):
    inputs = loss_inputs(
        Shape(2, 3, 20, 4, 5, 20, 24), LossCase(layers=1, shared=False, masked=True, dtype=torch.float32)
    )
    inputs = on(device, inputs)
    tensors = {name: t.requires_grad_() for name, t in inputs.tensors().items()}
    leaves = [tensors["queries"], tensors["head.weights.0"]]
    got, want = (
        torch.autograd.grad(ops.decoder_loss(inputs.with_tensors(tensors), backend=backend).total, leaves)
        for backend in ("triton", "reference")
    )
    for a, r in zip(got, want, strict=True):
        torch.testing.assert_close(a, r, atol=2e-5, rtol=2e-5)


def test_whole_model_trains_twenty_steps_like_the_reference(device):
    """A small SlotVAE, 20 Adam steps: losses agree to 1e-5 (seen 1e-7), weights to 1e-5 of their norm (seen 3e-7)."""
    config = SlotVAEConfig.preset(
        "sprites-mini", resolution=8, cnn_channels=8, cnn_stride=2, encoder_width=32, slot_dim=8, slot_width=24,
        slot_hidden=16, decoder_heads=3, query_width=20, query_hidden=24, output_hidden=(16,), encoder_layers=1,
        octaves=3, alpha=2.0,
    )  # fmt: skip

    def train(backend):
        torch.manual_seed(0)
        model = SlotVAE(config).to(device)
        images, noise = on(device, (torch.rand(2, 3, 8, 8), torch.randn(20, 2, config.num_slots, 8)))
        optimizer, losses = torch.optim.Adam(model.parameters(), lr=2e-3), []
        for step in range(20):
            posterior = model.encode(images, noise[step])
            decoded = model.decoder.loss(posterior.slots, images, config.sigma, config.alpha, backend=backend)
            loss = decoded.total + config.beta * posterior.kl
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return torch.tensor(losses), torch.cat([p.detach().flatten() for p in model.parameters()])

    losses, weights = train("triton")
    expected_losses, expected_weights = train("reference")
    assert expected_losses[-1] < 0.8 * expected_losses[0]
    torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=0)
    assert (weights - expected_weights).norm() < 1e-5 * expected_weights.norm()
    assert (weights - expected_weights).abs().max() < 2e-5  # of a rate of 2e-3


@pytest.mark.parametrize("batch, pixels", [(0, 8), (2, 0)], ids=["no-images", "no-pixels"])
def test_an_empty_loss_is_zero(batch, pixels, device):
    inputs = on(device, loss_inputs(UNALIGNED._replace(B=batch, L=pixels), FP32))
    need = list(inputs.tensors())
    got, want = decoder_loss(inputs, need), reference_decoder_loss(inputs, need)
    assert got.recon == want.recon == 0 and got.interaction == want.interaction == 0
    for name in need:
        assert got.grads[name].shape == want.grads[name].shape and not got.grads[name].any()


HEADS = {"plain-head": FP32, "head-with-its-loss": FP32._replace(head=(24, 20, 3))}


@cache
def every_gradient(head, device):
    inputs = on(device, loss_inputs(UNALIGNED, HEADS[head]))
    return decoder_loss(inputs, list(inputs.tensors())).grads


def names(part, head):
    """Those of a part of the decoder: "queries", "head", or a layer's "0 folded" or "1 ff"."""
    layer, _, record = part.partition(" ")
    if not record:
        return [name for name in loss_inputs(UNALIGNED, HEADS[head]).tensors() if name.startswith(part)]
    fields = {"folded": FoldedProjections, "ff": FeedForward}[record]._fields
    return [f"layers.{layer}.{name}" for name in fields]


@pytest.mark.parametrize(
    "wanted, launches",
    [
        (["head"], {}),  # the head alone: no layer is gone back through
        (["1 ff"], {"dx": 2, "feed-forward": 1}),
        (["0 folded", "1 folded"], {"dx": 4, "attention": 2}),  # a frozen decoder: the slots alone
        (["queries"], {"dx": 4}),
        (["0 ff", "head"], {"dx": 4, "feed-forward": 1}),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else "",
)
@pytest.mark.parametrize("head", HEADS)
def test_triton_makes_no_gradient_that_is_not_needed(wanted, launches, head, device):
    need = [name for part in wanted for name in names(part, head)]
    inputs = on(device, loss_inputs(UNALIGNED, HEADS[head]))
    got = decoder_loss(inputs, need).grads
    assert set(got) == set(need)
    for name, grad in got.items():
        assert torch.equal(grad, every_gradient(head, device)[name])
    with launch.record("sm_90") as found:
        gpu_decoder_loss._run(on("meta", inputs), need, 1.0, gpu_decoder_loss.Tiling(4096, torch.float32))
    of_loss = ("bias_gelu", "row_norm", "slot_map_loss", "output_head")  # which every gradient has to pass
    backwards = [item for item in found if not item.name.endswith("_fwd") and not item.name.startswith(of_loss)]
    backwards = [item for item in backwards if item.constexprs.get("RESIDUAL", True)]  # without one it is the head's
    halves = {"feed_forward_dz": "feed-forward", "folded_attention_dx": "attention"}  # whose weights' gradients follow
    kept = [halves[item.name] for item in backwards if item.constexprs["KEEP"]]
    assert Counter([*("dx" for _ in backwards), *kept]) == launches
    forwards = [item for item in found if item.name == "decoder_layer_fwd"]
    first = next((i for i, item in enumerate(forwards) if item.constexprs["KEEP"]), 2)
    assert first == 2 - launches.get("dx", 0) // 2  # a layer that is not gone back through keeps nothing
    assert sum(item.constexprs["KEEP_H"] for item in forwards) == launches.get("feed-forward", 0)


REFUSED = {"cumsum", "cumsum_", "scatter_add", "scatter_add_", "scatter_reduce", "index_add", "index_add_", "index_put",
           "index_put_", "put_", "bincount", "histc", "embedding_dense_backward"}  # fmt: skip


@pytest.fixture
def deterministic(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch asks for it on a GPU
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_deterministic_algorithms_can_be_asked_for(deterministic, device):
    inputs = on(device, loss_inputs(UNALIGNED, FP32))
    with Operations() as found:
        decoder_loss(inputs, list(inputs.tensors()))
    assert "mm" in found.names and not found.names & REFUSED
    w = torch.rand(2, 5, 4, dtype=torch.float64, device=device, requires_grad=True)
    with Operations() as found:
        penalty = ops.interaction_penalty(w)
        penalty.backward()
    assert found.names and not found.names & REFUSED
    torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(penalty, ops.interaction_penalty(w))
    torch.testing.assert_close(w.grad, (w.sum(-1, keepdim=True) - w).detach() / 10)
