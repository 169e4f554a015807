"""What every op owes PyTorch: derivatives in all modes, compile, opcheck, autocast, the same bits, messages."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.library import opcheck
from values import cast, cpu_backend, values_and_gradients

from fastslots import ops
from fastslots.nn import InteractionCrossAttention
from fastslots.ops import reference
from fastslots.records import FeedForward, FoldedProjections
from fastslots.testing import (
    SHAPES,
    UNALIGNED,
    LossCase,
    Operations,
    assert_close,
    assert_within_units,
    loss_inputs,
    on,
    random_layer,
    random_qkv,
)

SMALL = SHAPES["one-slot"]._replace(K=3)
Q, K, V = random_qkv(SMALL, torch.float32)
X, FOLDED, FF = random_layer(SMALL, torch.float32)


# ---- derivatives in every mode ---------------------------------------------------------------------------------------


def _ops_on_small_inputs(backend: str = "auto", device: torch.device | str = "cpu"):
    """name -> function, tensors: each public op as a function of tensors alone."""
    q, k, v = on(device, random_qkv(SMALL))
    x, folded, ff = on(device, random_layer(SMALL))

    def layer(x, *weights):
        return ops.decoder_layer(x, ops.FoldedProjections(*weights[:4]), ops.FeedForward(*weights[4:]), backend)

    def statistics(q, k, v):
        both = ("entropy", "lse")
        out, slot_map, rows = ops.cross_attention(
            q, k, v, backend=backend, head_weights=q.new_tensor([0.5, -2.0, 1.0]), statistics=both
        )
        return out, slot_map, *rows.values()

    def iteration(q, k):  # the pixels as tokens
        return ops.slot_attention(k, q, 2 * q + 1, eps=1e-2, backend=backend, return_map=True)

    return {
        "cross_attention": (lambda q, k, v: ops.cross_attention(q, k, v, backend=backend), (q, k, v)),
        "attention_statistics": (statistics, (q, k, v)),
        "slot_attention": (iteration, (q, k)),
        "folded_cross_attention": (
            lambda x, *f: ops.folded_cross_attention(x, ops.FoldedProjections(*f), backend),
            (x, *folded),
        ),
        "decoder_layer": (layer, (x, *folded, *ff)),
        "interaction_penalty": (ops.interaction_penalty, (reference.cross_attention(q, k, v, 0.5)[1],)),
    }


def as_tuple(value):
    return value if isinstance(value, tuple) else (value,)


CONTRACT = pytest.mark.parametrize("name", list(_ops_on_small_inputs()))


@CONTRACT
def test_gradcheck_backward_forward_and_second_order(name, device):
    function, tensors = _ops_on_small_inputs("reference", device)[name]
    tensors = tuple(t.detach().requires_grad_() for t in tensors)
    assert torch.autograd.gradcheck(function, tensors, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


@CONTRACT
def test_jvp_is_not_silently_zero(name, device):
    function, tensors = _ops_on_small_inputs(device=device)[name]
    tensors = tuple(t.float() for t in tensors)  # fp32: where a kernel would serve
    tangents = tuple(torch.randn_like(t) for t in tensors)
    _, tangent = torch.func.jvp(function, tensors, tangents)
    step = 1e-3
    moved = function(*(t.double() + step * dt.double() for t, dt in zip(tensors, tangents, strict=True)))
    back = function(*(t.double() - step * dt.double() for t, dt in zip(tensors, tangents, strict=True)))
    for t, a, b in zip(as_tuple(tangent), as_tuple(moved), as_tuple(back), strict=True):
        assert t.any()
        assert_close(t, (a - b) / (2 * step), 2e-3, "tangent")


@CONTRACT
def test_vmap_of_jacfwd_equals_jacrev(name, device):
    function, tensors = _ops_on_small_inputs(device=device)[name]
    first = lambda t: function(t, *tensors[1:])  # noqa: E731
    forward, reverse = torch.func.jacfwd(first)(tensors[0]), torch.func.jacrev(first)(tensors[0])
    for a, b in zip(as_tuple(forward), as_tuple(reverse), strict=True):
        assert_close(a, b, 1e-11)


def test_gradients_of_the_double_build_are_the_slopes_of_its_values():
    shape = SHAPES["one-slot"]._replace(L=3, K=2)
    q, k, v = cast(random_qkv(shape), torch.float64)
    assert torch.autograd.gradcheck(lambda *a: ops.cross_attention(*a, backend="cpu"), (q, k, v), fast_mode=True)
    x, folded, ff = random_layer(shape)
    weights = cast([x, *folded, *ff], torch.float64)

    def layer(x, *w):
        return ops.decoder_layer(x, FoldedProjections(*w[:4]), FeedForward(*w[4:]), "cpu")

    assert torch.autograd.gradcheck(layer, weights, fast_mode=True)


def test_opcheck_and_transforms():
    shape = SHAPES["one-slot"]._replace(K=3)
    q, k, v = cast(random_qkv(shape), torch.float32)
    torch.library.opcheck(torch.ops.fastslots.cross_attention.default, (q, k, v, 0.5, None, "cpu"))
    x, folded, ff = random_layer(shape, torch.float32)
    weights = [t.requires_grad_() for t in (x, *folded)]
    torch.library.opcheck(torch.ops.fastslots.folded_cross_attention.default, (weights[0], weights[1:], None, "cpu"))
    arguments = (x, list(folded), list(ff), None, 1e-5, "cpu")
    torch.library.opcheck(torch.ops.fastslots.decoder_layer.default, arguments)
    # Forward mode goes to the reference, which has a rule; naming the kernels outright is refused, not silently zero.
    _, tangent = torch.func.jvp(lambda q: ops.cross_attention(q, k, v)[0], (q,), (torch.ones_like(q),))
    assert tangent.abs().max() > 0
    with pytest.raises(ValueError, match="no rule for forward-mode"):
        torch.func.jvp(lambda q: ops.cross_attention(q, k, v, backend="cpu")[0], (q,), (torch.ones_like(q),))


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize(("B", "L"), [(0, 9), (2, 0)], ids=["no image", "no pixel"])
def test_an_empty_batch_has_a_backward(backend, B, L, device):
    """Also from a gradient without strides, which is what a sum gives."""

    def leaf(*shape):
        return torch.randn(*shape, device=device, requires_grad=True)

    q, k, v = leaf(B, 2, L, 4), leaf(B, 2, 3, 4), leaf(B, 2, 3, 4)
    x, wq, wo, ff = (
        leaf(B, L, 8),
        leaf(8, 8),
        leaf(8, 8),
        [leaf(8), leaf(8), leaf(16, 8), leaf(16), leaf(8, 16), leaf(8)],
    )
    folded = ops.fold_projections(wq, None, k, v, wo, None)
    rows, tokens = leaf(B, 4, 8), leaf(B, 5, 8)
    outputs = [
        *ops.cross_attention(q, k, v, backend=backend),
        *ops.folded_cross_attention(x, folded, backend=backend),
        *ops.decoder_layer(x, folded, FeedForward(*ff), backend=backend),
        ops.token_attention(rows[:, : L + 4], tokens, backend=backend),
        ops.interaction_penalty(torch.rand(B, L, 3, device=device)),
    ]
    sum(output.sum() for output in outputs).backward()
    for tensor in (q, x, wq, wo, *ff):
        assert tensor.grad.shape == tensor.shape and not tensor.grad.any()
    if not B:
        assert rows.grad.shape == rows.shape and tokens.grad.shape == tokens.shape


@pytest.mark.parametrize("grad", [True, False])
def test_tensors_without_storage(grad):
    """On the meta device, as builders of models and counters of operations use it."""
    module = InteractionCrossAttention(8, 6, 2).to("meta")
    x, slots = torch.empty(2, 9, 8, device="meta", requires_grad=grad), torch.empty(2, 3, 6, device="meta")
    y, slot_map = module(x, slots)
    assert y.shape == (2, 9, 8) and slot_map.shape == (2, 9, 3) and y.is_meta
    if grad:
        (y.sum() + ops.interaction_penalty(slot_map)).backward()
        assert x.grad.shape == x.shape
    q = torch.empty(2, 2, 9, 4, device="meta")
    assert ops.cross_attention(q, q, q)[1].shape == (2, 9, 9)
    rows = ops.cross_attention(q, q, q, statistics=("entropy", "lse"))[2]
    assert rows["entropy"].shape == rows["lse"].shape == (2, 2, 9) and rows["lse"].is_meta
    updates, slot_map = ops.slot_attention(q[:, :, :3], q, q, return_map=True)
    assert updates.shape == (2, 2, 3, 4) and slot_map.shape == (2, 9, 3) and updates.is_meta
    tokens = torch.empty(2, 5, 8, device="meta")
    assert ops.token_attention(torch.empty(2, 3, 8, device="meta"), tokens).shape == (2, 3, 8)


# ---- compile ---------------------------------------------------------------------------------------------------------


@CONTRACT
def test_fullgraph_compile_forward_and_backward(name, device):
    function, tensors = _ops_on_small_inputs(device=device)[name]
    tensors = tuple(t.float().requires_grad_() for t in tensors)
    loss = lambda *t: sum(o.square().sum() for o in as_tuple(function(*t)))  # noqa: E731
    expected = torch.autograd.grad(loss(*tensors), tensors)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(*tensors), tensors), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class AsModule(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *tensors):
        return self.function(*tensors)


@CONTRACT
def test_export_keeps_the_operator(name, device):
    function, tensors = _ops_on_small_inputs(device=device)[name]
    tensors = tuple(t.float() for t in tensors)
    program = torch.export.export(AsModule(function), tensors, strict=False)
    called = {str(node.target) for node in program.graph.nodes if "fastslots" in str(node.target)}
    kernel = name != "interaction_penalty" and ops.explain(*tensors, op=name).backend != "reference"
    assert called == ({f"fastslots.{name}.default"} if kernel else set())
    for a, b in zip(as_tuple(program.module()(*tensors)), as_tuple(function(*tensors)), strict=True):
        assert torch.equal(a, b)


@CONTRACT
def test_autocast_has_the_types_and_errors_of_the_reference(name, device):
    results = {}
    for backend in ("auto", "reference"):
        function, tensors = _ops_on_small_inputs(backend, device)[name]
        with torch.autocast(device.type, torch.bfloat16):
            results[backend] = as_tuple(function(*(t.float() for t in tensors)))
    exact = as_tuple(function(*tensors))
    for ours, theirs, want in zip(results["auto"], results["reference"], exact, strict=True):
        assert ours.dtype == theirs.dtype
        assert_close(ours, want, 0.1)


def test_autocast_gives_attention_its_type_as_torch_does_and_rows_theirs():
    narrow = torch.bfloat16
    with torch.autocast("cpu", narrow):
        assert torch.nn.functional.scaled_dot_product_attention(Q, K, V).dtype == narrow
        out, slot_map, rows = ops.cross_attention(Q, K, V, statistics=("entropy",))
        updates, owners = ops.slot_attention(K, Q, Q, return_map=True)
        gathered = ops.token_attention(X[:, :3], X)
        layers = ops.folded_cross_attention(X, FOLDED), ops.decoder_layer(X, FOLDED, FF)
    assert out.dtype == updates.dtype == gathered.dtype == narrow
    assert {t.dtype for t in (slot_map, owners, rows["entropy"])} == {torch.float32}
    assert {t.dtype for pair in layers for t in pair} == {torch.float32}
    for op in (ops.cross_attention, ops.slot_attention, ops.token_attention):
        assert "under autocast" in op.__doc__


def test_compiled_code_calls_the_kernel_that_eager_code_calls(device):
    q, k, v = on(device, random_qkv(SMALL, torch.float32))
    serves = ops.explain(q, k, v).backend
    calls = []

    def see(graph, example_inputs):
        calls.extend(node for node in graph.graph.nodes if "fastslots.cross_attention" in str(node.target))
        return graph.forward

    compiled = torch.compile(lambda *t: ops.cross_attention(*t)[0], fullgraph=True, backend=see)
    torch.testing.assert_close(compiled(q, k, v), ops.cross_attention(q, k, v)[0])
    assert [node.args[5] for node in calls] == ([] if serves == "reference" else [serves])


def test_fullgraph_compile_gives_the_bits_of_eager(device):
    x, folded, ff = on(device, random_layer(UNALIGNED, torch.float32))
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
def test_compiled_code_calls_the_kernel(dynamic, device):
    """Not the reference, which Dynamo would trace as well, and which makes a tensor of all heads over all pixels."""
    targets = []

    def see(graph, example_inputs):
        targets.append([str(node.target) for node in graph.graph.nodes if "fastslots" in str(node.target)])
        return graph.forward

    compiled = torch.compile(
        lambda q, k, v: ops.cross_attention(q, k, v, backend="triton")[0], fullgraph=True, backend=see, dynamic=dynamic
    )
    for pixels in (5, 6):
        q, k, v = on(device, random_qkv(UNALIGNED._replace(L=pixels), torch.float32))
        assert torch.equal(compiled(q, k, v), ops.cross_attention(q, k, v, backend="triton")[0])
    assert targets and all(found == ["fastslots.cross_attention.default"] for found in targets)


# ---- operators -------------------------------------------------------------------------------------------------------


def leaf(t):
    return t.detach().clone().requires_grad_()


def operators(backend: str, device: torch.device) -> dict[str, tuple]:
    """Arguments of every registered operator, forward and backward."""
    x, folded, ff = on(device, random_layer(UNALIGNED, torch.float32))
    q, k, v = on(device, random_qkv(UNALIGNED, torch.float32))
    B, _, L, K, _, D, _ = UNALIGNED
    dy, dmap, rows, tokens = (torch.randn(*s, device=device) for s in ((B, L, D), (B, L, K), (2, 6, 20), (2, 9, 20)))
    gathered, lse = torch.ops.fastslots.token_attention(rows, tokens, backend)
    layer = [leaf(t) for t in folded], [leaf(t) for t in ff]
    return {
        "cross_attention": (leaf(q), leaf(k), leaf(v), 0.5, None, backend),
        "cross_attention_backward": (torch.randn_like(q), dmap, q, k, v, 0.5, None, backend),
        "folded_cross_attention": (leaf(x), layer[0], None, backend),
        "folded_cross_attention_backward": (dy, dmap, x, list(folded), None, backend),
        "decoder_layer": (leaf(x), *layer, None, 1e-5, backend),
        "decoder_layer_backward": (dy, dmap, x, list(folded), list(ff), None, 1e-5, backend),
        "token_attention": (leaf(rows), leaf(tokens), backend),
        "token_attention_backward": (torch.randn_like(rows), rows, tokens, gathered, lse, backend),
    }


KERNELS = ["cross_attention", "folded_cross_attention", "decoder_layer", "token_attention"]


@pytest.mark.parametrize("name", KERNELS)
def test_opcheck(name, kernels, device):
    """Schema, autograd, and shapes and strides as announced: compiled code reads results by the announced strides."""
    arguments = operators(kernels, device)
    opcheck(getattr(torch.ops.fastslots, name).default, arguments[name])
    backward = f"{name}_backward"
    checks = ("test_schema", "test_faketensor")
    opcheck(getattr(torch.ops.fastslots, backward).default, arguments[backward], test_utils=checks)


@pytest.mark.parametrize("name", KERNELS)
def test_two_runs_are_bit_equal(name, kernels, device):
    arguments = operators(kernels, device)
    for suffix in ("", "_backward"):
        run = getattr(torch.ops.fastslots, name + suffix)
        for a, b in zip(run(*arguments[name + suffix]), run(*arguments[name + suffix]), strict=True):
            assert torch.equal(a, b)


# ---- element types ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_tensors_are_rounded_once(dtype):
    shape = SHAPES["sprites-mini"]
    unit = torch.finfo(dtype).eps

    def attention(q, k, v, backend="cpu"):
        return ops.cross_attention(q, k, v, backend=backend)

    def layer(x, *w, backend="cpu"):
        return ops.decoder_layer(x, FoldedProjections(*w[:4]), FeedForward(*w[4:]), backend)

    x, folded, ff = random_layer(shape)
    for call, inputs in ((attention, random_qkv(shape)), (layer, [x, *folded, *ff])):
        narrow = cast(inputs, dtype)
        found = values_and_gradients(call, narrow)
        wide = cast([t.detach() for t in narrow], torch.float64)
        expected = values_and_gradients(partial(call, backend="reference"), wide)  # the same cotangents, not rounded
        for a, b in zip(found, expected, strict=True):
            assert_close(a, b, 8 * unit)
        assert found[0].dtype == dtype and found[1].dtype == torch.float32
        assert all(a.dtype == dtype for a in found[2:])


def test_autocast_reaches_the_kernels(device):
    """As it reaches the reference's products: fp32 rows, as a norm leaves them, must not run as IEEE fp32 on a GPU."""
    x, folded, ff = on(device, random_layer(UNALIGNED, torch.float32))
    q, k, v = on(device, random_qkv(UNALIGNED, torch.float32))
    seen = {}
    for backend in ("triton", "reference"):
        with torch.autocast(device.type, torch.bfloat16), Operations() as found:
            out = ops.cross_attention(q, k, v, backend=backend)
            y = ops.folded_cross_attention(leaf(x), folded, backend)
            layer = ops.decoder_layer(leaf(x), folded, ff, backend)
        assert y[0].dtype == layer[0].dtype == x.dtype
        seen[backend] = (*out, *y, *layer)
        assert backend == "reference" or {"fastslots::cross_attention", "_to_copy"} <= found.names
    assert [a.dtype for a in seen["triton"]] == [r.dtype for r in seen["reference"]]
    wide = on(device, (random_qkv(UNALIGNED), random_layer(UNALIGNED)))
    exact = [*ops.cross_attention(*wide[0]), *ops.folded_cross_attention(*wide[1][:2]), *ops.decoder_layer(*wide[1])]
    assert_within_units(seen["triton"], exact, torch.bfloat16)
    wide = ops.folded_cross_attention(x, folded, "triton")
    assert not torch.equal(seen["triton"][2], wide[0])


# ---- arguments and who serves ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: ops.cross_attention(Q[0], K, V), ValueError, r"q must be \[B, H, L, d\], got shape \[3, 9, 4\]"),
        (lambda: ops.cross_attention(Q, K[..., :2], V), ValueError, r"k has shape .* expected"),
        (lambda: ops.cross_attention(Q, K, V[:, :, :1]), ValueError, r"v has shape"),
        (lambda: ops.cross_attention(Q, K.double(), V), TypeError, r"k is torch.float64, but q is torch.float32"),
        (lambda: ops.cross_attention(Q.long(), K, V), TypeError, r"q must be fp16.*int64"),
        (lambda: ops.cross_attention([1], K, V), TypeError, r"q must be a torch.Tensor"),
        (lambda: ops.cross_attention(Q, K[:, :, :0], V[:, :, :0]), ValueError, "at least one head, slot"),
        (lambda: ops.cross_attention(Q, K, V, slot_mask=torch.ones(2, 3)), TypeError, "slot_mask must be a bool"),
        (lambda: ops.cross_attention(Q, K, V, slot_mask=torch.ones(2, 9).bool()), ValueError, "slot_mask has shape"),
        (lambda: ops.cross_attention(Q, K, V, backend="cuda"), ValueError, "backend must be one of auto"),
        (lambda: ops.interaction_penalty(Q), ValueError, r"slot_map must be \[B, L, K\]"),
        (
            lambda: ops.folded_cross_attention(X[..., :3], FOLDED),
            ValueError,
            r"x has shape .* expected \[2 or 1, L, 12\]",
        ),
        (lambda: ops.folded_cross_attention(X, tuple(FOLDED)), TypeError, "folded must be what fold_projections"),
        (lambda: ops.decoder_layer(X, FOLDED, FF._replace(w2=FF.w1)), ValueError, r"ff.w2 has shape"),
        (
            lambda: ops.decoder_layer(X, FOLDED, FF._replace(w1=FF.w1[:0], b1=FF.b1[:0], w2=FF.w2[:, :0])),
            ValueError,
            "at least one unit",
        ),
        (lambda: ops.decoder_layer(X, FOLDED, FF._replace(b2=FF.b2[:1])), ValueError, r"ff.b2 has shape \[1\]"),
        (lambda: ops.decoder_layer(X, FOLDED, FF._replace(b1=FF.b1.to("meta"))), ValueError, "ff.b1 is on meta"),
        (lambda: ops.decoder_layer(X, FOLDED, FF, eps=0.0), ValueError, "eps must be above 0"),
        (
            lambda: ops.cross_attention(Q, K, V, slot_mask=torch.ones(2, 3, device="meta") > 0),
            ValueError,
            "slot_mask is on meta",
        ),
        (
            lambda: ops.fold_projections(torch.ones(3, 3), None, K, V, torch.ones(3, 3), None, 1.0),
            ValueError,
            r"wq has shape \[3, 3\], expected \[12, 3\]",
        ),
    ],
)
def test_bad_arguments_are_named(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_explain_names_the_backend_and_why_not_another():
    with torch.autocast("cpu", torch.bfloat16):  # which the C++ kernels leave to the reference
        explanation = ops.explain(Q, K, V)
    assert explanation.backend == "reference" and "cpu" in explanation.reasons
    assert "reference" in str(explanation) and "not cpu" in str(explanation)
    assert ops.explain(Q, K, V, backend="reference").backend == "reference"
    with pytest.raises(ValueError, match="op must be one of"):
        ops.explain(op="softmax")
    with pytest.raises(ValueError, match=r"backend='cpu' cannot serve cross_attention"):
        ops.explain(Q.to("meta"), K.to("meta"), V.to("meta"), backend="cpu")


def test_explain_says_what_a_transform_takes():
    said = []

    def f(q):
        said.append(ops.explain(q, K, V))
        return ops.cross_attention(q, K, V)[0]

    torch.func.jvp(f, (Q,), (Q,))
    assert said[0].backend == "reference" and "forward-mode" in said[0].reasons["cpu"]
    with pytest.raises(ValueError, match="cannot serve cross_attention: kernels have no rule"):
        torch.func.jvp(lambda q: ops.cross_attention(q, K, V, backend="cpu")[0], (Q,), (Q,))


def test_explain_gives_a_reason_for_each_backend_that_does_not_serve():
    explanation = ops.explain(Q, K, V)
    others = {"reference", "cpu", "triton"} - {explanation.backend}
    assert set(explanation.reasons) == others and all(explanation.reasons.values())
    wq, wo = torch.randn(8, 6), torch.randn(6, 8)
    folded = ops.fold_projections(wq, None, torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4), wo, None)
    as_called = ops.explain(torch.randn(1, 5, 6), folded, op="folded_cross_attention")
    assert as_called.backend == ops.explain(torch.randn(1, 5, 6), *folded, op="folded_cross_attention").backend
    for wrong in ((), ("cross_attention", Q), (3,)):
        with pytest.raises(TypeError, match="explain takes a call's tensors"):
            ops.explain(*wrong)


def test_explain_takes_what_decoder_loss_takes():
    """A LossInputs and a FoldedDecoder were a TypeError."""
    for layers in (2, 17):  # more than the C++ kernels' longest chain
        inputs = loss_inputs(SHAPES["one-pixel"], LossCase(dtype=torch.float32, layers=layers))
        for argument in (inputs, inputs.decoder):
            said = ops.explain(argument, op="decoder_loss")
            assert said.op == "decoder_loss" and said.backend == ("cpu" if layers == 2 else "reference")
            assert layers == 2 or "17 layers" in said.reasons["cpu"]
            assert ops.explain(argument, op="decoder_loss", backend="reference").backend == "reference"
            with pytest.raises(TypeError, match="explain takes a call's tensors"):
                ops.explain(argument, op="decoder_layer")


def test_what_the_kernels_refuse_is_said():
    q, k, v = random_qkv(SHAPES["one-slot"], torch.float32)
    assert ops.explain(q, k, v).backend == "cpu"
    assert "float32, float64" in ops.explain(q, k.double(), v).reasons["cpu"]
    many = torch.randn(1, 2, 129, 4)
    assert "129 slots" in ops.explain(q, many, many).reasons["cpu"]
    with pytest.raises(ValueError, match="on meta, not on the CPU"):
        ops.explain(q.to("meta"), k, v, backend="cpu")
    with pytest.raises(ValueError, match="'neon9' is not one that this processor serves"):
        cpu_backend.set_isa("neon9")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "autocast" in ops.explain(q, k, v).reasons["cpu"]
