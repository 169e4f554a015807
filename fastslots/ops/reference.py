"""The one definition of every op, in plain PyTorch: any float dtype, any device, differentiable in every mode.

Axes: B images, H heads, L pixels, K slots, d head width, D query width (``Dq``), F feed-forward width.

Cross-attention of pixels to slots, and what the regulariser needs of it (arXiv 2411.07784, §4)::

    A[b,h,l,:]  = softmax_k(scale · q[b,h,l] · k[b,h,k])      out[b,h,l] = Σ_k A[b,h,l,k] v[b,h,k]
    slot_map[b,l,k] = Σ_h A[b,h,l,k]                          penalty = mean_{b,l} Σ_{j<k} w_j w_k,  w = slot_map

Folding (K is far below the widths, so the projections of the pixel side disappear), with x̂ the normed query::

    S[l,h,k] = x̂_l · G[:,h,k] + g[h,k]     G = scale · Wq_hᵀ k_hk,  g = scale · bq_h · k_hk
    y_l      = Σ_hk A[l,h,k] U[h,k,:] + b  U = v_hk Wo_hᵀ

From the other side, M folded rows of few queries gather T tokens n_t, S wide, without projecting any::

    A[b,m,:] = softmax_t(rows[b,m] · n[b,t])      gathered[b,m] = Σ_t A[b,m,t] n[b,t]

One iteration of slot attention, in which slots compete for T tokens (Locatello et al. 2020)::

    A[b,h,t,:] = softmax_k(scale · k[b,h,t] · q[b,h,k])    updates[b,h,k] = Σ_t (A + ε) v[b,h,t] / Σ_t (A + ε)

Softmax and slot maps are computed in fp32 for 16-bit inputs; everything else in the dtype of the inputs (or of
autocast). Nothing here checks its arguments: ``fastslots.ops`` (api.py) does, and calls this.
"""

from __future__ import annotations

import contextlib
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from fastslots.records import (
    FeedForward,
    FoldedDecoder,
    FoldedProjections,
    OutputHead,
    QueryMlp,
    Statistics,
    StatisticsInputs,
)


def linear_maps(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    """Linear layers with GELU between them."""
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        x = F.linear(F.gelu(x) if i else x, weight, bias)
    return x


def made_queries(queries: Tensor | QueryMlp) -> Tensor:
    """[B or 1, L, D]; of an MLP [1, L, D], the same for every image."""
    if isinstance(queries, Tensor):
        return queries
    return linear_maps(queries.code, queries.weights, queries.biases)[None]


def slot_softmax(scores: Tensor, slot_mask: Tensor | None) -> Tensor:
    """Softmax over the last axis (slots) in at least fp32; slots masked False get weight 0 (all masked: all 0).

    scores: [B, H, L, K]; slot_mask: [B, K] bool or None.
    """
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if slot_mask is None:
        return scores.softmax(-1)
    return _masked_scores(scores, slot_mask).softmax(-1) * slot_mask[:, None, None, :]


def _masked_scores(scores: Tensor, slot_mask: Tensor) -> Tensor:
    """−∞ for masked slots; 0 where an image has no slot at all, so that its softmax is no NaN, forward and backward.

    −∞ rather than the least number: else a row whose real scores are all −∞ would put its weight on a masked slot.
    """
    keep = slot_mask[:, None, None, :]
    instead = torch.where(keep.any(-1, keepdim=True), float("-inf"), 0.0).to(scores.dtype)
    return torch.where(keep, scores, instead)


def real_slots(slot_mask: Tensor | None, axis: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors with zeros for masked slots: whatever these hold (padding is often not written at all) reaches
    neither a value nor a gradient. A weight of 0 alone would not do: 0 · NaN is NaN.

    slot_mask: [B, K]; the tensors have images first and slots along ``axis``.
    """
    if slot_mask is None:
        return tensors
    shapes = (
        [len(slot_mask), *(slot_mask.shape[1] if i == axis % t.ndim else 1 for i in range(1, t.ndim))] for t in tensors
    )
    return tuple(t.masked_fill(~slot_mask.view(shape), 0) for t, shape in zip(tensors, shapes, strict=True))


def real_slots_folded(slot_mask: Tensor | None, folded: FoldedProjections) -> FoldedProjections:
    """The same of folded projections."""
    if slot_mask is None:
        return folded
    (G, g), (U,) = real_slots(slot_mask, -1, folded.G, folded.g), real_slots(slot_mask, 2, folded.U)
    return FoldedProjections(G, g, U, folded.b)


def cross_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, slot_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """q [B,H,L,d], k, v [B,H,K,d] -> out [B,H,L,d], slot_map [B,L,K] (fp32 or wider)."""
    attn = slot_softmax((q * scale) @ k.transpose(-1, -2), slot_mask)
    return attn.to(v.dtype) @ v, attn.sum(1)


def attention_statistics(inputs: StatisticsInputs) -> Statistics:
    """``cross_attention`` with slot_map = Σ_h c_h A, and of each head and row the entropy −Σ A log A and the
    log-sum-exp of the scores, [B,H,L] in fp32 or wider (empty unless wanted). A row without slots has zeros."""
    mask = inputs.slot_mask
    scores = (inputs.q * inputs.scale) @ inputs.k.transpose(-1, -2)
    attn = slot_softmax(scores, mask)
    weights = inputs.head_weights
    slot_map = attn.sum(1) if weights is None else torch.einsum("h,bhlk->blk", weights.to(attn.dtype), attn)
    entropy = lse = attn.new_zeros(0)
    if inputs.rows:
        scores = scores.to(attn.dtype)
        if mask is not None:
            keep = mask[:, None, None, :]
            lse = torch.where(keep.any(-1), _masked_scores(scores, mask).logsumexp(-1), 0)
            scores = scores.masked_fill(~keep, 0)
        else:
            lse = scores.logsumexp(-1)
        entropy = lse - (attn * scores).sum(-1)  # log A = S − lse: no logarithm of a weight that is 0
    return Statistics(attn.to(inputs.v.dtype) @ inputs.v, slot_map, entropy, lse)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """A context in which products keep their operands' type. A device that autocast does not know (meta) needs none."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else contextlib.nullcontext()


def _running_sum(w: Tensor) -> Tensor:
    """Sums of each slot's weight and those before it. Where deterministic algorithms are asked for, not by ``cumsum``,
    which torch refuses then on a GPU."""
    if w.shape[-1] == 0 or not torch.are_deterministic_algorithms_enabled():
        return w.cumsum(-1)
    return torch.stack(list(accumulate(w.unbind(-1))), -1)


def interaction_penalty(slot_map: Tensor, pixel_weight: Tensor | None = None) -> Tensor:
    """mean_{b,l} Σ_{j<k} w_j w_k, as each weight times the running sum of those before it.

    The equal ½[(Σw)² − Σw²] cancels as slots near one-hot: 2.5e-4 a pixel in fp32 against 5e-8 for this form.
    slot_map: [B, L, K]; pixel_weight: [B, L] or None. Returns a scalar, 0 for an empty map.
    """
    w = slot_map.to(torch.promote_types(slot_map.dtype, torch.float32))
    pairs = (w[..., 1:] * _running_sum(w[..., :-1])).sum(-1)
    if pixel_weight is not None:
        pairs = pairs * pixel_weight
    return pairs.sum() / max(pairs.numel(), 1)


def fold_projections(
    wq: Tensor, bq: Tensor | None, k: Tensor, v: Tensor, wo: Tensor, bo: Tensor | None, scale: float | Tensor
) -> FoldedProjections:
    """wq [H·d,D], bq [H·d], k, v [B,H,K,d], wo [D,H·d], bo [D] -> the folded projections, in fp32 or wider.

    Tiny (K rows an image), so it stays out of autocast: a rounding here would touch every pixel.
    """
    heads, d = k.shape[1], k.shape[3]
    dtype = torch.promote_types(k.dtype, torch.float32)
    with without_autocast(k.device):
        wq, k, v, wo = (t.to(dtype) for t in (wq, k, v, wo))
        wq_heads, wo_heads = wq.view(heads, d, -1), wo.view(-1, heads, d)
        k = k * scale
        G = torch.einsum("hdq,bhkd->bqhk", wq_heads, k)
        U = torch.einsum("bhkd,qhd->bhkq", v, wo_heads)
        g = k.new_zeros(k.shape[:3]) if bq is None else torch.einsum("hd,bhkd->bhk", bq.to(dtype).view(heads, d), k)
        b = wo.new_zeros(wo.shape[0]) if bo is None else bo.to(dtype)
    return FoldedProjections(G, g, U, b)


def fold_norm(folded: FoldedProjections, weight: Tensor, bias: Tensor) -> FoldedProjections:
    """Fold the affine part of the query norm, ``x̂ = weight · n + bias``, into G and g: then n alone is the input."""
    with without_autocast(folded.G.device):
        g = folded.g + torch.einsum("q,bqhk->bhk", bias.to(folded.G.dtype), folded.G)
        return folded._replace(G=folded.G * weight[:, None, None], g=g)


def folded_cross_attention(
    x: Tensor, folded: FoldedProjections, slot_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x [B or 1, L, D], already normed -> y = A·U + b [B,L,D] (no residual), slot_map [B,L,K]."""
    # A folding is in fp32 where rows may be in 16 bits: products in the wider of the two.
    dtype = torch.promote_types(x.dtype, folded.G.dtype)
    G, g, U, b = (t.to(dtype) for t in folded)
    B, D, H, K = G.shape
    # One product a layer: [B, L, H·K]. x of batch 1 (layer 1: the same queries for every image) broadcasts unrepeated.
    scores = torch.matmul(x.to(dtype), G.reshape(B, D, H * K)) + g.reshape(B, 1, H * K)
    attn = slot_softmax(scores.unflatten(-1, (H, K)).transpose(1, 2), slot_mask)  # [B, H, L, K], a view
    rows = attn.transpose(1, 2).flatten(-2)
    y = torch.matmul(rows.to(U.dtype), U.reshape(B, H * K, D)) + b
    return y.to(x.dtype), attn.sum(1)


def token_attention(rows: Tensor, tokens: Tensor) -> Tensor:
    """rows [B,M,S], tokens [B,T,S] -> gathered [B,M,S] = softmax_T(rows · tokensᵀ) · tokens."""
    scores = rows @ tokens.transpose(1, 2)
    attn = scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(-1)
    return attn.to(tokens.dtype) @ tokens


def slot_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, eps: float, slot_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """q [B,H,K,d], k, v [B,H,L,d] -> updates [B,H,K,d], slot_map [B,L,K]: slots compete for tokens, then average them.

    A slot that is masked out gets the update 0. Weights are in fp32 or wider; an empty set of tokens gives zeros.
    """
    attn = slot_softmax((k * scale) @ q.transpose(-1, -2), slot_mask)  # [B, H, L, K]
    weight = attn + eps if slot_mask is None else (attn + eps) * slot_mask[:, None, None, :]
    total = weight.sum(2)[..., None]  # [B, H, K, 1]
    share = weight.transpose(-1, -2) / total.masked_fill(total == 0, 1)
    return share.to(v.dtype) @ v, attn.sum(1)


def feed_forward(x: Tensor, ff: FeedForward, eps: float = 1e-5) -> Tensor:
    """x [..., D] -> x + w2 · gelu(w1 · norm(x) + b1) + b2, with the exact (erf) GELU."""
    normed = F.layer_norm(x, x.shape[-1:], ff.norm_weight, ff.norm_bias, eps)
    return x + F.linear(F.gelu(F.linear(normed, ff.w1, ff.b1)), ff.w2, ff.b2)


def decoder_layer(
    x: Tensor, folded: FoldedProjections, ff: FeedForward, slot_mask: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """One pre-norm layer of the decoder: x [B or 1, L, D] (not normed) -> x' [B,L,D], slot_map [B,L,K].

    ``folded`` already holds the affine part of the query norm (``fold_norm``).
    """
    y, slot_map = folded_cross_attention(F.layer_norm(x, x.shape[-1:], eps=eps), folded, slot_mask)
    return feed_forward(x + y, ff, eps).to(x.dtype), slot_map


def output_head(x: Tensor, head: OutputHead, eps: float = 1e-5) -> Tensor:
    """x [..., D] -> [..., C]."""
    x = F.layer_norm(x, x.shape[-1:], head.norm_weight, head.norm_bias, eps)
    return linear_maps(x, head.weights, head.biases)


def decode(decoder: FoldedDecoder, slot_mask: Tensor | None = None, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """The whole decoder after folding: queries [B or 1, L, D] -> pixels [B,L,C], slot_map [B,L,K] (layer mean)."""
    x, maps = made_queries(decoder.queries), []
    for folded, ff in decoder.layers:
        x, slot_map = decoder_layer(x, folded, ff, slot_mask, eps)
        maps.append(slot_map)
    return output_head(x, decoder.head, eps), torch.stack(maps).mean(0)


def reconstruction_error(pixels: Tensor, target: Tensor, pixel_weight: Tensor | None = None) -> Tensor:
    """Σ (pixels − target)² / B over pixels and channels [B,L,C]; pixel_weight [B,L] weights each pixel's sum."""
    error = (pixels.to(torch.promote_types(pixels.dtype, torch.float32)) - target).square().sum(-1)
    if pixel_weight is not None:
        error = error * pixel_weight
    return error.sum() / max(pixels.shape[0], 1)
