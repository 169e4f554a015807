"""The interface of decoders: what one that brings only ``forward`` gets, and that ours keep to it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn as nn
from tiny import MODEL_8
from torch import Tensor

from fastslots.data.builtin.sprites import SpritesDataset
from fastslots.data.map_style import as_split
from fastslots.errors import UserError
from fastslots.evaluation.evaluate import evaluate
from fastslots.evaluation.grids import SlotPictures
from fastslots.metrics import interaction_order, slot_jacobian
from fastslots.models import SlotDecoder, SlotVAE, SlotVAEConfig
from fastslots.models.broadcast import BroadcastDecoder
from fastslots.models.decoder import Decoder
from fastslots.models.slot_decoder import as_slot_decoder
from fastslots.report.explorer import explore
from fastslots.report.live import Session

SIZES = {name: value for name, value in MODEL_8.items() if name != "pixels_per_step"}


def config(**overrides) -> SlotVAEConfig:
    return SlotVAEConfig.preset("sprites-mini", **SIZES | overrides)


class Linear(SlotDecoder):
    """K x D numbers -> a linear layer -> an image, for exactly K slots; no slot map."""

    def __init__(self, config: SlotVAEConfig):
        super().__init__()
        self.to_image = nn.Linear(config.num_slots * config.slot_dim, config.channels * config.resolution**2)
        self.shape = (config.channels, config.resolution, config.resolution)

    def forward(self, slots: Tensor) -> Tensor:
        return self.to_image(slots.flatten(1)).unflatten(1, self.shape)


def ours(kind: str) -> SlotDecoder:
    torch.manual_seed(0)
    cls = {"transformer": Decoder, "broadcast": BroadcastDecoder}[kind]
    return cls(config(decoder=kind, broadcast_side=4, broadcast_channels=4)).double()


@pytest.mark.parametrize("kind", ["transformer", "broadcast"])
@pytest.mark.parametrize("subset", [False, True])
def test_generic_loss_equals_a_decoders_own(kind, subset):
    decoder = ours(kind)
    slots = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    images = torch.rand(3, 3, 8, 8, dtype=torch.float64)
    chosen = {}
    if subset:
        chosen = {"pixels": torch.randint(64, (3, 10)), "pixel_weight": torch.rand(3, 10, dtype=torch.float64)}
    variables = [slots, *decoder.parameters()]
    own = decoder.loss(slots, images, 2.0, 0.3, **chosen)
    generic = as_slot_decoder(lambda z: decoder(z)).loss(slots, images, 2.0, 0.3, **chosen)
    for name in ("total", "recon", "interaction"):
        torch.testing.assert_close(getattr(own, name), getattr(generic, name), rtol=1e-10, atol=1e-10)
    # By hand: the drawn pixels alone, each with its weight
    recon, slot_map = decoder(slots)
    error, pairs = (recon - images).square().sum(1).flatten(1), slot_map[..., 0] * slot_map[..., 1]
    if subset:
        weight = chosen["pixel_weight"]
        error = error.gather(1, chosen["pixels"]) * weight * 64 / 10
        pairs = pairs.gather(1, chosen["pixels"]) * weight
    expected = 2.0 * error.sum() / 3 + 0.3 * pairs.mean()
    assert generic.total.item() == pytest.approx(expected.item(), rel=1e-10)
    grads = [torch.autograd.grad(total, variables, allow_unused=True) for total in (own.total, expected)]
    for a, b in zip(*grads, strict=True):
        if b is not None and b.abs().max() > 1e-12:  # a key bias has no gradient, to rounding
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_a_model_decodes_all_pixels_where_a_subset_saves_nothing():
    model = SlotVAE(config(decoder="broadcast", broadcast_side=4, broadcast_channels=4))
    images, noise, pixels = torch.rand(2, 3, 8, 8), torch.zeros(2, 2, 2), torch.randint(64, (2, 5))
    some, whole = (model.training_loss(images, noise, pixels=chosen).recon for chosen in (pixels, None))
    assert torch.equal(some, whole)
    assert not torch.equal(
        model.decoder.loss(model.encode(images, noise).slots, images, 1, 1, pixels=pixels).recon, whole
    )


@pytest.mark.parametrize("changes", ["forward", "head", "components"])
def test_a_subclass_gets_no_shortcut_of_what_it_changed(changes):
    base = BroadcastDecoder if changes == "components" else Decoder
    decoder = ours("broadcast" if changes == "components" else "transformer")
    if changes == "forward":
        body = {"forward": lambda self, z: (2 * base.forward(self, z)[0], base.forward(self, z)[1])}
    elif changes == "head":

        def head(self):
            own = base.head(self)
            return own._replace(weights=[*own.weights[:-1], 2 * own.weights[-1]])

        body = {"head": head}
    else:
        body = {"components": lambda self, z: tuple(2 * part for part in base.components(self, z))}
    decoder.__class__ = type("Changed", (base,), body)
    slots, images = torch.randn(1, 2, 2).double(), torch.rand(1, 3, 8, 8).double()
    full = torch.autograd.functional.jacobian(lambda z: decoder(z)[0], slots).squeeze(4)  # [1, C, R, R, K, D]
    expected = full.abs().sum((1, 5)).permute(0, 3, 1, 2)
    torch.testing.assert_close(slot_jacobian(decoder, slots), expected)
    loss = decoder.loss(slots, images, 1.0, 0.0)
    assert loss.recon.item() == pytest.approx((decoder(slots)[0] - images).square().sum().item())


def test_a_subclass_keeps_what_it_brings_itself():
    class Own(Decoder):
        def forward(self, slots, slot_mask=None):
            return super().forward(slots, slot_mask)

        def jacobian(self, slots, request):
            return slots.new_ones(1)

    class Named(Decoder):
        def extra(self) -> str:
            return "nothing that decoding looks at"

    assert slot_jacobian(ours("transformer"), torch.zeros(1, 2, 2)).shape == (1, 2, 8, 8)
    assert Own.loss is SlotDecoder.loss and Own.jacobian is not SlotDecoder.jacobian and not Own.decodes_pixels
    assert Named.loss is Decoder.loss and Named.jacobian is Decoder.jacobian and Named.decodes_pixels


def test_a_decoder_of_forward_alone_gets_every_score_and_picture():
    """Training steps, scores of the Jacobian, grids, the explorer of a report and the live one."""
    torch.manual_seed(0)
    settings = config(alpha=0.0, jacobian_weight=0.1)
    model = SlotVAE(settings, decoder=Linear(settings))
    dataset = SpritesDataset(8, size=8)
    images = torch.stack([torch.from_numpy(dataset[i]["image"]) for i in range(4)]).permute(0, 3, 1, 2).float() / 255
    optimizer, losses = torch.optim.Adam(model.parameters(), 0.01), []
    for _ in range(20):
        optimizer.zero_grad()
        terms = model.training_loss(images, torch.zeros(4, 2, 2))
        terms.total.backward()
        optimizer.step()
        losses.append(terms.recon.item())
        assert terms.interaction == 0
    assert losses[-1] < losses[0]
    pictures = SlotPictures(model.eval(), 2)
    evaluation = evaluate(model, as_split(dataset, range(6)), batch_size=3, see=pictures.see)
    scores = evaluation.scores()
    assert {"j_ari", "jis"} <= scores.keys() and not {"fg_ari", "ari", "mbo", "miou"} & scores.keys()
    assert math.isfinite(scores["j_ari"]) and 0 <= scores["jis"] <= 1 and len(evaluation.of_images["j_ari"]) == 6
    assert [len(row) for row in pictures.tiles] == [2 + 1 + 2] * 2  # no tiles of a map
    weight = model.decoder.to_image.weight.detach().view(3, 64, 2, 2)  # C, L, K, D: the Jacobian itself
    expected = weight.abs().sum((0, 3)).T.view(1, 2, 8, 8)
    torch.testing.assert_close(slot_jacobian(model.decoder, torch.randn(1, 2, 2)), expected)
    assert math.isnan(interaction_order(model.decoder, torch.randn(1, 2, 2)).ratio)  # nothing is curved
    explored = explore(model, images, None)
    assert explored["maps"] is False and len(explored["images"]) >= 1
    session = Session(model, images[:1], "linear")
    shown = session.decode({"z": session.images[0]["z"], "shown": [True, False]})
    assert shown["maps"] == ["", ""] and shown["recon"].startswith("data:image/png")


def test_any_module_is_a_decoder_and_another_an_encoder():
    settings = config()

    class Encode(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3 * 64, 2 * 4)

        def forward(self, images):
            return self.linear(images.flatten(1)).view(-1, 2, 4)

    class WithMap(nn.Module):
        def forward(self, slots):
            image = slots.sum((1, 2)).sigmoid()[:, None, None, None].expand(-1, 3, 8, 8)
            return image, slots.sum(-1).softmax(-1)[:, None].expand(-1, 64, -1)

    model = SlotVAE(settings, Encode(), decoder := WithMap())
    assert model.decoder is decoder and not any(name.startswith("decoder") for name in model.state_dict())
    images, noise = torch.rand(2, 3, 8, 8), torch.zeros(2, 2, 2)
    whole, trained = model.loss(model(images, noise), images), model.training_loss(images, noise)
    assert torch.allclose(whole.total, trained.total) and whole.interaction > 0
    assert torch.allclose(whole.interaction, trained.interaction)
    assert model.training_loss(images, noise, pixels=torch.zeros(2, 3, dtype=torch.int64)).recon == trained.recon
    plain = config(beta=0.0)
    with pytest.raises(UserError, match=r"encoder Encode gives \[2, 2, 4\], expected \[2, 2, 2\] \(B, K, S: the slots"):
        SlotVAE(plain, Encode())(images)


def test_what_does_not_fit_is_named():
    class Other(nn.Module):
        def __init__(self, out):
            super().__init__()
            self.out = out

        def forward(self, slots):
            return self.out

    image, slot_map = torch.zeros(1, 3, 8, 8), torch.zeros(1, 64, 2)
    images, noise = torch.rand(1, 3, 8, 8), torch.zeros(1, 2, 2)
    for out, message in [
        (torch.zeros(1, 3, 8, 9), r"decoder Other gives an image \[1, 3, 8, 9\], expected \[1, 3, 8, 8\] \(B, C, R, R"),
        ((image, torch.zeros(1, 2, 64)), r"gives a slot map \[1, 2, 64\], expected \[1, 64, 2\] \(B, R·R, K"),
        (image, "decoder Other gives no slot map, so there is no interaction penalty: set alpha to 0"),
        ({"image": image}, "must give an image or \\(image, slot_map\\), got a dict"),
    ]:
        with pytest.raises(UserError, match=message):
            SlotVAE(config(), decoder=Other(out))(images, noise)
    with pytest.raises(UserError, match="Other gives no slot map"):
        SlotVAE(config(), decoder=Other(image)).training_loss(images, noise)
    SlotVAE(config(alpha=0.0), decoder=Other(image)).training_loss(images, noise)
    with pytest.raises(ValueError, match="backend 'cpu' has no kernel for the loss of BroadcastDecoder"):
        ours("broadcast").loss(noise.double(), images.double(), 1.0, 0.0, backend="cpu")
    with pytest.raises(ValueError, match=r"images has shape \[1, 3, 4, 4\]"):
        as_slot_decoder(Other((image, slot_map))).loss(noise, torch.rand(1, 3, 4, 4), 1.0, 0.0)
