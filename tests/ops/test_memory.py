"""No path of the ``cpu`` and ``triton`` backends makes a tensor of all heads over all pixels, [B, H, L, K].

K > d and H·K > D, so it would be larger than every input and output and no size coincides with it. For C++ the peak of
the process is measured, which sees what its allocator gives; for Triton every tensor made around the launches is."""

from __future__ import annotations

import pytest
import torch
from peaks import PRELUDE, measured, needs_peak

from fastslots.kernels.gpu import decoder_loss, launch
from fastslots.kernels.gpu.cross_attention import cross_attention_bwd, cross_attention_fwd
from fastslots.kernels.gpu.decoder_layer import decoder_layer_bwd, decoder_layer_fwd
from fastslots.kernels.gpu.folded_cross_attention import folded_cross_attention_bwd, folded_cross_attention_fwd
from fastslots.ops import reference
from fastslots.records import FeedForward, FoldedDecoder, FoldedLayer, FoldedProjections, LossInputs, OutputHead
from fastslots.testing import LargestTensor

PROGRAM = (
    PRELUDE
    + """
backend = sys.argv[1]
B, H, K, d, D, F, M, S = 1, 8, 32, 2, 8, 8, 128, 4


def both_ways(*outputs):
    torch.autograd.backward([o.sum() for o in outputs])


def calls(L):
    q, k, v = leaf(B, H, L, d), leaf(B, H, K, d), leaf(B, H, K, d)
    x, folded = leaf(B, L, D), FoldedProjections(leaf(B, D, H, K), leaf(B, H, K), leaf(B, H, K, D), leaf(D))
    ff = FeedForward(leaf(D), leaf(D), leaf(F, D), leaf(F), leaf(D, F), leaf(D))
    head = OutputHead(leaf(D), leaf(D), [leaf(3, D)], [leaf(3)])
    decoder = FoldedDecoder(x, [FoldedLayer(folded, ff)] * 2, head)
    loss = LossInputs(decoder, torch.zeros(B, L, 3), None, None, 1.0, 1.0)
    rows, tokens = leaf(B, M, S), leaf(B, L, S)
    return {  # those that need least come first: what they free may be given out again unseen
        "decoder_loss": lambda: both_ways(ops.decoder_loss(loss, backend=backend).total),
        "token_attention": lambda: both_ways(ops.token_attention(rows, tokens, backend)),
        "decoder_layer": lambda: both_ways(*ops.decoder_layer(x, folded, ff, backend)),
        "folded_cross_attention": lambda: both_ways(*ops.folded_cross_attention(x, folded, backend)),
        "cross_attention": lambda: both_ways(*ops.cross_attention(q, k, v, backend=backend)),
    }


for call in calls(64).values():  # what is imported at the first call is not what is looked for
    call()
L = 2**16
per_head = {name: 4 * L * B * (M if name == "token_attention" else H * K) for name in calls(1)}
print(json.dumps({name: [added(call), per_head[name]] for name, call in calls(L).items()}))
"""
)


GROWTH = (
    PRELUDE
    + """
L, H, K, D, F = 2048, 8, 8, 128, 128


def decoder_loss(B):
    layers = []
    for _ in range(2):
        folded = FoldedProjections(leaf(B, D, H, K), leaf(B, H, K), leaf(B, H, K, D), leaf(D))
        ff = FeedForward(leaf(D), leaf(D), leaf(F, D), leaf(F), leaf(D, F), leaf(D))
        layers.append(FoldedLayer(folded, ff))
    head = OutputHead(leaf(D), leaf(D), [leaf(3, D)], [leaf(3)])
    loss = LossInputs(FoldedDecoder(leaf(1, L, D), layers, head), torch.zeros(B, L, 3), None, None, 1.0, 1.0)
    return lambda: ops.decoder_loss(loss, backend="cpu").total.backward()


decoder_loss(1)()
few, many = decoder_loss(4), decoder_loss(16)
print(json.dumps([added(few), added(many), 4 * 2 * 2 * D * H * K]))
"""
)


def test_triton_ops_make_none():
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
        with launch.record("sm_90"), LargestTensor() as seen:
            call()
        assert 0 < seen.elements < per_head, f"{name} made a tensor {seen.shape}, as large as [B,H,L,K]"
    with LargestTensor() as seen:  # the test can fail: the reference does make one
        reference.cross_attention(q, k, v, 1.0)
    assert seen.elements >= per_head


@pytest.mark.parametrize("shared", [True, False], ids=["shared-queries", "own-queries"])
@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "all-pixels"])
def test_triton_loss_makes_none_beyond_a_tile(shared, weighted):
    """Token attention has its test in test_token_attention.py. A tile of an eighth of the pixels, on tensors without
    memory: it stores the weights of its heads once, for their gradients, and nothing of two images' size."""
    B, L, H, K, D, F = 2, 2**15, 8, 24, 32, 32

    def make(*size):
        return torch.empty(size, device="meta")

    folded = FoldedProjections(make(B, D, H, K), make(B, H, K), make(B, H, K, D), make(D))
    ff = FeedForward(make(D), make(D), make(F, D), make(F), make(D, F), make(D))
    head = OutputHead(make(D), make(D), [make(D, D), make(3, D)], [make(D), make(3)])
    weight = make(B, L) if weighted else None
    x = make(1 if shared else B, L, D)
    decoder = FoldedDecoder(x, [FoldedLayer(folded, ff)] * 2, head)
    inputs = LossInputs(decoder, make(B, L, 3), weight, make(B, K) > 0, 1.0, 1.0)
    with launch.record("sm_90") as launches, LargestTensor() as seen:
        decoder_loss._run(inputs, list(inputs.tensors()), 1.0, decoder_loss.Tiling(B * L // 8, torch.float32))
    # Of each layer the forward, the backward of its feed-forward and of its attention; of the head its norm and a GELU,
    # forward and backward; and the penalty of the slot map with its gradient.
    assert len(launches) == 8 * (2 * 3 + 4 + 1)
    heads = [item.args["attn_ptr"] for item in launches if item.name == "folded_attention_dx"]
    assert max(t.numel() for t in heads) < B * H * L * K / 5  # K is padded to 32
    assert (1 if shared else B) * L * D <= seen.elements < B * H * L * K / 4


@needs_peak
def test_cpu_kernels_add_less_than_a_per_head_tensor():
    pytest.importorskip("fastslots._cpu")
    for name, (added, limit) in measured(PROGRAM, "cpu").items():
        assert added < limit / 2, f"{name} added {added / 2**20:.0f} MiB, a per-head tensor has {limit / 2**20:.0f}"


@needs_peak
def test_sums_of_an_image_are_kept_once_and_not_by_every_task():
    """The loss is cut into 24 tasks. Yet an image's projections (weights, gradients) are there five times (37 before):
    packed for both directions, their gradients for autograd, as sums, and as those of the task at hand."""
    pytest.importorskip("fastslots._cpu")
    few, many, projections = measured(GROWTH)
    assert many - few < 12 * 10 * projections, f"{few / 2**20:.1f} and {many / 2**20:.1f} MiB for 4 and 16 images"


@needs_peak
def test_the_measurement_sees_a_per_head_tensor():
    """The reference makes them, but for its loss in tiles."""
    for name, (added, limit) in measured(PROGRAM, "reference").items():
        assert added > limit or name == "decoder_loss", name
