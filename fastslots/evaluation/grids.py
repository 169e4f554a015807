"""Pictures of what the slots hold: one row an image, columns input, reconstruction, masks, maps, Jacobians."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastslots.metrics import slot_jacobian
from fastslots.models import SlotVAE
from fastslots.models.jacobian import slot_share
from fastslots.models.outputs import SlotVAEOutput
from fastslots.report.pictures import by_colour, grey, rgb

GAP = 2
SIDE = 96  # small images are enlarged to at least this


class SlotPictures:
    """The first ``room`` images of an evaluation, as it saw them: nothing is computed twice.

    Rows of ``tiles``: input, reconstruction, slots by colour (map, then Jacobian), each slot's map, each slot's share
    of the Jacobian; uint8 [R, R, 3]. Of a decoder without a slot map, its tiles are left out.
    """

    def __init__(self, model: SlotVAE, room: int):
        self._model, self._room = model, room
        self.tiles: list[list[np.ndarray]] = []

    @torch.no_grad()
    def see(self, images: Tensor, result: SlotVAEOutput, jacobian: Tensor | None) -> None:
        """What ``evaluate`` tells after each batch."""
        images = images[: self._room - len(self.tiles)]
        if not len(images):
            return
        n, R = len(images), images.shape[-1]
        pictures = []  # [n, K, R, R] each, in [0, 1]
        if result.slot_map is not None:
            maps = result.slot_map[:n].transpose(1, 2).unflatten(-1, (R, R)).cpu()
            pictures.append(maps / self._model.slot_decoder.heads)
        jacobian = slot_jacobian(self._model.decoder, result.slots[:n]) if jacobian is None else jacobian[:n]
        pictures.append(slot_share(jacobian).cpu())
        for i in range(n):
            row = [rgb(images[i]), rgb(result.recon[i]), *(by_colour(slots[i]) for slots in pictures)]
            self.tiles.append(row + [grey(values) for slots in pictures for values in slots[i]])

    def grid(self) -> Image.Image:
        """One picture of all rows."""
        rows = [_join([_enlarge(tile) for tile in row], axis=1) for row in self.tiles]
        return Image.fromarray(_join(rows, axis=0))


def _enlarge(tile: np.ndarray) -> np.ndarray:
    factor = max(1, -(-SIDE // tile.shape[0]))
    return tile.repeat(factor, 0).repeat(factor, 1)


def _join(parts: list[np.ndarray], axis: int) -> np.ndarray:
    shape = list(parts[0].shape)
    shape[axis] = GAP
    gap = np.full(shape, 255, np.uint8)
    return np.concatenate([piece for part in parts for piece in (part, gap)][:-1], axis)
