"""folded_cross_attention and fold_projections: the folding against projecting, C++ and Triton against the reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from values import compare

from fastslots import ops
from fastslots.kernels import gpu_backend
from fastslots.kernels.gpu import launch
from fastslots.kernels.gpu.folded_cross_attention import folded_cross_attention_bwd, folded_cross_attention_fwd
from fastslots.kernels.tools import compile
from fastslots.nn import InteractionCrossAttention
from fastslots.ops import reference
from fastslots.records import FeedForward, FoldedProjections
from fastslots.testing import (
    SHAPES,
    UNALIGNED,
    Poison,
    Shape,
    assert_close,
    assert_slots_within_units,
    assert_within_units,
    layer_inputs,
    on,
    random_layer,
    random_mask,
    random_qkv,
)

EVERY_SHAPE = pytest.mark.parametrize("shape", [pytest.param(shape, id=name) for name, shape in SHAPES.items()])
SMALL = SHAPES["one-slot"]._replace(K=3)
Q, K, V = random_qkv(SMALL, torch.float32)
CASES = [
    *(pytest.param(name, False, id=name) for name in SHAPES),
    *(pytest.param(name, True, id=f"{name}-masked") for name in ("sprites-mini", "one-pixel", "sixteen-slots")),
]


@EVERY_SHAPE
def test_folding_equals_projecting(shape):
    B, H, L, _, d, D, _ = shape
    g = torch.Generator().manual_seed(1)
    wq, wo = (torch.randn(*size, generator=g, dtype=torch.float64) * D**-0.5 for size in ((H * d, D), (D, H * d)))
    bq, bo = torch.randn(H * d, generator=g, dtype=torch.float64), torch.randn(D, generator=g, dtype=torch.float64)
    _, k, v = random_qkv(shape)
    x = torch.randn(B, L, D, generator=g, dtype=torch.float64)
    q = (x @ wq.T + bq).unflatten(-1, (H, d)).transpose(1, 2)
    out, expected_map = ops.cross_attention(q, k, v, scale=0.2)
    expected = out.transpose(1, 2).flatten(2) @ wo.T + bo
    y, slot_map = ops.folded_cross_attention(x, ops.fold_projections(wq, bq, k, v, wo, bo, 0.2))
    assert_close(y, expected, 1e-11, "y")
    assert_close(slot_map, expected_map, 1e-11, "slot_map")


def test_folding_without_biases():
    _, k, v = random_qkv(SMALL)
    wq, wo = torch.randn(SMALL.H * SMALL.d, SMALL.D).double(), torch.randn(SMALL.D, SMALL.H * SMALL.d).double()
    zeros = ops.fold_projections(wq, wq.new_zeros(len(wq)), k, v, wo, wo.new_zeros(len(wo)), 1.0)
    for a, b in zip(ops.fold_projections(wq, None, k, v, wo, None, 1.0), zeros, strict=True):
        assert torch.equal(a, b)


def test_a_scale_with_a_gradient_is_refused_or_gets_it():
    scale = torch.tensor(0.3, requires_grad=True)
    with pytest.raises(ValueError, match="scale cannot have a gradient"):
        ops.cross_attention(Q, K, V, scale=scale)
    k, v = torch.randn(2, 1, 2, 3, 4)
    folded = ops.fold_projections(torch.randn(8, 6), torch.randn(8), k, v, torch.randn(6, 8), None, scale)
    folded.G.sum().backward()
    torch.testing.assert_close(scale.grad, folded.G.sum().detach() / 0.3)


def test_module_is_multi_head_attention_with_folded_projections():
    attention = InteractionCrossAttention(12, 6, heads=3, inner_width=24, scale=0.5).double()
    x, slots = torch.randn(2, 9, 12).double(), torch.randn(2, 4, 6).double()
    p = attention.projections
    k, v = p.keys_values(slots)
    out, expected_map = ops.cross_attention(p.split_heads(p.to_q(x)), k, v, scale=0.5)
    y, slot_map = attention(x, slots)
    assert_close(y, p.to_out(out.transpose(1, 2).flatten(2)), 1e-12)
    assert_close(slot_map, expected_map, 1e-12)
    masked, _ = attention(x, slots, torch.tensor([[True, True, False, False]] * 2))
    assert_close(masked, attention(x, slots[:, :2])[0], 1e-12)
    with pytest.raises(ValueError, match="multiple of heads"):
        InteractionCrossAttention(10, 6, heads=3)


def test_export_and_autocast():
    attention = InteractionCrossAttention(12, 6, heads=3)
    inputs = (torch.randn(2, 9, 12), torch.randn(2, 4, 6))
    exported = torch.export.export(attention, inputs)
    for a, b in zip(exported.module()(*inputs), attention(*inputs), strict=True):
        torch.testing.assert_close(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        out, slot_map = attention(*inputs)
    assert slot_map.dtype == torch.float32
    assert_close(out, attention(*inputs)[0], 0.1, "out under bf16 autocast")


# ---- C++ -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, masked", CASES)
def test_cpp_values_and_every_gradient(name, masked):
    shape = SHAPES[name]
    mask = random_mask(shape) if masked else None
    x, folded, _ = random_layer(shape, shared_queries=masked)

    def attention(backend, x, *f):
        return ops.folded_cross_attention(x, FoldedProjections(*f), backend, slot_mask=mask)

    compare(attention, [x, *folded])


# ---- Triton ----------------------------------------------------------------------------------------------------------


def leaves(*tensors):
    return [t.detach().double().requires_grad_() for t in tensors]


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("shared", [False, True], ids=["own-x", "shared-x"])
@pytest.mark.parametrize("masked", [False, True], ids=["all-slots", "masked"])
def test_triton_values_and_every_gradient(norm, shared, masked, device):
    for dtype in (torch.float32, torch.bfloat16):
        inputs = layer_inputs(Shape(3, 12, 45, 7, 43, 180, 8), dtype, shared, masked)
        x, folded, _, mask, dy, dmap = on(device, inputs)
        with Poison():
            got = folded_cross_attention_fwd(x, folded, mask, norm)
            dx, dfolded = folded_cross_attention_bwd(dy, dmap, x, folded, mask, norm)
        inputs = leaves(x, *folded)
        normed = F.layer_norm(inputs[0], (180,)) if norm else inputs[0]
        y, slot_map = reference.folded_cross_attention(normed, FoldedProjections(*inputs[1:]), mask)
        y = y + inputs[0] if norm else y
        expected_grads = torch.autograd.grad([y, slot_map], inputs, [dy.double(), dmap.double()])
        assert_within_units((*got, dx, *dfolded), (y, slot_map, *expected_grads), dtype)
        wide = (slot_map, *expected_grads[1:4])
        assert_slots_within_units((got[1], *dfolded[:3]), wide, (2, 3, 2, 2), dtype)
        if masked:
            assert (got[1][~mask[:, None].expand_as(got[1])] == 0).all()


def test_weights_are_a_softmax_and_shift_invariant(device):
    x, folded, *_ = on(device, layer_inputs(Shape(2, 12, 40, 7, 43, 180, 8), torch.float32))
    _, slot_map = folded_cross_attention_fwd(x, folded, norm=True)
    assert (slot_map >= 0).all() and (slot_map.sum(-1) - 12).abs().max() < 1e-5
    shifted = folded._replace(g=folded.g + 1000.0)
    _, slot_map2 = folded_cross_attention_fwd(x, shifted, norm=True)
    torch.testing.assert_close(slot_map2, slot_map, atol=2e-3, rtol=0)  # 1000 + s rounds s to 3e-5
    extreme = folded._replace(G=folded.G * 1e4)
    y3, slot_map3 = folded_cross_attention_fwd(x, extreme, norm=True)
    assert y3.isfinite().all() and slot_map3.isfinite().all()


@pytest.mark.parametrize(
    "dtype, slots, width, reason",
    [
        (torch.float64, 4, 16, "float64"),
        (torch.float32, 65, 16, "65 slots"),
        (torch.float32, 64, 16, "columns"),
        (torch.float32, 4, 2048, "wider"),
    ],
)
def test_triton_says_why_it_does_not_serve(dtype, slots, width, reason, device):
    heads = 9
    folded = FoldedProjections(
        torch.zeros(1, width, heads, slots, dtype=dtype), torch.zeros(1, heads, slots, dtype=dtype),
        torch.zeros(1, heads, slots, width, dtype=dtype), torch.zeros(width, dtype=dtype),
    )  # fmt: skip
    x, folded = on(device, (torch.zeros(1, 2, width, dtype=dtype), folded))
    with pytest.raises(ValueError, match=reason):
        ops.folded_cross_attention(x, folded, backend="triton")


def test_weights_of_another_dtype_than_the_rows(device):
    """Biases of a double-precision folding under 16-bit rows: added in fp32, and a gradient in each one's dtype."""
    x, folded, ff = on(device, random_layer(UNALIGNED, torch.float64))
    ff = FeedForward(*(t.float() for t in ff))
    got = {}
    for backend in ("triton", "reference"):
        cast = x.bfloat16() if backend == "triton" else x.bfloat16().double()
        weights = [t.clone().requires_grad_() for t in folded]
        plain = FoldedProjections(*weights)
        y, slot_map = ops.folded_cross_attention(cast, plain, backend=backend)
        got[backend] = [y, *torch.autograd.grad(y.double().square().mean() + slot_map.square().mean(), weights)]
    assert_within_units(got["triton"], got["reference"], torch.bfloat16)
    y, _ = ops.folded_cross_attention(x.bfloat16(), FoldedProjections(*folded), backend="reference")
    assert y.dtype == torch.bfloat16  # the reference takes what the kernels take
    torch.testing.assert_close(y.double(), got["triton"][0].double(), atol=0.05, rtol=0.02)
    with launch.record("sm_90") as launches:
        gpu_backend.decoder_layer_fwd(x.bfloat16(), folded, FeedForward(*(t.double() for t in ff)))
    for item in launches:
        compile.source(item)  # every pointer is of a type that kernels take
        assert item.args["bias_ptr"].dtype == item.args["b2_ptr"].dtype == torch.float32
