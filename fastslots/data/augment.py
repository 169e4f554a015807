"""Changes of training images that leave objects objects: a mirror, a crop that is resized, other colours.

What happens to image i of a step follows from (seed, step, i) alone, so a run resumes exactly and is the same on any
number of processes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastslots.config.run import TrainConfig
from fastslots.data.sampling import Purpose, random_u64

_DRAWS = 7  # random numbers an image: mirror, side, y, x, hue, saturation, brightness


@dataclass(frozen=True)
class Augmentation:
    """Changes of a step's images, and of their masks in the same way.

    kinds: applied in this order whatever theirs is; none leaves images as they are.

    - mirror: left and right change places, in half of the images.
    - crop: a square whose side is a share of the image's, uniform in [``least_side``, 1], at a uniform place, resized
      to the image's side (images bilinearly, masks to the nearest pixel).
    - colour: with a = ``colours`` and each u uniform in [-1, 1], the hue is turned by 180·a·u degrees about the gray
      axis, the distance from gray times 1 + a·u, all times 1 + a·u; then clipped to [0, 1].

    seed: of the run.
    """

    kinds: tuple[str, ...]
    seed: int
    least_side: float = 0.7
    colours: float = 0.2

    @classmethod
    def of(cls, config: TrainConfig) -> Augmentation:
        return cls(config.augmentations(), config.seed, config.augment_crop, config.augment_colour)

    def __call__(
        self, step: int, images: Tensor, masks: Tensor | None = None, start: int = 0
    ) -> tuple[Tensor, Tensor | None]:
        """Images float [b, C, R, R] in [0, 1] (C = 3 for colour) and masks [b, R, R] -> the same shapes and types.

        start: the first image's number in the step's global batch. Nothing waits for the device.
        """
        if not self.kinds or not len(images):
            return images, masks
        counters = np.arange(start, start + len(images))[:, None], np.arange(_DRAWS)
        bits = random_u64(self.seed, step, Purpose.AUGMENTATION, *counters)
        drawn = torch.from_numpy((bits >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24))  # [0, 1)
        u = drawn.to(images.device, non_blocking=True)
        if "mirror" in self.kinds:
            turned = u[:, 0] < 0.5
            images = torch.where(turned[:, None, None, None], images.flip(-1), images)
            masks = None if masks is None else torch.where(turned[:, None, None], masks.flip(-1), masks)
        if "crop" in self.kinds:
            images, masks = _cropped(images, masks, self.least_side, u[:, 1:4])
        if "colour" in self.kinds:
            images = _recoloured(images, self.colours, 2 * u[:, 4:] - 1)
        return images, masks


def _cropped(images: Tensor, masks: Tensor | None, least: float, u: Tensor) -> tuple[Tensor, Tensor | None]:
    """u [b, 3] in [0, 1): the side, and the corner's y and x among those that there are."""
    side = least + (1 - least) * u[:, :1]
    corner = (1 - side) * u[:, 1:]  # [b, 2], shares of the image's side
    size = images.shape[-1]
    centres = (torch.arange(size, device=images.device) + 0.5) / size
    places = corner[:, :, None] + side[:, :, None] * centres  # [b, 2, R]: rows, columns
    y, x = places.unbind(1)
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), -1)
    out = F.grid_sample(images, (2 * grid - 1).to(images.dtype), padding_mode="border", align_corners=False)
    if masks is not None:
        rows, columns = (places * size).long().clamp_(0, size - 1).unbind(1)
        image = torch.arange(len(masks), device=masks.device)[:, None, None]
        masks = masks[image, rows[:, :, None], columns[:, None, :]]
    return out, masks


def _recoloured(images: Tensor, strength: float, u: Tensor) -> Tensor:
    """u [b, 3] in [-1, 1): hue, saturation, brightness; all three are one matrix an image."""
    angle = math.pi * strength * u[:, 0, None, None]
    saturation, brightness = ((1 + strength * u[:, i])[:, None, None] for i in (1, 2))
    one = torch.eye(3, device=u.device)
    gray = torch.full_like(one, 1 / 3)
    across = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]], device=u.device) / math.sqrt(3)
    turned = angle.cos() * (one - gray) + angle.sin() * across  # what is not gray, turned about the gray axis
    matrix = brightness * (gray + saturation * turned)
    return (matrix.to(images.dtype) @ images.flatten(2)).view_as(images).clamp(0, 1)
