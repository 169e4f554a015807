"""The Triton kernels as torch operators, interpreted: registration, ``torch.compile``, repeats, settings."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace
from functools import cache

os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is first imported

import pytest
import torch
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from fastslots import ops
from fastslots.kernels import gpu_backend
from fastslots.kernels.gpu import decoder_loss as loss_module
from fastslots.kernels.gpu import launch
from fastslots.kernels.gpu._tiles import INTERPRETED
from fastslots.kernels.gpu.decoder_loss import decoder_loss
from fastslots.kernels.tools import compile
from fastslots.ops.decoder_loss import reference_decoder_loss
from fastslots.records import FeedForward, FoldedDecoder, FoldedLayer, FoldedProjections, LossInputs, OutputHead
from fastslots.testing import Shape, random_layer, random_qkv

SHAPE = Shape(B=2, H=3, L=5, K=4, d=5, D=20, F=24)  # D and F fill no block: padded weights, and gradients cut out


@pytest.fixture(autouse=True)
def _interpreted():
    assert INTERPRETED.value, "triton was imported before TRITON_INTERPRET was set: run these tests in a new process"


def leaf(t):
    return t.detach().clone().requires_grad_()


def operators() -> dict[str, tuple]:
    """Arguments of every registered operator, forward and backward."""
    x, folded, ff = random_layer(SHAPE, torch.float32)
    q, k, v = random_qkv(SHAPE, torch.float32)
    dy, dmap = torch.randn(SHAPE.B, SHAPE.L, SHAPE.D), torch.randn(SHAPE.B, SHAPE.L, SHAPE.K)
    rows, tokens = torch.randn(2, 6, 20), torch.randn(2, 9, 20)
    gathered, lse = torch.ops.fastslots.token_attention(rows, tokens, "triton")
    layer = [leaf(t) for t in folded], [leaf(t) for t in ff]
    return {
        "cross_attention": (leaf(q), leaf(k), leaf(v), 0.5, None, "triton"),
        "cross_attention_backward": (torch.randn_like(q), dmap, q, k, v, 0.5, None, "triton"),
        "folded_cross_attention": (leaf(x), layer[0], None, "triton"),
        "folded_cross_attention_backward": (dy, dmap, x, list(folded), None, "triton"),
        "decoder_layer": (leaf(x), *layer, None, 1e-5, "triton"),
        "decoder_layer_backward": (dy, dmap, x, list(folded), list(ff), None, 1e-5, "triton"),
        "token_attention": (leaf(rows), leaf(tokens), "triton"),
        "token_attention_backward": (torch.randn_like(rows), rows, tokens, gathered, lse, "triton"),
    }


@pytest.mark.parametrize("name", ["cross_attention", "folded_cross_attention", "decoder_layer", "token_attention"])
def test_opcheck(name):
    """Schema, autograd, and shapes and strides as announced: compiled code reads results by the announced strides."""
    arguments = operators()
    opcheck(getattr(torch.ops.fastslots, name).default, arguments[name])
    backward = f"{name}_backward"
    checks = ("test_schema", "test_faketensor")
    opcheck(getattr(torch.ops.fastslots, backward).default, arguments[backward], test_utils=checks)


def test_fullgraph_compile_gives_the_bits_of_eager():
    x, folded, ff = random_layer(SHAPE, torch.float32)
    weights = [leaf(t) for t in (x, *folded, *ff)]

    def loss(x, *rest):
        y, slot_map = ops.decoder_layer(x, FoldedProjections(*rest[:4]), FeedForward(*rest[4:]), backend="triton")
        return y.square().mean() + ops.interaction_penalty(slot_map)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    eager = loss(*weights)
    assert torch.equal(compiled(*weights), eager)
    got, want = (torch.autograd.grad(f(*weights), weights) for f in (compiled, loss))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
def test_compiled_code_calls_the_kernel(dynamic):
    """Not the reference, which Dynamo would trace as well, and which makes a tensor of all heads over all pixels."""
    targets = []

    def see(graph, example_inputs):
        targets.append([str(node.target) for node in graph.graph.nodes if "fastslots" in str(node.target)])
        return graph.forward

    compiled = torch.compile(
        lambda q, k, v: ops.cross_attention(q, k, v, backend="triton")[0], fullgraph=True, backend=see, dynamic=dynamic
    )
    for pixels in (5, 6):
        q, k, v = random_qkv(SHAPE._replace(L=pixels), torch.float32)
        assert torch.equal(compiled(q, k, v), ops.cross_attention(q, k, v, backend="triton")[0])
    assert targets and all(found == ["fastslots.cross_attention.default"] for found in targets)


@pytest.mark.parametrize("name", ["cross_attention", "folded_cross_attention", "decoder_layer", "token_attention"])
def test_two_runs_are_bit_equal(name):
    arguments = operators()
    for suffix in ("", "_backward"):
        run = getattr(torch.ops.fastslots, name + suffix)
        for a, b in zip(run(*arguments[name + suffix]), run(*arguments[name + suffix]), strict=True):
            assert torch.equal(a, b)


def loss_inputs(batch: int = 2, pixels: int = 5) -> LossInputs:
    gen = torch.Generator().manual_seed(0)
    x, folded, ff = random_layer(SHAPE._replace(B=batch, L=pixels), torch.float32)
    weights = [torch.randn(20, 20, generator=gen) * 0.2, torch.randn(3, 20, generator=gen)]
    head = OutputHead(torch.ones(20), torch.zeros(20), weights, [torch.zeros(20), torch.zeros(3)])
    decoder = FoldedDecoder(x, [FoldedLayer(folded, ff)] * 2, head)
    return LossInputs(decoder, torch.rand(batch, pixels, 3, generator=gen), None, None, 1.0, 0.5)


@pytest.mark.parametrize("batch, pixels", [(0, 8), (2, 0)], ids=["no-images", "no-pixels"])
def test_an_empty_loss_is_zero(batch, pixels):
    inputs = loss_inputs(batch, pixels)
    need = list(inputs.tensors())
    got, want = decoder_loss(inputs, need), reference_decoder_loss(inputs, need)
    assert got.recon == want.recon == 0 and got.interaction == want.interaction == 0
    for name in need:
        assert got.grads[name].shape == want.grads[name].shape and not got.grads[name].any()


@cache
def every_gradient():
    inputs = loss_inputs()
    return decoder_loss(inputs, list(inputs.tensors())).grads


def names(part):
    """Those of a part of the decoder: "queries", "head", or a layer's "0 folded" or "1 ff"."""
    layer, _, record = part.partition(" ")
    if not record:
        return [name for name in loss_inputs().tensors() if name.startswith(part)]
    fields = {"folded": FoldedProjections, "ff": FeedForward}[record]._fields
    return [f"layers.{layer}.{name}" for name in fields]


@pytest.mark.parametrize(
    "wanted, launches",
    [
        (["head"], {}),  # the head alone: no layer is gone back through
        (["1 ff"], {"dx": 2, "feed_forward_dw": 1}),
        (["0 folded", "1 folded"], {"dx": 4, "folded_attention_dw": 2}),  # a frozen decoder: the slots alone
        (["queries"], {"dx": 4}),
        (["0 ff", "head"], {"dx": 4, "feed_forward_dw": 1}),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else "",
)
def test_what_needs_no_gradient_costs_none(wanted, launches):
    need = [name for part in wanted for name in names(part)]
    inputs = loss_inputs()
    got = decoder_loss(inputs, need).grads
    assert set(got) == set(need)
    for name, grad in got.items():
        assert torch.equal(grad, every_gradient()[name])
    meta = inputs.with_tensors({name: t.to("meta") for name, t in inputs.tensors().items()})
    meta = replace(meta, target=inputs.target.to("meta"))
    with launch.record("sm_90") as found:
        loss_module._run(meta, need, 1.0, loss_module.Tiling(4096, torch.float32))
    backwards = [item.name for item in found if not item.name.endswith("_fwd")]
    assert Counter("dx" if name.endswith("_dx") else name for name in backwards) == launches


class Names(TorchDispatchMode):
    """Names of the operations inside."""

    def __init__(self):
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.name().removeprefix("aten::").split(".")[0])
        return func(*args, **(kwargs or {}))


# What torch.use_deterministic_algorithms refuses on CUDA tensors, of its list: sums whose order is not fixed.
REFUSED = {"cumsum", "cumsum_", "scatter_add", "scatter_add_", "scatter_reduce", "index_add", "index_add_", "index_put",
           "index_put_", "put_", "bincount", "histc", "embedding_dense_backward"}  # fmt: skip


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_deterministic_algorithms_can_be_asked_for(deterministic):
    inputs = loss_inputs()
    with Names() as found:
        decoder_loss(inputs, list(inputs.tensors()))
    assert "native_layer_norm_backward" in found.seen and not found.seen & REFUSED
    w = torch.rand(2, 5, 4, dtype=torch.float64, requires_grad=True)
    with Names() as found:
        penalty = ops.interaction_penalty(w)
        penalty.backward()
    assert found.seen and not found.seen & REFUSED
    torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(penalty, ops.interaction_penalty(w))
    torch.testing.assert_close(w.grad, (w.sum(-1, keepdim=True) - w).detach() / 10)


def test_weights_of_another_dtype_than_the_rows():
    """Biases of a double-precision folding under 16-bit rows: added in fp32, and a gradient in each one's dtype."""
    x, folded, ff = random_layer(SHAPE, torch.float64)
    ff = FeedForward(*(t.float() for t in ff))
    got = {}
    for backend in ("triton", "reference"):
        cast = x.bfloat16() if backend == "triton" else x.bfloat16().double()
        weights = [leaf(t) for t in folded]
        plain = FoldedProjections(*weights)
        y, slot_map = ops.folded_cross_attention(cast, plain, backend=backend)
        got[backend] = [y, *torch.autograd.grad(y.double().square().mean() + slot_map.square().mean(), weights)]
    for a, r in zip(got["triton"], got["reference"], strict=True):
        torch.testing.assert_close(a.double(), r.double(), atol=0.02, rtol=0.02)
    y, _ = ops.folded_cross_attention(x.bfloat16(), FoldedProjections(*folded), backend="reference")
    assert y.dtype == torch.bfloat16  # the reference takes what the kernels take
    torch.testing.assert_close(y.double(), got["triton"][0].double(), atol=0.05, rtol=0.02)
    with launch.record("sm_90") as launches:
        gpu_backend.decoder_layer_fwd(x.bfloat16(), folded, FeedForward(*(t.double() for t in ff)))
    for item in launches:
        compile.source(item)  # every pointer is of a type that kernels take
        assert item.args["bias_ptr"].dtype == item.args["b2_ptr"].dtype == torch.float32


def test_autocast_reaches_the_kernels():
    """As it reaches the reference's products: fp32 rows, as a norm leaves them, must not run as IEEE fp32 on a GPU."""
    x, folded, ff = random_layer(SHAPE, torch.float32)
    q, k, v = random_qkv(SHAPE, torch.float32)
    seen = {}
    for backend in ("triton", "reference"):
        with torch.autocast("cpu", torch.bfloat16), Names() as found:
            out = ops.cross_attention(q, k, v, backend=backend)
            y = ops.folded_cross_attention(leaf(x), folded, backend)
            layer = ops.decoder_layer(leaf(x), folded, ff, backend)
        assert y[0].dtype == layer[0].dtype == x.dtype
        seen[backend] = (*out, *y, *layer)
        assert backend == "reference" or {"fastslots::cross_attention", "_to_copy"} <= found.seen
    for a, r in zip(seen["triton"], seen["reference"], strict=True):
        assert a.dtype == r.dtype
        torch.testing.assert_close(a, r, atol=0.1, rtol=0.05)
    wide = ops.folded_cross_attention(x, folded, "triton")
    assert not torch.equal(seen["triton"][2], wide[0])
