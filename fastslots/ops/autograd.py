"""Kernels as differentiable torch operators: those of the decoder; other files register theirs by the same function.

They work in eager mode, under ``torch.compile(fullgraph=True)`` and ``export``. Inside forward-mode AD and functorch
transforms they would answer with silent zeros: ``backends.select`` takes the reference there. Outputs that no one used
come to a backward as zeros (autograd makes them), so kernels always see both cotangents.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from fastslots.ops import backends
from fastslots.records import FeedForward, FoldedProjections

Function = TypeVar("Function", bound=Callable[..., Any])
"""Both decorators hand back what they are handed, or what stands in its place with the same parameters."""

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}
"""What each operator of ours runs, by its name: for a model that follows a call down to its launches."""


def operator(function: Function, writes: tuple[str, ...] = ()) -> Function:
    """Register ``function`` as an operator of its name -> what calls it. writes: the parameters that it writes into.

    ``torch.library.custom_op`` does the same and imports Dynamo at the first call, which takes seconds. A
    backward refuses to be differentiated: left alone, torch would only warn, and drop its gradient.
    """
    name = f"fastslots::{function.__name__}"
    schema = torch.library.infer_schema(function, mutates_args=writes)
    torch.library.define(name, schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(name, "default", function)
    IMPLEMENTATIONS[function.__name__] = function
    if name.endswith("_backward") and not writes:
        torch.library.register_autograd(name, _refuse)
    return cast(Function, getattr(torch.ops.fastslots, function.__name__).default)


def operator_that_writes(*names: str) -> Callable[[Function], Function]:
    """The same of a function that writes into these parameters."""
    return lambda function: operator(function, names)


def shapes_of(function: Callable[..., Any]) -> Callable[[Function], Function]:
    """Register what makes empty outputs for an operator, from its own arguments: one that names the first of them takes
    the rest as ``*_``."""
    name = cast(Any, function)._schema.name
    return cast(Callable[[Function], Function], torch.library.register_fake(name))


def _refuse(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError("kernels have no autograd formula of their backward: take second derivatives by the reference")


def map_like(x: Tensor, batch: int, pixels: int, slots: int) -> Tensor:
    return x.new_empty(batch, pixels, slots, dtype=torch.promote_types(x.dtype, torch.float32))


def contiguous_like(t: Tensor) -> Tensor:
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def _layer_like(x: Tensor, folded: FoldedProjections) -> tuple[Tensor, Tensor]:
    B, _, K = folded.g.shape
    return x.new_empty(B, x.shape[1], x.shape[2]), map_like(x, B, x.shape[1], K)


# ---- cross_attention -------------------------------------------------------------------------------------------------


@operator
def cross_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, slot_mask: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    return backends.load(backend).cross_attention_fwd(q, k, v, scale, slot_mask)


@shapes_of(cross_attention)
def _(q: Tensor, k: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return contiguous_like(q), map_like(q, q.shape[0], q.shape[2], k.shape[2])


@operator
def cross_attention_backward(
    dout: Tensor,
    dslot_map: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    slot_mask: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return backends.load(backend).cross_attention_bwd(dout, dslot_map, q, k, v, scale, slot_mask)


@shapes_of(cross_attention_backward)
def _(dout: Tensor, dmap: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return contiguous_like(q), contiguous_like(k), contiguous_like(v)


def _cross_attention_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, v, ctx.scale, slot_mask, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, slot_mask)


def _cross_attention_vjp(ctx: Any, dout: Tensor, dslot_map: Tensor) -> tuple[Any, ...]:
    q, k, v, slot_mask = ctx.saved_tensors
    dq, dk, dv = cross_attention_backward(dout, dslot_map, q, k, v, ctx.scale, slot_mask, ctx.backend)
    return dq, dk, dv, None, None, None


torch.library.register_autograd(
    "fastslots::cross_attention", _cross_attention_vjp, setup_context=_cross_attention_setup
)


# ---- folded_cross_attention ------------------------------------------------------------------------------------------


@operator
def folded_cross_attention(
    x: Tensor, folded: list[Tensor], slot_mask: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    return backends.load(backend).folded_cross_attention_fwd(x, FoldedProjections(*folded), slot_mask)


@shapes_of(folded_cross_attention)
def _(x: Tensor, folded: list[Tensor], *_: object) -> tuple[Tensor, Tensor]:
    return _layer_like(x, FoldedProjections(*folded))


@operator
def folded_cross_attention_backward(
    dy: Tensor, dslot_map: Tensor, x: Tensor, folded: list[Tensor], slot_mask: Tensor | None, backend: str
) -> list[Tensor]:
    """-> dx, then the gradients of folded in order."""
    run = backends.load(backend).folded_cross_attention_bwd
    dx, dfolded = run(dy, dslot_map, x, FoldedProjections(*folded), slot_mask)
    assert dfolded is not None  # they are left out on request alone
    return [dx, *dfolded]


@shapes_of(folded_cross_attention_backward)
def _(dy: Tensor, dslot_map: Tensor, x: Tensor, folded: list[Tensor], *_: object) -> list[Tensor]:
    return [contiguous_like(t) for t in (x, *folded)]


def _folded_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, folded, slot_mask, ctx.backend = inputs
    ctx.save_for_backward(x, slot_mask, *folded)


def _folded_vjp(ctx: Any, dy: Tensor, dslot_map: Tensor) -> tuple[Any, ...]:
    x, slot_mask, *folded = ctx.saved_tensors
    dx, *dfolded = folded_cross_attention_backward(dy, dslot_map, x, folded, slot_mask, ctx.backend)
    return dx, dfolded, None, None


torch.library.register_autograd("fastslots::folded_cross_attention", _folded_vjp, setup_context=_folded_setup)


# ---- decoder_layer ---------------------------------------------------------------------------------------------------


@operator
def decoder_layer(
    x: Tensor, folded: list[Tensor], ff: list[Tensor], slot_mask: Tensor | None, eps: float, backend: str
) -> tuple[Tensor, Tensor]:
    run = backends.load(backend).decoder_layer_fwd
    return run(x, FoldedProjections(*folded), FeedForward(*ff), slot_mask, eps)


@shapes_of(decoder_layer)
def _(x: Tensor, folded: list[Tensor], *_: object) -> tuple[Tensor, Tensor]:
    return _layer_like(x, FoldedProjections(*folded))


@operator
def decoder_layer_backward(
    dy: Tensor,
    dslot_map: Tensor,
    x: Tensor,
    folded: list[Tensor],
    ff: list[Tensor],
    slot_mask: Tensor | None,
    eps: float,
    backend: str,
) -> list[Tensor]:
    """-> dx, then the gradients of folded and ff in order. x is all that the forward saves; the rest is recomputed."""
    run = backends.load(backend).decoder_layer_bwd
    grads = run(dy, dslot_map, x, FoldedProjections(*folded), FeedForward(*ff), slot_mask, eps)
    assert grads.folded is not None and grads.ff is not None  # they are left out on request alone
    return [grads.x, *grads.folded, *grads.ff]


@shapes_of(decoder_layer_backward)
def _(dy: Tensor, dmap: Tensor, x: Tensor, folded: list[Tensor], ff: list[Tensor], *_: object) -> list[Tensor]:
    return [contiguous_like(t) for t in (x, *folded, *ff)]


def _layer_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, folded, ff, slot_mask, ctx.eps, ctx.backend = inputs
    ctx.save_for_backward(x, slot_mask, *folded, *ff)
    ctx.num_folded = len(folded)


def _layer_vjp(ctx: Any, dy: Tensor, dslot_map: Tensor) -> tuple[Any, ...]:
    x, slot_mask, *weights = ctx.saved_tensors
    folded, ff = weights[: ctx.num_folded], weights[ctx.num_folded :]
    dx, *grads = decoder_layer_backward(dy, dslot_map, x, folded, ff, slot_mask, ctx.eps, ctx.backend)
    return dx, grads[: ctx.num_folded], grads[ctx.num_folded :], None, None, None


torch.library.register_autograd("fastslots::decoder_layer", _layer_vjp, setup_context=_layer_setup)


# ---- token_attention -------------------------------------------------------------------------------------------------


@operator
def token_attention(rows: Tensor, tokens: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """-> gathered in fp32 or wider, and the log-sum-exp of each row's scores, both of which the backward needs.

    From a gathered of 16 bits it would take dgathered · gathered with an error that the tokens' mean blows up: tokens
    of mean 4 and deviation 1 made the gradient of the rows 17 % wrong in bf16.
    """
    return backends.load(backend).token_attention_fwd(rows, tokens)


@shapes_of(token_attention)
def _(rows: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(rows.dtype, torch.float32)
    return contiguous_like(rows).to(dtype), rows.new_empty(rows.shape[:2], dtype=dtype)


@operator
def token_attention_backward(
    dgathered: Tensor, rows: Tensor, tokens: Tensor, gathered: Tensor, lse: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    return backends.load(backend).token_attention_bwd(dgathered, rows, tokens, gathered, lse)


@shapes_of(token_attention_backward)
def _(dgathered: Tensor, rows: Tensor, tokens: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return contiguous_like(rows), contiguous_like(tokens)


def _token_attention_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    rows, tokens, ctx.backend = inputs
    gathered, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)  # zeros for lse, which nothing reads
    ctx.save_for_backward(rows, tokens, gathered, lse)


def _token_attention_vjp(ctx: Any, dgathered: Tensor | None, _dlse: None) -> tuple[Any, ...]:
    if dgathered is None:  # an undefined cotangent, which nothing turns into zeros here
        return None, None, None
    rows, tokens, gathered, lse = ctx.saved_tensors
    grads = token_attention_backward(dgathered, rows, tokens, gathered, lse, ctx.backend)
    return *grads, None


torch.library.register_autograd(
    "fastslots::token_attention", _token_attention_vjp, setup_context=_token_attention_setup
)
