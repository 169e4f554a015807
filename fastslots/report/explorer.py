"""The pictures that the slot explorer of a report shows, all decoded beforehand, so that a page needs no server.

Each image has one sheet of square tiles, in this order (K slots, P partner images, V values)::

    input, true objects, reconstruction, slots by map, slots by Jacobian
    for each slot k:              its map, its share of the Jacobian, the image without it
    for each partner, k and j:    the image with slot k replaced by slot j of the partner
    for each slot k and latent:   the image with that latent of the slot at each of V values

What it costs is bounded: IMAGES images, tiles of at most SIDE pixels a side (every n-th pixel of larger images,
decoded exactly: pixels are independent), PIXELS pixels in all, SHEET_BYTES bytes a sheet.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from fastslots.metrics import adjusted_rand_index, fg_ari, slot_jacobian
from fastslots.models import SlotVAE
from fastslots.models.decoder import Decoder
from fastslots.report.pictures import by_colour, data_uri, grey, labels, rgb

IMAGES = 6
SIDE = 64
LATENTS = 3  # of each slot, those that carry most
VALUES = 7
SPREAD = 2.5  # standard deviations to each side that a walk covers
PIXELS = 8_000_000
SHEET_BYTES = 400_000
SCORED = 24  # images in the histogram of scores
COLUMNS = 32  # tiles in a row of a sheet
DECODED_AT_ONCE = 262_144  # pixels: bounds memory on any device
FIXED, PER_SLOT = 5, 3  # tiles an image and a slot have, whatever is chosen


@dataclass(frozen=True)
class Plan:
    """How many images are shown. They swap slots within groups: of three, or of two where that costs too much."""

    images: int
    group: int

    @classmethod
    def of(cls, images: int, slots: int, latents: int, side: int) -> Plan:
        """The largest plan within PIXELS; a single image always fits."""
        for count in range(min(images, IMAGES), 1, -1):
            for group in (3, 2):
                tiles = FIXED + slots * (PER_SLOT + (group - 1) * slots + latents * VALUES)
                if count * tiles * side**2 <= PIXELS:
                    return cls(count, group)
        return cls(1, 1)

    def partners_of(self, image: int) -> list[int]:
        first = image - image % self.group
        return [other for other in range(first, min(first + self.group, self.images)) if other != image]


@torch.no_grad()
def explore(model: SlotVAE, images: Tensor, masks: Tensor | None) -> dict[str, Any]:
    """Everything the page's explorer needs, ready for JSON.

    images: float [B, 3, R, R] in [0, 1], the first few to show, all to score; masks: [B, R, R] integer labels or None.
    z is the posterior mean. The model should be in evaluation mode.
    """
    K, D = model.config.num_slots, model.config.slot_dim
    device = next(model.parameters()).device
    noise = torch.zeros(len(images), K, D, device=device)
    posterior = model.encode(images.to(device), noise)
    decoder = thinned(model.decoder)
    latents = _latents(posterior.mean, posterior.std, model.config.variational)
    center, spread = posterior.mean.mean((0, 1)), posterior.mean.std((0, 1), correction=0).clamp_min(1e-6)
    values = center[:, None] + spread[:, None] * torch.linspace(-SPREAD, SPREAD, VALUES, device=device)  # [D, VALUES]
    recon, maps, shares = map(_thin, views(decoder, posterior.slots, model.config.decoder_heads))
    plan = Plan.of(len(images), K, len(latents), recon.shape[-1])
    shown = posterior.slots[: plan.images]
    truth = None if masks is None else _thin(masks).long()
    inputs = _thin(images[: plan.images])
    without = _thin(decode(decoder, _without_each(shown))).unflatten(0, (plan.images, K))
    entries = []
    for i in range(plan.images):
        partners = plan.partners_of(i)
        changed = torch.cat([_swapped(shown, i, partners), _walked(shown[i], latents, values)])
        tiles = [rgb(inputs[i]), *([labels(truth[i].numpy())] if truth is not None else [rgb(inputs[i]) * 0])]
        tiles += [rgb(recon[i]), by_colour(maps[i]), by_colour(shares[i])]
        for k in range(K):
            tiles += [grey(maps[i, k]), grey(shares[i, k]), rgb(without[i, k])]
        tiles += [rgb(picture) for picture in _thin(decode(decoder, changed))]
        entry = {"sheet": data_uri(_sheet(tiles), SHEET_BYTES), "partners": partners}
        entry["z"] = [[_short(z) for z in row] for row in shown[i][:, latents].tolist()]
        if truth is not None:
            entry |= _confusion(shares[i], truth[i])
        entries.append(entry)
    return {
        "side": recon.shape[-1],
        "columns": COLUMNS,
        "slots": K,
        "latents": latents,
        "values": [[_short(v) for v in values[d].tolist()] for d in latents],
        "images": entries,
        "masks": masks is not None,
        "scores": {} if truth is None else _scores(maps, shares, truth),
    }


def views(decoder: Any, slots: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """slots [B, K, D] -> recon [B, 3, R, R], slot maps and shares of the Jacobian [B, K, R, R] in [0, 1], on the CPU.

    heads: what the slot map adds up to at each pixel.
    """
    recon, slot_map = decoder(slots)
    maps = slot_map.transpose(1, 2).unflatten(-1, (decoder.resolution, decoder.resolution)) / heads
    jacobian = slot_jacobian(decoder, slots)
    shares = jacobian / jacobian.sum(1, keepdim=True).clamp_min(torch.finfo(jacobian.dtype).tiny)
    return recon.cpu(), maps.cpu(), shares.cpu()


def thinned(decoder: Any) -> Any:
    """A copy that decodes every n-th pixel in each direction, so that at most SIDE are left.

    Between the pixels that it was trained on a decoder shows artefacts: its highest octave alternates from one to the
    next. So pixels are left out, not moved. A convolutional decoder needs them all and is returned as it is.
    """
    stride = -(-decoder.resolution // SIDE)
    if stride == 1 or not isinstance(decoder, Decoder):
        return decoder
    thin = copy.deepcopy(decoder)
    code = cast(Tensor, decoder.position_code).unflatten(0, (decoder.resolution, decoder.resolution))[
        ::stride, ::stride
    ]
    thin.resolution, thin.position_code = code.shape[0], code.flatten(0, 1)
    return thin


def decode(decoder: Any, slots: Tensor) -> Tensor:
    """slots [B, K, D] -> images [B, 3, R, R] on the CPU, a bounded number of pixels at once."""
    size = max(1, DECODED_AT_ONCE // decoder.resolution**2)
    return torch.cat([decoder(part)[0].cpu() for part in slots.split(size)])


def _thin(images: Tensor) -> Tensor:
    """Every n-th pixel of [..., R, R], so that at most SIDE x SIDE are left; what is thin stays as it is."""
    stride = -(-images.shape[-1] // SIDE)
    return images[..., ::stride, ::stride].cpu()


def _latents(mean: Tensor, std: Tensor, variational: bool) -> list[int]:
    """The latents whose means vary most from slot to slot, in units of their posterior noise where there is one."""
    signal = mean.var((0, 1), correction=0)
    if variational:
        signal = signal / std.square().mean((0, 1)).clamp_min(1e-12)
    return sorted(signal.topk(min(LATENTS, len(signal))).indices.tolist())


def _without_each(slots: Tensor) -> Tensor:
    """[B, K, D] -> [B·K, max(K − 1, 1), D], one slot left out in turn (a single slot is set to zero)."""
    B, K, D = slots.shape
    if K == 1:
        return torch.zeros_like(slots)
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


def _scores(maps: Tensor, shares: Tensor, truth: Tensor) -> dict[str, list[float]]:
    """J-ARI and FG-ARI of each image, on the pixels that are left."""
    by_jacobian = adjusted_rand_index(truth, shares.argmax(1), foreground_only=True)
    by_map = fg_ari(maps.flatten(2).transpose(1, 2), truth)
    return {name: [_short(s) for s in v.tolist()] for name, v in (("j_ari", by_jacobian), ("fg_ari", by_map))}


def _short(value: float) -> float:
    return float(f"{value:.4g}")
