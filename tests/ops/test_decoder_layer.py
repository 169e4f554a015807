"""decoder_layer: the reference against its formula, C++ and Triton against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from values import compare

from fastslots import ops
from fastslots.kernels.gpu import launch
from fastslots.kernels.gpu.decoder_layer import decoder_layer_bwd, decoder_layer_fwd
from fastslots.ops import reference
from fastslots.records import FeedForward, FoldedProjections
from fastslots.testing import (
    INTERPRETED_SHAPES,
    SHAPES,
    UNIT,
    Poison,
    Shape,
    assert_close,
    assert_slots_within_units,
    assert_within_units,
    layer_inputs,
    on,
    random_layer,
    random_mask,
)

SMALL = SHAPES["one-slot"]._replace(K=3)
CASES = [
    *(pytest.param(name, False, id=name) for name in SHAPES),
    *(pytest.param(name, True, id=f"{name}-masked") for name in ("sprites-mini", "one-pixel", "sixteen-slots")),
]


def test_shared_queries_equal_repeated_ones():
    x, folded, ff = random_layer(SHAPES["sprites-mini"], shared_queries=True)
    repeated = x.expand(len(folded.g), -1, -1)
    for a, b in zip(ops.decoder_layer(x, folded, ff), ops.decoder_layer(repeated, folded, ff), strict=True):
        assert_close(a, b, 1e-12)


def test_decoder_layer_is_its_formula():
    x, folded, ff = random_layer(SMALL)
    weight, bias = torch.randn(2, SMALL.D).double()
    normed = torch.nn.functional.layer_norm(x, (SMALL.D,), weight, bias)
    h = x + ops.folded_cross_attention(normed, folded)[0]
    n = torch.nn.functional.layer_norm(h, (SMALL.D,), ff.norm_weight, ff.norm_bias)
    expected = h + torch.nn.functional.gelu(n @ ff.w1.T + ff.b1) @ ff.w2.T + ff.b2
    assert_close(ops.decoder_layer(x, ops.fold_norm(folded, weight, bias), ff)[0], expected, 1e-12)


# ---- C++ -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, masked", CASES)
def test_cpp_values_and_every_gradient(name, masked):
    shape = SHAPES[name]
    mask = random_mask(shape) if masked else None
    x, folded, ff = random_layer(shape, shared_queries=masked)

    def layer(backend, x, *w):
        return ops.decoder_layer(x, FoldedProjections(*w[:4]), FeedForward(*w[4:]), backend, slot_mask=mask)

    compare(layer, [x, *folded, *ff])


# ---- Triton ----------------------------------------------------------------------------------------------------------


def flat(grads):
    return [grads.x, *grads.folded, *grads.ff]


def expected_of(x, folded, ff, mask, dy, dmap):
    """Outputs and gradients of the reference in float64."""
    inputs = [t.detach().double().requires_grad_() for t in (x, *folded, *ff)]
    outputs = reference.decoder_layer(inputs[0], FoldedProjections(*inputs[1:5]), FeedForward(*inputs[5:]), mask)
    return *outputs, *torch.autograd.grad(outputs, inputs, [dy.double(), dmap.double()])


@pytest.mark.parametrize(
    "shape, dtype",
    [
        pytest.param(shape, dtype, id=f"{name}-{launch.DTYPES[dtype]}")
        for name, shape in INTERPRETED_SHAPES.items()
        for dtype in UNIT
        if dtype != torch.float16 or name == "clevr6"  # the 16-bit types share every code path
    ],
)
def test_triton_values_and_every_gradient(shape, dtype, device):
    inputs = on(device, layer_inputs(shape, dtype, shared=shape.B == 1))
    with Poison():
        got = decoder_layer_fwd(inputs.x, inputs.folded, inputs.ff, inputs.mask)
        grads = decoder_layer_bwd(inputs.dy, inputs.dmap, inputs.x, inputs.folded, inputs.ff, inputs.mask)
    expected = expected_of(*inputs)
    assert_within_units((*got, *flat(grads)), expected, dtype)
    assert_slots_within_units((got[1], *grads.folded[:3]), (expected[1], *expected[3:6]), (2, 3, 2, 2), dtype)


@pytest.mark.parametrize("block_l, block_c", [(16, 64), (64, 16), (128, 128)])
def test_block_sizes_change_nothing_but_rounding(block_l, block_c, device):
    inputs = on(device, layer_inputs(Shape(2, 3, 130, 5, 12, 37, 50), torch.float32))
    x, folded, ff, mask, dy, dmap = inputs
    with launch.override(launch.LaunchConfig(block_l, block_c, 4, 1, block_d=32)):
        got = (*decoder_layer_fwd(x, folded, ff, mask), *flat(decoder_layer_bwd(dy, dmap, x, folded, ff, mask)))
    assert_within_units(got, expected_of(*inputs), torch.float32)


def test_triton_repeats_are_bit_equal(device):
    inputs = layer_inputs(Shape(2, 4, 130, 7, 16, 64, 64), torch.bfloat16)
    x, folded, ff, mask, dy, dmap = on(device, inputs)
    first, second = (flat(decoder_layer_bwd(dy, dmap, x, folded, ff, mask)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("batch, pixels", [(0, 16), (2, 0)], ids=["no-images", "no-pixels"])
@pytest.mark.parametrize("shared", [False, True], ids=["queries-of-each", "shared-queries"])
def test_empty_inputs(batch, pixels, shared, device):
    inputs = layer_inputs(Shape(batch, 3, pixels, 4, 5, 20, 24), torch.float32, shared=shared)
    x, folded, ff, mask, dy, dmap = on(device, inputs)
    assert len(x) == (1 if shared else batch)
    y, slot_map = decoder_layer_fwd(x, folded, ff, mask)
    assert y.shape == (batch, pixels, 20) and slot_map.shape == (batch, pixels, 4)
    with Poison():
        grads = flat(decoder_layer_bwd(dy, dmap, x, folded, ff, mask))
    assert [g.shape for g in grads] == [t.shape for t in (x, *folded, *ff)]
    assert all(g.isfinite().all() and g.abs().sum() == 0 for g in grads)
