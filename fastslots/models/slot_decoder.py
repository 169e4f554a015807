"""What every decoder of slots is to the rest of the package, and what one that brings only ``forward`` gets.

A decoder gives images of slots, perhaps with a slot map, a loss and a slot Jacobian. ``SlotDecoder`` has a loss and a
Jacobian that are exact for any ``forward``: plain autograd, and one forward derivative for each of K·D numbers,

    jacobian[b,k,l] = Σ_c Σ_d |∂x̂[b,c,l] / ∂z[b,k,d]|

A decoder that has cheaper ways overrides them. Images of a batch must not mix in it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fastslots.errors import UserError
from fastslots.ops import checks
from fastslots.ops.decoder_loss import DecoderLossTerms
from fastslots.ops.reference import interaction_penalty, reconstruction_error
from fastslots.ops.second_order import second_order

TANGENTS = 16
"""Directions that the generic Jacobian pushes forward at once."""
ROUTES = ("loss", "serving_backend", "jacobian", "thinned", "multiplications")
"""Methods that follow from ``forward`` and may be computed in another way."""


class Decoded(NamedTuple):
    """Images of slots."""

    recon: Tensor  # [B, C, R, R]
    slot_map: Tensor | None  # [B, R·R, K]; None: the decoder has none


AnyDecoder = Callable[..., Any]
"""A ``SlotDecoder``, or any callable slots -> recon (or (recon, ...)) as ``ForeignDecoder`` takes it."""


class JacobianRequest(NamedTuple):
    """What is asked of a Jacobian besides decoder and slots; see ``fastslots.metrics.slot_jacobian``."""

    chunk: int | None = None
    slot_mask: Tensor | None = None  # [B, K] bool
    pixels: Tensor | None = None  # [B, P] int64
    reduce: bool = True
    differentiable: bool = False
    backend: str = "auto"


class SlotDecoder(nn.Module):
    """The interface of decoders. A subclass needs ``forward`` alone: slots [B, K, D] -> recon [B, C, R, R], or
    (recon, slot_map [B, R·R, K]).

    A subclass of a decoder that changes what its parent computes with gets the generic ``loss`` and ``jacobian``
    unless it defines its own: its parent's might be those of other pictures.
    """

    heads: int = 1
    """What a slot map adds up to over the slots of a pixel."""
    any_slots: bool = False
    """Whether it decodes any number of slots, or K alone."""
    decodes_pixels: bool = False
    """Whether a subset of the pixels costs less than all of them."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        parents = [base for base in cls.__mro__[1:] if issubclass(base, SlotDecoder) and base is not SlotDecoder]
        methods = {name for base in parents for name, value in vars(base).items() if callable(value)}
        changed = {name for name in vars(cls) if name in methods and not name.startswith("__")}
        if changed.difference(ROUTES):
            for name in (*ROUTES, "decodes_pixels"):
                if name not in vars(cls):
                    setattr(cls, name, vars(SlotDecoder)[name])

    def decode(self, slots: Tensor, slot_mask: Tensor | None = None) -> Decoded:
        """``forward`` in one form, whatever it returns.

        slots: [B, K, D]; slot_mask: [B, K] bool, True = a real slot.
        """
        out = self(slots) if slot_mask is None else self(slots, slot_mask)
        if isinstance(out, Tensor):
            return Decoded(out, None)
        if not (isinstance(out, tuple | list) and out and isinstance(out[0], Tensor)):
            raise UserError(f"{self._name()} must give an image or (image, slot_map), got a {type(out).__name__}")
        return Decoded(out[0], out[1] if len(out) > 1 else None)

    def loss(
        self,
        slots: Tensor,
        images: Tensor,
        recon_weight: float | Tensor,
        interaction_weight: float | Tensor,
        *,
        pixels: Tensor | None = None,
        pixel_weight: Tensor | None = None,
        slot_mask: Tensor | None = None,
        grad_scale: float | Tensor = 1.0,
        backend: str = "auto",
    ) -> DecoderLossTerms:
        """Both terms of the decoder's loss; here by plain autograd.

        Args:
            slots: [B, K, D]. images: [B, C, R, R], the targets.
            recon_weight, interaction_weight: floats or 0-d tensors.
            pixels: [B, P] int64, compare these pixels alone (rows of R·R, drawn with replacement); None: all.
            pixel_weight: [B, P] (or [B, L]), 1 / (L · probability) of each drawn pixel, so that both terms estimate
                those of all pixels without bias; None: drawn uniformly.
            slot_mask: [B, K] bool, True = a real slot.
            grad_scale: the loss scale of mixed precision, for a loss that makes gradients on the way forward; no
                result depends on it but in its rounding, and autograd makes them after the scaling.
            backend: "auto", or who computes; plain autograd is "reference".

        Returns:
            total (carries the gradient), recon = Σ(x − x̂)²/B, interaction = mean over pixels of Σ_{j<k} w_j w_k
            (0 without a slot map).

        Raises:
            TypeError, ValueError: naming the argument, its shape or dtype, and what was expected; an interaction
                weight without a slot map.
        """
        if backend not in ("auto", "reference"):
            raise ValueError(f"backend {backend!r} has no kernel for the loss of {self._name()}: use auto")
        L = images.shape[2:].numel() if images.ndim == 4 else 0
        check_loss(slots, images, L, pixels, pixel_weight, slot_mask)
        recon, slot_map = self.decode(slots, slot_mask)
        checks.shape("images", images, tuple(recon.shape), f"(B, C, R, R: what {self._name()} decodes)")
        if slot_map is None and interaction_weight != 0:
            raise UserError(no_penalty(self._name()))
        decoded, target, expansion = recon.flatten(2).mT, images.flatten(2).mT, 1.0
        if pixels is not None:  # the error is a sum over all pixels, of which P are seen; the penalty is a mean
            decoded, target, expansion = _rows(decoded, pixels), _rows(target, pixels), L / pixels.shape[1]
            slot_map = None if slot_map is None else _rows(slot_map, pixels)
        error = reconstruction_error(decoded, target, pixel_weight) * expansion
        total, interaction = recon_weight * error, torch.zeros_like(error)
        if slot_map is not None:
            interaction = interaction_penalty(slot_map, pixel_weight)
            total = total + interaction_weight * interaction
        return DecoderLossTerms(total, error.detach(), interaction.detach())

    def serving_backend(self) -> str:
        """Name of the backend that computes ``loss`` on the device of the weights; plain autograd is "reference"."""
        return "reference"

    def jacobian(self, slots: Tensor, request: JacobianRequest) -> Tensor:
        """[B, K, R, R], or [B, K, P] where pixels are asked for; unreduced [B, C, R, R, K, D], or [B, C, P, K, D].

        Here by one forward derivative for each number of a slot, all images at once.
        """
        if request.backend not in ("auto", "reference"):
            raise ValueError(f"backend={request.backend!r} takes a fastslots.models Decoder, got {self._name()}")
        return _forward_jacobian(lambda z: self.decode(z, request.slot_mask).recon, slots, request)

    def thinned(self, stride: int) -> SlotDecoder:
        """A decoder of every ``stride``-th pixel in both directions; itself where leaving pixels out saves nothing."""
        return self

    @torch.no_grad()
    def multiplications(self, slots: Tensor) -> int:
        """Of decoding slots [B, K, D], as far as torch's own operators can be counted."""
        from torch.utils.flop_counter import FlopCounterMode  # imports triton

        with FlopCounterMode(display=False) as counter:
            self.decode(slots)
        flops: int = counter.get_total_flops()
        return flops // 2

    def _name(self) -> str:
        return type(self).__name__


class ForeignDecoder(SlotDecoder):
    """Any callable from slots to images (or to images and a slot map) as a ``SlotDecoder``."""

    def __init__(self, function: AnyDecoder):
        super().__init__()
        self.function = function

    def forward(self, slots: Tensor) -> Any:
        return self.function(slots)

    def decode(self, slots: Tensor, slot_mask: Tensor | None = None) -> Decoded:
        if slot_mask is not None:
            raise ValueError("slot_mask is for our own decoders: bind it into the callable instead")
        return super().decode(slots)

    def _name(self) -> str:
        return type(self.function).__name__


def as_slot_decoder(decoder: AnyDecoder) -> SlotDecoder:
    """A decoder as what this package asks of one; ``torch.compile``'s wrapper is looked through."""
    decoder = getattr(decoder, "_orig_mod", decoder)
    return decoder if isinstance(decoder, SlotDecoder) else ForeignDecoder(decoder)


def check_forward_derivative(decoder: SlotDecoder, slots: Tensor) -> None:
    """UserError where forward-mode derivatives of a decoder at slots [1, K, D] fail, or differ from its gradients: an
    operator may answer them with zeros."""
    slots = slots.detach().clone()
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(2, *slots.shape, generator=generator).to(slots)

    def derivative(direction: Tensor) -> Tensor:
        tangent: Tensor = torch.func.jvp(lambda z: decoder.decode(z).recon, (slots,), (direction,))[1]
        return tangent

    name = decoder._name()
    try:
        with torch.no_grad():
            tangents = torch.func.vmap(derivative)(directions)
    except RuntimeError as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(
            f"the decoder {name} has no forward derivative, which its slot Jacobian needs: {reason}"
        ) from error
    with torch.enable_grad():
        z = slots.requires_grad_()
        recon = decoder.decode(z).recon
        weight = torch.randn(recon.shape, generator=generator).to(recon)
        (gradient,) = (
            torch.autograd.grad((recon * weight).sum(), z, allow_unused=True) if recon.requires_grad else (None,)
        )
    backward = 0 * directions if gradient is None else directions * gradient
    forward = (tangents * weight).flatten(1)
    scale = forward.abs().sum(1) + backward.flatten(1).abs().sum(1)
    if ((forward.sum(1) - backward.flatten(1).sum(1)).abs() > 1e-2 * scale).any():
        raise UserError(
            f"the decoder {name} has forward derivatives that differ from its gradients: is a step outside torch?"
        )


def no_penalty(name: str) -> str:
    """Why alpha must be 0."""
    return f"{name} gives no slot map, so there is no interaction penalty: set alpha to 0, or return (image, slot_map)"


def check_loss(
    slots: Tensor,
    images: Tensor,
    pixel_count: int,
    pixels: Tensor | None,
    pixel_weight: Tensor | None,
    slot_mask: Tensor | None,
) -> None:
    """Arguments of a decoder's loss; ``pixel_count``: R·R. Raises as ``SlotDecoder.loss`` says."""
    B = slots.shape[0]
    checks.tensor("images", images, 4, "[B, C, R, R]")
    checks.shape("images", images, (B, *images.shape[1:]), "(B of slots, C, R, R)")
    checks.slot_mask(slot_mask, slots, *slots.shape[:2])
    if pixels is not None and (pixels.dtype != torch.int64 or pixels.ndim != 2 or not pixels.shape[1]):
        raise ValueError(f"pixels must be int64 [{B}, P], P above 0, got {pixels.dtype} {list(pixels.shape)}")
    P = pixel_count if pixels is None else pixels.shape[1]
    if pixels is not None:
        checks.shape("pixels", pixels, (B, P), "(B of slots, P)")
    if pixel_weight is not None:
        checks.shape("pixel_weight", pixel_weight, (B, P), "(B of slots, a pixel each)")


def check_slots(slots: Tensor, slot_mask: Tensor | None, width: int) -> None:
    """Arguments of a Jacobian: slots [B, K, width], slot_mask [B, K]. Raises ValueError."""
    if slots.shape[2] != width:
        raise ValueError(f"slots has shape {list(slots.shape)}, the decoder takes [B, K, {width}]")
    if slot_mask is not None and slot_mask.shape != slots.shape[:2]:
        raise ValueError(f"slot_mask has shape {list(slot_mask.shape)}, expected {list(slots.shape[:2])} (B, K)")


def _rows(x: Tensor, pixels: Tensor) -> Tensor:
    """x [B, L, n] at pixels [B, P] -> [B, P, n]."""
    return x.gather(1, pixels[..., None].expand(-1, -1, x.shape[2]))


def _forward_jacobian(decode: Callable[[Tensor], Tensor], slots: Tensor, request: JacobianRequest) -> Tensor:
    """slots -> recon [B, C, R, R] by forward-mode derivatives; shapes as ``SlotDecoder.jacobian`` says."""
    _, K, D = slots.shape
    side: tuple[int, ...] = ()

    def recon(z: Tensor) -> Tensor:
        nonlocal side
        out = decode(z)
        side = tuple(out.shape[2:])
        out = out.flatten(2)
        if request.pixels is None:
            return out
        return out.gather(2, request.pixels[:, None].expand(-1, out.shape[1], -1))

    def influence(index: Tensor) -> Tensor:
        direction = F.one_hot(index, K * D).to(slots.dtype).view(1, K, D).expand_as(slots)
        tangent: Tensor = torch.func.jvp(recon, (slots,), (direction,))[1]  # [B, C, P]
        return tangent.abs().sum(1) if request.reduce else tangent

    with torch.set_grad_enabled(request.differentiable), second_order() if request.differentiable else nullcontext():
        indices = torch.arange(K * D, device=slots.device).split(request.chunk or TANGENTS)
        parts = torch.cat([torch.func.vmap(influence)(some) for some in indices]).unflatten(0, (K, D))
        if request.reduce:
            jacobian: Tensor = parts.sum(1).transpose(0, 1).contiguous()
        else:
            jacobian = parts.permute(2, 3, 4, 0, 1)
        if request.pixels is None:
            jacobian = jacobian.unflatten(2, side)
    return jacobian
