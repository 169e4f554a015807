"""Modules for other people's slot models: parameters over the functional ops of ``fastslots.ops``."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
import torch.nn as nn
from torch import Tensor

from fastslots.ops import backends, checks, fold_projections, folded_cross_attention, slot_attention
from fastslots.ops.autograd_slots import FoldedSlotAttention
from fastslots.ops.backends import check_name
from fastslots.ops.reference import real_slots
from fastslots.records import FoldedProjections, describe

__all__ = ["InteractionCrossAttention", "SlotAttention"]


def _check_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")


class AttentionProjections(nn.Module):
    """The four projections of a cross-attention; keys and values share one matrix, as published.

    The key bias cancels in a softmax over keys, so that path never reads it and its gradient is exactly zero: a
    rounding-sized one would be blown up to ±lr by Adam. It exists because published checkpoints hold it.
    """

    def __init__(self, query_width: int, source_width: int, inner_width: int, heads: int, scale: float | None = None):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(query_width, inner_width)
        self.to_kv = nn.Linear(source_width, 2 * inner_width)
        self.to_out = nn.Linear(inner_width, query_width)
        self.scale = query_width**-0.5 if scale is None else scale  # as published: the query's width, not the head's

    def split_heads(self, x: Tensor) -> Tensor:
        """[B, n, H·d] -> [B, H, n, d]"""
        heads: Tensor = x.unflatten(-1, (self.heads, -1))
        return heads.transpose(1, 2)

    def key_value_weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """Key weight [H·d, source], value weight [H·d, source], value bias [H·d]."""
        inner = self.to_q.out_features
        key, value = self.to_kv.weight.split(inner)
        return key, value, self.to_kv.bias[inner:]

    def keys_values(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """source [B, K, source_width] -> k, v [B, H, K, d]; k without the bias that cancels."""
        wk, wv, bv = self.key_value_weights()
        return self.split_heads(source @ wk.T), self.split_heads(source @ wv.T + bv)

    def fold(self, k: Tensor, v: Tensor) -> FoldedProjections:
        """k, v [B, H, K, d] -> both projections of the query side folded into them."""
        return fold_projections(
            self.to_q.weight, self.to_q.bias, k, v, self.to_out.weight, self.to_out.bias, self.scale
        )


class InteractionCrossAttention(nn.Module):
    """Cross-attention of many queries to few slots that also returns what the interaction penalty needs.

    >>> attention = InteractionCrossAttention(query_width=180, slot_width=64, heads=12, inner_width=516)
    >>> out, slot_map = attention(pixels, slots)          # [B, L, 180], [B, L, K]
    >>> loss = ... + alpha * fastslots.ops.interaction_penalty(slot_map)

    The projections of the query side are folded into the slots, so their cost does not grow with the number of pixels
    and no attention matrix per head is kept by the kernels. No norm and no residual: add your own.

    Args:
        query_width, slot_width: widths of the inputs. heads: H. inner_width: all heads together (None: query_width).
        scale: factor on the scores; None means query_width^-1/2, as published. The function
            ``fastslots.ops.cross_attention`` knows no query width, and takes the usual d^-1/2 of a head.
        backend: "auto", "reference", "cpu" or "triton", see ``fastslots.ops.cross_attention``.

    Raises ValueError where a width or the number of heads is below 1, where inner_width is no multiple of heads, for an
    unknown backend, and in ``forward`` for shapes that do not fit, by the argument's name.
    """

    def __init__(
        self,
        query_width: int,
        slot_width: int,
        heads: int,
        inner_width: int | None = None,
        scale: float | None = None,
        backend: str = "auto",
    ):
        super().__init__()
        inner_width = query_width if inner_width is None else inner_width
        _check_positive(query_width=query_width, slot_width=slot_width, heads=heads, inner_width=inner_width)
        check_name(backend)
        if inner_width % heads:
            raise ValueError(f"inner_width {inner_width} must be a multiple of heads {heads}")
        self.widths, self.backend = (query_width, slot_width), backend
        self.projections = AttentionProjections(query_width, slot_width, inner_width, heads, scale)

    def forward(self, queries: Tensor, slots: Tensor, slot_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """queries [B or 1, L, query_width], slots [B, K, slot_width] -> out [B, L, query_width], slot_map [B, L, K].

        slot_mask: [B, K] bool, True for a real slot: images with fewer slots are padded.
        """
        checks.rows(self.widths[0], queries=queries)
        checks.rows(self.widths[1], slots=slots)
        if len(queries) not in (1, len(slots)):
            raise ValueError(f"queries are of {len(queries)} images, slots of {len(slots)}: expected as many, or 1")
        folded = self.projections.fold(*self.projections.keys_values(slots))
        return folded_cross_attention(queries, folded, self.backend, slot_mask=slot_mask)


class FoldedTokens:
    """The tokens of slot attention as its iterations meet them: no key and no value of a token is ever made.

    Where a kernel serves, the tokens are also normed inside it, and their gradient is one array that every iteration
    adds to; else they are normed once, here.

    Args:
        tokens: [B, L, S]. slots: [B, K, any width], as many as will meet them. norm: of the tokens.
        backend: see ``fastslots.ops.cross_attention``.
        normed: whether the tokens come normed, so that only the affine part of ``norm`` is left.
    """

    def __init__(self, tokens: Tensor, slots: Tensor, norm: nn.LayerNorm, backend: str = "auto", normed: bool = False):
        call = describe("folded_slot_attention", (slots, tokens))
        self.norm, self.backend, self.norm_eps = norm, backend, None if normed else norm.eps
        self.fused = backend in ("auto", "cpu") and not backends.is_traced() and bool(tokens.shape[1])
        self.fused = self.fused and backends.why_not("cpu", call) is None
        if self.fused:
            self.tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
        else:
            self.tokens = tokens * norm.weight + norm.bias if normed else norm(tokens)

    def gather(
        self, rows: Tensor, scale: float, eps: float, slot_mask: Tensor | None = None, return_map: bool = False
    ) -> tuple[Tensor, Tensor]:
        """rows [B, K, S]: the slots' queries, through the keys' projection -> each slot's mean of the tokens it won
        [B, K, S], still without the values' projection, and the map [B, L, K] (or [0])."""
        (rows,) = real_slots(slot_mask, 1, rows)
        rows = rows.to(self.tokens.dtype)
        if not self.fused:
            n = self.tokens[:, None]
            gathered = slot_attention(
                rows[:, None], n, n, scale, eps, self.backend, slot_mask=slot_mask, return_map=return_map
            )
            means, slot_map = gathered if isinstance(gathered, tuple) else (gathered, n.new_zeros(0))
            return means[:, 0], slot_map
        weight, bias = (t.to(rows.dtype) for t in (self.norm.weight, self.norm.bias))
        rows = rows * scale
        means, slot_map, tokens = FoldedSlotAttention.apply(  # type: ignore[no-untyped-call]  # torch's
            rows * weight, rows @ bias, self.tokens, eps, self.norm_eps, slot_mask, return_map, "cpu"
        )
        if tokens is not None and tokens.requires_grad:  # not where gradients are off for this iteration alone
            self.tokens = tokens
        return real_slots(slot_mask, 1, means * weight + bias)[0], slot_map


class SlotAttention(nn.Module):
    """Slot Attention (Locatello et al. 2020, arXiv 2006.15055): slots compete for tokens, iteration by iteration.

    >>> attention = SlotAttention(width=64, token_width=192)
    >>> slots = attention(first_slots, tokens)                        # [B, K, 64], of [B, K, 64] and [B, L, 192]
    >>> slots, slot_map = attention(first_slots, tokens, return_map=True)          # [B, L, K] of the last iteration

    The projections of the tokens are folded into the slots: no key and no value of a token is ever made, so what an
    iteration keeps for the backward does not grow with the number of tokens. Where the first slots come from is the
    caller's choice: a learned parameter, or draws from a Gaussian.

    Args:
        width: of slots, queries and updates. token_width: of the tokens (None: width).
        iterations: how often slots are refined. hidden: units of the MLP (None: 2 width).
        eps: added to every weight. scale: factor on the scores; None means width^-1/2.
        implicit: only the last iteration has a gradient, the first-order form of implicit differentiation (Chang et al.
            2022, arXiv 2207.00787): the others only bring the slots to where it starts.
        backend: see ``fastslots.ops.cross_attention``.

    Raises ValueError for a width or a number of iterations below 1, an unknown backend, and in ``forward`` for shapes
    that do not fit, by the argument's name.
    """

    def __init__(
        self,
        width: int,
        token_width: int | None = None,
        iterations: int = 3,
        hidden: int | None = None,
        eps: float = 1e-8,
        scale: float | None = None,
        implicit: bool = False,
        backend: str = "auto",
    ):
        super().__init__()
        token_width = width if token_width is None else token_width
        hidden = 2 * width if hidden is None else hidden
        _check_positive(width=width, token_width=token_width, hidden=hidden, iterations=iterations)
        check_name(backend)
        self.widths = width, token_width
        self.iterations, self.eps, self.implicit, self.backend = iterations, eps, implicit, backend
        self.scale = width**-0.5 if scale is None else scale
        self.norm_tokens, self.norm_slots = nn.LayerNorm(token_width), nn.LayerNorm(width)
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k, self.to_v = (nn.Linear(token_width, width, bias=False) for _ in range(2))
        self.gru = nn.GRUCell(width, width)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))

    def forward(
        self, slots: Tensor, tokens: Tensor, slot_mask: Tensor | None = None, return_map: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """slots [B, K, width], tokens [B, L, token_width] -> slots [B, K, width], with ``return_map`` also [B, L, K].

        slot_mask: [B, K] bool, True for a real slot; the others win no token.
        """
        checks.rows(self.widths[0], slots=slots)
        checks.rows(self.widths[1], tokens=tokens)
        if len(slots) != len(tokens):
            raise ValueError(f"slots are of {len(slots)} images, tokens of {len(tokens)}: expected as many")
        met = FoldedTokens(tokens, slots, self.norm_tokens, self.backend)
        slot_map = tokens.new_zeros(0)
        for i in range(self.iterations):
            last = i == self.iterations - 1
            slots = slots.detach() if last and self.implicit else slots
            with torch.set_grad_enabled(torch.is_grad_enabled() and (last or not self.implicit)):
                slots, slot_map = self._refine(slots, met, slot_mask, return_map and last)
        return (slots, slot_map) if return_map else slots

    def _refine(
        self, slots: Tensor, tokens: FoldedTokens, slot_mask: Tensor | None, return_map: bool
    ) -> tuple[Tensor, Tensor]:
        rows = self.to_q(self.norm_slots(slots)) @ self.to_k.weight
        means, slot_map = tokens.gather(rows, self.scale, self.eps, slot_mask, return_map)
        updates = self.to_v(means.to(self.to_v.weight.dtype))
        slots = self.gru(updates.flatten(0, 1), slots.flatten(0, 1)).view_as(slots)
        return slots + self.mlp(slots), slot_map

    def load_foreign(self, state: Mapping[str, Tensor]) -> None:
        """Take the weights of another implementation by the names that are common for them.

        Known are norm_input(s) or norm_features, norm_slots, norm_pre_ff or norm_mlp, to_q or project_q (k and v
        alike), gru, and fc1 and fc2 or mlp.0 and mlp.2. Biases of keys and values have no place in the published
        algorithm. Means and deviations of first slots are left out: those are the caller's.

        Raises ValueError: weights that are missing, left over or of another shape, by their names.
        """
        ours, left = {}, []
        for name, value in state.items():
            renamed = next((re.sub(pattern, to, name) for pattern, to in _COMMON if re.search(pattern, name)), name)
            if renamed in self.state_dict():
                ours[renamed] = value
            elif not re.search(r"slots?_(mu|log_?sigma|sigma|mean|init)|initial_slots|learned_slots", name):
                left.append(name)
        shapes = {name: value.shape for name, value in self.state_dict().items()}
        missing = sorted(shapes.keys() - ours.keys())
        wrong = [f"{name} {list(ours[name].shape)}" for name in ours if ours[name].shape != shapes[name]]
        if missing or left or wrong:
            problems = {"missing": missing, "left over": left, "of another shape": wrong}
            said = "; ".join(f"{what}: {', '.join(names)}" for what, names in problems.items() if names)
            raise ValueError(f"these are no weights of a SlotAttention of this size ({said})")
        self.load_state_dict(ours)


# Names of other implementations -> ours, the first that matches.
_COMMON = (
    (r"^norm_(inputs?|features)\.", "norm_tokens."),
    (r"^norm_(pre_ff|mlp)\.", "mlp.0."),
    (r"^(project|to)_([qkv])\.", r"to_\2."),
    (r"^(fc1|mlp\.0)\.(?=weight|bias)", "mlp.1."),
    (r"^(fc2|mlp\.2)\.(?=weight|bias)", "mlp.3."),
)
