"""slot_jacobian: the reference and C++ against forward-mode derivatives of the published decoder."""

from __future__ import annotations

import pytest
import torch
from jacobians import draw_slots, published_jacobian, relative, tiny

from fastslots.metrics import slot_jacobian
from fastslots.models import SlotVAEConfig
from fastslots.models.decoder import Decoder
from fastslots.models.decoder_jacobian import KERNEL_IMAGES
from fastslots.ops import explain
from fastslots.testing import LargestTensor

KERNELS = explain(torch.zeros(1, 1, 1), op="slot_jacobian").backend == "cpu"


@pytest.mark.parametrize("overrides", [{}, {"decoder_layers": 1}, {"decoder_layers": 3}, {"channels": 20}])
@pytest.mark.parametrize("chunk", [None, 1, 7, 60])
def test_equals_the_published_form(overrides, chunk, host_backend):
    decoder = tiny(**overrides)
    slots = draw_slots(decoder, images=3)
    jacobian = slot_jacobian(decoder, slots, chunk, backend=host_backend)
    assert jacobian.shape == (3, 3, 5, 5) and jacobian.dtype == torch.float64
    assert relative(jacobian.flatten(2), published_jacobian(decoder, slots)) < 1e-9


@pytest.mark.parametrize("preset", ["sprites", "clevr6", "sprites-mini"])
def test_presets_on_a_sample_of_pixels(preset, host_backend):
    torch.manual_seed(1)
    config = SlotVAEConfig.preset(preset, resolution=16)
    decoder = Decoder(config)
    slots = torch.randn(1, config.num_slots, config.slot_dim)
    pixels = torch.tensor([0, 17, 100, 255])
    expected = published_jacobian(decoder.double(), slots.double(), pixels)
    actual = slot_jacobian(decoder.float(), slots, backend=host_backend).flatten(2)[..., pixels]
    error = relative(actual, expected)
    print(preset, host_backend, error)
    assert actual.dtype == torch.float32
    assert error < 1e-5  # seen: 5e-7


def test_feature_maps_of_many_channels(host_backend):
    torch.manual_seed(1)
    config = SlotVAEConfig.preset("clevrtex", resolution=3, channels=50, num_slots=4, slot_dim=6, encoder_heads=1)
    decoder = Decoder(config).double()
    slots = torch.randn(1, 4, 6, dtype=torch.float64)
    jacobian = slot_jacobian(decoder, slots, backend=host_backend).flatten(2)
    assert relative(jacobian, published_jacobian(decoder, slots)) < 1e-9


def test_masked_slots_have_no_influence(host_backend):
    decoder = tiny()
    slots = draw_slots(decoder)
    mask = torch.tensor([[True, False, True], [True, True, True]])
    jacobian = slot_jacobian(decoder, slots, slot_mask=mask, backend=host_backend).flatten(2)
    assert not jacobian[0, 1].any()
    assert relative(jacobian, published_jacobian(decoder, slots, slot_mask=mask)) < 1e-9


@pytest.mark.skipif(not KERNELS, reason="no C++ kernels here")
def test_the_kernel_many_images_and_every_number_of_threads():
    """More images than one call hands over; the same bits for 1, 2 and 4 threads; a NaN comes through."""
    decoder = tiny().float()
    slots = draw_slots(decoder, images=2 * KERNEL_IMAGES + 1).float()
    before = torch.get_num_threads()
    maps = []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            maps.append(slot_jacobian(decoder, slots, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(maps[0], maps[1]) and torch.equal(maps[0], maps[2])
    assert relative(maps[0], slot_jacobian(decoder, slots, backend="reference")) < 1e-5
    slots[5, 0, 0] = torch.nan
    poisoned = slot_jacobian(decoder, slots, backend="cpu")
    assert poisoned[5].isnan().all() and not poisoned[[4, 6]].isnan().any()


def test_what_has_no_kernel_is_said():
    decoder = tiny()
    slots = draw_slots(decoder)
    with pytest.raises(ValueError, match="no kernel for slot_jacobian"):
        slot_jacobian(decoder, slots, backend="triton")
    with pytest.raises(ValueError, match="no differentiable, unreduced or traced Jacobian"):
        slot_jacobian(decoder, slots, reduction=None, backend="cpu")
    with pytest.raises(ValueError, match=r"takes a fastslots\.models Decoder, got function"):
        slot_jacobian(lambda z: decoder(z), slots, backend="cpu")


def test_no_tensor_of_all_pixels_but_the_queries_and_the_result(host_backend):
    decoder = tiny(resolution=20)
    slots = draw_slots(decoder)
    with LargestTensor() as largest:
        slot_jacobian(decoder, slots, 100, backend=host_backend)
    assert largest.elements == 20 * 20 * 12  # pixels x query_width; one channel's K·D numbers a pixel would be 21 wide
