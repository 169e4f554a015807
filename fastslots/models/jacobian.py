"""The slot Jacobian of a decoder: which slot acts on which pixel, exactly.

    jacobian[b,k,l] = Σ_c Σ_d |∂x̂[b,c,l] / ∂z[b,k,d]|        (arXiv 2411.07784; the published form is vmap(jacfwd))

Each decoder knows its own way to it (``SlotDecoder.jacobian``); what stands here is the same for all of them.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext

import torch
import torch.nn as nn
from torch import Tensor

from fastslots.models.slot_decoder import AnyDecoder, JacobianRequest, as_slot_decoder
from fastslots.ops.reference import interaction_penalty


def slot_jacobian(
    decoder: AnyDecoder,
    slots: Tensor,
    chunk: int | None = None,
    *,
    slot_mask: Tensor | None = None,
    pixels: Tensor | None = None,
    reduction: str | None = "sum",
    differentiable: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Σ over channels and slot width of ``|∂recon/∂slots|``, not normalised over slots; or all of ∂recon/∂slots.

    Args:
        decoder: a ``SlotDecoder``; or any callable slots -> recon (or (recon, ...)), recon [B, C, R, R], in which
            images do not mix: then K·D forward-mode derivatives are taken, exact but slower.
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
    differentiable = differentiable and torch.is_grad_enabled()
    request = JacobianRequest(chunk, slot_mask, pixels, reduction == "sum", differentiable, backend)
    # inference_mode off: autograd refuses its tensors; the clone is an ordinary one.
    inference = nullcontext() if differentiable else torch.inference_mode(False)
    with inference, torch.autocast(slots.device.type, enabled=False):
        if not differentiable:
            slots = slots.detach().clone()
        own = as_slot_decoder(decoder)
        dtype = _dtype(own)
        if dtype is not None and torch.finfo(dtype).bits < 32:  # derivatives in 16 bits mean little
            if differentiable:
                raise ValueError(f"a differentiable Jacobian needs weights of at least 32 bits, got {dtype}")
            own, dtype = copy.deepcopy(own).float(), torch.float32
        return own.jacobian(slots if dtype is None else slots.to(dtype), request)


def _dtype(decoder: nn.Module) -> torch.dtype | None:
    """Of the first of its floating-point weights; None where it has none."""
    return next((p.dtype for p in decoder.parameters() if p.is_floating_point()), None)


def slot_share(jacobian: Tensor) -> Tensor:
    """Each slot's share of a pixel's Jacobian: [B, K, ...], of the same dtype; zeros where all are zero."""
    return jacobian / jacobian.sum(1, keepdim=True).clamp_min(torch.finfo(jacobian.dtype).tiny)


def jacobian_penalty(decoder: AnyDecoder, slots: Tensor, pixels: Tensor, pixel_weight: Tensor | None = None) -> Tensor:
    """How much slots share pixels, by the Jacobian itself rather than by attention: a scalar with a gradient.

    With P = each slot's share of a pixel's Jacobian (Σ_c Σ_d |∂x̂/∂z|, normalised over slots), the mean over the given
    pixels of Σ_{j<k} P_j P_k: 0 where one slot alone acts on each pixel, ½(1 − 1/K) where all act alike. Shares make
    it free of scale: a decoder cannot lower it by shrinking its derivatives.

    decoder: as in ``slot_jacobian``; slots: [B, K, D]; pixels: [B, P] int64, rows of R·R; pixel_weight: [B, P],
    1 / (L · probability) of each.
    """
    wide = slots.to(torch.promote_types(slots.dtype, torch.float32))
    jacobian = slot_jacobian(decoder, wide, pixels=pixels, differentiable=True)
    with torch.autocast(slots.device.type, enabled=False):
        return interaction_penalty(slot_share(jacobian).transpose(1, 2), pixel_weight)
