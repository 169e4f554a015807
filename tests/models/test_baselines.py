"""The baselines against their formulas, written out with loops; each trains and is scored like the method itself."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from fastslots.errors import UserError
from fastslots.interop import to_official
from fastslots.metrics import slot_jacobian
from fastslots.models import SlotVAE, SlotVAEConfig
from fastslots.models.broadcast import BroadcastDecoder
from fastslots.ops import interaction_penalty
from fastslots.train import TrainConfig, fit

SIZES = dict(resolution=8, num_slots=3, slot_dim=5, cnn_channels=4, cnn_stride=4, encoder_width=8, encoder_layers=1)
SIZES |= dict(query_width=8, query_hidden=8, slot_width=8, slot_hidden=8, decoder_heads=2, output_hidden=(8,))
SIZES |= dict(broadcast_side=2, broadcast_channels=6)


def tiny(**overrides) -> SlotVAE:
    torch.manual_seed(0)
    return SlotVAE(SlotVAEConfig(**SIZES | overrides)).double()


def images_and_slots(count: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    images = torch.rand(count, 3, 8, 8, generator=g, dtype=torch.float64)
    return images, torch.randn(count, 3, 5, generator=g, dtype=torch.float64)


def assert_equal(actual, expected, bound: float = 1e-10):
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= bound * expected.abs().max()


# -- Slot Attention


def gru(cell, update, state):
    """Cho et al., 2014, as in torch's documentation: h' = (1 − z) n + z h."""
    wi, wh, bi, bh = cell.weight_ih.chunk(3), cell.weight_hh.chunk(3), cell.bias_ih.chunk(3), cell.bias_hh.chunk(3)
    r = torch.sigmoid(wi[0] @ update + bi[0] + wh[0] @ state + bh[0])
    z = torch.sigmoid(wi[1] @ update + bi[1] + wh[1] @ state + bh[1])
    n = torch.tanh(wi[2] @ update + bi[2] + r * (wh[2] @ state + bh[2]))
    return (1 - z) * n + z * state


def norm(layer, x):
    x = (x - x.mean()) / torch.sqrt(x.var(unbiased=False) + 1e-5)
    return x * layer.weight + layer.bias


@torch.no_grad()
def test_slot_attention_is_algorithm_1():
    encoder = tiny(encoder="slot-attention").encoder
    for layer in (encoder.norm_tokens, encoder.norm_slots):
        torch.nn.init.normal_(layer.weight, 1, 0.5)
        torch.nn.init.normal_(layer.bias)
    images, _ = images_and_slots()
    raw = encoder.token_mlp(_tokens_before_the_mlp(encoder, images))
    for b in range(2):
        tokens = torch.stack([norm(encoder.norm_tokens, t) for t in raw[b]])
        keys, values = tokens @ encoder.to_k.weight.T, tokens @ encoder.to_v.weight.T
        slots = list(encoder.queries[0])
        for _ in range(3):
            q = [encoder.to_q.weight @ norm(encoder.norm_slots, s) for s in slots]
            attn = torch.tensor([[k @ q_j / math.sqrt(8) for q_j in q] for k in keys], dtype=torch.float64)
            attn = attn.softmax(1) + 1e-8  # over slots
            attn = attn / attn.sum(0)  # over tokens
            for j in range(3):
                slots[j] = gru(encoder.gru, sum(a * v for a, v in zip(attn[:, j], values, strict=True)), slots[j])
                hidden = torch.relu(encoder.mlp[1](norm(encoder.mlp[0], slots[j])))
                slots[j] = slots[j] + encoder.mlp[3](hidden)
        expected = torch.stack([encoder.output(norm(encoder.norm, s)) for s in slots])
        assert_equal(encoder(images)[b], expected)


def _tokens_before_the_mlp(encoder, images):
    x = encoder.cnn(images).flatten(2).transpose(1, 2) + encoder.position(encoder.grid)
    return F.layer_norm(x, x.shape[1:])


def test_slots_compete_for_tokens_and_follow_their_queries():
    encoder = tiny(encoder="slot-attention").encoder
    images, _ = images_and_slots()
    before = encoder(images)
    encoder.queries.data = encoder.queries.data[:, [2, 0, 1]]
    assert_equal(encoder(images), before[:, [2, 0, 1]])
    model = tiny(encoder="slot-attention", slot_attention_iterations=1).encoder
    assert (model(images) - before).abs().max() > 1e-6


def test_slot_attention_widths():
    for overrides, width in [
        ({}, 10),
        ({"beta": 0.0}, 5),
        ({"encoder_width": 0}, 10),
        ({"slot_attention_hidden": 3}, 10),
    ]:
        model = tiny(encoder="slot-attention", encoder_heads=1, **overrides)
        assert model.encoder(images_and_slots()[0]).shape == (2, 3, width)
    biased = tiny(encoder="slot-attention", encoder_width=0, log_scale_bias=-2.0)
    assert (biased.encoder.output.bias[5:] == -2).all() and (biased.encoder.output.bias[:5] != -2).all()


# -- Spatial broadcast


def test_broadcast_is_a_mixture_of_slots_decoded_alone():
    decoder = tiny(decoder="broadcast").decoder
    _, slots = images_and_slots()
    recon, slot_map = decoder(slots)
    for b in range(2):
        parts = []
        for k in range(3):
            x = torch.empty(5, 2, 2, dtype=torch.float64)
            for i, y_ in enumerate((0.0, 1.0)):
                for j, x_ in enumerate((0.0, 1.0)):
                    place = torch.tensor([y_, x_, 1 - y_, 1 - x_], dtype=torch.float64)
                    x[:, i, j] = slots[b, k] + decoder.position.weight @ place + decoder.position.bias
            parts.append(decoder.cnn(x[None])[0])
        parts = torch.stack(parts)  # [K, C + 1, R, R]
        weights = parts[:, 3].exp() / parts[:, 3].exp().sum(0)
        assert_equal(recon[b], (parts[:, :3] * weights[:, None]).sum(0))
        assert_equal(slot_map[b], 2 * weights.flatten(1).T)  # sums to the number of heads, as the Transformer's


def test_a_transposed_convolution_doubles_the_side_as_defined():
    decoder = tiny(decoder="broadcast", resolution=4, cnn_stride=2).decoder
    layer = decoder.cnn[0]
    x = torch.randn(1, 5, 2, 2, dtype=torch.float64)
    expected = layer.bias[None, :, None, None].repeat(1, 1, 4, 4)
    for i in range(2):
        for j in range(2):
            for u in range(5):
                for v in range(5):
                    y_, x_ = 2 * i + u - 2, 2 * j + v - 2
                    if 0 <= y_ < 4 and 0 <= x_ < 4:
                        expected[0, :, y_, x_] += x[0, :, i, j] @ layer.weight[:, :, u, v]
    assert_equal(layer(x), expected)


def test_the_broadcast_loss_is_that_of_its_pictures():
    model = tiny(decoder="broadcast")
    images, slots = images_and_slots()
    slots.requires_grad_()
    terms = model.decoder.loss(slots, images, 0.7, 1.3)
    recon, slot_map = model.decoder(slots)
    error, penalty = (recon - images).square().sum() / 2, interaction_penalty(slot_map)
    assert_equal(terms.recon, error.detach())
    assert_equal(terms.interaction, penalty.detach())
    weights = [slots, *model.decoder.parameters()]
    for actual, expected in zip(
        torch.autograd.grad(terms.total, weights),
        torch.autograd.grad(0.7 * error + 1.3 * penalty, weights),
        strict=True,
    ):
        assert_equal(actual, expected)
    assert not terms.recon.requires_grad and not terms.interaction.requires_grad
    with pytest.raises(ValueError, match="images has shape"):
        model.decoder.loss(slots, images[:1], 1.0, 1.0)


def test_a_masked_slot_leaves_the_mixture():
    decoder = tiny(decoder="broadcast").decoder
    _, slots = images_and_slots()
    mask = torch.tensor([[True, False, True], [True, True, True]])
    recon, slot_map = decoder(slots, mask)
    assert not slot_map[0, :, 1].any()
    assert_equal(recon[0], decoder(slots[:1, [0, 2]])[0][0])
    assert not slot_jacobian(decoder, slots, slot_mask=mask)[0, 1].any()


@pytest.mark.parametrize("chunk", [None, 1, 4])
def test_the_broadcast_jacobian_takes_d_directions_and_equals_the_k_times_d(chunk):
    decoder = tiny(decoder="broadcast").decoder
    _, slots = images_and_slots()
    foreign = lambda z: decoder(z)  # noqa: E731  any callable gets the K·D directions
    assert_equal(slot_jacobian(decoder, slots, chunk), slot_jacobian(foreign, slots))
    assert_equal(slot_jacobian(decoder, slots, chunk, reduction=None), slot_jacobian(foreign, slots, reduction=None))
    full = torch.autograd.functional.jacobian(lambda z: decoder(z[None])[0][0], slots[1])
    assert_equal(slot_jacobian(decoder, slots, reduction=None)[1], full)


def test_a_broadcast_model_names_a_side_that_does_not_fit():
    for side in (3, 16):
        with pytest.raises(UserError, match=f"broadcast_side {side} times a power of two"):
            SlotVAEConfig(**SIZES | {"decoder": "broadcast", "broadcast_side": side})
    SlotVAEConfig(**SIZES | {"broadcast_side": 3})  # not looked at
    assert isinstance(tiny(decoder="broadcast", broadcast_side=8).decoder, BroadcastDecoder)
    with pytest.raises(UserError, match="encoder must be one of transformer, slot-attention"):
        SlotVAEConfig(encoder="slotattention")


# -- From one flag


@pytest.mark.parametrize(
    "flag",
    [{"encoder": "slot-attention"}, {"decoder": "broadcast"}, {"beta": 0.0}, {"alpha": 0.0}],
)
def test_each_baseline_trains_from_one_flag_and_gets_every_score(tmp_path, flag):
    small = dict(steps=2, eval_images=2, eval_every=0, batch_size=4, resolution=16, broadcast_channels=8, threads=1)
    config = TrainConfig.preset("sprites-mini", **small, **flag)
    result = fit(config, out=tmp_path / "run")
    assert {"j_ari", "jis", "fg_ari", "mbo", "recon"} <= result.scores.keys()
    assert all(math.isfinite(v) for v in result.scores.values() if isinstance(v, float))
    loaded = SlotVAE.from_run(tmp_path / "run", "last")
    x, noise = torch.rand(2, 3, 16, 16), torch.zeros(2, 4, 32)
    model = result.model.eval()
    assert torch.equal(loaded(x, noise).recon, model(x, noise).recon)
    whole, tiled = model.loss(model(x, noise), x), model.training_loss(x, noise)
    assert torch.allclose(whole.total, tiled.total, rtol=1e-4)


def test_the_authors_format_has_no_place_for_a_baseline():
    with pytest.raises(UserError, match="slot-attention"):
        to_official(SlotVAE(SlotVAEConfig.preset("sprites-mini", encoder="slot-attention")))
