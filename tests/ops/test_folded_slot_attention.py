"""The iterations of slot attention over tokens that nothing projects: one gradient of all tokens among them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastslots.nn import FoldedTokens, SlotAttention
from fastslots.ops import explain
from fastslots.ops.autograd_slots import FoldedSlotAttention
from fastslots.testing import Operations

SHAPES = {  # B, K, L, S
    "minis": (3, 7, 257, 64),
    "odd width": (2, 5, 33, 17),
    "narrow": (2, 4, 70, 3),
    "many slots": (1, 128, 40, 43),
    "wide": (1, 11, 65, 160),
    "many images": (26, 3, 31, 24),
}
UNITS = 100
"""Roundoffs of fp32, relative to the largest element of a gradient, after three iterations: the worst seen is 21."""


@pytest.fixture
def backend(host_backend):
    return host_backend


def made(name: str, dtype: torch.dtype = torch.float32, **options) -> tuple[SlotAttention, Tensor, Tensor]:
    B, K, L, S = SHAPES[name]
    torch.manual_seed(0)
    module = SlotAttention(24, S, hidden=32, eps=1e-3, **options).to(dtype)
    nn.init.normal_(module.norm_tokens.weight, 1, 0.3)
    nn.init.normal_(module.norm_tokens.bias, 0, 0.3)
    slots, tokens = torch.randn(B, K, 24).to(dtype), (2 * torch.randn(B, L, S) + 1).to(dtype)
    return module, slots.requires_grad_(), tokens.requires_grad_()


def mask_of(slots: Tensor) -> Tensor:
    keep = torch.rand(slots.shape[:2], generator=torch.Generator().manual_seed(1)) > 0.4
    keep[:, 0] = True
    return keep


def results(module: SlotAttention, slots: Tensor, tokens: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    """Slots and map, and every gradient of a sum that weighs each element of both differently."""
    out, slot_map = module(slots, tokens, mask, return_map=True)
    u, w = out.flatten(), slot_map.flatten().to(out.dtype)
    if mask is not None:
        u = (out * mask[..., None]).flatten()  # what becomes of a slot that is not there is nobody's concern
    loss = u @ torch.linspace(0.5, 2, len(u), dtype=u.dtype) + w.square() @ torch.linspace(0, 1, len(w), dtype=w.dtype)
    # The bias of the slots' norm shifts all scores of a token alike: its gradient through them is zero by right.
    leaves = {"slots": slots, "tokens": tokens, **dict(module.named_parameters())}
    leaves = {name: t for name, t in leaves.items() if t.requires_grad and name != "norm_slots.bias"}
    return {
        "out": out,
        "map": slot_map,
        **dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True)),
    }


def exact(name: str, masked: bool, **options) -> dict[str, Tensor]:
    module, slots, tokens = made(name, backend="reference", **options)
    wide = [t.detach().double().requires_grad_() for t in (slots, tokens)]
    return results(module.double(), *wide, mask_of(slots) if masked else None)


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], units: float = UNITS) -> None:
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        scale = want.abs().max().clamp_min(1e-6)
        off = (found[name].double() - want).abs().max() / scale / torch.finfo(torch.float32).eps
        assert off <= units, f"{name} is off by {off:.1f} roundoffs"


@pytest.mark.parametrize("masked", [False, True], ids=["all slots", "masked"])
@pytest.mark.parametrize("name", SHAPES)
def test_three_iterations_and_every_gradient(backend, name, masked):
    module, slots, tokens = made(name, backend=backend)
    assert_near(results(module, slots, tokens, mask_of(slots) if masked else None), exact(name, masked))


def test_doubles_agree_to_their_last_digits():
    module, slots, tokens = made("odd width", torch.float64, backend="cpu")
    assert_near(results(module, slots, tokens), exact_of(module, slots, tokens), 1e-6)


def exact_of(module: SlotAttention, slots: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    module.backend, before = "reference", module.backend
    found = results(module, slots, tokens)
    module.backend = before
    return found


def test_one_iteration_has_the_gradient_when_it_is_implicit(backend):
    module, slots, tokens = made("minis", backend=backend, implicit=True)
    slots = slots.detach()  # no gradient reaches what the last iteration starts from
    expected = exact_implicit(module, slots, tokens)
    assert_near(results(module, slots, tokens), expected)


def exact_implicit(module: SlotAttention, slots: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    wide = SlotAttention(24, 64, hidden=32, eps=1e-3, implicit=True, backend="reference").double()
    wide.load_state_dict(module.state_dict())
    return results(wide, slots.double(), tokens.detach().double().requires_grad_())


def test_tokens_that_need_no_gradient_get_none():
    """Features of a frozen backbone: no array of their size is made in the backward."""
    module, slots, tokens = made("minis", backend="cpu")
    frozen = results(module, slots, tokens.detach())
    expected = exact("minis", False)
    del expected["tokens"]
    assert_near(frozen, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_tokens_are_widened_once(dtype):
    _, slots, tokens = made("minis")
    module, narrow = SlotAttention(24, 64, backend="cpu"), tokens.detach().to(dtype).requires_grad_()
    got = torch.autograd.grad(module(slots, narrow).square().sum(), narrow)[0]
    wide = narrow.detach().float().requires_grad_()
    want = torch.autograd.grad(module(slots, wide).square().sum(), wide)[0]
    assert got.dtype == dtype and torch.equal(got, want.to(dtype))


def test_a_second_backward_gives_the_same_gradient():
    """The iterations add to one array: not to that of the backward before."""
    module, slots, tokens = made("minis", backend="cpu")
    loss = module(slots, tokens).square().sum()
    first = torch.autograd.grad(loss, tokens, retain_graph=True)[0]
    kept = first.clone()
    again = torch.autograd.grad(loss, tokens)[0]
    assert torch.equal(first, kept) and torch.equal(again, kept)


def test_what_is_zero_in_a_frozen_iteration_leaves_the_others_alone():
    """A loss that some iterations do not reach: nothing flows back through those, and the tokens' gradient passes."""
    norm = nn.LayerNorm(8)
    tokens, rows = torch.randn(2, 20, 8, requires_grad=True), torch.randn(2, 3, 8, requires_grad=True)

    def gradient(backend: str, used: list[int]) -> Tensor:
        met = FoldedTokens(tokens, rows, norm, backend)
        found = [met.gather(rows * (i + 1), 0.5, 1e-3)[0] for i in range(3)]
        return torch.autograd.grad(sum(found[i].square().sum() for i in used), tokens)[0]

    for used in ([0], [1], [2], [0, 2], [1, 2]):
        assert torch.allclose(gradient("cpu", used), gradient("reference", used), atol=1e-5)


def test_second_derivatives_are_refused():
    module, slots, tokens = made("odd width", backend="cpu")
    (gradient,) = torch.autograd.grad(module(slots, tokens).square().sum(), tokens, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable"):
        gradient.sum().backward()


def test_masked_slots_may_hold_anything(backend):
    B, K, L, S = SHAPES["odd width"]
    norm = nn.LayerNorm(S)
    rows, tokens = torch.randn(B, K, S), torch.randn(B, L, S)
    mask = mask_of(rows)
    mask[1] = False
    found = []
    for padding in (0.0, float("nan")):
        leaf = rows.masked_fill(~mask[..., None], padding).requires_grad_()
        of_tokens = tokens.clone().requires_grad_()
        means, slot_map = FoldedTokens(of_tokens, leaf, norm, backend).gather(leaf, 1.0, 1e-3, mask, True)
        grads = torch.autograd.grad(means.sum() + slot_map.square().sum(), [leaf, of_tokens, *norm.parameters()])
        found.append([means, slot_map, *grads])
        assert not means[~mask].any() and not slot_map.mT[~mask].any() and not grads[0][~mask].any()
    assert all(torch.equal(a, b) and torch.isfinite(a).all() for a, b in zip(*found, strict=True))


def test_no_tokens_and_no_images(backend):
    for B, L in ((0, 5), (2, 0)):
        module, slots = SlotAttention(16, backend=backend), torch.ones(B, 3, 16, requires_grad=True)
        tokens = torch.ones(B, L, 16, requires_grad=True)
        module(slots, tokens).sum().backward()
        assert tokens.grad.shape == tokens.shape and torch.isfinite(slots.grad).all()


@pytest.mark.parametrize("threads", [2, 3, 8])
@pytest.mark.parametrize("name", ["minis", "many images"])
def test_bits_do_not_depend_on_the_number_of_threads(name, threads):
    B, K, L, S = SHAPES[name]
    rows, offsets, tokens = torch.randn(B, K, S), torch.randn(B, K), torch.randn(B, L, S)
    found = []
    for count in (1, threads):
        torch.set_num_threads(count)
        leaves = [t.clone().requires_grad_() for t in (rows, offsets, tokens)]
        gathered, slot_map, _ = FoldedSlotAttention.apply(*leaves, 1e-3, 1e-5, None, True, "cpu")
        found.append([gathered, slot_map, *torch.autograd.grad([gathered, slot_map], leaves, [gathered, slot_map])])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_operators_keep_torchs_contract():
    B, K, L, S = 2, 3, 5, 4
    rows, offsets, tokens = (torch.randn(*s, dtype=torch.float64) for s in ((B, K, S), (B, K), (B, L, S)))
    mask = mask_of(rows)
    checks = ("test_schema", "test_faketensor")
    for norm_eps, return_map in ((1e-5, True), (None, False)):
        arguments = rows, offsets, tokens, 1e-3, norm_eps, mask, return_map, "cpu"
        torch.library.opcheck(torch.ops.fastslots.folded_slot_attention, arguments, test_utils=checks)
        gathered, totals, slot_map = torch.ops.fastslots.folded_slot_attention(*arguments)
        for dtokens, add in ((torch.zeros_like(tokens), True), (None, False)):
            back = (gathered, slot_map if return_map else None, rows, offsets, tokens, gathered, totals, dtokens, add)
            operator = torch.ops.fastslots.folded_slot_attention_backward
            torch.library.opcheck(operator, (*back, 1e-3, norm_eps, mask, "cpu"), test_utils=checks)

        def gather(*t, norm_eps=norm_eps):
            return FoldedSlotAttention.apply(*t, 1e-2, norm_eps, mask, True, "cpu")[:2]

        torch.autograd.gradcheck(gather, [t.clone().requires_grad_() for t in (rows, offsets, tokens)])


def test_transforms_and_compiled_code_take_operators_that_know_them():
    module, slots, tokens = made("odd width")
    expected = results(module, slots, tokens)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(slots, tokens).square().sum(), tokens)[0]
    want = torch.autograd.grad(module(slots, tokens).square().sum(), tokens)[0]
    assert torch.allclose(got, want, atol=1e-5 * float(want.abs().max()))
    tangent = torch.func.jvp(lambda t: module(slots, t), (tokens,), (torch.ones_like(tokens) * tokens,))[1]
    assert tangent.abs().max() > 0, "a forward derivative that is silently zero"
    one_by_one = torch.func.vmap(lambda s, t: module(s[None], t[None])[0])(slots, tokens)
    assert torch.allclose(one_by_one, expected["out"], atol=1e-5)
    exported = torch.export.export(module, (slots, tokens), strict=False).module()
    assert torch.allclose(exported(slots, tokens), expected["out"], atol=1e-5)


def test_who_serves():
    module, slots, tokens = made("minis")
    with Operations() as eager:
        module(slots, tokens)
    assert "fastslots::folded_slot_attention" in eager.names and "native_layer_norm" in eager.names  # of the slots
    with torch.autocast("cpu", torch.bfloat16), Operations() as sixteen:
        module(slots, tokens)
    assert not any("fastslots" in name for name in sixteen.names)
    said = explain(torch.empty(1, 129, 8), torch.empty(1, 4, 8), op="folded_slot_attention")
    assert said.backend == "reference" and "129 slots are more than 128" in said.reasons["cpu"]
    nowhere = torch.empty(1, 3, 16, device="meta"), torch.empty(1, 4, 16, device="meta")
    with pytest.raises(ValueError, match="cannot serve"):
        SlotAttention(16, backend="cpu").to("meta")(*nowhere)
    assert SlotAttention(16).to("meta")(*nowhere).is_meta
