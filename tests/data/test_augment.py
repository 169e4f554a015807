"""Changes of training images: what each does, that masks follow, and that a run's follow from (seed, step, image)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import MODEL_8

from fastslots.data import SpritesDataset, to_float
from fastslots.data.augment import Augmentation
from fastslots.errors import UserError
from fastslots.runs.log import read_metrics
from fastslots.train import TrainConfig, fit

ALL = ("mirror", "crop", "colour")


@pytest.fixture(scope="module")
def scenes() -> tuple[torch.Tensor, torch.Tensor]:
    images, masks = SpritesDataset(5, 32, (2, 3)).batch(np.arange(40))
    return to_float(torch.from_numpy(images)), torch.from_numpy(masks)


def test_a_mirror_turns_about_half_of_the_images_and_their_masks(scenes):
    images, masks = scenes
    out, labels = Augmentation(("mirror",), 0)(3, images, masks)
    turned = [torch.equal(a, b.flip(-1)) for a, b in zip(out, images, strict=True)]
    assert 10 < sum(turned) < 30
    for i, is_turned in enumerate(turned):
        assert torch.equal(out[i], images[i].flip(-1) if is_turned else images[i])
        assert torch.equal(labels[i], masks[i].flip(-1) if is_turned else masks[i])


def test_a_crop_is_a_square_resized(scenes):
    """Two images that hold their own coordinates say where each pixel came from."""
    side = 32
    centres = (torch.arange(side) + 0.5) / side
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    images = torch.stack([y, x, y * 0]).expand(40, 3, side, side)
    labels = torch.arange(side * side).view(side, side).expand(40, side, side)
    out, moved = Augmentation(("crop",), 1, least_side=0.5)(1, images, labels)
    inner = out[:, :2, 4:-4, 4:-4]  # beyond the outermost centres the border's colour goes on
    steps = inner.diff(dim=-1)[:, 1].flatten(1), inner.diff(dim=-2)[:, 0].flatten(1)
    sides = torch.stack([step.mean(1) for step in steps]) * side
    assert (sides[0] - sides[1]).abs().max() < 1e-4 and (steps[0].std(1) < 1e-4).all()  # a square, evenly
    assert 0.5 <= sides.min() < 0.6 and 0.9 < sides.max() <= 1.0001
    first = out[:, :2, 16, 16] - 16.5 * sides[0, :, None] / side  # the corner: the crop lies inside the image
    assert (first > -1e-4).all() and (first + sides[0, :, None] < 1 + 1e-4).all() and first.std() > 0.05
    came_from = torch.stack([moved // side, moved % side], 1)[:, :, 4:-4, 4:-4]
    assert ((came_from + 0.5) / side - inner).abs().max() <= 0.5 / side + 1e-5  # the nearest pixel's label


def test_masks_follow_their_objects(scenes):
    _, masks = scenes
    images = (masks.float() / 4)[:, None].expand(-1, 3, -1, -1)  # a picture of the mask
    out, labels = Augmentation(("crop", "mirror"), 2)(7, images, masks)
    assert labels.dtype == masks.dtype and not torch.equal(labels, masks)
    agree = ((out[:, 0] * 4).round() == labels).float().mean()
    assert agree > 0.97  # all but pixels along edges, whose colours mix


def test_colours_turn_about_gray():
    gray, colour = torch.full((64, 3, 2, 2), 0.5), torch.rand(64, 3, 2, 2) * 0.2 + 0.3
    change = Augmentation(("colour",), 3, colours=0.25)
    plain, changed = change(1, gray)[0], change(1, colour)[0]
    assert (plain.amax(1) - plain.amin(1)).max() < 1e-6  # gray stays gray
    brightness = plain[:, 0, 0, 0] / 0.5
    assert brightness.min() > 0.75 and brightness.max() < 1.25 and brightness.std() > 0.1
    torch.testing.assert_close(changed.mean(1), colour.mean(1) * brightness[:, None, None])

    def chroma(images):  # as a complex number: its angle is the hue about the gray axis
        r, g, b = images.unbind(1)
        return torch.complex(r - (g + b) / 2, (g - b) * 3**0.5 / 2)

    ratio = chroma(changed) / chroma(colour) / brightness[:, None, None]
    torch.testing.assert_close(ratio, ratio[:, :1, :1].expand_as(ratio), rtol=1e-3, atol=1e-3)  # one turn an image
    turned, saturation = ratio[:, 0, 0].angle(), ratio[:, 0, 0].abs()
    assert turned.abs().max() < np.pi / 4 + 1e-3 and turned.min() < -0.5 and turned.max() > 0.5
    assert saturation.min() > 0.75 - 1e-3 and saturation.max() < 1.25 + 1e-3 and saturation.std() > 0.1
    bright = change(1, torch.ones(8, 3, 2, 2))[0]
    assert bright.max() <= 1 and bright.min() >= 0


def test_what_happens_follows_from_seed_step_and_image(scenes):
    images, masks = scenes
    change = Augmentation(ALL, 4)
    whole, labels = change(9, images, masks)
    part, some = change(9, images[8:20], masks[8:20], start=8)
    assert torch.equal(whole[8:20], part) and torch.equal(labels[8:20], some)
    for other in (change(10, images)[0], Augmentation(ALL, 5)(9, images)[0]):
        assert (other - whole).flatten(1).abs().amax(1).min() > 1e-3
    assert change(9, images[:0], masks[:0])[0].shape == (0, 3, 32, 32)
    nothing, same = Augmentation((), 4)(9, images, masks)
    assert nothing is images and same is masks


def test_a_run_trains_on_changed_images_and_resumes_bit_for_bit(tmp_path):
    few = dict(MODEL_8, batch_size=4, steps=4, eval_images=2, checkpoint_every=2, threads=1, data="sprites")
    plain = fit(TrainConfig.preset("sprites-mini", **few), out=tmp_path / "plain")
    config = TrainConfig.preset("sprites-mini", **few, augment="mirror, crop,colour")
    whole = fit(config, out=tmp_path / "whole")
    losses = [read_metrics(tmp_path / name / "metrics.jsonl")[0][0]["loss"] for name in ("plain", "whole")]
    assert losses[0] != losses[1]
    (tmp_path / "part").mkdir()
    for name in ("config.json", "metrics.jsonl"):
        (tmp_path / "part" / name).write_bytes((tmp_path / "whole" / name).read_bytes())
    checkpoints = tmp_path / "part" / "checkpoints"
    checkpoints.mkdir()
    saved = next((tmp_path / "whole" / "checkpoints").glob("*2.safetensors"))
    (checkpoints / saved.name).write_bytes(saved.read_bytes())
    again = fit(config, out=tmp_path / "part", resume=True)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name])
    assert any(not torch.equal(a, b) for a, b in zip(plain.model.parameters(), whole.model.parameters(), strict=True))


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"augment": "mirror,rotate"}, "augment must name mirror, crop, colour, got 'rotate'"),
        ({"augment_crop": 0.0}, "augment_crop must be above 0 and at most 1, got 0.0"),
        ({"augment_crop": 1.5}, "augment_crop must be above 0"),
        ({"augment_colour": -0.1}, "augment_colour must be from 0 to 1"),
        ({"augment": "colour", "channels": 1}, "augment colour needs images of 3 channels, got channels 1"),
    ],
)
def test_bad_settings_are_named(fields, words):
    with pytest.raises(UserError, match=words):
        TrainConfig.preset("sprites-mini", **fields)


def test_features_are_no_pictures():
    with pytest.raises(UserError, match="augment changes pictures, and this model reads features"):
        TrainConfig.preset("clevrtex", augment="mirror")
