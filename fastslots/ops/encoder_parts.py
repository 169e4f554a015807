"""Parts of the encoder where it is no operator as a whole: on a GPU, whose step is bound by how many operators it has.

Their definition is the plain PyTorch of ``fastslots/models/encoder.py``. ``joint_norm`` is the norm over tokens and
channels together; ``bias_gelu`` and ``bias_norm`` are what follows a convolution or a linear layer that has left its
bias out. Those three have kernels on GPUs alone. ``encode_queries`` are the layers: K rows an image, so what depends
on weights alone is made for all N layers at once. With γ, β of the tokens' norm, for each head h::

    rows[b,(k,h)] = A_h norm(q_bk) + a_h      A_h = scale · γ ∘ Wk_hᵀ Wq_h      a_h = scale · γ ∘ Wk_hᵀ bq_h
    out[b,k]      = Σ_h C_h gathered[b,(k,h)] + c      C_h = Wo_h Wv_h γ      c = Wo (Wv β + bv) + bo

All of that is fp32, tokens and what meets them apart: rows have the dtype of the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fastslots.ops import autograd, backends
from fastslots.ops.api import token_attention
from fastslots.ops.autograd import contiguous_like, operator, shapes_of
from fastslots.records import describe

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


def _stacked(layers: Sequence[dict[str, tuple[Tensor, Tensor]]], name: str) -> tuple[Tensor, Tensor]:
    return torch.stack([layer[name][0] for layer in layers]), torch.stack([layer[name][1] for layer in layers])


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
    cross = [of.unbind() for of in fold_cross(layers, heads)]
    own_weight, own_bias = _stacked(layers, "to_qkv")
    # The scale goes with the queries' map; the key bias cancels in the softmax, and its gradient is an exact zero.
    # Filled on the device: a tensor made of numbers is copied from the host, which waits.
    ours, one = own_bias.new_full((S,), S**-0.5), own_bias.new_ones(S)
    scale, unbiased = torch.cat([ours, one, one]), torch.cat([ours, torch.zeros_like(one), one])
    own = (own_weight * scale[:, None]).unbind(), (own_bias * unbiased).unbind()
    x = queries.expand(B, K, S).flatten(0, 1)
    for i, layer in enumerate(layers):
        rows_weight, rows_bias, out_weight, out_bias = (of[i] for of in cross)
        rows = F.linear(F.layer_norm(x, (S,), *layer["norm_q"], eps), rows_weight, rows_bias)
        gathered, tokens = attend(rows.view(B, K * heads, S).to(tokens.dtype), tokens)
        x = x + F.linear(gathered.view(B * K, heads * S).to(x.dtype), out_weight, out_bias)
        qkv = F.linear(F.layer_norm(x, (S,), *layer["norm_own"], eps), own[0][i], own[1][i])
        q, k, v = qkv.view(B, K, 3, heads, -1).permute(2, 0, 3, 1, 4).reshape(3, B * heads, K, -1).unbind()
        attended = torch.bmm(torch.softmax(torch.bmm(q, k.mT), -1), v)
        x = x + F.linear(attended.view(B, heads, K, -1).transpose(1, 2).reshape(B * K, S), *layer["to_out_own"])
        hidden = F.gelu(F.linear(F.layer_norm(x, (S,), *layer["norm_ff"], eps), *layer["w1"]))
        x = x + F.linear(hidden, *layer["w2"])
    return x.view(B, K, S)


def attend(rows: Tensor, tokens: Tensor, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """``token_attention``, and the tokens for the layer that comes next -> gathered, fp32 where kernels serve.

    What later layers make of the tokens' gradient comes back through those, and the kernel adds its own: summed up by
    autograd, each layer would read and write a gradient of all tokens once more.
    """
    name = backends.select(describe("token_attention", (rows, tokens)), backend)
    if name != "triton" or backends.is_traced():
        return token_attention(rows, tokens, name), tokens
    gathered, passed = _Attend.apply(rows, tokens, name)  # type: ignore[no-untyped-call]  # torch's
    return gathered, passed


class _Attend(torch.autograd.Function):  # no operator: those may not hand on what they are handed
    @staticmethod
    def forward(ctx: Any, rows: Tensor, tokens: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        ctx.backend = backend
        ctx.set_materialize_grads(False)
        gathered, lse = autograd.token_attention(rows, tokens, backend)
        ctx.save_for_backward(rows, tokens, gathered, lse)
        return gathered, tokens

    @staticmethod
    def backward(ctx: Any, dgathered: Tensor | None, dtokens: Tensor | None) -> tuple[Tensor | None, ...]:
        if dgathered is None:
            return None, dtokens, None
        rows, tokens, gathered, lse = ctx.saved_tensors
        return *attend_backward(dgathered, rows, tokens, gathered, lse, dtokens, ctx.backend), None


@operator
def attend_backward(
    dgathered: Tensor, rows: Tensor, tokens: Tensor, gathered: Tensor, lse: Tensor, before: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    return _backend(backend).token_attention_bwd(dgathered, rows, tokens, gathered, lse, before)


@shapes_of(attend_backward)
def _(dgathered: Tensor, rows: Tensor, tokens: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return contiguous_like(rows), contiguous_like(tokens)


class PartsBackend(backends.Backend, Protocol):
    """A backend that serves these parts as well."""

    def token_attention_bwd(
        self, dgathered: Tensor, rows: Tensor, tokens: Tensor, gathered: Tensor, lse: Tensor,
        before: Tensor | None = None,
    ) -> backends.Pair: ...  # fmt: skip

    def joint_norm_fwd(self, x: Tensor, eps: float) -> backends.Pair:
        """-> normed over all but the first axis, and 1/σ of each image."""

    def joint_norm_bwd(self, dy: Tensor, y: Tensor, rstd: Tensor) -> Tensor: ...

    def bias_gelu_fwd(self, u: Tensor, bias: Tensor) -> Tensor: ...

    def bias_gelu_bwd(self, dh: Tensor, u: Tensor, bias: Tensor) -> backends.Pair:
        """-> du, and the gradient of the bias in fp32."""

    def bias_norm_fwd(self, x: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        """-> y, and the mean and 1/σ of each row."""

    def bias_norm_bwd(self, dy: Tensor, x: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor) -> backends.Pair:
        """-> dx, and the gradient of the bias in fp32."""


def _backend(name: str) -> PartsBackend:
    return cast(PartsBackend, backends.load(name))


# ---- the norm over tokens and channels ------------------------------------------------------------------------------


def joint_norm(x: Tensor, eps: float = 1e-5, backend: str = "auto") -> Tensor:
    """x [B, T, S] -> (x − mean) / σ over T and S together, without affine part, like x: ``layer_norm(x, [T, S])``.

    ValueError where a backend that is named cannot serve.
    """
    name = backends.select(describe("joint_norm", [x]), backend)
    if name == "reference" or not x.numel():
        return F.layer_norm(x, x.shape[1:], eps=eps)
    return joint_norm_operator(x, eps, name)[0]


@operator
def joint_norm_operator(x: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor]:
    return _backend(backend).joint_norm_fwd(x, eps)


@shapes_of(joint_norm_operator)
def _(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return contiguous_like(x), x.new_empty(x.shape[0], dtype=torch.float32)


@operator
def joint_norm_operator_backward(dy: Tensor, y: Tensor, rstd: Tensor, backend: str) -> Tensor:
    return _backend(backend).joint_norm_bwd(dy, y, rstd)


@shapes_of(joint_norm_operator_backward)
def _(dy: Tensor, y: Tensor, *_: object) -> Tensor:
    return contiguous_like(y)


def _joint_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.backend = inputs[2]
    y, rstd = output
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(y, rstd)


def _joint_norm_vjp(ctx: Any, dy: Tensor | None, _drstd: None) -> tuple[Any, ...]:
    if dy is None:  # an undefined cotangent, which nothing turns into zeros here
        return None, None, None
    y, rstd = ctx.saved_tensors
    return joint_norm_operator_backward(dy, y, rstd, ctx.backend), None, None


torch.library.register_autograd("fastslots::joint_norm_operator", _joint_norm_vjp, setup_context=_joint_norm_setup)

# ---- what follows a convolution or a linear layer -------------------------------------------------------------------


def bias_gelu(u: Tensor, bias: Tensor, backend: str = "auto") -> Tensor:
    """u [..., D], bias [D] -> GELU(u + bias), like u. ValueError where a backend that is named cannot serve."""
    name = backends.select(describe("bias_gelu", [u]), backend)
    if name == "reference" or not u.numel():
        return F.gelu(u + bias.to(u.dtype))
    return bias_gelu_operator(u, bias, name)


def bias_norm(x: Tensor, bias: Tensor, eps: float = 1e-5, backend: str = "auto") -> Tensor:
    """x [..., D], bias [D] -> x + bias, each row normed without affine part, like x. ValueError where a backend that is
    named cannot serve."""
    name = backends.select(describe("bias_norm", [x]), backend)
    if name == "reference" or not x.numel():
        return F.layer_norm(x + bias.to(x.dtype), x.shape[-1:], eps=eps)
    return bias_norm_operator(x, bias, eps, name)[0]


@operator
def bias_gelu_operator(u: Tensor, bias: Tensor, backend: str) -> Tensor:
    return _backend(backend).bias_gelu_fwd(u, bias)


@shapes_of(bias_gelu_operator)
def _(u: Tensor, *_: object) -> Tensor:
    return contiguous_like(u)


@operator
def bias_gelu_operator_backward(dh: Tensor, u: Tensor, bias: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return _backend(backend).bias_gelu_bwd(dh, u, bias)


@shapes_of(bias_gelu_operator_backward)
def _(dh: Tensor, u: Tensor, bias: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return contiguous_like(u), contiguous_like(bias).float()


def _bias_gelu_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    u, bias, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(u, bias)


def _bias_gelu_vjp(ctx: Any, dh: Tensor | None) -> tuple[Any, ...]:
    if dh is None:
        return None, None, None
    u, bias = ctx.saved_tensors
    du, dbias = bias_gelu_operator_backward(dh, u, bias, ctx.backend)
    return du, dbias.to(bias.dtype), None


torch.library.register_autograd("fastslots::bias_gelu_operator", _bias_gelu_vjp, setup_context=_bias_gelu_setup)


@operator
def bias_norm_operator(x: Tensor, bias: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    return _backend(backend).bias_norm_fwd(x, bias, eps)


@shapes_of(bias_norm_operator)
def _(x: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.float32).flatten() for _ in range(2))
    return contiguous_like(x), mean, rstd


@operator
def bias_norm_operator_backward(
    dy: Tensor, x: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    return _backend(backend).bias_norm_bwd(dy, x, bias, mean, rstd)


@shapes_of(bias_norm_operator_backward)
def _(dy: Tensor, x: Tensor, bias: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return contiguous_like(x), contiguous_like(bias).float()


def _bias_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, bias, _, ctx.backend = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, bias, mean, rstd)


def _bias_norm_vjp(ctx: Any, dy: Tensor | None, _dmean: None, _drstd: None) -> tuple[Any, ...]:
    if dy is None:
        return None, None, None, None
    x, bias, mean, rstd = ctx.saved_tensors
    dx, dbias = bias_norm_operator_backward(dy, x, bias, mean, rstd, ctx.backend)
    return dx, dbias.to(bias.dtype), None, None


torch.library.register_autograd("fastslots::bias_norm_operator", _bias_norm_vjp, setup_context=_bias_norm_setup)
