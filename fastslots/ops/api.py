"""The public ops: argument checks, then the backend that serves. See ``reference`` for the formulas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from fastslots.ops import autograd, autograd_slots, autograd_statistics, backends, checks, reference
from fastslots.records import FeedForward, FoldedProjections, Statistics, StatisticsInputs, describe


def _under_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's type where it is on, as it casts the operands of the reference's products."""
    device = tensors[0].device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return tensors
    return tuple(t.to(torch.get_autocast_dtype(device)) for t in tensors)


@overload
def cross_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, backend: str = "auto", *,
    slot_mask: Tensor | None = None, head_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def cross_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, backend: str = "auto", *,
    slot_mask: Tensor | None = None, head_weights: Tensor | None = None, statistics: Sequence[str],
) -> tuple[Tensor, Tensor, dict[str, Tensor]]: ...  # fmt: skip


def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    backend: str = "auto",
    *,
    slot_mask: Tensor | None = None,
    head_weights: Tensor | None = None,
    statistics: Sequence[str] = (),
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Attention of pixels to slots that also returns the weights summed over heads.

    ``A = softmax_k(scale · q·k)``; ``out = A v``; ``slot_map = Σ_h c_h A``, the smallest thing that the interaction
    penalty needs (arXiv 2411.07784). Kernels never store A; the same call gives the same bits.

    Args:
        q: [B, H, L, d] fp16, bf16, fp32 or fp64, any strides (a [B, L, H, d] layout by ``transpose(1, 2)``).
        k, v: [B, H, K, d], dtype and device of q.
        scale: factor on the scores; None means d^-1/2, of a head's width. (``fastslots.nn.InteractionCrossAttention``,
            like the published model, takes that of the queries before projection.)
        backend: "auto", "reference", "cpu" or "triton"; one named outright either serves or raises.
        slot_mask: [B, K] bool, True for a real slot; padded slots get weight 0, and what they hold, NaN included,
            reaches no result and no gradient. None means all are real.
        head_weights: [H] float, the c_h of the slot map; None means ones (1/H: the mean; 0 and 1: chosen heads). They
            may need a gradient.
        statistics: any of "entropy" and "lse": what else of each head and row to return, with gradients.

    Returns:
        out [B, H, L, d] in the dtype of q (under autocast in autocast's, as torch's ``scaled_dot_product_attention``
        gives it), slot_map [B, L, K] in fp32 (fp64 for fp64); with ``statistics`` also a dictionary of [B, H, L] in the
        dtype of the map: "entropy" −Σ_k A log A in nats, "lse" log Σ_k exp(scale · q·k).
        A row whose slots are all masked has zeros everywhere, and gradients of zero.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, a statistic that is none, or a
            backend that cannot serve.
    """
    checks.qkv(q, k, v)
    checks.slot_mask(slot_mask, q, k.shape[0], k.shape[2])
    checks.head_weights(head_weights, q)
    k, v = reference.real_slots(slot_mask, 2, k, v)
    unknown = sorted(set(statistics) - {"entropy", "lse"})
    if unknown or isinstance(statistics, str):
        raise ValueError(f"statistics must be a sequence of 'entropy' and 'lse', got {statistics!r}")
    if isinstance(scale, Tensor) and scale.requires_grad:
        raise ValueError("scale cannot have a gradient: multiply q by it, and pass scale=1.0")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if statistics or head_weights is not None:
        inputs = StatisticsInputs(q, k, v, slot_mask, head_weights, scale, rows=bool(statistics))
        result = _attention_statistics(inputs, backend)
        rows = {"entropy": result.entropy, "lse": result.lse}
        pair = result.out, result.slot_map
        return (*pair, {name: rows[name] for name in statistics}) if statistics else pair
    name = backends.select(describe("cross_attention", (q, k, v)), backend)
    if name == "reference":
        return reference.cross_attention(q, k, v, scale, slot_mask)
    q, k, v = _under_autocast(q, k, v)
    return autograd.cross_attention(q, k, v, scale, slot_mask, name)


def _attention_statistics(inputs: StatisticsInputs, backend: str) -> Statistics:
    name = backends.select(describe("attention_statistics", inputs[:3]), backend)
    if name == "reference":
        return reference.attention_statistics(inputs)
    q, k, v = _under_autocast(*inputs[:3])
    return Statistics(*autograd_statistics.attention_statistics(q, k, v, *inputs[3:], name))


def interaction_penalty(slot_map: Tensor) -> Tensor:
    """``mean_{b,l} ½[(Σ_k w_k)² − Σ_k w_k²]``, computed as each weight times the sum of those before it.

    slot_map: [B, L, K] float. Returns a scalar; its gradient is ``(Σ_j w_j − w_k) / (B·L)`` (arXiv 2411.07784, §4).
    Raises TypeError or ValueError for anything but a float tensor with three axes.
    """
    checks.tensor("slot_map", slot_map, 3, "[B, L, K]")
    return reference.interaction_penalty(slot_map)


def fold_projections(
    wq: Tensor,
    bq: Tensor | None,
    k: Tensor,
    v: Tensor,
    wo: Tensor,
    bo: Tensor | None,
    scale: float | Tensor | None = None,
) -> FoldedProjections:
    """Fold the query and output projections into the slots, so that neither is ever applied to a pixel.

    Args:
        wq, bq: query projection [H·d, D] and bias [H·d] (or None).
        k, v: keys and values of the slots, [B, H, K, d]. A key bias cancels in the softmax: leave it out.
        wo, bo: output projection [D, H·d] and bias [D] (or None).
        scale: factor on the scores, a 0-d tensor if it is to have a gradient; None means d^-1/2.

    Returns:
        FoldedProjections(G [B,D,H,K], g [B,H,K], U [B,H,K,D], b [D]) in fp32 (fp64 for fp64), differentiable.

    Raises:
        TypeError, ValueError: naming the argument, its shape and what was expected.
    """
    checks.projections(wq, bq, k, v, wo, bo)
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    return reference.fold_projections(wq, bq, k, v, wo, bo, scale)


def folded_cross_attention(
    x: Tensor, folded: FoldedProjections, backend: str = "auto", *, slot_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The same attention through folded projections: ``y = softmax_k(x·G + g)·U + b``, without the residual.

    Args:
        x: [B or 1, L, D] float, already normed; a batch of 1 is shared by all images and never repeated.
        folded: what ``fold_projections`` returns.
        backend, slot_mask: as in ``cross_attention``.

    Returns:
        y [B, L, D] in the dtype of x, under autocast too; slot_map [B, L, K] in fp32 (fp64 for fp64).

    Raises:
        TypeError, ValueError: as in ``cross_attention``.
    """
    checks.folded(x, folded)
    checks.slot_mask(slot_mask, x, folded.g.shape[0], folded.g.shape[2])
    folded = reference.real_slots_folded(slot_mask, folded)
    name = backends.select(describe("folded_cross_attention", (x, *folded)), backend)
    if name == "reference":
        return reference.folded_cross_attention(x, folded, slot_mask)
    (rows,) = _under_autocast(x)
    y, slot_map = autograd.folded_cross_attention(rows, list(folded), slot_mask, name)
    return y.to(x.dtype), slot_map


def token_attention(rows: Tensor, tokens: Tensor, backend: str = "auto") -> Tensor:
    """Few rows attend to many tokens: ``gathered = softmax_t(rows · tokensᵀ) · tokens``, without scale or projections.

    Cross-attention of queries to tokens, folded from the query side: scale and key projection go into ``rows`` before,
    the value projection is applied to ``gathered`` after. Kernels pass once over the tokens and store no weights.

    Args:
        rows: [B, M, S] fp16, bf16, fp32 or fp64; M = heads x queries.
        tokens: [B, T, S], dtype and device of rows.
        backend: as in ``cross_attention``.

    Returns:
        gathered [B, M, S] in the dtype of rows, under autocast in autocast's.

    Raises:
        TypeError, ValueError: as in ``cross_attention``.
    """
    checks.rows_and_tokens(rows, tokens)
    name = backends.select(describe("token_attention", (rows, tokens)), backend)
    if name == "reference":
        return reference.token_attention(rows, tokens)
    rows, tokens = _under_autocast(rows, tokens)
    gathered, _ = autograd.token_attention(rows, tokens, name)
    return gathered.to(rows.dtype)


@overload
def slot_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, eps: float = 1e-8, backend: str = "auto", *,
    slot_mask: Tensor | None = None, return_map: Literal[False] = False,
) -> Tensor: ...  # fmt: skip


@overload
def slot_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, eps: float = 1e-8, backend: str = "auto", *,
    slot_mask: Tensor | None = None, return_map: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip


def slot_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    eps: float = 1e-8,
    backend: str = "auto",
    *,
    slot_mask: Tensor | None = None,
    return_map: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """One iteration of slot attention: slots compete for tokens, and each takes their weighted mean.

    ``A = softmax over slots of scale · (k·q)``; ``updates = Σ_l (A + ε) v / Σ_l (A + ε)`` (Locatello et al. 2020,
    arXiv 2006.15055, algorithm 1). Kernels read keys and values once a direction and store nothing of size [B, L, K]
    but the map, where it is asked for. ``fastslots.nn.SlotAttention`` is the whole module.

    The folded form projects no token: with keys ``Wk n`` and values ``Wv n`` of tokens n and no biases, pass
    ``q @ Wk`` as q and n itself as k and v, and apply ``Wv`` to the updates. It is exact.

    Args:
        q: [B, H, K, d] fp16, bf16, fp32 or fp64, any strides: the slots' queries.
        k, v: [B, H, L, d], dtype and device of q: the tokens' keys and values.
        scale: factor on the scores; None means d^-1/2.
        eps: added to every weight, so that a slot without tokens takes their mean.
        backend: as in ``cross_attention``.
        slot_mask: [B, K] bool, True for a real slot; the others get no weight, and updates of 0.
        return_map: also return the weights summed over heads.

    Returns:
        updates [B, H, K, d] in the dtype of q, under autocast in autocast's; with ``return_map`` also slot_map
        [B, L, K] = Σ_h A in fp32 (fp64 for fp64). Without tokens the updates are 0.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, or a backend that cannot serve.
    """
    checks.slots_and_tokens(q, k, v)
    checks.slot_mask(slot_mask, q, q.shape[0], q.shape[2])
    if not eps >= 0:
        raise ValueError(f"eps must not be negative, got {eps}")
    (q,) = reference.real_slots(slot_mask, 2, q)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    name = backends.select(describe("slot_attention", (q, k, v)), backend)
    if name == "reference":
        updates, slot_map = reference.slot_attention(q, k, v, scale, eps, slot_mask)
    else:
        q, k, v = _under_autocast(q, k, v)
        updates, _, slot_map = autograd_slots.slot_attention(q, k, v, scale, eps, slot_mask, return_map, name)
        updates = updates.to(q.dtype)
    return (updates, slot_map) if return_map else updates


def decoder_layer(
    x: Tensor,
    folded: FoldedProjections,
    ff: FeedForward,
    backend: str = "auto",
    *,
    slot_mask: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """One pre-norm decoder layer: norm, folded attention, residual, norm, feed-forward, residual.

    Args:
        x: [B or 1, L, D] float, the residual stream (not normed).
        folded: folded projections that already hold the affine part of the query norm (``fold_norm``).
        ff: FeedForward(norm_weight [D], norm_bias [D], w1 [F,D], b1 [F], w2 [D,F], b2 [D]).
        backend, slot_mask: as in ``cross_attention``.
        eps: of both layer norms.

    Returns:
        x' [B, L, D] in the dtype of x, under autocast too; slot_map [B, L, K] in fp32 (fp64 for fp64).

    Raises:
        TypeError, ValueError: as in ``cross_attention``.
    """
    checks.folded(x, folded)
    checks.slot_mask(slot_mask, x, folded.g.shape[0], folded.g.shape[2])
    checks.feed_forward(ff, x.shape[2], x.device)
    if not eps > 0:
        raise ValueError(f"eps must be above 0, got {eps}")
    folded = reference.real_slots_folded(slot_mask, folded)
    name = backends.select(describe("decoder_layer", (x, *folded, *ff)), backend)
    if name == "reference":
        return reference.decoder_layer(x, folded, ff, slot_mask, eps)
    (rows,) = _under_autocast(x)
    y, slot_map = autograd.decoder_layer(rows, list(folded), list(ff), slot_mask, eps, name)
    return y.to(x.dtype), slot_map
