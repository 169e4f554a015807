"""Cross-attention with weights of the heads, entropy and log-sum-exp: reference and C++ on every instruction set.

Triton has a file of its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastslots.ops import cross_attention, explain

SHAPES = {  # B, H, L, K, d: those of diffusion models' text attention among them
    "decoder": (2, 3, 130, 7, 43),
    "one pixel": (1, 2, 1, 5, 16),
    "one slot": (2, 1, 40, 1, 16),
    "text": (1, 5, 96, 77, 64),
    "wide heads": (1, 2, 64, 77, 160),
    "most": (1, 1, 33, 128, 40),
}
UNITS = 25
"""Roundoffs of fp32, relative to the largest element: the worst seen is 8.5 (Zen 5, all instruction sets)."""


@pytest.fixture
def backend(host_backend):
    return host_backend


def inputs(name: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k, v and the heads' weights. q in the layout [B, L, H, d], as a view."""
    B, H, L, K, d = SHAPES[name]
    generator = torch.Generator().manual_seed(0)
    sizes = ((B, L, H, d), (B, H, K, d), (B, H, K, d), (H,))
    q, k, v, weights = (torch.randn(size, dtype=torch.float64, generator=generator).to(dtype) for size in sizes)
    return [t.requires_grad_() for t in (q.transpose(1, 2), k, v, weights)]


def mask_of(k: Tensor) -> Tensor:
    keep = torch.rand(k.shape[0], k.shape[2], generator=torch.Generator().manual_seed(1)) > 0.3
    keep[:, 0] = True
    return keep


def results(tensors: list[Tensor], backend: str, mask: Tensor | None) -> dict[str, Tensor]:
    """Each result, and the gradients of a sum that weighs every element of all of them differently."""
    q, k, v, weights = tensors
    out, slot_map, rows = cross_attention(
        q, k, v, backend=backend, slot_mask=mask, head_weights=weights, statistics=("lse", "entropy")
    )
    assert list(rows) == ["lse", "entropy"]
    loss = torch.zeros((), dtype=slot_map.dtype)
    for i, part in enumerate((out, slot_map.square(), rows["lse"], rows["entropy"])):
        flat = part.to(slot_map.dtype).flatten()
        loss = loss + flat @ torch.linspace(-1, 1 + i, len(flat), dtype=slot_map.dtype)
    grads = torch.autograd.grad(loss, tensors)
    named = zip(("dq", "dk", "dv", "dweights"), grads, strict=True)
    return {"out": out, "slot_map": slot_map, **rows, **dict(named)}


def close(got: Tensor, expected: Tensor, units: float) -> bool:
    scale = expected.abs().max().clamp_min(1e-3)
    return bool((got.double() - expected).abs().max() <= units * torch.finfo(got.dtype).eps * scale)


@pytest.mark.parametrize("masked", [False, True], ids=["all slots", "masked"])
@pytest.mark.parametrize("name", SHAPES)
def test_values_and_gradients_agree_with_float64(backend, name, masked):
    tensors = inputs(name)
    mask = mask_of(tensors[1]) if masked else None
    expected = results([t.detach().double().requires_grad_() for t in tensors], "reference", mask)
    for what, got in results(tensors, backend, mask).items():
        assert got.dtype == torch.float32 and close(got, expected[what], UNITS), what


def test_the_reference_is_the_definition():
    q, k, v, weights = inputs("decoder", torch.float64)
    out, slot_map, rows = cross_attention(
        q, k, v, 0.3, "reference", head_weights=weights, statistics=("entropy", "lse")
    )
    scores = 0.3 * torch.einsum("bhld,bhkd->bhlk", q, k)
    attn = scores.exp() / scores.exp().sum(-1, keepdim=True)
    assert torch.allclose(rows["lse"], scores.exp().sum(-1).log(), rtol=1e-12)
    assert torch.allclose(rows["entropy"], -(attn * attn.log()).sum(-1), rtol=1e-12)
    assert torch.allclose(slot_map, (weights[None, :, None, None] * attn).sum(1), rtol=1e-12)
    assert torch.allclose(out, attn @ v, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_lose_only_the_rounding_of_what_they_store(dtype):
    tensors = inputs("decoder", dtype)
    expected = results([t.detach().double().requires_grad_() for t in tensors], "reference", None)
    for what, got in results(tensors, "cpu", None).items():
        assert close(got.to(dtype), expected[what], 4), what


def test_weights_of_ones_and_no_statistics_are_the_plain_op(backend):
    q, k, v, _ = inputs("decoder")
    plain = cross_attention(q, k, v, backend=backend)
    weighted = cross_attention(q, k, v, backend=backend, head_weights=torch.ones(3))
    assert len(weighted) == 2 and all(torch.allclose(a, b, atol=1e-6) for a, b in zip(plain, weighted, strict=True))
    chosen = cross_attention(q, k, v, backend=backend, head_weights=torch.tensor([0.0, 1.0, 0.0]))[1]
    assert torch.allclose(chosen, cross_attention(q[:, 1:2], k[:, 1:2], v[:, 1:2], backend=backend)[1], atol=1e-6)


def test_a_row_whose_slots_are_all_masked_has_zeros_and_no_gradient(backend):
    tensors = inputs("decoder")
    mask = mask_of(tensors[1])
    mask[1] = False
    found = results(tensors, backend, mask)
    for what, value in found.items():
        assert torch.isfinite(value).all(), what
        if what != "dweights":
            assert not value[1].any() and value[0].any(), what


def test_entropy_of_one_hot_and_even_rows(backend):
    q = torch.zeros(1, 1, 2, 4)
    q[0, 0, 1, 0] = 200
    k = torch.eye(4)[None, None]
    rows = cross_attention(q, k, k, scale=1.0, backend=backend, statistics=("entropy",))[2]
    assert torch.allclose(rows["entropy"][0, 0], torch.tensor([4.0, 1.0]).log(), atol=1e-6)


def test_operator_keeps_torchs_contract():
    q, k, v, weights = inputs("decoder", torch.float64)
    mask = mask_of(k)
    for rows in (False, True):
        arguments = (q, k, v, mask, weights, 0.5, rows, "cpu")
        torch.library.opcheck(torch.ops.fastslots.attention_statistics, arguments)
    small = [t.detach()[:1, :2, :3, :4].clone().requires_grad_() for t in (q, k, v)]
    heads = torch.tensor([0.5, -2.0], dtype=torch.float64, requires_grad=True)

    def both(backend: str):
        def run(q, k, v, w):
            out, slot_map, rows = cross_attention(
                q, k, v, backend=backend, head_weights=w, statistics=("entropy", "lse")
            )
            return out, slot_map, *rows.values()

        return run

    torch.autograd.gradcheck(both("cpu"), [*small, heads])
    torch.autograd.gradcheck(both("reference"), [*small, heads], check_forward_ad=True)
    tangent = torch.func.jvp(lambda q: both("auto")(q, k, v, weights)[2], (q,), (torch.ones_like(q),))[1]
    assert tangent.abs().max() > 0, "a forward derivative that is silently zero"


def test_compiles_whole():
    q, k, v, weights = inputs("decoder")

    def total(q: Tensor, k: Tensor, v: Tensor, weights: Tensor) -> Tensor:
        _, slot_map, rows = cross_attention(q, k, v, head_weights=weights, statistics=("entropy",))
        return slot_map.square().sum() + rows["entropy"].sum()

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(q, k, v, weights), (q, weights))
    want = torch.autograd.grad(total(q, k, v, weights), (q, weights))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("threads", [2, 3])
def test_bits_do_not_depend_on_the_number_of_threads(threads):
    tensors = inputs("text")
    torch.set_num_threads(1)
    one = results(tensors, "cpu", None)
    torch.set_num_threads(threads)
    many = results(tensors, "cpu", None)
    assert all(torch.equal(one[what], many[what]) for what in one)


def test_no_pixels_and_no_images_have_a_backward(backend):
    for B, L in ((0, 5), (2, 0)):
        q, k, v = (torch.ones(B, 2, n, 4, requires_grad=True) for n in (L, 3, 3))
        out, slot_map, rows = cross_attention(q, k, v, backend=backend, statistics=("lse",))
        (out.sum() + slot_map.sum() + rows["lse"].sum()).backward()
        assert torch.equal(k.grad, torch.zeros_like(k))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"head_weights": torch.ones(4)}, "head_weights has shape"),
        ({"head_weights": [1.0]}, "head_weights must be a torch.Tensor"),
        ({"statistics": ("variance",)}, "statistics must be"),
        ({"statistics": "lse"}, "statistics must be"),
    ],
)
def test_bad_arguments_are_named(options, says):
    q, k, v, _ = inputs("decoder")
    with pytest.raises((TypeError, ValueError), match=says):
        cross_attention(q, k, v, **options)


def test_explain_names_the_limit():
    q, k = torch.empty(1, 1, 4, 8), torch.empty(1, 1, 129, 8)
    said = explain(q, k, k)
    assert said.backend == "reference" and "129 slots are more than 128" in said.reasons["cpu"]
    assert explain(*inputs("most")[:3]).backend == "cpu"
