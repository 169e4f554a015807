"""The encoder's layers on a GPU, whose step is bound by how many operators it has.

Their definition is the plain PyTorch of ``fastslots/models/encoder.py``. They have K rows an image, so what depends on
weights alone is made for all N layers at once. With γ, β of the tokens' norm, for each head h::

    rows[b,(k,h)] = A_h norm(q_bk) + a_h      A_h = scale · γ ∘ Wk_hᵀ Wq_h      a_h = scale · γ ∘ Wk_hᵀ bq_h
    out[b,k]      = Σ_h C_h gathered[b,(k,h)] + c      C_h = Wo_h Wv_h γ      c = Wo (Wv β + bv) + bo

All of that is fp32, tokens and what meets them apart: rows have the dtype of the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastslots.ops import backends
from fastslots.ops.encoder_parts import attend

NAMES = (
    "norm_q", "norm_tokens", "to_q", "to_kv", "to_out", "norm_own", "to_qkv", "to_out_own", "norm_ff", "w1", "w2",
)  # fmt: skip
"""A layer's weights in the order of ``records.EncoderInputs``; each is followed by its bias."""


class CrossWeights(NamedTuple):
    """Of N layers, folded."""

    rows_weight: Tensor  # [N, H·S, S]
    rows_bias: Tensor  # [N, H·S]
    out_weight: Tensor  # [N, S, H·S]
    out_bias: Tensor  # [N, S]


def _of(layers: Sequence[dict[str, tuple[Tensor, Tensor]]], name: str) -> tuple[list[Tensor], list[Tensor]]:
    return [layer[name][0] for layer in layers], [layer[name][1] for layer in layers]


def _stacked(layers: Sequence[dict[str, tuple[Tensor, Tensor]]], name: str) -> tuple[Tensor, Tensor]:
    weights, biases = _of(layers, name)
    return torch.stack(weights), torch.stack(biases)


def fold_cross(layers: Sequence[dict[str, tuple[Tensor, Tensor]]], heads: int) -> CrossWeights:
    """What every layer does before and after it meets the tokens, as one map each."""
    (wq, bq), (wkv, bkv) = _stacked(layers, "to_q"), _stacked(layers, "to_kv")
    (wo, bo), (gamma, beta) = _stacked(layers, "to_out"), _stacked(layers, "norm_tokens")
    N, S, _ = wq.shape
    wk, wv = wkv.chunk(2, 1)
    by_head = (N * heads, S // heads, S)
    wk = (wk * (gamma * S**-0.5)[:, None]).reshape(by_head).mT  # [N·H, S, d]
    rows_weight = torch.bmm(wk, wq.reshape(by_head))
    rows_bias = torch.bmm(wk, bq.reshape(N * heads, S // heads, 1))
    outward = wo.mT.reshape(by_head).mT  # [N·H, S, d]
    out_weight = torch.bmm(outward, (wv * gamma[:, None]).reshape(by_head))  # [N·H, S, S]
    value_bias = torch.baddbmm(bkv[:, S:, None], wv, beta[..., None])
    return CrossWeights(
        rows_weight.view(N, heads * S, S),
        rows_bias.view(N, heads * S),
        out_weight.view(N, heads, S, S).transpose(1, 2).reshape(N, S, heads * S),
        torch.baddbmm(bo[..., None], wo, value_bias)[..., 0],
    )


def encode_queries(queries: Tensor, tokens: Tensor, weights: Sequence[Tensor], heads: int, eps: float) -> Tensor:
    """queries [B or 1, K, S] fp32, tokens [B, T, S] -> queries [B, K, S] after all layers.

    weights: those of the layers alone, as ``records.EncoderInputs`` orders them.
    """
    pairs = list(zip(weights[::2], weights[1::2], strict=True))
    layers = [dict(zip(NAMES, pairs[at : at + len(NAMES)], strict=True)) for at in range(0, len(pairs), len(NAMES))]
    B, (_, K, S) = len(tokens), queries.shape
    cross = fold_cross(layers, heads)
    own_weight, own_bias = _stacked(layers, "to_qkv")
    # The scale goes with the queries' map; the key bias cancels in the softmax, and its gradient is an exact zero.
    # Filled on the device: a tensor made of numbers is copied from the host, which waits.
    ours, one = own_bias.new_full((S,), S**-0.5), own_bias.new_ones(S)
    scale, unbiased = torch.cat([ours, one, one]), torch.cat([ours, torch.zeros_like(one), one])
    to_rows = Maps(cross.rows_weight.unbind(), cross.rows_bias.unbind())
    from_tokens = Maps(cross.out_weight.unbind(), cross.out_bias.unbind())
    to_qkv = Maps((own_weight * scale[:, None]).unbind(), (own_bias * unbiased).unbind())
    to_out_own, w1, w2 = (
        Maps(*zip(*(layer[name] for layer in layers), strict=True)) for name in ("to_out_own", "w1", "w2")
    )
    x = queries.expand(B, K, S).flatten(0, 1)
    for i, layer in enumerate(layers):
        rows = to_rows(i, F.layer_norm(x, (S,), *layer["norm_q"], eps))
        gathered, tokens = attend(rows.view(B, K * heads, S).to(tokens.dtype), tokens)
        x = x + from_tokens(i, gathered.view(B * K, heads * S).to(x.dtype))
        qkv = to_qkv(i, F.layer_norm(x, (S,), *layer["norm_own"], eps))
        q, k, v = qkv.view(B, K, 3, heads, -1).permute(2, 0, 3, 1, 4).reshape(3, B * heads, K, -1).unbind()
        attended = torch.bmm(torch.softmax(torch.bmm(q, k.mT), -1), v)
        x = x + to_out_own(i, attended.view(B, heads, K, -1).transpose(1, 2).reshape(B * K, S))
        x = x + w2(i, F.gelu(w1(i, F.layer_norm(x, (S,), *layer["norm_ff"], eps))))
    return x.view(B, K, S)


class Maps:
    """A linear map of each of N layers, all of one shape: the gradients of their weights are one product.

    On the way back a layer leaves its rows and their gradients here; when all have, one batched product makes N
    gradients of weights, and one sum those of the biases. Layer by layer each would be a launch of its own.
    """

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor]):
        self._rows: dict[int, tuple[Tensor, Tensor]] = {}
        self._traced = backends.is_traced()  # a compiler follows no tensor through a dictionary
        both = [*weights, *biases]
        if not self._traced:
            both = _Weights.apply(self._rows, *both)  # type: ignore[no-untyped-call]  # torch's
        self._weights, self._biases = both[: len(weights)], both[len(weights) :]

    def __call__(self, layer: int, x: Tensor) -> Tensor:
        """x [n, in] -> [n, out]"""
        weight, bias = self._weights[layer], self._biases[layer]
        if self._traced:
            return F.linear(x, weight, bias)
        y: Tensor = _Map.apply(x, weight, bias, self._rows, layer)  # type: ignore[no-untyped-call]  # torch's
        return y


class _Weights(torch.autograd.Function):
    """Hands the weights on; its backward comes after those of all maps, whose gradients of weights are None."""

    @staticmethod
    def forward(ctx: Any, rows: dict[int, tuple[Tensor, Tensor]], *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.rows, ctx.layers = rows, len(weights) // 2
        ctx.set_materialize_grads(False)
        return tuple(weight.view_as(weight) for weight in weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_: None) -> tuple[Tensor | None, ...]:
        left = [ctx.rows.pop(layer, None) for layer in range(ctx.layers)]
        if any(rows is None for rows in left):  # a layer that nothing depends on
            grads = [(None, None) if rows is None else (rows[0].mT @ rows[1], rows[0].sum(0)) for rows in left]
            return None, *(weight for weight, _ in grads), *(bias for _, bias in grads)
        dy, x = (torch.stack(tensors) for tensors in zip(*left, strict=True))
        return None, *torch.bmm(dy.mT, x).unbind(), *dy.sum(1).unbind()


class _Map(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, rows: dict[int, tuple[Tensor, Tensor]], layer: int
    ) -> Tensor:
        ctx.rows, ctx.layer = rows, layer
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        if any(ctx.needs_input_grad[1:3]):
            ctx.rows[ctx.layer] = dy, x
        return dy @ weight if ctx.needs_input_grad[0] else None, None, None, None, None
