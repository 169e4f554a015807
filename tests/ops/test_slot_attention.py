"""One iteration of slot attention: reference, C++ on every instruction set, its module, and torch's contract."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastslots.nn import SlotAttention
from fastslots.ops import explain, slot_attention

SHAPES = {  # B, H, K, L, d
    "minis": (3, 1, 7, 257, 64),
    "heads": (2, 4, 5, 33, 17),
    "one token": (2, 1, 3, 1, 8),
    "one slot": (1, 2, 1, 40, 16),
    "many slots": (1, 1, 32, 100, 43),
    "long": (1, 1, 11, 5000, 64),
}
UNITS = 40
"""Roundoffs of fp32, relative to the largest element: the worst seen is 13.5 for the reference, 6.9 for C++ (Zen 5)."""
UNITS_OF = {"one token": 1000}
"""A lone token's update is the token itself, so both terms of its attention's gradient cancel: what is left is small
beside their roundoff (244 seen)."""


@pytest.fixture
def backend(host_backend):
    return host_backend


def inputs(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    B, H, K, L, d = SHAPES[name]
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(B, H, n, d, dtype=torch.float64, generator=generator) for n in (K, L, L)]
    return [t.to(dtype).requires_grad_() for t in made]


def mask_of(q: Tensor) -> Tensor:
    keep = torch.rand(q.shape[0], q.shape[2], generator=torch.Generator().manual_seed(1)) > 0.4
    keep[:, 0] = True
    return keep


def results(tensors: list[Tensor], backend: str, mask: Tensor | None, eps: float = 1e-3) -> list[Tensor]:
    """Updates, map, and the gradients of a sum that weighs every element of both differently."""
    updates, slot_map = slot_attention(*tensors, eps=eps, backend=backend, slot_mask=mask, return_map=True)
    wide = torch.promote_types(updates.dtype, torch.float32)
    u, w = updates.to(wide).flatten(), slot_map.flatten()
    loss = u @ torch.linspace(0.5, 2, len(u), dtype=wide) + w.square() @ torch.linspace(0, 1, len(w), dtype=w.dtype)
    return [updates, slot_map, *torch.autograd.grad(loss, tensors)]


def plainly(q: Tensor, k: Tensor, v: Tensor, scale: float, eps: float) -> Tensor:
    """The published algorithm, in loops over heads and slots."""
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            scores = scale * k[b, h] @ q[b, h].T
            weights = torch.exp(scores) / torch.exp(scores).sum(1, keepdim=True) + eps
            for slot in range(q.shape[2]):
                out[b, h, slot] = (weights[:, slot, None] * v[b, h]).sum(0) / weights[:, slot].sum()
    return out


def close(got: Tensor, expected: Tensor, units: float) -> bool:
    scale = expected.abs().max().clamp_min(1e-30)
    unit = torch.finfo(got.dtype).eps
    return bool(((got.double() - expected).abs().max() / scale) <= units * unit)


@pytest.mark.parametrize("masked", [False, True], ids=["all slots", "masked"])
@pytest.mark.parametrize("name", SHAPES)
def test_values_and_gradients_agree_with_float64(backend, name, masked):
    tensors = inputs(name)
    mask = mask_of(tensors[0]) if masked else None
    expected = results([t.detach().double().requires_grad_() for t in tensors], "reference", mask)
    for got, want in zip(results(tensors, backend, mask), expected, strict=True):
        assert got.dtype == torch.float32 and close(got, want, UNITS_OF.get(name, UNITS))


def test_the_reference_is_the_published_algorithm():
    q, k, v = inputs("heads", torch.float64)
    assert torch.allclose(slot_attention(q, k, v, scale=0.3, eps=0.01), plainly(q, k, v, 0.3, 0.01), rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_lose_only_the_rounding_of_what_they_store(backend, dtype):
    tensors = inputs("minis", dtype)
    expected = results([t.detach().double().requires_grad_() for t in tensors], "reference", None)
    ours = results(tensors, backend, None)
    assert ours[0].dtype == dtype and ours[1].dtype == torch.float32
    for got, want in zip(ours, expected, strict=True):
        assert close(got.to(dtype), want, 4 if backend == "cpu" else 16)


def test_no_tokens_and_no_images_give_zeros_and_a_backward(backend):
    q, k, v = (torch.ones(2, 1, n, 4, requires_grad=True) for n in (3, 0, 0))
    updates = slot_attention(q, k, v, backend=backend)
    updates.sum().backward()
    assert torch.equal(updates, torch.zeros(2, 1, 3, 4)) and torch.equal(q.grad, torch.zeros_like(q))
    q, k, v = (torch.ones(0, 1, n, 4, requires_grad=True) for n in (3, 5, 5))
    slot_attention(q, k, v, backend=backend).sum().backward()
    assert k.grad.shape == k.shape


def test_a_slot_that_is_masked_out_has_update_zero_and_no_gradient(backend):
    tensors = inputs("minis")
    mask = mask_of(tensors[0])
    mask[1] = False  # a whole image without slots
    updates, slot_map, *grads = results(tensors, backend, mask)
    gone = ~mask[:, None, :, None].expand_as(updates)
    assert not updates[gone].any() and not grads[0][gone].any()
    assert not slot_map.transpose(1, 2)[~mask].any() and all(torch.isfinite(g).all() for g in grads)


def test_tokens_shared_by_heads_are_read_without_copies(backend):
    q = torch.randn(2, 3, 4, 16, requires_grad=True)
    tokens = torch.randn(2, 50, 16, requires_grad=True)
    shared = tokens[:, None].expand(-1, 3, -1, -1)
    got = torch.autograd.grad(slot_attention(q, shared, shared, backend=backend).square().sum(), (q, tokens))
    wide = [t.detach().double().requires_grad_() for t in (q, tokens)]
    copies = wide[1][:, None].repeat(1, 3, 1, 1)
    want = torch.autograd.grad(slot_attention(wide[0], copies, copies).square().sum(), wide)
    assert all(close(a, b, UNITS) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_bits_do_not_depend_on_the_number_of_threads(threads):
    tensors = inputs("long")
    torch.set_num_threads(1)
    one = results(tensors, "cpu", None)
    torch.set_num_threads(threads)
    many = results(tensors, "cpu", None)
    assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))


def test_operator_keeps_torchs_contract():
    q, k, v = inputs("heads", torch.float64)
    mask = mask_of(q)
    for return_map in (False, True):
        torch.library.opcheck(torch.ops.fastslots.slot_attention, (q, k, v, 0.5, 1e-3, mask, return_map, "cpu"))
    small = [t[:1, :1, :3, :4].detach().clone().requires_grad_() for t in (q, k, v)]
    torch.autograd.gradcheck(lambda *t: slot_attention(*t, eps=1e-2, backend="cpu", return_map=True), small)
    torch.autograd.gradcheck(lambda *t: slot_attention(*t, eps=1e-2, backend="reference"), small, check_forward_ad=True)
    tangent = torch.func.jvp(lambda q: slot_attention(q, k, v), (q,), (torch.ones_like(q),))[1]
    assert tangent.abs().max() > 0, "a forward derivative that is silently zero"


def test_compiles_whole():
    q, k, v = inputs("minis")
    compiled = torch.compile(
        lambda q, k, v: slot_attention(q, k, v, backend="cpu").sum(), fullgraph=True, backend="aot_eager"
    )
    got = torch.autograd.grad(compiled(q, k, v), (q, k, v))
    want = torch.autograd.grad(slot_attention(q, k, v, backend="cpu").sum(), (q, k, v))
    assert all(torch.allclose(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda q, k, v: (q[0], k, v), "q must be"),
        (lambda q, k, v: (q, k[..., :3], v), "k has shape"),
        (lambda q, k, v: (q, k, v[:, :, :5]), "v has shape"),
        (lambda q, k, v: (q[:, :, :0], k, v), "at least one head, slot"),
        (lambda q, k, v: (q, k.double(), v), "k is torch.float64"),
    ],
)
def test_bad_arguments_are_named(change, says):
    with pytest.raises((TypeError, ValueError), match=says):
        slot_attention(*change(*inputs("minis")))


def test_explain_names_the_limit():
    q, k = torch.empty(1, 1, 129, 8), torch.empty(1, 1, 4, 8)
    said = explain(q, k, k, op="slot_attention")
    assert said.backend == "reference" and "129 slots are more than 128" in said.reasons["cpu"]
    assert explain(*inputs("minis"), op="slot_attention").backend == "cpu"


class Plain(nn.Module):
    """The module as commonly written: tokens projected, attention stored. Names of one common implementation."""

    def __init__(self, width: int, token_width: int, hidden: int):
        super().__init__()
        self.norm_input, self.norm_slots = nn.LayerNorm(token_width), nn.LayerNorm(width)
        self.norm_pre_ff = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k, self.to_v = (nn.Linear(token_width, width, bias=False) for _ in range(2))
        self.gru, self.fc1, self.fc2 = nn.GRUCell(width, width), nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.slots_mu = nn.Parameter(torch.zeros(width))

    def forward(self, slots: Tensor, tokens: Tensor, iterations: int) -> Tensor:
        n = self.norm_input(tokens)
        k, v = self.to_k(n), self.to_v(n)
        for _ in range(iterations):
            q = self.to_q(self.norm_slots(slots)) * slots.shape[-1] ** -0.5
            attn = (q @ k.transpose(1, 2)).softmax(1) + 1e-8
            updates = attn / attn.sum(-1, keepdim=True) @ v
            slots = self.gru(updates.flatten(0, 1), slots.flatten(0, 1)).view_as(slots)
            slots = slots + self.fc2(self.fc1(self.norm_pre_ff(slots)).relu())
        return slots


@pytest.mark.parametrize("iterations", range(1, 8))
def test_module_is_the_plain_one_with_its_weights(iterations):
    torch.manual_seed(0)
    plain = Plain(16, 24, 40).double()
    ours = SlotAttention(16, 24, iterations, hidden=40).double()
    ours.load_foreign(plain.state_dict())
    slots, tokens = torch.randn(2, 5, 16).double(), torch.randn(2, 60, 24).double()
    got, want = ours(slots, tokens), plain(slots, tokens, iterations)
    assert torch.allclose(got, want, rtol=1e-10, atol=1e-12)
    mine = torch.autograd.grad(got.square().sum(), ours.to_k.weight)[0]
    theirs = torch.autograd.grad(want.square().sum(), plain.to_k.weight)[0]
    assert torch.allclose(mine, theirs, rtol=1e-8, atol=1e-12)


def test_implicit_gradient_is_that_of_the_last_iteration():
    torch.manual_seed(0)
    whole = SlotAttention(16, iterations=4, implicit=True).double()
    slots, tokens = torch.randn(2, 5, 16).double().requires_grad_(), torch.randn(2, 60, 16).double()
    with torch.no_grad():
        before = SlotAttention(16, iterations=3).double()
        before.load_state_dict(whole.state_dict())
        start = before(slots, tokens)
    one = SlotAttention(16, iterations=1).double()
    one.load_state_dict(whole.state_dict())
    got = torch.autograd.grad(whole(slots, tokens).sum(), whole.to_v.weight)[0]
    want = torch.autograd.grad(one(start, tokens).sum(), one.to_v.weight)[0]
    assert torch.allclose(got, want, rtol=1e-12)


def test_foreign_weights_that_do_not_fit_are_named():
    state = dict(Plain(16, 24, 40).state_dict())
    del state["fc1.weight"]
    with pytest.raises(ValueError, match=r"missing: mlp\.1\.weight"):
        SlotAttention(16, 24, hidden=40).load_foreign(state)
    with pytest.raises(ValueError, match=r"left over: to_k\.bias"):
        SlotAttention(16, 24, hidden=40).load_foreign({**Plain(16, 24, 40).state_dict(), "to_k.bias": torch.zeros(16)})
