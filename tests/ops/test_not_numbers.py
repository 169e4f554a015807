"""What is no number: in a masked slot it reaches nothing, elsewhere it reaches what it reaches in the reference.

Padding of slots is often memory that nobody wrote. A weight of 0 does not keep it out, for 0 · NaN is NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from tiny import MODEL_8
from torch import Tensor
from values import cast, values_and_gradients

from fastslots import ops
from fastslots.models import SlotVAE, SlotVAEConfig
from fastslots.ops.decoder_loss import decoder_loss
from fastslots.records import FeedForward, FoldedProjections
from fastslots.testing import LossCase, Shape, assert_within_units, loss_inputs, on, random_layer, random_qkv

SIZES = Shape(B=2, H=2, L=5, K=4, d=4, D=8, F=8)
MASK = torch.tensor([[True, False, True, True], [False] * 4])  # one padded slot; an image without any
GARBAGE = (float("nan"), float("inf"), float("-inf"))

Op = Callable[[str, list[Tensor]], object]


def attention(backend: str, t: list[Tensor]):
    return ops.cross_attention(*t, backend=backend, slot_mask=MASK.to(t[0].device))


def statistics(backend: str, t: list[Tensor]):
    out, slot_map, rows = ops.cross_attention(
        *t, backend=backend, slot_mask=MASK.to(t[0].device), statistics=("lse", "entropy")
    )
    return out, slot_map, rows["lse"], rows["entropy"]


def folded(backend: str, t: list[Tensor]):
    return ops.folded_cross_attention(t[0], FoldedProjections(*t[1:]), backend, slot_mask=MASK.to(t[0].device))


def layer(backend: str, t: list[Tensor]):
    return ops.decoder_layer(
        t[0], FoldedProjections(*t[1:5]), FeedForward(*t[5:]), backend, slot_mask=MASK.to(t[0].device)
    )


def iteration(backend: str, t: list[Tensor]):
    return ops.slot_attention(*t, backend=backend, slot_mask=MASK.to(t[0].device), return_map=True)


def inputs(op: Op) -> dict[str, Tensor]:
    if op in (folded, layer):
        x, projections, ff = random_layer(SIZES, torch.float32)
        named = {"x": x} | projections._asdict()
        return named | ff._asdict() if op is layer else named
    if op is iteration:
        g = torch.Generator().manual_seed(0)
        return {name: torch.randn(2, 2, n, 4, generator=g) for name, n in (("q", 4), ("k", 5), ("v", 5))}
    return dict(zip("qkv", random_qkv(SIZES, torch.float32), strict=True))


SLOTS = {"k": 2, "v": 2, "G": 3, "g": 2, "U": 2}
"""The axis of slots, of the inputs that have one. Of an iteration of slot attention the queries have it."""


def slot_axes(op: Op) -> dict[str, int]:
    return {"q": 2} if op is iteration else {name: SLOTS[name] for name in inputs(op) if name in SLOTS}


def run(op: Op, backend: str, values: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return values_and_gradients(lambda *t: op(backend, list(t)), cast(list(values.values()), dtype))


OPS = (attention, statistics, folded, layer, iteration)
CASES = [pytest.param(op, name, id=f"{op.__name__}-{name}") for op in OPS for name in slot_axes(op)]


@pytest.mark.parametrize("op, name", CASES)
def test_what_a_masked_slot_holds_reaches_nothing(op, name, backend, device):
    """Neither values nor gradients, to the last bit."""
    values, axis = on(device, inputs(op)), slot_axes(op)[name]
    clean = run(op, backend, values)
    for garbage in GARBAGE:
        padded = values[name].clone()
        padded[0].select(axis - 1, 1).fill_(garbage)
        padded[1] = garbage
        assert all(torch.equal(a, b) for a, b in zip(run(op, backend, values | {name: padded}), clean, strict=True))


PLACES = [pytest.param(op, name, id=f"{op.__name__}-{name}") for op in OPS for name in list(inputs(op))[:5]]


@pytest.mark.parametrize("image", [0, 1], ids=["of an image", "of one without slots"])
@pytest.mark.parametrize("op, name", PLACES)
def test_nan_comes_through_where_it_does_in_the_reference(op, name, image, backend, device):
    """None is hidden, and none spreads: from a row, a token or a real slot."""
    values = on(device, inputs(op))
    poisoned = values[name].clone()
    of_image = poisoned[image] if poisoned.ndim > 1 else poisoned
    element = {"G": (0, 0, 2), "g": (0, 2), "x": (2, 0), "b": (0,)}.get(name, (0, 2, 0))
    of_image[element] = float("nan")
    exact = run(op, "reference", values | {name: poisoned}, torch.float64)
    for i, (a, b) in enumerate(zip(run(op, backend, values | {name: poisoned}), exact, strict=True)):
        assert torch.equal(a.isnan(), b.isnan()), f"result {i}: {a.isnan().sum()} of them, {b.isnan().sum()} expected"


def test_the_loss_of_a_decoder(backend, device):
    case = LossCase(shared=False, masked=True, dtype=torch.float32)
    given = on(device, replace(loss_inputs(SIZES, case), slot_mask=MASK))

    def terms(values: dict[str, Tensor]) -> list[Tensor]:
        leaves = {name: t.detach().clone().requires_grad_() for name, t in values.items()}
        total, recon, interaction = decoder_loss(given.with_tensors(leaves), backend=backend)
        return [recon, interaction, *torch.autograd.grad(total, list(leaves.values()))]

    clean, padded = given.tensors(), {}
    for name, t in clean.items():
        last = name.rsplit(".", 1)[-1]
        padded[name] = t.clone()
        if last in ("G", "g", "U"):
            padded[name][0].select(SLOTS[last] - 1, 1).fill_(float("nan"))
            padded[name][1] = float("nan")
    assert any(t.isnan().any() for t in padded.values())
    assert all(torch.equal(a, b) for a, b in zip(terms(padded), terms(clean), strict=True))


@pytest.mark.parametrize("decoder", ["transformer", "broadcast"])
def test_a_model_with_padded_slots(decoder, device):
    """Pictures, loss, Jacobian and the gradient of every weight are those of slots padded with zeros."""
    fields = {name: value for name, value in MODEL_8.items() if name != "pixels_per_step"} | {"num_slots": 4}
    torch.manual_seed(0)
    model = SlotVAE(SlotVAEConfig.preset("sprites-mini", **fields, decoder=decoder)).slot_decoder.to(device)
    images, weights, mask = torch.rand(2, 3, 8, 8).to(device), list(model.parameters()), MASK.to(device)

    def results(padding: float) -> list[Tensor]:
        slots = (
            torch.linspace(-1, 1, 16, device=device)
            .view(2, 4, 2)
            .masked_fill(~mask[..., None], padding)
            .requires_grad_()
        )
        recon = model.decode(slots, mask).recon
        total = model.loss(slots, images, 1.0, 1.0, slot_mask=mask).total
        from fastslots.metrics import slot_jacobian

        jacobian = slot_jacobian(model, slots.detach(), slot_mask=mask)
        return [recon, total, jacobian, *torch.autograd.grad(total + recon.sum(), [slots, *weights])]

    assert all(torch.equal(a, b) for a, b in zip(results(float("nan")), results(0.0), strict=True))


@pytest.mark.parametrize("mean", [0.0, 4.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tokens_with_a_mean_have_gradients_in_sixteen_bits(backend, dtype, mean, device):
    """The gradient of a row is a difference: of bf16 results it was 17 % off, of tokens of mean 4 and deviation 1. All
    earlier inputs had a mean of 0, or 0.3."""
    g = torch.Generator().manual_seed(0)
    rows = (torch.randn(2, 16, 64, generator=g) * 0.1 * 64**-0.5).to(dtype)
    tokens, weights = (torch.randn(2, n, 64, generator=g) + m for n, m in ((64, mean), (16, 0.0)))
    rows, tokens, weights = on(device, (rows, tokens.to(dtype), weights.to(dtype)))

    def gradients(wide: torch.dtype, backend: str) -> list[Tensor]:
        leaves = [t.to(wide).requires_grad_() for t in (rows, tokens)]
        return list(torch.autograd.grad(ops.token_attention(*leaves, backend), leaves, weights.to(wide)))

    for got, want in zip(gradients(dtype, backend), gradients(torch.float64, "reference"), strict=True):
        assert got.dtype == dtype
        assert_within_units([got], [want], dtype)
