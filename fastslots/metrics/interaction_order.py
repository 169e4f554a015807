"""How far a decoder is from first-order interaction: its second derivatives across slots against those within.

With H_jk[c,l] = ∂²x̂[c,l] / ∂z_j ∂z_k, a D x D block for each pixel and channel (arXiv 2411.07784, §3: for interaction
of order n = 1 the blocks j ≠ k vanish, while those within a slot may not)::

    cross  = Σ_{j≠k} Σ_{c,l} ‖H_jk[c,l]‖²          within = Σ_j Σ_{c,l} ‖H_jj[c,l]‖²
    ratio  = root mean square of a cross block / that of a block within
           = sqrt( (cross / K(K−1)) / (within / K) )

For independent u, v of random signs in slots j and k, E (uᵀ H_jk v)² = ‖H_jk‖²: one forward derivative of a forward
derivative gives that at every pixel. ``exact`` runs through all D² pairs of unit vectors instead, for small models.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastslots.models.slot_decoder import AnyDecoder, as_slot_decoder
from fastslots.ops.second_order import second_order

PIXELS = 1 << 17
"""Pixels (images x R² x pairs of directions) that are differentiated at once."""


@dataclass(frozen=True)
class InteractionOrder:
    """Squared norms summed over blocks, channels and pixels: one number an image, [B] float64."""

    cross: Tensor
    within: Tensor
    slots: int  # K

    @property
    def ratio(self) -> float:
        """Of all images together; 0 means at most first-order interaction, nan where nothing is curved."""
        cross, within, K = self.cross.sum().item(), self.within.sum().item(), self.slots
        if K == 1:
            return 0.0
        return math.sqrt(cross / (K - 1) / within) if within else math.nan if not cross else math.inf


def interaction_order(
    decoder: AnyDecoder,
    slots: Tensor,
    samples: int = 4,
    *,
    exact: bool = False,
    seed: int = 0,
    chunk: int | None = None,
) -> InteractionOrder:
    """Second-order interaction of a decoder at given slots.

    Args:
        decoder: any callable slots -> recon (or (recon, ...)), recon [B, C, R, R], in which images do not mix.
        slots: [B, K, D] float.
        samples: pairs of random directions for each pair of slots and image; the standard error of ``ratio`` falls
            with the root of samples times images.
        exact: all D² pairs of unit vectors in place of random ones.
        seed: of the directions.
        chunk: pairs of directions at once; None: chosen from the picture's size.

    Returns:
        ``InteractionOrder``. Slots that a decoder's ReLUs leave uncurved still meet in its softmax over masks.

    Raises:
        ValueError: slots that are not float [B, K, D], or fewer than one sample, or pair at once.
    """
    if slots.ndim != 3 or not slots.is_floating_point():
        raise ValueError(f"slots must be float [B, K, D], got {slots.dtype} {list(slots.shape)}")
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    K = slots.shape[1]
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(slots.device.type, enabled=False):
        slots = slots.detach().clone()
        squares = slots.new_zeros(K, K, len(slots), dtype=torch.float64)
        side = _recon(decoder, slots).shape[-1]
        chunk = max(1, PIXELS // max(len(slots) * side**2, 1)) if chunk is None else chunk
        curvature = torch.func.vmap(lambda u, v: _second_derivative(decoder, slots, u, v).square().sum((1, 2, 3)))
        with second_order():
            for j in range(K):
                for k in range(j, K):
                    pairs = _unit_vectors(slots) if exact else _random_signs(slots, samples, seed + j * K + k)
                    for u, v in zip(*(part.split(chunk) for part in pairs), strict=True):
                        squares[j, k] += curvature(_in_slot(u, j, K), _in_slot(v, k, K)).double().sum(0)
    if not exact:
        squares /= samples
    within = squares.diagonal().sum(-1)
    return InteractionOrder(2 * (squares.sum((0, 1)) - within), within, K)


def _second_derivative(decoder: AnyDecoder, slots: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """uᵀ H v at every pixel and channel, [B, C, R, R]; u, v [B, K, D]."""

    def first(z: Tensor) -> Tensor:
        tangent: Tensor = torch.func.jvp(lambda y: _recon(decoder, y), (z,), (u,))[1]
        return tangent

    second: Tensor = torch.func.jvp(first, (slots,), (v,))[1]
    return second


def _recon(decoder: AnyDecoder, slots: Tensor) -> Tensor:
    return as_slot_decoder(decoder).decode(slots).recon


def _unit_vectors(slots: Tensor) -> tuple[Tensor, Tensor]:
    """All pairs of unit vectors of one slot: two of [D², B, D]."""
    B, _, D = slots.shape
    eye = torch.eye(D, dtype=slots.dtype, device=slots.device)[:, None].expand(D, B, D)
    return eye.repeat_interleave(D, 0), eye.repeat(D, 1, 1)


def _random_signs(slots: Tensor, samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pairs of random signs, others for each image: two of [samples, B, D]. Drawn on the CPU, the same everywhere."""
    B, _, D = slots.shape
    bits = torch.randint(2, (2, samples, B, D), generator=torch.Generator().manual_seed(seed))
    u, v = (2 * bits - 1).to(slots)
    return u, v


def _in_slot(direction: Tensor, slot: int, K: int) -> Tensor:
    """[n, B, D] -> [n, B, K, D], zero in the other slots."""
    out = direction.new_zeros(*direction.shape[:2], K, direction.shape[2])
    out[:, :, slot] = direction
    return out
