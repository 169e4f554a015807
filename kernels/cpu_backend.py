"""The ``cpu`` backend: the C++ kernels of ``kernels/cpu`` as the raw functions that ``fastslots.ops`` calls.

Arrays are passed through DLPack, contiguous and detached, in fp32 or fp64. 16-bit tensors are widened to fp32 for the
call, results narrowed to the dtypes of the inputs: nothing is accumulated in 16 bits.

Threads are torch's (``torch.set_num_threads``), and so is the pool: the module has no OpenMP runtime of its own. Where
these kernels do nearly all of a computation, ``torch_on_one_thread`` keeps them for the kernels.
Results are the same bits on every call, for any number of threads.

The instruction set is the best that the processor has; ``FASTSLOTS_ISA`` or ``set_isa`` name another (avx512, avx2,
portable).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from fastslots.records import (
    Call,
    FeedForward,
    FoldedDecoder,
    FoldedProjections,
    LayerGrads,
    LossInputs,
    LossResult,
    QueryMlp,
    Tangents,
    flatten,
)

from .cpu_attention import (
    attention_statistics_bwd,
    attention_statistics_fwd,
    folded_slot_attention_bwd,
    folded_slot_attention_fwd,
    slot_attention_bwd,
    slot_attention_fwd,
)
from .cpu_calls import ISAS, MAX_CHAIN, binding, isa, kernel, mask, plain, set_isa, torch_on_one_thread, unit_rows, wide
from .cpu_encoder import encoder_bwd, encoder_fwd, encoder_saved_size
from .cpu_step import step_update, train_step

MAX_SLOTS = 64
MAX_KEYS = 128
MAX_COLUMNS = 512
"""Largest number of slots; of slots where heads are taken one at a time; of heads x slots, or of folded rows of the
encoder: what the C++ tests cover."""

__all__ = [
    "ISAS",
    "attention_statistics_bwd",
    "attention_statistics_fwd",
    "cross_attention_bwd",
    "cross_attention_fwd",
    "decoder_layer_bwd",
    "decoder_layer_fwd",
    "decoder_loss",
    "encoder_bwd",
    "encoder_fwd",
    "encoder_saved_size",
    "folded_cross_attention_bwd",
    "folded_cross_attention_fwd",
    "folded_slot_attention_bwd",
    "folded_slot_attention_fwd",
    "isa",
    "muon",
    "norm",
    "set_isa",
    "slot_attention_bwd",
    "slot_attention_fwd",
    "slot_jacobian",
    "step_update",
    "token_attention_bwd",
    "token_attention_fwd",
    "torch_on_one_thread",
    "train_step",
    "why_not",
]  # fmt: skip


def why_not(call: Call) -> str | None:
    """None when these kernels serve this call, else the reason in words."""
    if call.device.type != "cpu":
        return f"the tensors are on {call.device}, not on the CPU"
    if torch.is_autocast_enabled("cpu"):
        return "autocast asks for 16-bit products, these kernels multiply in fp32 and fp64"
    dtypes = set(call.dtypes)
    if not (dtypes == {torch.float64} or dtypes <= {torch.float16, torch.bfloat16, torch.float32}):
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        return f"{names}: all tensors must be fp64, or of at most 32 bits and floating point"
    if call.op == "encoder" and call.needs_grad:
        return "the images need a gradient, which this kernel does not make"
    if call.rows > MAX_COLUMNS:
        return f"{call.rows} rows are more than {MAX_COLUMNS}"
    most = MAX_KEYS if call.one_head_at_a_time else MAX_SLOTS
    if call.slots > most:
        return f"{call.slots} slots are more than {most}"
    if call.columns > MAX_COLUMNS:
        return f"{call.heads} heads x {call.slots} slots are more than {MAX_COLUMNS} columns"
    if call.chain > MAX_CHAIN:
        return f"{call.chain} layers, one after the other, are more than {MAX_CHAIN}"
    return None


def _empty_like(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Room for the gradient of each."""
    return {name: t.new_empty(t.shape, dtype=dtype) for name, t in tensors.items()}


def _arrays(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: plain(t, dtype) for name, t in tensors.items()}


def cross_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, scale: float, slot_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """q [B,H,L,d], k, v [B,H,K,d], any strides -> out [B,H,L,d], slot_map [B,L,K] (fp32 or wider)."""
    dtype = wide(q.dtype)
    out = q.new_empty(q.shape, dtype=dtype)
    slot_map = q.new_empty(q.shape[0], q.shape[2], k.shape[2], dtype=dtype)
    kernel("cross_attention_fwd", dtype)(
        q=unit_rows(q, dtype), k=unit_rows(k, dtype), v=unit_rows(v, dtype), slot_mask=mask(slot_mask),
        head_weights=None, scale=scale, out=out, slot_map=slot_map, entropy=None, lse=None,
    )  # fmt: skip
    return out.to(q.dtype), slot_map


def cross_attention_bwd(
    dout: Tensor, dslot_map: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, slot_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dq, dk, dv, contiguous."""
    dtype = wide(q.dtype)
    dq, dk, dv = (t.new_empty(t.shape, dtype=dtype) for t in (q, k, v))
    kernel("cross_attention_bwd", dtype)(
        q=unit_rows(q, dtype), k=unit_rows(k, dtype), v=unit_rows(v, dtype), slot_mask=mask(slot_mask),
        head_weights=None, scale=scale, out_grad=unit_rows(dout, dtype), slot_map_grad=plain(dslot_map, dtype),
        entropy_grad=None, lse_grad=None, q_grad=dq, k_grad=dk, v_grad=dv, head_weights_grad=None,
    )  # fmt: skip
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _layer_fwd(x: Tensor, weights: Mapping[str, Tensor], slot_mask: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    dtype = wide(x.dtype)
    B, _, K = weights["g"].shape
    y = x.new_empty(B, *x.shape[1:], dtype=dtype)
    slot_map = x.new_empty(B, x.shape[1], K, dtype=dtype)
    kernel("layer_fwd", dtype)(
        x=plain(x, dtype), weights=_arrays(weights, dtype), slot_mask=mask(slot_mask), eps=eps, y=y, slot_map=slot_map
    )
    return y.to(x.dtype), slot_map


def _layer_bwd(
    dy: Tensor, dslot_map: Tensor, x: Tensor, weights: Mapping[str, Tensor], slot_mask: Tensor | None, eps: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """-> dx, and the gradient of each of the weights by its name."""
    dtype = wide(x.dtype)
    dx, grads = x.new_empty(x.shape, dtype=dtype), _empty_like(weights, dtype)
    kernel("layer_bwd", dtype)(
        x=plain(x, dtype), weights=_arrays(weights, dtype), slot_mask=mask(slot_mask), eps=eps,
        y_grad=plain(dy, dtype), slot_map_grad=plain(dslot_map, dtype), x_grad=dx, grads=grads,
    )  # fmt: skip
    return dx.to(x.dtype), {name: grad.to(weights[name].dtype) for name, grad in grads.items()}


def folded_cross_attention_fwd(
    x: Tensor, folded: FoldedProjections, slot_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x [B or 1,L,D], already normed -> y = A·U + b [B,L,D] (no residual), slot_map [B,L,K]."""
    return _layer_fwd(x, folded._asdict(), slot_mask, 0.0)


def folded_cross_attention_bwd(
    dy: Tensor, dslot_map: Tensor, x: Tensor, folded: FoldedProjections, slot_mask: Tensor | None = None
) -> tuple[Tensor, FoldedProjections]:
    """-> dx and the gradients of ``folded``."""
    dx, grads = _layer_bwd(dy, dslot_map, x, folded._asdict(), slot_mask, 0.0)
    return dx, FoldedProjections(**grads)


def decoder_layer_fwd(
    x: Tensor, folded: FoldedProjections, ff: FeedForward, slot_mask: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """x [B or 1,L,D], not normed -> the layer's output [B,L,D], slot_map [B,L,K]."""
    return _layer_fwd(x, folded._asdict() | ff._asdict(), slot_mask, eps)


def decoder_layer_bwd(
    dy: Tensor,
    dslot_map: Tensor,
    x: Tensor,
    folded: FoldedProjections,
    ff: FeedForward,
    slot_mask: Tensor | None = None,
    eps: float = 1e-5,
) -> LayerGrads:
    """-> gradients of x and of all weights; the forward runs again."""
    dx, grads = _layer_bwd(dy, dslot_map, x, folded._asdict() | ff._asdict(), slot_mask, eps)
    dfolded = FoldedProjections(**{name: grads[name] for name in FoldedProjections._fields})
    return LayerGrads(dx, dfolded, FeedForward(**{name: grads[name] for name in FeedForward._fields}))


def token_attention_fwd(rows: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """rows [B,M,S], tokens [B,T,S] -> gathered [B,M,S], lse [B,M], both in fp32 or wider."""
    dtype = wide(rows.dtype)
    gathered, lse = rows.new_empty(rows.shape, dtype=dtype), rows.new_empty(rows.shape[:2], dtype=dtype)
    plain = _arrays({"rows": rows, "tokens": tokens}, dtype)
    kernel("token_attention_fwd", dtype)(**plain, gathered=gathered, lse=lse)
    return gathered, lse


def token_attention_bwd(
    dgathered: Tensor, rows: Tensor, tokens: Tensor, gathered: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """-> drows, dtokens, contiguous; the softmax is computed again from ``lse``."""
    dtype = wide(rows.dtype)
    drows, dtokens = (t.new_empty(t.shape, dtype=dtype) for t in (rows, tokens))
    inputs = {"rows": rows, "tokens": tokens, "gathered": gathered, "lse": lse, "gathered_grad": dgathered}
    kernel("token_attention_bwd", dtype)(**_arrays(inputs, dtype), rows_grad=drows, tokens_grad=dtokens)
    return drows.to(rows.dtype), dtokens.to(tokens.dtype)


MAKES_QUERIES = True
"""``decoder_loss`` takes the query MLP in place of queries: they never exist for all pixels at once."""


def decoder_loss(inputs: LossInputs, need: Collection[str], grad_scale: float | Tensor = 1.0) -> LossResult:
    """Loss terms and the gradients of ``grad_scale · total``.

    A tile of pixels runs through the whole decoder and back in a core's cache; see ``kernels/cpu/decoder_loss.h``.

    Args:
        inputs: with queries [B or 1,L,D], or the MLP that makes them, tile by tile.
        need: names of ``inputs.tensors()`` whose gradients are needed; without any, only the forward runs.
        grad_scale: the loss scale of mixed precision, a float or a 0-d tensor.
    """
    tensors, queries = inputs.tensors(), inputs.decoder.queries
    dtype = wide(next(iter(tensors.values())).dtype)
    decoder = _arrays(tensors, dtype)
    if isinstance(queries, QueryMlp):
        decoder["query.code"] = plain(queries.code, dtype)
    grads = _empty_like({name: t for name, t in tensors.items() if name in need}, dtype)
    target, scale = plain(inputs.target, dtype), float(grad_scale)
    recon, interaction = kernel("decoder_loss", dtype)(
        decoder=decoder,
        grads=grads,
        target=target,
        pixel_weight=None if inputs.pixel_weight is None else plain(inputs.pixel_weight, dtype),
        slot_mask=mask(inputs.slot_mask),
        recon_weight=float(inputs.recon_weight) * scale,
        interaction_weight=float(inputs.interaction_weight) * scale,
        eps=inputs.eps,
    )
    like = {name: grad.to(tensors[name].dtype) for name, grad in grads.items()}
    return LossResult(target.new_tensor(recon), target.new_tensor(interaction), like)


def slot_jacobian(decoder: FoldedDecoder, tangents: Sequence[Tangents], slot_mask: Tensor | None, eps: float) -> Tensor:
    """Σ over channels and a slot's numbers of |∂x̂/∂z|: [B, K, L]; see ``kernels/cpu/slot_jacobian.h``.

    decoder: with queries [B or 1,L,D] that are made already. tangents: of each of its layers.
    """
    tensors = flatten(decoder)
    queries = tensors["queries"]
    dtype = wide(queries.dtype)
    B, K = tangents[0].keys.shape[:2]
    jacobian = queries.new_empty(B, K, queries.shape[1], dtype=dtype)
    kernel("slot_jacobian", dtype)(
        decoder=_arrays(tensors, dtype),
        tangents=[_arrays(layer._asdict(), dtype) for layer in tangents],
        slot_mask=mask(slot_mask),
        eps=eps,
        jacobian=jacobian,
    )
    return jacobian


def muon(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    buffers: Sequence[Tensor],
    settings: dict[str, float],
    coefficients: tuple[float, float, float],
    iterations: int,
) -> None:
    """Muon's update of matrices and of their momentum, in place; settings: momentum, lr, weight_decay."""
    kernel("muon", params[0].dtype)(
        params=[p.detach() for p in params],
        grads=[g.detach() for g in grads],
        buffers=list(buffers),
        coefficients=coefficients,
        iterations=iterations,
        **settings,
    )


def norm(tensors: Sequence[Tensor]) -> float:
    """Euclidean norm of all of them together: contiguous, of one dtype, fp32 or fp64."""
    value: float = binding("norm", tensors[0].dtype)(arrays=[t.detach() for t in tensors])
    return value
