"""The Triton kernels in Triton's interpreter (no GPU): values and gradients against the reference in float64.

Bounds are multiples of the unit roundoff u of the element type, relative to the largest and to the RMS reference value.
Worst seen, maximum and RMS: bf16 3.9 and 2.8 u, fp16 1.8 and 1.4 u, fp32 12 and 10 u (gradient of the norm's bias).
"""

from __future__ import annotations

import os
from dataclasses import replace

os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is first imported

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fastslots import ops
from fastslots.kernels.gpu import launch
from fastslots.kernels.gpu._tiles import INTERPRETED
from fastslots.kernels.gpu.cross_attention import cross_attention_bwd, cross_attention_fwd
from fastslots.kernels.gpu.decoder_layer import decoder_layer_bwd, decoder_layer_fwd
from fastslots.kernels.gpu.decoder_loss import decoder_loss
from fastslots.kernels.gpu.folded_cross_attention import folded_cross_attention_bwd, folded_cross_attention_fwd
from fastslots.models import SlotVAE, SlotVAEConfig
from fastslots.ops import reference
from fastslots.ops.decoder_loss import reference_decoder_loss
from fastslots.records import FeedForward, FoldedDecoder, FoldedLayer, FoldedProjections, LossInputs, OutputHead
from fastslots.testing import Poison

UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
MAX_UNITS = {torch.float16: 6, torch.bfloat16: 6, torch.float32: 32}
RMS_UNITS = {torch.float16: 4, torch.bfloat16: 4, torch.float32: 16}

# B, L, D, F, H, K
LAYER_SHAPES = {
    "clevr6": (2, 40, 180, 360, 12, 7),
    "sprites": (1, 33, 180, 360, 12, 5),
    "clevrtex": (1, 17, 360, 720, 12, 11),
    "sprites-mini": (2, 64, 64, 128, 4, 4),
    "one-pixel": (2, 1, 180, 40, 2, 3),
    "one-slot": (1, 9, 20, 24, 3, 1),
    "64-slots": (1, 31, 24, 16, 8, 64),
    "17-slots": (1, 65, 37, 50, 3, 17),
}


def interpreted() -> None:
    assert INTERPRETED.value, "triton was imported before TRITON_INTERPRET was set: run these tests in a new process"


def assert_close(got, expected, dtype: torch.dtype) -> None:
    for i, (a, r) in enumerate(zip(got, expected, strict=True)):
        assert a.shape == r.shape
        error, scale = (a.double() - r).abs(), r.abs()
        if scale.max() == 0:  # one slot: softmax is constant and its gradient an exact zero
            assert error.max() < 16 * UNIT[dtype], f"output {i}: {error.max():.1e} where zero was expected"
            continue
        worst = (error.max() / scale.max() / UNIT[dtype]).item()
        rms = (error.square().mean().sqrt() / scale.square().mean().sqrt() / UNIT[dtype]).item()
        assert worst < MAX_UNITS[dtype] and rms < RMS_UNITS[dtype], f"output {i}: max {worst:.1f} u, rms {rms:.2f} u"


def flat(grads):
    return [grads.x, *grads.folded, *grads.ff]


def leaves(*tensors):
    return [t.detach().double().requires_grad_() for t in tensors]


def layer_inputs(shape, dtype, shared=False, masked=False):
    B, L, D, units, H, K = shape
    gen = torch.Generator().manual_seed(0)

    def randn(*size):
        return torch.randn(*size, generator=gen)

    x = randn(1 if shared else B, L, D).to(dtype)
    folded = FoldedProjections(randn(B, D, H, K) * 2 * D**-0.5, randn(B, H, K), randn(B, H, K, D), randn(D))
    w1, w2 = randn(units, D) * D**-0.5, randn(D, units) * units**-0.5
    ff = FeedForward(randn(D).abs() + 0.5, randn(D), w1, randn(units), w2, randn(D))
    mask = None
    if masked:
        mask = torch.rand(B, K, generator=gen) > 0.4
        mask[0] = False  # an image without any slot
    return x, folded, ff, mask, randn(B, L, D).to(dtype), randn(B, L, K)


@pytest.mark.parametrize(
    "shape, dtype",
    [
        pytest.param(shape, dtype, id=f"{name}-{launch.DTYPES[dtype]}")
        for name, shape in LAYER_SHAPES.items()
        for dtype in UNIT
        if dtype != torch.float16 or name == "clevr6"  # the 16-bit types share every code path
    ],
)
def test_decoder_layer_matches_reference(shape, dtype):
    interpreted()
    x, folded, ff, mask, dy, dmap = layer_inputs(shape, dtype, shared="one" not in str(shape) and shape[0] == 1)
    with Poison():
        got = decoder_layer_fwd(x, folded, ff, mask)
        grads = flat(decoder_layer_bwd(dy, dmap, x, folded, ff, mask))
    inputs = leaves(x, *folded, *ff)
    expected = reference.decoder_layer(inputs[0], FoldedProjections(*inputs[1:5]), FeedForward(*inputs[5:]), mask)
    expected_grads = torch.autograd.grad(expected, inputs, [dy.double(), dmap.double()])
    assert_close((*got, *grads), (*expected, *expected_grads), dtype)


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("shared", [False, True], ids=["own-x", "shared-x"])
@pytest.mark.parametrize("masked", [False, True], ids=["all-slots", "masked"])
def test_folded_attention_variants(norm, shared, masked):
    interpreted()
    for dtype in (torch.float32, torch.bfloat16):
        x, folded, _, mask, dy, dmap = layer_inputs((3, 45, 180, 8, 12, 7), dtype, shared, masked)
        with Poison():
            got = folded_cross_attention_fwd(x, folded, mask, norm)
            dx, dfolded = folded_cross_attention_bwd(dy, dmap, x, folded, mask, norm)
        inputs = leaves(x, *folded)
        normed = F.layer_norm(inputs[0], (180,)) if norm else inputs[0]
        y, slot_map = reference.folded_cross_attention(normed, FoldedProjections(*inputs[1:]), mask)
        y = y + inputs[0] if norm else y
        expected_grads = torch.autograd.grad([y, slot_map], inputs, [dy.double(), dmap.double()])
        assert_close((*got, dx, *dfolded), (y, slot_map, *expected_grads), dtype)
        if masked:
            assert (got[1][~mask[:, None].expand_as(got[1])] == 0).all()


@pytest.mark.parametrize("dtype", UNIT, ids=str)
@pytest.mark.parametrize(
    "shape",
    [(2, 12, 70, 43, 7), (1, 12, 33, 43, 5), (1, 2, 1, 43, 11), (1, 3, 31, 80, 64), (2, 1, 65, 16, 1)],
    ids=["clevr6", "sprites", "one-pixel", "64-slots", "one-slot"],
)
def test_cross_attention_matches_reference(shape, dtype):
    interpreted()
    B, H, L, d, K = shape
    gen = torch.Generator().manual_seed(0)
    # q and dout as a projection leaves them: [B, L, H·d] seen as [B, H, L, d].
    q, dout = (torch.randn(B, L, H, d, generator=gen).to(dtype).transpose(1, 2) for _ in range(2))
    k, v = (torch.randn(B, H, K, d, generator=gen).to(dtype) for _ in range(2))
    dmap, mask = torch.randn(B, L, K, generator=gen), torch.rand(B, K, generator=gen) > 0.3 if K > 4 else None
    scale = 180**-0.5
    with Poison():
        got = cross_attention_fwd(q, k, v, scale, mask)
        grads = cross_attention_bwd(dout, dmap, q, k, v, scale, mask)
    inputs = leaves(q, k, v)
    expected = reference.cross_attention(*inputs, scale, mask)
    expected_grads = torch.autograd.grad(expected, inputs, [dout.double(), dmap.double()])
    assert_close((*got, *grads), (*expected, *expected_grads), dtype)


def test_weights_are_a_softmax_and_shift_invariant():
    interpreted()
    x, folded, *_ = layer_inputs((2, 40, 180, 8, 12, 7), torch.float32)
    _, slot_map = folded_cross_attention_fwd(x, folded, norm=True)
    assert (slot_map >= 0).all() and (slot_map.sum(-1) - 12).abs().max() < 1e-5
    shifted = folded._replace(g=folded.g + 1000.0)
    _, slot_map2 = folded_cross_attention_fwd(x, shifted, norm=True)
    torch.testing.assert_close(slot_map2, slot_map, atol=2e-3, rtol=0)  # 1000 + s rounds s to 3e-5
    extreme = folded._replace(G=folded.G * 1e4)
    y3, slot_map3 = folded_cross_attention_fwd(x, extreme, norm=True)
    assert y3.isfinite().all() and slot_map3.isfinite().all()


@pytest.mark.parametrize("block_l, block_c", [(16, 64), (64, 16), (128, 128)])
def test_block_sizes_change_nothing_but_rounding(block_l, block_c):
    interpreted()
    x, folded, ff, mask, dy, dmap = layer_inputs((2, 130, 37, 50, 3, 5), torch.float32)
    with launch.override(launch.LaunchConfig(block_l, block_c, 4, 1, block_d=32)):
        got = (*decoder_layer_fwd(x, folded, ff, mask), *flat(decoder_layer_bwd(dy, dmap, x, folded, ff, mask)))
    inputs = leaves(x, *folded, *ff)
    expected = reference.decoder_layer(inputs[0], FoldedProjections(*inputs[1:5]), FeedForward(*inputs[5:]), mask)
    assert_close(got, (*expected, *torch.autograd.grad(expected, inputs, [dy.double(), dmap.double()])), torch.float32)


def test_repeats_are_bit_equal():
    interpreted()
    x, folded, ff, mask, dy, dmap = layer_inputs((2, 130, 64, 64, 4, 7), torch.bfloat16)
    first, second = (flat(decoder_layer_bwd(dy, dmap, x, folded, ff, mask)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("batch, pixels", [(0, 16), (2, 0)], ids=["no-images", "no-pixels"])
def test_empty_inputs(batch, pixels):
    interpreted()
    x, folded, ff, mask, dy, dmap = layer_inputs((batch, pixels, 20, 24, 3, 4), torch.float32)
    y, slot_map = decoder_layer_fwd(x, folded, ff, mask)
    assert y.shape == (batch, pixels, 20) and slot_map.shape == (batch, pixels, 4)
    grads = flat(decoder_layer_bwd(dy, dmap, x, folded, ff, mask))
    assert all(g.isfinite().all() and g.abs().sum() == 0 for g in grads)


class Allocations(TorchDispatchMode):
    """Size of the largest tensor made inside."""

    def __init__(self):
        super().__init__()
        self.largest, self.shape = 0, ()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            # A view or an expanded tensor occupies what its storage does.
            size = t.untyped_storage().nbytes() // t.element_size() if isinstance(t, torch.Tensor) else 0
            if size > self.largest:
                self.largest, self.shape = size, tuple(t.shape)
        return out


def test_no_path_allocates_a_per_head_tensor_over_all_pixels():
    """K > d and H·K > D, so a tensor [B,H,L,K] is larger than every input and output: nothing may reach its size."""
    B, L, H, K, d, D, units = 2, 2**16, 4, 20, 8, 32, 48
    per_head = B * H * L * K
    meta = {"device": "meta"}
    q, dout = torch.empty(B, H, L, d, **meta), torch.empty(B, H, L, d, **meta)
    k, v = torch.empty(B, H, K, d, **meta), torch.empty(B, H, K, d, **meta)
    x, dy, dmap = torch.empty(B, L, D, **meta), torch.empty(B, L, D, **meta), torch.empty(B, L, K, **meta)
    folded = FoldedProjections(*(torch.empty(s, **meta) for s in ((B, D, H, K), (B, H, K), (B, H, K, D), (D,))))
    ff = FeedForward(*(torch.empty(s, **meta) for s in ((D,), (D,), (units, D), (units,), (D, units), (D,))))
    calls = {
        "cross_attention_fwd": lambda: cross_attention_fwd(q, k, v, 1.0),
        "cross_attention_bwd": lambda: cross_attention_bwd(dout, dmap, q, k, v, 1.0),
        "folded_cross_attention_fwd": lambda: folded_cross_attention_fwd(x, folded),
        "folded_cross_attention_bwd": lambda: folded_cross_attention_bwd(dy, dmap, x, folded),
        "decoder_layer_fwd": lambda: decoder_layer_fwd(x, folded, ff),
        "decoder_layer_bwd": lambda: decoder_layer_bwd(dy, dmap, x, folded, ff),
    }
    for name, call in calls.items():
        with launch.record("sm_90"), Allocations() as seen:
            call()
        assert 0 < seen.largest < per_head, f"{name} made a tensor {seen.shape}, as large as [B,H,L,K]"
    with Allocations() as seen:  # the test can fail: the reference does make one
        reference.cross_attention(q, k, v, 1.0)
    assert seen.largest >= per_head


def test_public_ops_serve_and_differentiate():
    interpreted()
    gen = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 16, generator=gen, requires_grad=True) for n in (40, 5, 5))
    out, slot_map = ops.cross_attention(q, k, v, backend="triton")
    loss = out.square().sum() + ops.interaction_penalty(slot_map)
    expected_out, expected_map = ops.cross_attention(q, k, v, backend="reference")
    expected = expected_out.square().sum() + ops.interaction_penalty(expected_map)
    got, want = torch.autograd.grad(loss, (q, k, v)), torch.autograd.grad(expected, (q, k, v))
    for a, r in zip(got, want, strict=True):
        torch.testing.assert_close(a, r, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "dtype, slots, width, reason",
    [
        (torch.float64, 4, 16, "float64"),
        (torch.float32, 65, 16, "65 slots"),
        (torch.float32, 64, 16, "columns"),
        (torch.float32, 4, 2048, "wider"),
    ],
)
def test_unserved_calls_say_why(dtype, slots, width, reason):
    interpreted()
    heads = 9
    folded = FoldedProjections(
        torch.zeros(1, width, heads, slots, dtype=dtype), torch.zeros(1, heads, slots, dtype=dtype),
        torch.zeros(1, heads, slots, width, dtype=dtype), torch.zeros(width, dtype=dtype),
    )  # fmt: skip
    with pytest.raises(ValueError, match=reason):
        ops.folded_cross_attention(torch.zeros(1, 2, width, dtype=dtype), folded, backend="triton")


def test_whole_model_trains_twenty_steps_like_the_reference():
    """A small SlotVAE, 20 Adam steps: losses agree to 1e-5 (seen 1e-7), weights to 1e-5 of their norm (seen 3e-7)."""
    interpreted()
    config = SlotVAEConfig.preset(
        "sprites-mini", resolution=8, cnn_channels=8, cnn_stride=2, encoder_width=32, slot_dim=8, slot_width=24,
        slot_hidden=16, decoder_heads=3, query_width=20, query_hidden=24, output_hidden=(16,), encoder_layers=1,
        octaves=3, alpha=2.0,
    )  # fmt: skip

    def train(backend):
        torch.manual_seed(0)
        model = SlotVAE(config)
        images, noise = torch.rand(2, 3, 8, 8), torch.randn(20, 2, config.num_slots, 8)
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


@pytest.mark.parametrize("shared", [True, False], ids=["shared-queries", "own-queries"])
@pytest.mark.parametrize("rows", [4096, 24], ids=["images", "parts-of-images"])
def test_tiled_decoder_loss_matches_the_untiled_one(rows, shared):
    """Every gradient of the tiled loss, with pixel weights and a loss scale, against autograd in float64."""
    interpreted()
    B, L, K, H, D, units = 3, 40, 4, 3, 20, 24
    gen = torch.Generator().manual_seed(0)

    def randn(*size, scale=1.0):
        return torch.randn(*size, generator=gen) * scale

    layers = [
        FoldedLayer(
            FoldedProjections(randn(B, D, H, K, scale=0.4), randn(B, H, K), randn(B, H, K, D), randn(D)),
            FeedForward(1 + randn(D, scale=0.1), randn(D), randn(units, D, scale=0.2), randn(units),
                        randn(D, units, scale=0.2), randn(D)),
        )
        for _ in range(2)
    ]  # fmt: skip
    head = OutputHead(1 + randn(D, scale=0.1), randn(D), [randn(D, D, scale=0.2), randn(3, D, scale=0.2)],
                      [randn(D), randn(3)])  # fmt: skip
    mask = torch.rand(B, K, generator=gen) > 0.3
    inputs = LossInputs(
        FoldedDecoder(randn(1 if shared else B, L, D), layers, head), torch.rand(B, L, 3, generator=gen),
        torch.rand(B, L, generator=gen), mask, 1.5, torch.tensor(0.3),
    )  # fmt: skip
    need = list(inputs.tensors())
    recon, interaction, grads = decoder_loss(inputs, need, grad_scale=8.0, rows=rows)
    wide = replace(
        inputs.with_tensors({name: t.double() for name, t in inputs.tensors().items()}),
        target=inputs.target.double(), pixel_weight=inputs.pixel_weight.double(),
    )  # fmt: skip
    expected = reference_decoder_loss(wide, need, grad_scale=8.0)
    expected_grads = [expected.grads[name] for name in need]
    assert_close((recon, interaction, *grads.values()), (*expected[:2], *expected_grads), torch.float32)
    forward_only = decoder_loss(inputs, [], rows=rows)
    assert forward_only.grads == {}
    torch.testing.assert_close(forward_only[:2], (recon, interaction))


def test_decoder_loss_is_served_and_differentiates():
    interpreted()
    x, folded, ff, mask, _, _ = layer_inputs((2, 20, 20, 24, 3, 4), torch.float32)
    head = OutputHead(torch.ones(20), torch.zeros(20), [torch.full((3, 20), 0.1, requires_grad=True)], [torch.zeros(3)])
    decoder = FoldedDecoder(x.requires_grad_(), [FoldedLayer(folded, ff)], head)
    inputs = LossInputs(decoder, torch.zeros(2, 20, 3), None, mask, 1.0, 0.5)
    grads = {}
    for backend in ("triton", "reference"):
        terms = ops.decoder_loss(inputs, backend=backend)
        grads[backend] = torch.autograd.grad(terms.total, (x, head.weights[0]))
    for a, r in zip(grads["triton"], grads["reference"], strict=True):
        torch.testing.assert_close(a, r, atol=2e-5, rtol=2e-5)
