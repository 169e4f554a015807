"""The tiled decoder loss equals the untiled one, in value and in every gradient, and keeps autograd's promises."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

from fastslots.models import SlotVAE, SlotVAEConfig
from fastslots.ops import backends, interaction_penalty
from fastslots.ops.decoder_loss import _loss, decoder_loss, reference_decoder_loss
from fastslots.records import FoldedDecoder, LossInputs, QueryMlp
from fastslots.testing import assert_close


def tiny(**overrides) -> SlotVAE:
    torch.manual_seed(0)
    config = SlotVAEConfig.preset(
        "sprites-mini", resolution=12, num_slots=3, slot_dim=16, encoder_layers=1, **overrides
    )
    return SlotVAE(config).double()


def inputs_of(model: SlotVAE, slots, images, **overrides) -> LossInputs:
    decoder = model.decoder
    target = images.flatten(2).transpose(1, 2)
    values = dict(pixel_weight=None, slot_mask=None, recon_weight=0.7, interaction_weight=1.3) | overrides
    return LossInputs(FoldedDecoder(decoder.queries(), decoder.layers(slots), decoder.head()), target, **values)


@pytest.fixture
def setup():
    model = tiny()
    slots = torch.randn(2, 3, 16, dtype=torch.float64, requires_grad=True)
    return model, slots, torch.rand(2, 3, 12, 12, dtype=torch.float64)


@pytest.mark.parametrize("rows", [1, 50, 10_000])
@pytest.mark.parametrize("weighted", [False, True])
def test_tiles_add_up(setup, rows, weighted):
    model, slots, images = setup
    weight = torch.rand(2, 144, dtype=torch.float64) if weighted else None
    inputs = inputs_of(model, slots, images, pixel_weight=weight)
    tensors = inputs.tensors()
    recon, pairs, grads = reference_decoder_loss(inputs, list(tensors), rows=rows)
    expected = _loss(inputs)
    torch.testing.assert_close((recon, pairs), tuple(t.detach() for t in expected))
    expected_grads = torch.autograd.grad(0.7 * expected[0] + 1.3 * expected[1], list(tensors.values()))
    for name, expected_grad in zip(tensors, expected_grads, strict=True):
        assert_close(grads[name], expected_grad, 1e-10, name)


def test_gradients_through_the_model(setup):
    model, slots, images = setup
    parameters = [slots, *model.decoder.parameters()]
    terms = model.decoder.loss(slots, images, 0.7, torch.tensor(1.3, dtype=torch.float64))
    tiled = torch.autograd.grad(terms.total, parameters)
    recon, slot_map = model.decoder(slots)
    error = (recon - images).square().sum() / 2
    untiled = torch.autograd.grad(0.7 * error + 1.3 * interaction_penalty(slot_map), parameters)
    torch.testing.assert_close(terms.recon, error.detach())
    assert not terms.recon.requires_grad and not terms.interaction.requires_grad
    for a, b in zip(tiled, untiled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("images", [1, 9])
def test_queries_made_in_the_tile_are_the_same_queries(backend, images):
    """Loss and all gradients as with queries made before; ragged tiles, parts of the pixels and of the images."""
    if backend == "cpu":
        pytest.importorskip("fastslots.kernels.cpu_backend", reason="this installation has no C++ module")
    model = tiny()
    slots, pictures = torch.randn(images, 3, 16).double().requires_grad_(), torch.rand(images, 3, 12, 12).double()
    weight = torch.rand(images, 144).double()
    given = inputs_of(model, slots, pictures, pixel_weight=weight)
    maps = [m for m in model.decoder.query_mlp if isinstance(m, torch.nn.Linear)]
    mlp = QueryMlp(model.decoder.position_code, [m.weight for m in maps], [m.bias for m in maps])
    made = replace(given, decoder=given.decoder._replace(queries=mlp))
    parameters = [slots, *model.decoder.parameters()]
    terms = [decoder_loss(inputs, 1.0, backend) for inputs in (made, given)]
    torch.testing.assert_close(terms[0].recon, terms[1].recon)
    torch.testing.assert_close(terms[0].interaction, terms[1].interaction)
    own, expected = (torch.autograd.grad(t.total, parameters, retain_graph=True) for t in terms)
    for a, b in zip(own, expected, strict=True):
        assert_close(a, b, 1e-12)
    for p in model.decoder.query_mlp.parameters():  # not asked for: none is made, the others stay
        p.requires_grad_(False)
    folded_again = made.decoder._replace(layers=model.decoder.layers(slots))
    frozen = decoder_loss(replace(made, decoder=folded_again), 1.0, backend)
    assert_close(torch.autograd.grad(frozen.total, slots)[0], own[0], 1e-12)
    with torch.no_grad():
        torch.testing.assert_close(decoder_loss(made, 1.0, backend).recon, terms[0].recon)


def test_made_queries_in_16_bits_and_under_autocast():
    model = tiny().float()
    slots, pictures = torch.randn(2, 3, 16), torch.rand(2, 3, 12, 12)
    parameters = list(model.decoder.query_mlp.parameters())
    whole = torch.autograd.grad(model.decoder.loss(slots, pictures, 0.7, 1.3).total, parameters)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = torch.autograd.grad(model.decoder.loss(slots, pictures, 0.7, 1.3).total, parameters)
    for a, b in zip(narrow, whole, strict=True):
        assert_close(a, b, 0.1)


def test_pixels_of_each_image_have_their_queries():
    """Few pixels have their own rows of the MLP, many are picked out of all of them: the same queries."""
    decoder = tiny().decoder
    for count in (5, 200):
        pixels = torch.randint(144, (3, count))
        torch.testing.assert_close(decoder._queries_at(pixels), decoder.queries()[0][pixels])


def test_what_needs_no_gradient_costs_none(setup):
    model, slots, images = setup
    inputs = inputs_of(model, slots.detach(), images)
    last = list(inputs.tensors())[-1]
    assert list(reference_decoder_loss(inputs, [last]).grads) == [last]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_what_needs_no_gradient_costs_none_of_a_backend(backend, setup, monkeypatch):
    """Autograd tells of an argument that it requires a gradient also where gradients are off."""
    model, slots, images = setup
    asked: list[list[str]] = []
    place, name = sys.modules[decoder_loss.__module__], "reference_decoder_loss"
    if backend == "cpu":
        place, name = backends.load("cpu"), "decoder_loss"
    run = getattr(place, name)

    def recorded(inputs, need, *more):
        asked.append(list(need))
        return run(inputs, need, *more)

    monkeypatch.setattr(place, name, recorded)
    inputs = inputs_of(model, slots, images)
    expected = decoder_loss(inputs, backend=backend)
    assert asked.pop() == list(inputs.tensors())
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            found = decoder_loss(inputs, backend=backend)
        assert asked.pop() == [] and not found.total.requires_grad
        torch.testing.assert_close(found.total, expected.total.detach())


def test_loss_scale_leaves_the_gradient_as_it_is(setup):
    model, slots, images = setup
    plain = torch.autograd.grad(model.decoder.loss(slots, images, 1.0, 1.0).total, slots)[0]
    terms = model.decoder.loss(slots, images, 1.0, 1.0, grad_scale=1024.0)
    scaled = torch.autograd.grad(terms.total * 1024.0, slots)[0]
    torch.testing.assert_close(scaled, plain * 1024.0)


def test_second_backward_and_double_backward_raise(setup):
    model, slots, images = setup
    terms = model.decoder.loss(slots, images, 1.0, 1.0)
    terms.total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="already differentiated"):
        terms.total.backward()
    total = model.decoder.loss(slots, images, 1.0, 1.0).total
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(total, slots, create_graph=True)


def test_pixel_subsets_are_unbiased(setup):
    """The mean over every single pixel, drawn with its probability, is the loss of all pixels."""
    model, slots, images = setup
    everything = model.decoder.loss(slots, images, 1.0, 1.0)
    probability = torch.rand(144, dtype=torch.float64) + 0.1
    probability /= probability.sum()
    recon = interaction = 0.0
    with torch.no_grad():
        for pixel in range(144):
            index = torch.full((2, 1), pixel)
            weight = torch.full((2, 1), 1 / (144 * probability[pixel].item()), dtype=torch.float64)
            terms = model.decoder.loss(slots, images, 1.0, 1.0, pixels=index, pixel_weight=weight)
            recon += probability[pixel] * terms.recon
            interaction += probability[pixel] * terms.interaction
    torch.testing.assert_close(recon, everything.recon)
    torch.testing.assert_close(interaction, everything.interaction)


def test_forward_mode_and_compile_are_right(setup):
    model, slots, images = setup
    loss = lambda z: model.decoder.loss(z, images, 1.0, 1.0).total  # noqa: E731
    tangent = torch.randn_like(slots)
    _, derivative = torch.func.jvp(loss, (slots.detach(),), (tangent,))
    gradient = torch.autograd.grad(loss(slots), slots)[0]
    torch.testing.assert_close(derivative, (gradient * tangent).sum())
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(slots), slots)[0], gradient)


def test_no_images_no_loss():
    model = tiny()
    terms = model.decoder.loss(torch.zeros(0, 3, 16).double(), torch.zeros(0, 3, 12, 12).double(), 1.0, 1.0)
    assert terms.total.item() == 0


PIXELS = torch.zeros(2, 5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        (
            {"images": torch.zeros(2, 3, 12, 11)},
            ValueError,
            r"images has shape \[2, 3, 12, 11\], expected \[2, 3, 12, 12\]",
        ),
        ({"slot_mask": torch.ones(2, 3)}, TypeError, "slot_mask must be a bool tensor"),
        ({"slot_mask": torch.ones(1, 3) > 0}, ValueError, r"slot_mask has shape \[1, 3\], expected \[2, 3\]"),
        ({"pixels": PIXELS[:1]}, ValueError, r"pixels has shape \[1, 5\], expected \[2, 5\]"),
        ({"pixels": PIXELS[:, :0]}, ValueError, "pixels must be int64"),
        ({"pixels": PIXELS.int()}, ValueError, "pixels must be int64"),
        ({"pixel_weight": torch.ones(2, 1)}, ValueError, r"pixel_weight has shape \[2, 1\], expected \[2, 144\]"),
        ({"pixels": PIXELS, "pixel_weight": torch.ones(2, 1)}, ValueError, r"expected \[2, 5\]"),
        ({"interaction_weight": torch.ones((), requires_grad=True)}, ValueError, "interaction_weight.detach()"),
        ({"recon_weight": torch.ones((), requires_grad=True)}, ValueError, "recon_weight.detach()"),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_wrong_arguments_are_named(setup, wrong, error, words, backend):
    """By every backend alike: what one would broadcast another would read out of bounds."""
    model, slots, images = setup
    arguments = {"images": images, "recon_weight": 1.0, "interaction_weight": 1.0} | wrong
    with pytest.raises(error, match=words):
        model.decoder.loss(slots, backend=backend, **arguments)


def test_same_bits_twice(setup):
    model, slots, images = setup
    first, second = (
        torch.autograd.grad(model.decoder.loss(slots, images, 1.0, 1.0).total, list(model.decoder.parameters()))
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_pixels_subset_has_the_same_bits_every_time(threads):
    """Pixels that many images have drawn, whose gradients meet in the queries: no order but one may add them."""
    torch.manual_seed(0)
    decoder = SlotVAE(SlotVAEConfig.preset("sprites-mini")).decoder
    slots, images, pixels = torch.randn(32, 4, 32), torch.rand(32, 3, 32, 32), torch.randint(1024, (32, 64))
    first, *others = (
        torch.autograd.grad(decoder.loss(slots, images, 1.0, 1.0, pixels=pixels).total, list(decoder.parameters()))
        for _ in range(6)
    )
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def test_decoder_loss_is_public_through_tensors(setup):
    model, slots, images = setup
    terms = decoder_loss(inputs_of(model, slots, images))
    terms.total.backward()
    assert slots.grad is not None and slots.grad.any()
