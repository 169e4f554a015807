"""The reference against the formulas written out, its gradients, and the PyTorch contract of every public op."""

from __future__ import annotations

import pytest
import torch

from fastslots import ops
from fastslots.nn import InteractionCrossAttention
from fastslots.ops import reference
from fastslots.testing import SHAPES, assert_close, random_layer, random_qkv

CASES = pytest.mark.parametrize("shape", [pytest.param(shape, id=name) for name, shape in SHAPES.items()])
SMALL = SHAPES["one-slot"]._replace(K=3)


def pair_sum(slot_map: torch.Tensor) -> torch.Tensor:
    """The double loop over slots."""
    total = torch.zeros(slot_map.shape[:2], dtype=slot_map.dtype)
    for k in range(slot_map.shape[-1]):
        for j in range(k):
            total += slot_map[..., j] * slot_map[..., k]
    return total


@CASES
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


@CASES
def test_penalty_is_the_double_loop(shape):
    slot_map = ops.cross_attention(*random_qkv(shape))[1]
    expected = pair_sum(slot_map).mean() if shape.B else torch.zeros((), dtype=torch.float64)
    torch.testing.assert_close(ops.interaction_penalty(slot_map), expected, rtol=1e-13, atol=0)


def test_penalty_does_not_cancel_near_one_hot():
    """Every form is right in float64; in fp32 ½[(Σw)² − Σw²] loses a pixel's penalty, the running sum does not."""
    g = torch.Generator().manual_seed(0)
    shared = 40 * torch.randn(1, 1, 4096, 7, dtype=torch.float64, generator=g)  # the heads agree on a slot
    scores = shared + torch.randn(1, 12, 4096, 7, dtype=torch.float64, generator=g)
    exact = pair_sum(scores.softmax(-1).sum(1))
    w = scores.float().softmax(-1).sum(1)
    difference = (w.sum(-1) ** 2 - (w**2).sum(-1)) / 2
    near = exact < 1e-3
    assert near.any()
    bound = 1e-6 * exact[near].mean()  # seen: 3.5e-9, and 3e-3 by the difference
    assert (ops.interaction_penalty(w[near][None]) - exact[near].mean()).abs() < bound
    assert (difference[near].mean() - exact[near].mean()).abs() > 100 * bound


def test_penalty_gradient_is_the_formula():
    w = torch.rand(2, 5, 4, dtype=torch.float64, requires_grad=True)
    ops.interaction_penalty(w).backward()
    torch.testing.assert_close(w.grad, (w.sum(-1, keepdim=True) - w).detach() / 10)


@CASES
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


# ---- the PyTorch contract --------------------------------------------------------------------------------------------


def _ops_on_small_inputs(backend: str = "auto"):
    """name -> function, tensors: each public op as a function of tensors alone."""
    q, k, v = random_qkv(SMALL)
    x, folded, ff = random_layer(SMALL)

    def layer(x, *weights):
        return ops.decoder_layer(x, ops.FoldedProjections(*weights[:4]), ops.FeedForward(*weights[4:]), backend)

    return {
        "cross_attention": (lambda q, k, v: ops.cross_attention(q, k, v, backend=backend), (q, k, v)),
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
def test_gradcheck_backward_forward_and_second_order(name):
    function, tensors = _ops_on_small_inputs("reference")[name]
    tensors = tuple(t.detach().requires_grad_() for t in tensors)
    assert torch.autograd.gradcheck(function, tensors, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


@CONTRACT
def test_jvp_is_not_silently_zero(name):
    function, tensors = _ops_on_small_inputs()[name]
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
def test_vmap_of_jacfwd_equals_jacrev(name):
    function, tensors = _ops_on_small_inputs()[name]
    first = lambda t: function(t, *tensors[1:])  # noqa: E731
    forward, reverse = torch.func.jacfwd(first)(tensors[0]), torch.func.jacrev(first)(tensors[0])
    for a, b in zip(as_tuple(forward), as_tuple(reverse), strict=True):
        assert_close(a, b, 1e-11)


@CONTRACT
def test_fullgraph_compile_forward_and_backward(name):
    function, tensors = _ops_on_small_inputs()[name]
    tensors = tuple(t.float().requires_grad_() for t in tensors)
    loss = lambda *t: sum(o.square().sum() for o in as_tuple(function(*t)))  # noqa: E731
    expected = torch.autograd.grad(loss(*tensors), tensors)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(*tensors), tensors), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_compiled_code_calls_the_kernel_that_eager_code_calls():
    q, k, v = random_qkv(SMALL, torch.float32)
    serves = ops.explain(q, k, v).backend
    calls = []

    def see(graph, example_inputs):
        calls.extend(node for node in graph.graph.nodes if "fastslots.cross_attention" in str(node.target))
        return graph.forward

    compiled = torch.compile(lambda *t: ops.cross_attention(*t)[0], fullgraph=True, backend=see)
    torch.testing.assert_close(compiled(q, k, v), ops.cross_attention(q, k, v)[0])
    assert [node.args[5] for node in calls] == ([] if serves == "reference" else [serves])


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


# ---- arguments -------------------------------------------------------------------------------------------------------

Q, K, V = random_qkv(SMALL, torch.float32)
X, FOLDED, FF = random_layer(SMALL, torch.float32)


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


def test_a_scale_with_a_gradient_is_refused_or_gets_it():
    scale = torch.tensor(0.3, requires_grad=True)
    with pytest.raises(ValueError, match="scale cannot have a gradient"):
        ops.cross_attention(Q, K, V, scale=scale)
    k, v = torch.randn(2, 1, 2, 3, 4)
    folded = ops.fold_projections(torch.randn(8, 6), torch.randn(8), k, v, torch.randn(6, 8), None, scale)
    folded.G.sum().backward()
    torch.testing.assert_close(scale.grad, folded.G.sum().detach() / 0.3)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize(("B", "L"), [(0, 9), (2, 0)], ids=["no image", "no pixel"])
def test_an_empty_batch_has_a_backward(backend, B, L):
    """Also from a gradient without strides, which is what a sum gives."""

    def leaf(*shape):
        return torch.randn(*shape, requires_grad=True)

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
        *ops.decoder_layer(x, folded, reference.FeedForward(*ff), backend=backend),
        ops.token_attention(rows[:, : L + 4], tokens, backend=backend),
        ops.interaction_penalty(torch.rand(B, L, 3)),
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
    tokens = torch.empty(2, 5, 8, device="meta")
    assert ops.token_attention(torch.empty(2, 3, 8, device="meta"), tokens).shape == (2, 3, 8)
