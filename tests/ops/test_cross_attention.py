"""cross_attention: the reference against the published formula, C++ and Triton against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from values import compare

from fastslots import ops
from fastslots.kernels.gpu.cross_attention import cross_attention_bwd, cross_attention_fwd
from fastslots.ops import reference
from fastslots.testing import (
    SHAPES,
    UNIT,
    Poison,
    assert_close,
    assert_slots_within_units,
    assert_within_units,
    on,
    random_mask,
    random_qkv,
)

EVERY_SHAPE = pytest.mark.parametrize("shape", [pytest.param(shape, id=name) for name, shape in SHAPES.items()])
SMALL = SHAPES["one-slot"]._replace(K=3)
CASES = [
    *(pytest.param(name, False, id=name) for name in SHAPES),
    *(pytest.param(name, True, id=f"{name}-masked") for name in ("sprites-mini", "one-pixel", "sixteen-slots")),
]


@EVERY_SHAPE
def test_cross_attention_is_the_published_formula(shape):
    q, k, v = random_qkv(shape)
    out, slot_map = ops.cross_attention(q, k, v, scale=0.3)
    attn = torch.einsum("bhld,bhkd->bhlk", q, k).mul(0.3).softmax(-1)
    assert_close(out, torch.einsum("bhlk,bhkd->bhld", attn, v), 1e-12, "out")
    assert_close(slot_map, attn.sum(1), 1e-12, "slot_map")
    if shape.B:
        torch.testing.assert_close(slot_map.sum(-1), torch.full_like(slot_map[..., 0], shape.H))
        assert slot_map.min() >= 0


def test_default_scale_is_that_of_the_head_width():
    q, k, v = random_qkv(SMALL)
    default, _ = ops.cross_attention(q, k, v)
    assert torch.equal(default, ops.cross_attention(q, k, v, scale=SMALL.d**-0.5)[0])


def test_softmax_ignores_what_is_added_to_every_score():
    q, k, v = random_qkv(SMALL)
    shifted = k + torch.randn(SMALL.B, SMALL.H, 1, SMALL.d, dtype=k.dtype)  # a key bias
    for a, b in zip(ops.cross_attention(q, k, v), ops.cross_attention(q, shifted, v), strict=True):
        assert_close(a, b, 1e-11)


def test_padded_slots_are_as_if_absent():
    q, k, v = random_qkv(SMALL)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    out, slot_map = ops.cross_attention(q, k, v, slot_mask=mask)
    short_out, short_map = ops.cross_attention(q[:1], k[:1, :, :2], v[:1, :, :2])
    assert_close(out[:1], short_out, 1e-13)
    assert_close(slot_map[:1, :, :2], short_map, 1e-13)
    assert not slot_map[0, :, 2].any()
    k = k.clone().requires_grad_()
    out, slot_map = ops.cross_attention(q, k, v, slot_mask=mask)
    (out.sum() + ops.interaction_penalty(slot_map)).backward()
    assert not k.grad[0, :, 2].any() and k.grad[1, :, 2].any()


def test_an_image_without_slots_gives_zeros_not_nan():
    q, k, v = random_qkv(SMALL)
    q.requires_grad_()
    out, slot_map = ops.cross_attention(q, k, v, slot_mask=torch.zeros(SMALL.B, SMALL.K, dtype=torch.bool))
    assert not out.any() and not slot_map.any()
    out.sum().backward()
    assert torch.isfinite(q.grad).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_is_as_good_as_its_dtype(dtype):
    q, k, v = random_qkv(SHAPES["sprites"], dtype)
    out, slot_map = ops.cross_attention(q, k, v)
    exact_out, exact_map = ops.cross_attention(q.double(), k.double(), v.double())
    assert out.dtype == dtype and slot_map.dtype == torch.float32
    bound = 40 * torch.finfo(dtype).eps
    assert_close(out, exact_out, bound, "out")
    assert_close(slot_map, exact_map, bound, "slot_map")


# ---- C++ -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, masked", CASES)
def test_cpp_values_and_every_gradient(name, masked):
    shape = SHAPES[name]
    mask = random_mask(shape) if masked else None
    compare(lambda b, *qkv: ops.cross_attention(*qkv, backend=b, slot_mask=mask), random_qkv(shape))


def test_heads_split_from_a_projection_are_not_copied():
    from fastslots.kernels.cpu_calls import unit_rows

    B, H, L, K, d = 2, 3, 21, 4, 5
    q, k, v = (torch.randn(B, n, H, d, dtype=torch.float64) for n in (L, K, K))

    def call(backend, q, k, v):
        return ops.cross_attention(*(t.transpose(1, 2) for t in (q, k, v)), backend=backend)

    compare(call, [q, k, v])
    assert unit_rows(q.transpose(1, 2), q.dtype).data_ptr() == q.data_ptr()
    strided = [torch.randn(2, 3, 5, n, dtype=torch.float64) for n in (9, 4, 4)]  # the last axis strided: copied
    compare(lambda b, q, k, v: ops.cross_attention(q.mT, k.mT, v.mT, backend=b), strided)


# ---- Triton ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", UNIT, ids=str)
@pytest.mark.parametrize(
    "shape",
    [(2, 12, 70, 43, 7), (1, 12, 33, 43, 5), (1, 2, 1, 43, 11), (1, 3, 31, 80, 64), (2, 1, 65, 16, 1)],
    ids=["clevr6", "sprites", "one-pixel", "64-slots", "one-slot"],
)
def test_triton_values_and_every_gradient(shape, dtype, device):
    B, H, L, d, K = shape
    gen = torch.Generator().manual_seed(0)
    # q and dout as a projection leaves them: [B, L, H·d] seen as [B, H, L, d].
    q, dout = (torch.randn(B, L, H, d, generator=gen).to(dtype).transpose(1, 2) for _ in range(2))
    k, v = (torch.randn(B, H, K, d, generator=gen).to(dtype) for _ in range(2))
    dmap, mask = torch.randn(B, L, K, generator=gen), torch.rand(B, K, generator=gen) > 0.3 if K > 4 else None
    scale = 180**-0.5
    q, k, v, dout, dmap, mask = on(device, (q, k, v, dout, dmap, mask))
    with Poison():
        got = cross_attention_fwd(q, k, v, scale, mask)
        grads = cross_attention_bwd(dout, dmap, q, k, v, scale, mask)
    inputs = [t.detach().double().requires_grad_() for t in (q, k, v)]
    expected = reference.cross_attention(*inputs, scale, mask)
    expected_grads = torch.autograd.grad(expected, inputs, [dout.double(), dmap.double()])
    assert_within_units((*got, *grads), (*expected, *expected_grads), dtype)
    assert_slots_within_units((got[1], *grads[1:]), (expected[1], *expected_grads[1:]), (2, 2, 2), dtype)


def test_triton_serves_the_public_op(device):
    gen = torch.Generator().manual_seed(0)
    q, k, v = on(device, [torch.randn(2, 3, n, 16, generator=gen, requires_grad=True) for n in (40, 5, 5)])
    out, slot_map = ops.cross_attention(q, k, v, backend="triton")
    loss = out.square().sum() + ops.interaction_penalty(slot_map)
    expected_out, expected_map = ops.cross_attention(q, k, v, backend="reference")
    expected = expected_out.square().sum() + ops.interaction_penalty(expected_map)
    got, want = torch.autograd.grad(loss, (q, k, v)), torch.autograd.grad(expected, (q, k, v))
    for a, r in zip(got, want, strict=True):
        torch.testing.assert_close(a, r, atol=1e-5, rtol=1e-5)
