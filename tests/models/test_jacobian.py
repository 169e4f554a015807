"""The slot Jacobian of any decoder: routes, modes, pixels, second derivatives and its penalty."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from jacobians import draw_slots, published_decoder, relative, tiny

from fastslots.metrics import jacobian_ari, jacobian_interaction_score, slot_jacobian
from fastslots.models import SlotVAEConfig
from fastslots.models.decoder import Decoder

PARITY = os.environ.get("FASTSLOTS_PARITY")


@pytest.mark.parametrize("as_tuple", [False, True])
def test_any_other_decoder(as_tuple):
    decoder = tiny()
    slots = draw_slots(decoder)

    def foreign(z):
        recon, slot_map = decoder(z)
        return (recon, slot_map) if as_tuple else recon

    for chunk in (None, 4):
        assert relative(slot_jacobian(foreign, slots, chunk), slot_jacobian(decoder, slots)) < 1e-9


def test_a_subclass_that_decodes_otherwise_is_not_taken_for_a_decoder():
    class Doubled(Decoder):
        def forward(self, slots, slot_mask=None):
            recon, slot_map = super().forward(slots, slot_mask)
            return 2 * recon, slot_map

    decoder = tiny()
    slots = draw_slots(decoder)
    expected = 2 * slot_jacobian(decoder, slots)
    decoder.__class__ = Doubled
    assert relative(slot_jacobian(decoder, slots), expected) < 1e-9


def test_the_same_in_every_mode():
    decoder = tiny()
    slots = draw_slots(decoder)
    expected = slot_jacobian(decoder, slots)
    with torch.no_grad():
        assert torch.equal(slot_jacobian(decoder, slots), expected)
    with torch.inference_mode():
        assert torch.equal(slot_jacobian(decoder, slots * 1), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(slot_jacobian(decoder, slots), expected)
    assert torch.equal(slot_jacobian(decoder.eval(), slots.requires_grad_()), expected)
    assert torch.equal(slot_jacobian(torch.compile(decoder), slots), expected)
    assert slots.grad is None and all(p.grad is None for p in decoder.parameters())
    assert not expected.requires_grad


def test_half_precision_weights_are_widened():
    decoder = tiny().bfloat16()
    slots = draw_slots(decoder).bfloat16()
    jacobian = slot_jacobian(decoder, slots)
    assert jacobian.dtype == torch.float32 and decoder.norm.weight.dtype == torch.bfloat16
    assert relative(jacobian, slot_jacobian(decoder.double(), slots.double())) < 1e-5


def test_no_images():
    assert slot_jacobian(tiny(), torch.zeros(0, 3, 7)).shape == (0, 3, 5, 5)


def test_wrong_arguments_are_named():
    decoder = tiny()
    for slots, message in [
        (torch.zeros(3, 7), r"slots must be float \[B, K, D\], got torch.float32 \[3, 7\]"),
        (torch.zeros(1, 3, 7).long(), "slots must be float"),
        (torch.zeros(1, 3, 8), r"slots has shape \[1, 3, 8\], the decoder takes \[B, K, 7\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            slot_jacobian(decoder, slots)
    slots = draw_slots(decoder)
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        slot_jacobian(decoder, slots, 0)
    with pytest.raises(ValueError, match=r"slot_mask has shape \[2, 4\]"):
        slot_jacobian(decoder, slots, slot_mask=torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="our own decoders: bind it into the callable"):
        slot_jacobian(lambda z: decoder(z), slots, slot_mask=torch.ones(2, 3, dtype=torch.bool))


def torch_jacobian(decoder: Decoder, slots: torch.Tensor) -> torch.Tensor:
    """autograd.functional.jacobian of each image: [B, C, R, R, K, D]."""
    one = lambda z: decoder(z[None])[0][0]  # noqa: E731
    return torch.stack([torch.autograd.functional.jacobian(one, z) for z in slots])


@pytest.mark.parametrize("overrides", [{}, {"channels": 20}])
def test_every_number_of_the_jacobian(overrides):
    decoder = tiny(**overrides)
    slots = draw_slots(decoder)
    expected = torch_jacobian(decoder, slots)
    for chunk in (None, 7):
        full = slot_jacobian(decoder, slots, chunk, reduction=None)
        assert full.shape == expected.shape and relative(full, expected) < 1e-9
    assert relative(slot_jacobian(lambda z: decoder(z), slots, reduction=None), expected) < 1e-9
    assert relative(full.abs().sum((1, 5)).permute(0, 3, 1, 2), slot_jacobian(decoder, slots)) < 1e-12


def test_a_subset_of_pixels_of_each_image():
    decoder = tiny()
    slots = draw_slots(decoder, images=3)
    pixels = torch.tensor([[0, 24, 24, 7], [1, 2, 3, 4], [20, 0, 9, 9]])
    expected = slot_jacobian(decoder, slots).flatten(2).gather(2, pixels[:, None].expand(-1, 3, -1))
    for route in (decoder, lambda z: decoder(z)):
        for chunk in (None, 3):
            assert relative(slot_jacobian(route, slots, chunk, pixels=pixels), expected) < 1e-9
    full = slot_jacobian(decoder, slots, pixels=pixels, reduction=None)
    assert full.shape == (3, 3, 4, 3, 7)
    assert relative(full.abs().sum((1, 4)).transpose(1, 2), expected) < 1e-9


def test_differentiable_gives_second_derivatives():
    decoder = tiny()
    slots = draw_slots(decoder).requires_grad_()
    weight = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    parameters = [slots, *decoder.parameters()]

    def gradients(jacobian):
        return torch.autograd.grad((jacobian * weight).sum(), parameters, allow_unused=True)

    # the truth: double backward through torch's own jacobian
    def expected_jacobian():
        one = lambda z: published_decoder(decoder, z)  # noqa: E731
        full = [torch.autograd.functional.jacobian(one, z, create_graph=True) for z in slots]  # [L, C, K, D]
        return torch.stack(full).abs().sum((2, 4)).transpose(1, 2).unflatten(-1, (5, 5))

    expected = gradients(expected_jacobian())
    jacobians = [slot_jacobian(route, slots, differentiable=True) for route in (decoder, lambda z: decoder(z))]
    for jacobian in jacobians:
        for actual, target in zip(gradients(jacobian), expected, strict=True):
            if target is None or not target.any():
                assert actual is None or actual.abs().max() < 1e-12
            else:
                assert relative(actual, target) < 1e-9
    assert relative(jacobians[0], slot_jacobian(decoder, slots)) < 1e-12
    with torch.no_grad():
        assert not slot_jacobian(decoder, slots, differentiable=True).requires_grad


def test_the_jacobian_penalty_by_hand_and_by_finite_differences():
    from fastslots.models.jacobian import jacobian_penalty

    decoder = tiny()
    slots = draw_slots(decoder).requires_grad_()
    pixels, weight = torch.tensor([[0, 7, 7], [3, 24, 12]]), torch.tensor([[0.5, 2.0, 1.0], [1.0, 0.1, 0.9]]).double()
    G = slot_jacobian(decoder, slots, pixels=pixels)
    expected = 0.0
    for b in range(2):
        for p in range(3):
            share = (G[b, :, p] / G[b, :, p].sum()).tolist()
            pairs = share[0] * share[1] + share[0] * share[2] + share[1] * share[2]
            expected += weight[b, p].item() * pairs / 6
    penalty = jacobian_penalty(decoder, slots, pixels, weight)
    assert abs(penalty.item() - expected) < 1e-12
    assert 0 < jacobian_penalty(decoder, slots, pixels) <= 0.5 * (1 - 1 / 3)
    penalty.backward()
    direction = torch.randn_like(slots)
    ahead, behind = (jacobian_penalty(decoder, slots + step * direction, pixels, weight) for step in (1e-6, -1e-6))
    assert ((ahead - behind) / 2e-6).item() == pytest.approx((slots.grad * direction).sum().item(), rel=1e-5)
    scaled = decoder.output_mlp[-1]
    scaled.weight.data *= 7  # shares, and so the penalty, do not see the picture's contrast
    assert abs(jacobian_penalty(decoder, slots, pixels, weight).item() - expected) < 1e-12


def test_the_jacobian_penalty_trains():
    from fastslots.models import SlotVAE

    torch.manual_seed(0)
    config = SlotVAEConfig.preset("sprites-mini", resolution=8, jacobian_weight=3.0)
    model = SlotVAE(config)
    images, noise, pixels = torch.rand(2, 3, 8, 8), torch.randn(2, 4, 32), torch.randint(64, (2, 16))
    plain = SlotVAE(SlotVAEConfig.preset("sprites-mini", resolution=8))
    plain.load_state_dict(model.state_dict())
    with_penalty = model.training_loss(images, noise, pixels=pixels, jacobian_pixels=pixels)
    without = plain.training_loss(images, noise, pixels=pixels)
    from fastslots.models.jacobian import jacobian_penalty

    penalty = jacobian_penalty(model.decoder, model.encode(images, noise).slots, pixels)
    assert torch.allclose(with_penalty.total - without.total, 3 * penalty, rtol=1e-3)
    before = penalty.item()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(15):
        optimizer.zero_grad()
        jacobian_penalty(model.decoder, model.encode(images, noise).slots, pixels).backward()
        optimizer.step()
    after = jacobian_penalty(model.decoder, model.encode(images, noise).slots, pixels).item()
    print(before, after)
    assert after < 0.9 * before


def test_other_arguments_are_named_too():
    decoder = tiny()
    slots = draw_slots(decoder)
    with pytest.raises(ValueError, match="reduction must be 'sum' or None, got 'mean'"):
        slot_jacobian(decoder, slots, reduction="mean")
    with pytest.raises(ValueError, match=r"pixels must be integers \[2, P\]"):
        slot_jacobian(decoder, slots, pixels=torch.zeros(3, 1).long())
    with pytest.raises(ValueError, match="at least 32 bits"):
        slot_jacobian(decoder.bfloat16(), slots, differentiable=True)


@pytest.mark.skipif(not PARITY, reason="set FASTSLOTS_PARITY to the folder of recordings")
def test_recorded_jacobian_and_scores():
    from safetensors.torch import load_file

    from fastslots.interop import load_official

    folder = Path(PARITY or "")
    expected = load_file(folder / "sprites_expected.safetensors")
    record = json.loads((folder / "sprites.json").read_text())
    model = load_official(folder / "sprites_weights.safetensors", "sprites")
    jacobian = slot_jacobian(model.decoder, expected["z"][:2])
    assert relative(jacobian, expected["slot_jacobian"]) < 5e-5  # seen: 5.4e-6
    masks = expected["masks"][:2]
    for theirs in (jacobian, expected["slot_jacobian"]):
        assert abs(jacobian_interaction_score(theirs, masks) - record["jis"]) < 1e-5
    assert abs(jacobian_ari(expected["slot_jacobian"], masks) - record["jari"]) < 1e-6
    assert abs(jacobian_ari(jacobian, masks) - record["jari"]) < 2e-3  # a pixel may be a tie within rounding
