"""The slot Jacobian of a decoder: which slot acts on which pixel, exactly.

    jacobian[b,k,l] = Σ_c Σ_d |∂x̂[b,c,l] / ∂z[b,k,d]|        (arXiv 2411.07784; the published form is vmap(jacfwd))

Our own decoders have cheaper routes than K·D forward-mode derivatives (``decoder_jacobian.py``); any other decoder
gets those.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fastslots.models.broadcast import BroadcastDecoder
from fastslots.models.decoder import Decoder
from fastslots.models.decoder_jacobian import Request, exact_jacobian
from fastslots.models.second_order import second_order

TANGENTS = 16
"""Directions that a foreign decoder pushes forward at once."""


def slot_jacobian(
    decoder: Callable,
    slots: Tensor,
    chunk: int | None = None,
    *,
    slot_mask: Tensor | None = None,
    pixels: Tensor | None = None,
    reduction: str | None = "sum",
    differentiable: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Σ over channels and slot width of |∂recon/∂slots|, not normalised over slots; or every number of ∂recon/∂slots.

    Args:
        decoder: a decoder of ``fastslots.models``; or any callable slots -> recon (or (recon, ...)), recon
            [B, C, R, R], in which images do not mix: then K·D forward-mode derivatives are taken, exact but slower.
        slots: [B, K, D] float. Their graph is left alone unless ``differentiable``.
        chunk: rows (images x pixels) handled at once in plain PyTorch; for other decoders than ``Decoder``,
            directions. None: chosen for the device and the sizes. Kernels hold one tile and need none.
        slot_mask: [B, K] bool, True = a real slot; the others get 0. For our own decoders alone.
        pixels: [B, P] int64, these pixels (rows of R·R) of each image alone; None: all.
        reduction: "sum", or None for the derivatives themselves: C·L·K·D numbers an image.
        differentiable: the result carries a gradient to the slots and the decoder's weights, for an interaction
            penalty of the Jacobian; memory then grows with the pixels asked for.
        backend: "auto", "reference" (plain PyTorch) or "cpu" (C++); only ``Decoder``'s sum has a kernel.

    Returns:
        "sum": [B, K, R, R], or [B, K, P] with ``pixels``. None: [B, C, R, R, K, D], or [B, C, P, K, D]. In the
        decoder's dtype (at least fp32), without gradient unless ``differentiable``. The same bits for the same call;
        works under no_grad, inference_mode and autocast (which is turned off inside).

    Raises:
        ValueError: slots that are not [B, K, D] of the decoder, a bad chunk, pixels that are not [B, P], an unknown
            reduction, a slot_mask or a named backend with a decoder that cannot have it, or a differentiable Jacobian
            of 16-bit weights.
    """
    if slots.ndim != 3 or not slots.is_floating_point():
        raise ValueError(f"slots must be float [B, K, D], got {slots.dtype} {list(slots.shape)}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    if reduction not in ("sum", None):
        raise ValueError(f"reduction must be 'sum' or None, got {reduction!r}")
    if pixels is not None and (pixels.ndim != 2 or len(pixels) != len(slots) or pixels.is_floating_point()):
        raise ValueError(f"pixels must be integers [{len(slots)}, P], got {pixels.dtype} {list(pixels.shape)}")
    decoder = getattr(decoder, "_orig_mod", decoder)  # what torch.compile wrapped
    differentiable = differentiable and torch.is_grad_enabled()
    request = Request(chunk, slot_mask, pixels, reduction == "sum", differentiable, backend)
    if backend not in ("auto", "reference") and type(decoder) is not Decoder:
        raise ValueError(f"backend={backend!r} takes a fastslots.models Decoder, got {type(decoder).__name__}")
    # inference_mode off: autograd refuses its tensors; the clone is an ordinary one.
    inference = nullcontext() if differentiable else torch.inference_mode(False)
    with inference, torch.autocast(slots.device.type, enabled=False):
        if not differentiable:
            slots = slots.detach().clone()
        if type(decoder) in (Decoder, BroadcastDecoder):  # a subclass may decode in another way
            own = cast("Decoder | BroadcastDecoder", decoder)
            jacobian, R = exact_jacobian(own, slots, request), own.resolution
        else:
            if slot_mask is not None:
                raise ValueError("slot_mask is for our own decoders: bind it into the callable instead")
            jacobian, R = _forward_route(decoder, slots, request)
    return jacobian if pixels is not None else jacobian.unflatten(2, (R, R))


def _forward_route(decoder: Callable, slots: Tensor, request: Request) -> tuple[Tensor, int]:
    """Any decoder: one forward-mode derivative for each number of a slot, all images at once -> Jacobian, R."""
    (_, K, D), side = slots.shape, 0

    def recon(z: Tensor) -> Tensor:
        nonlocal side
        out = decoder(z)
        out = out if isinstance(out, Tensor) else out[0]
        side = out.shape[-1]
        out = out.flatten(2)
        if request.pixels is None:
            return out
        return out.gather(2, request.pixels[:, None].expand(-1, out.shape[1], -1))

    def influence(index: Tensor) -> Tensor:
        direction = F.one_hot(index, K * D).to(slots.dtype).view(1, K, D).expand_as(slots)
        tangent = torch.func.jvp(recon, (slots,), (direction,))[1]  # [B, C, P]
        return tangent.abs().sum(1) if request.reduce else tangent

    with torch.set_grad_enabled(request.differentiable), second_order() if request.differentiable else nullcontext():
        indices = torch.arange(K * D, device=slots.device).split(request.chunk or TANGENTS)
        parts = torch.cat([torch.func.vmap(influence)(some) for some in indices]).unflatten(0, (K, D))
        if request.reduce:
            return parts.sum(1).transpose(0, 1).contiguous(), side
        return parts.permute(2, 3, 4, 0, 1), side
