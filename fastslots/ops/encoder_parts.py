"""Parts of the encoder where it is no operator as a whole: on a GPU, whose step is bound by how many operators it has.

Their definition is the plain PyTorch of ``fastslots/models/encoder.py``. ``joint_norm`` is the norm over tokens and
channels together; ``bias_gelu`` and ``bias_norm`` are what follows a convolution or a linear layer that has left its
bias out. Those three have kernels on GPUs alone. ``attend`` is the attention to tokens of one layer of several, whose
other parts are in ``parts.query_layers``.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fastslots.ops import autograd, backends
from fastslots.ops.api import token_attention
from fastslots.ops.autograd import contiguous_like, operator, shapes_of
from fastslots.records import describe


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

    def joint_norm_fwd(self, x: Tensor, eps: float, shared: Tensor | None = None) -> backends.Pair:
        """-> x, with what all images share added to each, normed over all but the first axis, and 1/σ of each image."""

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


def joint_norm(x: Tensor, eps: float = 1e-5, backend: str = "auto", shared: Tensor | None = None) -> Tensor:
    """x [B, T, S] -> (x − mean) / σ over T and S together, without affine part, like x: ``layer_norm(x, [T, S])``.

    shared: [T, S], added to each image before. ValueError where a backend that is named cannot serve.
    """
    name = backends.select(describe("joint_norm", [x]), backend)
    if name == "reference" or not x.numel():
        return F.layer_norm(x if shared is None else x + shared, x.shape[1:], eps=eps)
    return joint_norm_operator(x, shared, eps, name)[0]


@operator
def joint_norm_operator(x: Tensor, shared: Tensor | None, eps: float, backend: str) -> tuple[Tensor, Tensor]:
    return _backend(backend).joint_norm_fwd(x, eps, shared)


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
    _, shared, _, ctx.backend = inputs
    ctx.shared_dtype = None if shared is None else shared.dtype
    y, rstd = output
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(y, rstd)


def _joint_norm_vjp(ctx: Any, dy: Tensor | None, _drstd: None) -> tuple[Any, ...]:
    if dy is None:  # an undefined cotangent, which nothing turns into zeros here
        return None, None, None, None
    y, rstd = ctx.saved_tensors
    dx = joint_norm_operator_backward(dy, y, rstd, ctx.backend)
    dshared = dx.sum(0, dtype=ctx.shared_dtype) if ctx.needs_input_grad[1] else None
    return dx, dshared, None, None


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
