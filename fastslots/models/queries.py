"""First queries of an encoder: where its slots start, and so how they break the tie between objects.

Each kind is a module that turns the encoder's learned queries into those of a batch. A new kind is one more class here
with an entry in ``KINDS``; the encoders know none of them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fastslots.config.model import SlotVAEConfig
from fastslots.models.layers import grid

SURFACE_SIDE, SURFACE_ITERATIONS, SURFACE_SCALE = 16, 10, 0.06
"""Of the fit of a smooth ground: most patches along a side, steps, and the distance in colour at which a patch counts
half."""
SEED_LEVEL, BRIGHTNESS, PLACE = 0.3, 0.2, 0.5
"""Of seeds that differ from such a ground: how far from it counts half, and the weights of brightness and place."""
TIE = 1e-6
"""Added to a patch's distance from the ground, so that seeds left over (an image of one colour has K of them) spread
over the picture, where a product that is 0 everywhere would give every one of them the first patch."""


class LearnedQueries(nn.Module):
    """Query k of every image is learned query k, as published. It has no weights beside those."""

    rows: int | None = None  # how many queries the encoder learns; None: K, one a slot

    def __init__(self, config: SlotVAEConfig):
        super().__init__()

    def forward(self, learned: Tensor, images: Tensor, tokens: Tensor, noise: Tensor | None) -> Tensor:
        """The first queries [B, K, S] of a batch.

        learned: [1, rows, S], the encoder's parameter. images: [B, C, R, R]. tokens: [B, T, S], normalised.
        noise: [B, K, S], standard normal, or None; the kinds that draw nothing leave it alone.
        """
        return learned.expand(len(images), -1, -1)

    def before_tokens(
        self, learned: Tensor, images: Tensor, noise: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The same without tokens, for an encoder that is one operator (``fastslots.ops.encoder``).

        Returns queries [B or 1, K, S], and for kinds that look at tokens: picks [B, K] int64, the token that seeds each
        query, and W [S, S]; query k is then queries[k] + W · tokens[pick].
        """
        return learned, None, None


class SampledQueries(nn.Module):
    """Queries drawn from one learned Gaussian for all slots (Slot Attention, Locatello et al., 2020).

    Its mean is the encoder's one learned query. Without ``noise``, training draws it, and evaluation takes the draw
    kept in ``draw``, the same for every image: the mean would make all slots alike.
    """

    rows: int | None = 1
    draw: Tensor

    def __init__(self, config: SlotVAEConfig):
        super().__init__()
        width = config.token_width
        self.log_std = nn.Parameter(torch.zeros(width))
        generator = torch.Generator().manual_seed(0)  # of no run: every model is evaluated on the same draw
        self.register_buffer("draw", torch.randn(1, config.num_slots, width, generator=generator), persistent=False)

    def forward(self, learned: Tensor, images: Tensor, tokens: Tensor, noise: Tensor | None) -> Tensor:
        """As ``LearnedQueries.forward``. ValueError for noise of another shape than [B, K, S]."""
        shape = (len(images), *self.draw.shape[1:])
        if noise is not None and noise.shape != shape:
            raise ValueError(f"query_noise has shape {list(noise.shape)}, expected {list(shape)} (B, K, S)")
        if noise is None and self.training:
            noise = torch.randn(shape, device=learned.device, dtype=learned.dtype)
        return (learned + self.log_std.exp() * (self.draw if noise is None else noise)).expand(shape)

    def before_tokens(
        self, learned: Tensor, images: Tensor, noise: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """As ``LearnedQueries.before_tokens``."""
        return self(learned, images, images, noise), None, None


class SeededQueries(nn.Module):
    """One learned query for all slots, plus W · [token under seed k | its colour | its place | its distance], W without
    bias; the distance is that to the nearest seed before it, in colour and place (1 for the first).

    Slots differ by their seeds alone. Those are places in the image that differ from its ground and from one another
    (``farthest_patches``): a prior made by hand, which favours objects of other colours than a plain ground. No
    gradient goes through the choice.
    """

    rows: int | None = 1
    places: Tensor
    token_of: Tensor

    def __init__(self, config: SlotVAEConfig):
        super().__init__()
        self.slots, self.side, self.tokens = config.num_slots, config.patch_side, config.token_side
        self.projection = nn.Linear(config.token_width + config.channels + 3, config.token_width, bias=False)
        places = grid(self.side)
        y, x = (torch.arange(self.side**2) // self.side, torch.arange(self.side**2) % self.side)
        ratio = self.side // self.tokens
        self.register_buffer("places", places, persistent=False)
        self.register_buffer("token_of", y // ratio * self.tokens + x // ratio, persistent=False)

    def forward(self, learned: Tensor, images: Tensor, tokens: Tensor, noise: Tensor | None) -> Tensor:
        """As ``LearnedQueries.forward``."""
        seeds, seen = self.look(images.to(learned.dtype))
        # The token is picked by a product: seeds share tokens, and the gradient of an index adds those with atomics
        # on GPUs, in any order.
        under = self.token_of[seeds][..., None] == torch.arange(tokens.shape[1], device=tokens.device)
        picked = under.to(tokens.dtype) @ tokens  # [B, K, S]
        of_places: Tensor = self.projection(torch.cat([picked, seen.to(picked.dtype)], -1))
        return learned + of_places

    def before_tokens(
        self, learned: Tensor, images: Tensor, noise: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """As ``LearnedQueries.before_tokens``."""
        picks, seen = self.tokens_and_looks(images.to(learned.dtype))
        of_token, of_patch = self.projection.weight.split([learned.shape[2], seen.shape[2]], 1)
        # No matrix product: that of the weight's gradient is cut by the number of threads, and so are its roundings.
        return learned + (seen[:, :, None] * of_patch).sum(-1), picks, of_token

    def tokens_and_looks(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The token under each seed, int64 [B, K], and what ``look`` sees there."""
        seeds, seen = self.look(images)
        return self.token_of[seeds], seen

    def look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Seeds [B, K] int64, and what is seen at each: colour, place and distance, [B, K, C + 3]."""
        patches = patch_features(images, self.places)  # [B, C + 2, P²]
        seeds, distances = self.seeds(patches.detach())
        seen = patches.gather(2, seeds[:, None].expand(-1, patches.shape[1], -1)).transpose(1, 2)
        return seeds, torch.cat([seen, distances[..., None]], -1)

    def seeds(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """patches [B, C + 2, P²] -> seeds, int64 [B, K], and the distance of each from those before it, [B, K]."""
        return farthest_patches(patches, self.slots)


class SurfaceSeededQueries(SeededQueries):
    """As ``SeededQueries``, with seeds that differ from a smooth surface of colours, as a lit floor has, rather than
    from one colour, and that take shades of one colour for the same object (``farthest_from_surface``)."""

    basis: Tensor
    fine_basis: Tensor

    def __init__(self, config: SlotVAEConfig):
        super().__init__(config)
        coarse = self.side
        while coarse > SURFACE_SIDE and coarse % 2 == 0:
            coarse //= 2
        self.ratio = self.side // coarse
        basis, R = torch.linalg.qr(polynomials(grid(coarse).double()))
        fine = torch.linalg.solve_triangular(R, polynomials(grid(self.side).double()), upper=True, left=False)
        self.register_buffer("basis", basis.float(), persistent=False)
        self.register_buffer("fine_basis", fine.float(), persistent=False)

    def seeds(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """As ``SeededQueries.seeds``."""
        colours = patches[:, :-2]
        coarse = F.avg_pool2d(colours.unflatten(2, (self.side, self.side)), self.ratio).flatten(2)
        surface = smooth_surface(coarse, self.basis.to(coarse.dtype)) @ self.fine_basis.to(coarse.dtype).T
        return farthest_from_surface(patches, surface, self.slots)


KINDS: dict[str, type[LearnedQueries] | type[SeededQueries] | type[SampledQueries]] = {
    "learned": LearnedQueries,
    "seeded": SeededQueries,
    "seeded-surface": SurfaceSeededQueries,
    "sampled": SampledQueries,
}


def patch_features(images: Tensor, places: Tensor) -> Tensor:
    """Mean colours and places of P x P patches: images [B, C, R, R], places [P², 2] -> [B, C + 2, P²] (c | y, x)."""
    colours = F.avg_pool2d(images, images.shape[-1] // round(len(places) ** 0.5)).flatten(2)
    return torch.cat([colours, places.T.to(colours.dtype).expand(len(images), -1, -1)], 1)


def farthest_patches(patches: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Seeds by farthest-first traversal (Gonzalez, 1985), weighted by the distance from the ground.

    With c_p the colour of patch p and m the median colour (each channel's own), the next seed is

        argmax_p |c_p − m| · min_s |(c, y, x)_p − (c, y, x)_s|

    over the seeds s before it; for the first the second factor is 1. Of equal patches the first is taken.

    patches: [B, C + 2, P²] as ``patch_features`` gives. Returns the seeds, int64 [B, count], and the second factor of
    each, [B, count]. Nothing waits for the device.
    """
    colours = patches[:, :-2]
    return _traverse(patches, _length(colours - _median(colours)), count, _length)


def polynomials(yx: Tensor) -> Tensor:
    """Places in [0, 1], [n, 2] -> 1, y, x, y², yx, x² of each, shifted to [-1, 1]: [n, 6]."""
    y, x = (2 * yx - 1).unbind(1)
    return torch.stack([torch.ones_like(y), y, x, y * y, y * x, x * x], 1)


def smooth_surface(colours: Tensor, basis: Tensor) -> Tensor:
    """Coefficients [B, C, n] of the surface in ``basis`` [N, n], of orthonormal columns, that most colours [B, C, N]
    are near to.

    A robust fit by fixed point iteration from the median colour m: with f the surface's colours and r = c − f,

        f ← projection of f + r / (1 + |r|² / 0.06²) onto the basis

    which is iteratively reweighted least squares of the Cauchy loss, its weights in the residuals rather than in the
    norm (Huber and Dutter, 1974), so that no linear system is solved and nothing waits for a device.
    """
    surface = _median(colours).expand_as(colours)
    for _ in range(SURFACE_ITERATIONS):
        apart = colours - surface
        size = apart.square().sum(1, keepdim=True)
        coefficients = (surface + apart / (1 + size / SURFACE_SCALE**2)) @ basis
        surface = coefficients @ basis.T
    return coefficients


def farthest_from_surface(patches: Tensor, surface: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Seeds by farthest-first traversal, weighted by the distance from a ground whose colours vary.

    With r_p = |c_p − surface_p| the next seed is

        argmax_p r_p / (r_p + 0.3) · min_s |(c', ½y, ½x)_p − (c', ½y, ½x)_s|        c' = c − 0.8 · mean of c's channels

    over the seeds s before it; for the first the second factor is 1. Brightness counts less than colour in c', since an
    object has a bright and a dark side, and the first factor levels off, so that pale objects count nearly as much as
    vivid ones.

    patches: [B, C + 2, P²] as ``patch_features`` gives. surface: [B, C, P²]. Returns the seeds, int64 [B, count], and
    the second factor of each, [B, count]. Nothing waits for the device.
    """
    colours = patches[:, :-2]
    apart = _quick_length(colours - surface)
    shades = colours - (1 - BRIGHTNESS) * colours.mean(1, keepdim=True)
    return _traverse(
        torch.cat([shades, PLACE * patches[:, -2:]], 1), apart / (apart + SEED_LEVEL), count, _quick_length
    )


def _traverse(
    features: Tensor, weight: Tensor, count: int, length: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Farthest-first traversal of [B, n, P²], distances times ``weight`` [B, P²] -> seeds, int64 [B, count], and the
    distance of each from those before it, [B, count]; 1 for the first. length: [B, n, P²] -> [B, P²]."""
    weight = weight + TIE
    nearest, seeds, distances = torch.ones_like(weight), [], []
    for k in range(count):
        seed = (weight * nearest).argmax(1, keepdim=True)  # [B, 1]
        seeds.append(seed)
        distances.append(nearest.gather(1, seed))
        apart = length(features - features.gather(2, seed[:, None].expand(-1, features.shape[1], -1)))
        nearest = apart if k == 0 else torch.minimum(nearest, apart)
    return torch.cat(seeds, 1), torch.cat(distances, 1)


def _median(colours: Tensor) -> Tensor:
    """[B, C, P²] -> [B, C, 1]: each channel's, by a sort, since torch.median of rows is not deterministic on GPUs."""
    return colours.sort(2).values[..., (colours.shape[2] - 1) // 2, None]


def _length(vectors: Tensor) -> Tensor:
    """[B, n, P²] -> [B, P²], rounded correctly: patches at equal distances are many, and torch's fp32 root is a bit
    off on some CPUs. Its norm over an axis takes 60 times as long there."""
    return vectors.square().sum(1).double().sqrt().to(vectors.dtype)


def _quick_length(vectors: Tensor) -> Tensor:
    """As ``_length``, with torch's own root, whose last bit may differ between CPUs: the shipped weights of clevr6-mini
    were trained with it."""
    return vectors.square().sum(1).sqrt()
