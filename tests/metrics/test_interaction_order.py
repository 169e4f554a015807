"""Second-order interaction against full Hessians, and against decoders whose interaction is known."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from fastslots.metrics import interaction_order
from fastslots.models import SlotVAEConfig
from fastslots.models.broadcast import BroadcastDecoder
from fastslots.models.decoder import Decoder
from fastslots.ops.second_order import second_order
from fastslots.records import FoldedDecoder


def tiny(cls=Decoder, **overrides):
    torch.manual_seed(0)
    sizes = dict(
        resolution=2,
        channels=1,
        num_slots=3,
        slot_dim=4,
        encoder_heads=1,
        decoder_heads=2,
        slot_width=10,
        slot_hidden=16,
    )
    sizes |= dict(octaves=3, query_width=12, query_hidden=9, output_hidden=(8,), broadcast_side=1, broadcast_channels=5)
    decoder = cls(SlotVAEConfig(**sizes | overrides)).double()
    if cls is Decoder:
        for layer in decoder.transformer:
            layer.projections.to_q.weight.data *= 4
    return decoder


def hessian_norms(decode, slots) -> tuple[torch.Tensor, torch.Tensor]:
    """cross and within [B] from torch's own Hessians, one output number at a time, in reverse mode twice."""
    cross, within = [], []
    for z in slots:
        K = len(z)
        numbers = decode(z[None])[0].numel()
        norms = torch.zeros(K, K, dtype=torch.float64)
        for i in range(numbers):
            # no forward mode and no fused kernel anywhere: layer norms' double backward is right in torch
            H = torch.autograd.functional.hessian(lambda y, i=i: decode(y[None])[0].flatten()[i], z)  # [K, D, K, D]
            norms += H.square().sum((1, 3))
        within.append(norms.trace())
        cross.append(norms.sum() - norms.trace())
    return torch.stack(cross), torch.stack(within)


def by_parts(decoder: Decoder, slots):
    """The decoder through its plain definition, which can be differentiated twice in reverse."""
    from fastslots.ops import reference

    return reference.decode(FoldedDecoder(decoder.queries(), decoder.layers(slots), decoder.head()))[0]


@pytest.mark.parametrize("cls", [Decoder, BroadcastDecoder])
def test_exact_equals_the_hessian(cls):
    decoder = tiny(cls)
    slots = torch.randn(2, 3, 4, dtype=torch.float64)
    plain = (lambda z: by_parts(decoder, z)) if cls is Decoder else (lambda z: decoder(z)[0])
    cross, within = hessian_norms(plain, slots)
    for chunk in (None, 3):
        found = interaction_order(decoder, slots, exact=True, chunk=chunk)
        assert torch.allclose(found.cross, cross, rtol=1e-9) and torch.allclose(found.within, within, rtol=1e-9)
    assert found.ratio == pytest.approx(math.sqrt(cross.sum() / 6 / (within.sum() / 3)))


def test_random_directions_estimate_it_without_bias():
    decoder = tiny()
    slots = torch.randn(1, 3, 4, dtype=torch.float64).expand(30, -1, -1)
    exact = interaction_order(decoder, slots[:1], exact=True)
    drawn = interaction_order(decoder, slots, samples=8)
    for name in ("cross", "within"):
        values, truth = getattr(drawn, name), getattr(exact, name).item()
        error = values.std().item() / math.sqrt(len(values))
        print(name, values.mean().item() / truth, error / truth)
        assert abs(values.mean().item() - truth) < 4 * error and error < 0.1 * truth
    assert drawn.ratio == pytest.approx(exact.ratio, rel=0.15)
    again, other = interaction_order(decoder, slots[:2]), interaction_order(decoder, slots[:2], seed=9)
    assert torch.equal(again.cross, interaction_order(decoder, slots[:2]).cross)
    assert not torch.equal(again.cross, other.cross)


def test_decoders_of_known_order():
    mix = torch.randn(3, 16, 4, dtype=torch.float64)
    parts = lambda z: torch.einsum("kld,bkd->bkl", mix, z)  # noqa: E731
    picture = lambda x: x.view(-1, 1, 4, 4)  # noqa: E731
    slots = torch.randn(5, 3, 4, dtype=torch.float64)
    additive = interaction_order(lambda z: picture(parts(z).sin().sum(1)), slots, exact=True)
    assert additive.ratio == 0 and (additive.within > 0).all()
    linear = interaction_order(lambda z: picture(parts(z).sum(1)), slots, exact=True)
    assert math.isnan(linear.ratio)
    # (Σ_k m_k·z_k)²: every block is 2 m_j m_kᵀ
    square = interaction_order(lambda z: picture(parts(z).sum(1).square()), slots, exact=True)
    norms = mix.square().sum(-1)  # [K, L]
    total, within = 4 * norms.sum(0).square().sum(), 4 * norms.square().sum()
    assert torch.allclose(square.within, within.expand(5)) and torch.allclose(square.cross, (total - within).expand(5))
    assert interaction_order(lambda z: picture(parts(z[:, [0, 0, 0]]).sum(1)), slots[:, :1], exact=True).ratio == 0


def test_forward_over_forward_of_a_layer_norm_is_right_inside_second_order_alone():
    x, u, v, weight, c = torch.randn(5, 6, dtype=torch.float64)
    f = lambda y: (F.layer_norm(y, (6,), weight, u).square() * c).sum()  # noqa: E731

    def forward_twice():
        return torch.func.jvp(lambda y: torch.func.jvp(f, (y,), (u,))[1], (x,), (v,))[1]

    truth = u @ torch.autograd.functional.hessian(f, x) @ v
    assert not torch.allclose(forward_twice(), truth), "torch has mended layer_norm: second_order can go"
    with second_order():
        assert torch.allclose(forward_twice(), truth)
        assert torch.allclose(f(x), (F.layer_norm(x, (6,), weight, u).square() * c).sum())
        bare = F.layer_norm(x, (6,))
        with pytest.raises(ValueError, match="instance norm"):
            F.instance_norm(torch.randn(1, 2, 3))
    assert torch.allclose(bare, F.layer_norm(x, (6,)))


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="slots must be float"):
        interaction_order(tiny(), torch.zeros(3, 4))
    with pytest.raises(ValueError, match="samples must be at least 1"):
        interaction_order(tiny(), torch.zeros(1, 3, 4).double(), 0)
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        interaction_order(tiny(), torch.zeros(1, 3, 4).double(), chunk=0)
