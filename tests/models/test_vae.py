"""The model as a whole: its dtypes, what it refuses, and batches of no images."""

from __future__ import annotations

import pytest
import torch

from fastslots.interop import to_official
from fastslots.metrics import slot_jacobian
from fastslots.models import SlotVAE, SlotVAEConfig


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return SlotVAE(SlotVAEConfig.preset("sprites-mini", resolution=8, num_slots=3, slot_dim=16, encoder_layers=1))


def test_a_double_model_is_double_throughout(model):
    double = SlotVAE(model.config).double()
    double.load_state_dict(model.state_dict())
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    posterior = double.encode(images, torch.zeros(2, 3, 16, dtype=torch.float64))
    assert {t.dtype for t in posterior} == {torch.float64}
    near = model.encode(images.float(), torch.zeros(2, 3, 16))
    torch.testing.assert_close(near.mean.double(), posterior.mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("images", "error", "words"),
    [
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), TypeError, "images must be float"),
        (torch.zeros(2, 8, 8, 3), ValueError, r"images has shape \[2, 8, 8, 3\], expected \[B, 3, 8, 8\]"),
        (torch.zeros(2, 3, 16, 16), ValueError, r"expected \[B, 3, 8, 8\]"),
        (torch.zeros(3, 8, 8), ValueError, r"expected \[B, 3, 8, 8\]"),
    ],
)
def test_wrong_images_are_named(model, images, error, words):
    for call in (model, model.encode, model.training_loss):
        with pytest.raises(error, match=words):
            call(images)


def test_wrong_slots_and_targets_are_named(model):
    for slots in (torch.zeros(3, 16), torch.zeros(2, 3, 15)):
        with pytest.raises(ValueError, match=r"slots has shape .* expected \[B, K, 16\]"):
            model.decoder(slots)
    with pytest.raises(TypeError, match="images must be fp16, bf16, fp32 or fp64"):
        model.decoder.loss(torch.zeros(2, 3, 16), torch.zeros(2, 3, 8, 8, dtype=torch.uint8), 1.0, 1.0)


def test_no_images_no_loss(model):
    terms = model.training_loss(torch.zeros(0, 3, 8, 8))
    assert [term.item() for term in terms] == [0, 0, 0, 0]


def test_only_the_published_layout_has_official_names(model):
    with pytest.raises(ValueError, match="encoder_width"):
        to_official(model)


def test_a_deep_decoder_trains_where_the_kernels_hold_fewer_layers():
    """The limit is a backend's, not the model's: the reference takes what the C++ kernels refuse."""
    torch.manual_seed(0)
    config = SlotVAEConfig.preset("sprites-mini", resolution=8, cnn_stride=2, encoder_layers=1, decoder_layers=17)
    model = SlotVAE(config)
    slots, images = torch.randn(1, config.num_slots, config.slot_dim), torch.rand(1, 3, 8, 8)
    gradients = {}
    for backend in ("auto", "reference"):
        total = model.decoder.loss(slots, images, 1.0, 0.1, backend=backend).total
        gradients[backend] = torch.autograd.grad(total, model.decoder.norm.weight)[0]
    assert torch.equal(gradients["auto"], gradients["reference"])
    with pytest.raises(ValueError, match=r"cannot serve decoder_loss: (17 layers|not installed)"):
        model.decoder.loss(slots, images, 1.0, 0.1, backend="cpu")
    assert torch.isfinite(slot_jacobian(model.decoder, slots)).all()
