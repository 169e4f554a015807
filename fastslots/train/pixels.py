"""Which pixels of an image a step decodes: probabilities that look where there is something to learn."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

FOREGROUND_DISTANCE = 0.05
"""A pixel is foreground where any channel is this far from the median of the image's border."""


def pixel_probabilities(images: Tensor, sampling: str) -> Tensor:
    """Probability of drawing each pixel: images [B, C, R, R] -> fp32 [B, R·R], every one above 0, rows that sum to 1.

    sampling: "foreground": half uniform, half over the foreground; "edges": half over the edges, half as
    "foreground". A half without a pixel to go to goes to the others. Any such probabilities leave the loss unbiased,
    for its terms are weighted by their inverse.
    """
    foreground = foreground_pixels(images)
    probability = _half_over(foreground, torch.full_like(foreground, 1 / foreground.shape[1], dtype=torch.float32))
    return _half_over(edge_pixels(images), probability) if sampling == "edges" else probability


def drawn_pixels(images: Tensor, sampling: str, words: Tensor) -> tuple[Tensor, Tensor | None]:
    """Pixels drawn by random words, int64 [B, P], with the probabilities of ``pixel_probabilities``.

    images: [B, C, R, R]. Returns pixels, int64 [B, P], and their weights 1 / (L · probability), fp32 [B, P]; None where
    ``sampling`` is "uniform". Two low bits of a word choose between edges, foreground and all pixels, its upper half
    one of those: whole numbers, so that the order of a sum changes nothing.
    """
    L = images.shape[2:].numel()
    if sampling == "uniform":
        return uniform_of(words, L), None
    foreground = foreground_pixels(images)
    chosen = [edge_pixels(images), foreground] if sampling == "edges" else [foreground]
    ranks = torch.cat(chosen, 1).cumsum(1, dtype=torch.int32)
    ends = ranks[:, L - 1 :: L]  # [B, 1 or 2]
    counts = ends.diff(dim=1, prepend=torch.zeros_like(ends[:, :1]))
    of, before = torch.full_like(words, L), torch.full_like(words, -1)  # how many to choose from, those before them
    for i in reversed(range(len(chosen))):
        count = counts[:, i : i + 1]
        taken = ((words >> i) & 1).bool() & (count > 0)
        of, before = torch.where(taken, count, of), torch.where(taken, ends[:, i : i + 1] - count, before)
    nth, uniform = uniform_of(words, of), before < 0
    places = torch.searchsorted(ranks, (nth + before + 1).int())
    pixels = torch.where(uniform, nth, places % L)
    probability = torch.full_like(pixels, 1 / L, dtype=torch.float32)
    for i in reversed(range(len(chosen))):
        count, here = counts[:, i : i + 1], chosen[i].gather(1, pixels)
        probability = torch.where(count > 0, 0.5 * probability + 0.5 * here / count.clamp_min(1), probability)
    return pixels, 1 / (L * probability)


def uniform_of(words: Tensor, count: int | Tensor) -> Tensor:
    """Whole numbers from range(count), int64, of the upper half of random words; biased by less than count / 2^32."""
    return ((words >> 32) & 0xFFFFFFFF) * count >> 32


def _half_over(chosen: Tensor, rest: Tensor) -> Tensor:
    """Half of the probability evenly over the chosen pixels, bool [B, L]; as ``rest`` alone where there are none."""
    share = chosen.float()
    count = share.sum(1, keepdim=True)
    return torch.where(count > 0, 0.5 * rest + 0.5 * share / count.clamp_min(1), rest)


def foreground_pixels(images: Tensor) -> Tensor:
    """[B, C, R, R] -> bool [B, R·R]: pixels unlike the border, a guess that only steers which pixels are drawn."""
    border = torch.cat([images[:, :, 0], images[:, :, -1], images[:, :, :, 0], images[:, :, :, -1]], -1)
    # A sort gives the median of each channel: torch.median of rows is not deterministic on GPUs.
    background = border.sort(-1).values[..., (border.shape[-1] - 1) // 2, None, None]
    return ((images - background).abs().amax(1) > FOREGROUND_DISTANCE).flatten(1)


def edge_pixels(images: Tensor) -> Tensor:
    """[B, C, R, R] -> bool [B, R·R]: pixels whose 3x3 spans more than twice the foreground distance in a channel."""
    highest = lowest = images
    for axis in (2, 3):  # the largest of three rows, then of three columns; slices, since pooling is slow on CPUs
        highest, lowest = _over_three(highest, axis, torch.maximum), _over_three(lowest, axis, torch.minimum)
    return ((highest - lowest).amax(1) > 2 * FOREGROUND_DISTANCE).flatten(1)


def _over_three(x: Tensor, axis: int, best: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """``best`` of each entry and its two neighbours along an axis; at the border of the one there is."""
    size, out = x.shape[axis], x.clone()
    out.narrow(axis, 1, size - 1).copy_(best(x.narrow(axis, 1, size - 1), x.narrow(axis, 0, size - 1)))
    before = out.narrow(axis, 0, size - 1)
    before.copy_(best(before, x.narrow(axis, 1, size - 1)))
    return out
