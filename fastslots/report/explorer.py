"""The pictures that the slot explorer of a report shows, all decoded beforehand, so that a page needs no server.

Each image has one sheet of square tiles, in this order (K slots, P partner images, V values)::

    input, true objects, reconstruction, slots by map, slots by Jacobian
    for each slot k:              its map, its share of the Jacobian, the image without it
    for each partner, k and j:    the image with slot k replaced by slot j of the partner
    for each slot k and latent:   the image with that latent of the slot at each of V values

What it costs is bounded: IMAGES images, tiles of at most SIDE pixels a side (every n-th pixel of larger images,
decoded exactly: pixels are independent), PIXELS pixels in all, SHEET_BYTES bytes a sheet; on a CPU about CPU_WORK
multiplications, for which a large decoder shows fewer images and shorter walks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastslots.metrics import adjusted_rand_index, slot_jacobian
from fastslots.models import SlotVAE
from fastslots.models.jacobian import slot_share
from fastslots.models.slot_decoder import SlotDecoder
from fastslots.report.pictures import by_colour, data_uri, grey, labels, rgb

IMAGES = 6
SIDE = 64
WALKS = (
    (3, 7),
    (2, 5),
)  # latents of each slot, those that carry most, and values of each; the second where time is short
SPREAD = 2.5  # standard deviations to each side that a walk covers
PIXELS = 8_000_000
SHEET_BYTES = 400_000
CPU_WORK = 8_000_000_000_000  # multiplications: 15 to 25 s of one core at the published widths
ENCODED = 12  # images whose slots say which latents carry most
COLUMNS = 32  # tiles in a row of a sheet
DECODED_AT_ONCE = 262_144  # pixels: bounds memory on any device
FIXED, PER_SLOT = 5, 3  # tiles an image and a slot have, whatever is chosen


@dataclass(frozen=True)
class Plan:
    """How much is shown. Images swap slots within groups: of three, or of two where that costs too much."""

    images: int
    group: int
    latents: int
    values: int

    @classmethod
    def of(cls, images: int, slots: int, latents: int, pixels: int, side: int) -> Plan:
        """The largest plan of at most ``pixels`` pixels; of a single image and short walks whatever they are."""
        for count in range(min(images, IMAGES), 0, -1):
            for group in (3, 2) if count > 1 else (1,):
                for walk in WALKS[: 1 if count > 3 else None]:
                    plan = cls(count, group, min(latents, walk[0]), walk[1])
                    if count * plan.tiles(slots) * side**2 <= pixels:
                        return plan
        return cls(1, 1, min(latents, WALKS[-1][0]), WALKS[-1][1])

    def tiles(self, slots: int) -> int:
        """Of one image."""
        return FIXED + slots * (PER_SLOT + (self.group - 1) * slots + self.latents * self.values)

    def partners_of(self, image: int) -> list[int]:
        first = image - image % self.group
        return [other for other in range(first, min(first + self.group, self.images)) if other != image]


@torch.no_grad()
def explore(
    model: SlotVAE,
    images: Tensor,
    masks: Tensor | None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Everything the page's explorer needs, ready for JSON.

    images: float [B, 3, R, R] in [0, 1], the first few to show, all to encode; masks: [B, R, R] integer labels or None.
    progress: called with (images done, images). z is the posterior mean. The model should be in evaluation mode.
    """
    K, D = model.config.num_slots, model.config.slot_dim
    device = next(model.parameters()).device
    noise = torch.zeros(len(images), K, D, device=device)
    posterior = model.encode(images.to(device), noise)
    decoder, side = model.slot_decoder.thinned(_stride(images)), _thin(images).shape[-1]
    plan = Plan.of(len(images), K, D, affordable(decoder, posterior.slots[:1], side), side)
    latents = _latents(posterior.mean, posterior.std, model.config.variational, plan.latents)
    center, spread = posterior.mean.mean((0, 1)), posterior.mean.std((0, 1), correction=0).clamp_min(1e-6)
    values = center[:, None] + spread[:, None] * torch.linspace(-SPREAD, SPREAD, plan.values, device=device)  # [D, V]
    shown = posterior.slots[: plan.images]
    recon, maps, parts = views(decoder, shown)
    at_once = max(1, DECODED_AT_ONCE // recon.shape[-2:].numel())
    recon, maps, parts = map(_thin, (recon, maps, parts))
    truth = None if masks is None else _thin(masks[: plan.images]).long()
    inputs = _thin(images[: plan.images])
    without = _thin(decode(decoder, _without_each(shown, decoder.any_slots), at_once)).unflatten(0, (plan.images, K))
    entries = []
    for i in range(plan.images):
        partners = plan.partners_of(i)
        changed = torch.cat([_swapped(shown, i, partners), _walked(shown[i], latents, values)])
        tiles = [rgb(inputs[i]), *([labels(truth[i].numpy())] if truth is not None else [rgb(inputs[i]) * 0])]
        tiles += [rgb(recon[i]), by_colour(maps[i]), by_colour(parts[i])]
        for k in range(K):
            tiles += [grey(maps[i, k]), grey(parts[i, k]), rgb(without[i, k])]
        tiles += [rgb(picture) for picture in _thin(decode(decoder, changed, at_once))]
        entry = {"sheet": data_uri(_sheet(tiles), SHEET_BYTES), "partners": partners}
        entry["z"] = [[_short(z) for z in row] for row in shown[i][:, latents].tolist()]
        if truth is not None:
            entry |= _confusion(parts[i], truth[i])
        entries.append(entry)
        if progress:
            progress(i + 1, plan.images)
    return {
        "side": side,
        "columns": COLUMNS,
        "slots": K,
        "latents": latents,
        "values": [[_short(v) for v in values[d].tolist()] for d in latents],
        "images": entries,
        "masks": masks is not None,
        "maps": model.decode(shown[:1]).slot_map is not None,
    }


def affordable(decoder: SlotDecoder, slots: Tensor, side: int) -> int:
    """Pixels of tiles with ``side`` pixels a side that may be decoded; slots: [1, K, D]."""
    if slots.device.type != "cpu":
        return PIXELS
    return min(PIXELS, CPU_WORK // max(decoder.multiplications(slots), 1) * side**2)


def views(decoder: SlotDecoder, slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """slots [B, K, D] -> recon [B, 3, R, R], slot maps and shares of the Jacobian [B, K, R, R] in [0, 1], on the CPU.

    Maps of a decoder that has none are zero.
    """
    recon, slot_map = decoder.decode(slots)
    parts = slot_share(slot_jacobian(decoder, slots)).cpu()
    if slot_map is None:
        return recon.cpu(), torch.zeros_like(parts), parts
    return recon.cpu(), slot_map.transpose(1, 2).unflatten(-1, recon.shape[2:]).cpu() / decoder.heads, parts


def decode(decoder: SlotDecoder, slots: Tensor, at_once: int) -> Tensor:
    """slots [B, K, D] -> images [B, 3, R, R] on the CPU, a bounded number at once."""
    return torch.cat([decoder.decode(part).recon.cpu() for part in slots.split(at_once)])


def _stride(images: Tensor) -> int:
    """Every how many pixels of [..., R, R] are shown, so that at most SIDE x SIDE are left."""
    return -(-images.shape[-1] // SIDE)


def _thin(images: Tensor) -> Tensor:
    """What is shown of [..., R, R]; what is thin stays as it is."""
    stride = _stride(images)
    return images[..., ::stride, ::stride].cpu()


def _latents(mean: Tensor, std: Tensor, variational: bool, count: int) -> list[int]:
    """The latents whose means vary most from slot to slot, in units of their posterior noise where there is one."""
    signal = mean.var((0, 1), correction=0)
    if variational:
        signal = signal / std.square().mean((0, 1)).clamp_min(1e-12)
    return sorted(signal.topk(count).indices.tolist())


def _without_each(slots: Tensor, any_slots: bool) -> Tensor:
    """[B, K, D] -> [B·K, K − 1, D], one slot left out in turn; where a decoder needs all K (or there is one alone),
    [B·K, K, D] with that slot at zero, the prior's mean."""
    B, K, D = slots.shape
    if K == 1 or not any_slots:
        return (slots[:, None] * ~torch.eye(K, dtype=torch.bool, device=slots.device)[..., None]).flatten(0, 1)
    keep = ~torch.eye(K, dtype=torch.bool, device=slots.device)
    return slots[:, None].expand(B, K, K, D)[:, keep].reshape(B * K, K - 1, D)


def _swapped(slots: Tensor, image: int, partners: list[int]) -> Tensor:
    """[P·K·K, K, D]: for each partner, k and j, the image's slots with k replaced by the partner's j."""
    _, K, D = slots.shape
    out = slots[image].repeat(len(partners), K, K, 1, 1)
    for p, partner in enumerate(partners):
        for k in range(K):
            out[p, k, :, k] = slots[partner]
    return out.reshape(-1, K, D)


def _walked(slots: Tensor, latents: list[int], values: Tensor) -> Tensor:
    """slots [K, D] -> [K·len(latents)·V, K, D]"""
    K, D = slots.shape
    out = slots.repeat(K, len(latents), values.shape[1], 1, 1)
    for k in range(K):
        for n, latent in enumerate(latents):
            out[k, n, :, k, latent] = values[latent]
    return out.reshape(-1, K, D)


def _sheet(tiles: list[np.ndarray]) -> np.ndarray:
    side, rows = len(tiles[0]), -(-len(tiles) // COLUMNS)
    sheet = np.zeros((rows * COLUMNS, side, side, 3), np.uint8)
    sheet[: len(tiles)] = tiles
    return sheet.reshape(rows, COLUMNS, side, side, 3).swapaxes(1, 2).reshape(rows * side, COLUMNS * side, 3)


def _confusion(shares: Tensor, truth: Tensor) -> dict[str, Any]:
    """For each true object, the part of its pixels where each slot has the largest share of the Jacobian."""
    owner = shares.argmax(0)
    names = truth.unique().tolist()
    rows = [torch.bincount(owner[truth == name], minlength=len(shares)) for name in names]
    parts = [[_short(n) for n in (row / row.sum()).tolist()] for row in rows]
    agreement = adjusted_rand_index(truth[None], owner[None], foreground_only=True)
    return {"objects": names, "confusion": parts, "j_ari": _short(agreement.item())}


def _short(value: float) -> float:
    return float(f"{value:.4g}")
