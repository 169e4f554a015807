"""The ``cpu`` backend: the C++ kernels of ``kernels/cpu`` as the raw functions that ``fastslots.ops`` calls.

Arrays are passed through DLPack, contiguous and detached, in fp32 or fp64. 16-bit tensors are widened to fp32 for the
call, results narrowed to the dtypes of the inputs: nothing is accumulated in 16 bits.

Threads are torch's (``torch.set_num_threads``), and so is the pool: the module has no OpenMP runtime of its own.
Results are the same bits on every call, for any number of threads.

The instruction set is the best that the processor has; ``FASTSLOTS_ISA`` or ``set_isa`` name another (avx512, avx2,
portable).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch  # before _cpu, which takes its OpenMP symbols from the runtime that torch has loaded
from torch import Tensor

from fastslots import _cpu  # type: ignore[attr-defined]
from fastslots.errors import UserError

MAX_SLOTS = 64
MAX_COLUMNS = 512
"""Most slots of a head, and heads x slots (or folded rows of the encoder): what the C++ tests cover."""

ISAS: tuple[str, ...] = tuple(_cpu.instruction_sets())
"""Instruction sets that this processor serves, the best first."""


_isa: str


def set_isa(name: str | None) -> None:
    """Use this instruction set from now on; None for the best. UserError where the processor lacks it."""
    global _isa
    if name is not None and name not in ISAS:
        served = ", ".join(ISAS)
        raise UserError(f"instruction set {name!r} is not one that this processor serves: name one of {served}")
    _isa = name or ISAS[0]


def isa() -> str:
    """The instruction set in use."""
    return _isa


set_isa(os.environ.get("FASTSLOTS_ISA") or None)


def why_not(op: str, tensors: Sequence[Tensor]) -> str | None:
    """None when these kernels serve ``op`` on these tensors (in the order of the public call), else the reason."""
    x = tensors[0]
    if x.device.type != "cpu":
        return f"the tensors are on {x.device}, not on the CPU"
    if torch.is_autocast_enabled("cpu"):
        return "autocast asks for 16-bit products, these kernels multiply in fp32 and fp64"
    dtypes = {t.dtype for t in tensors}
    if not (dtypes == {torch.float64} or dtypes <= {torch.float16, torch.bfloat16, torch.float32}):
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        return f"{names}: all tensors must be fp64, or of at most 32 bits and floating point"
    if op == "slot_attention":
        slots = x.shape[2] if x.ndim == 4 else 1
        return f"{slots} slots are more than {MAX_SLOTS}" if slots > MAX_SLOTS else None
    if op == "token_attention":
        rows = x.shape[1] if x.ndim == 3 else 1
        return f"{rows} rows are more than {MAX_COLUMNS}" if rows > MAX_COLUMNS else None
    if op == "encoder":
        needed = x.requires_grad and torch.is_grad_enabled()
        return "the images need a gradient, which this kernel does not make" if needed else None
    # A probe of device and dtype alone (other shapes, one tensor) is answered too: its sizes forbid nothing.
    second = tensors[1].shape if len(tensors) > 1 and tensors[1].ndim == 4 else (1, 1, 1, 1)
    heads, slots = (1, second[2]) if op == "cross_attention" else second[2:4]
    if slots > MAX_SLOTS:
        return f"{slots} slots are more than {MAX_SLOTS}"
    if heads * slots > MAX_COLUMNS:
        return f"{heads} heads x {slots} slots are more than {MAX_COLUMNS} columns"
    return None


def _kernel(op: str, dtype: torch.dtype):
    return getattr(_cpu, f"{op}_{str(dtype).removeprefix('torch.')}")


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What the kernels compute in."""
    return torch.promote_types(dtype, torch.float32)


def _plain(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """What the C++ side takes: detached, contiguous, of its dtype."""
    return tensor.detach().to(dtype).contiguous()


def _rows(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Last axis contiguous, other strides as they are: heads split from one projection are not copied."""
    tensor = tensor.detach().to(dtype)
    if not tensor.numel():  # torch calls any strides of an empty tensor contiguous: those of a sum's gradient are 0
        return tensor.new_empty(tensor.shape)
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _mask(slot_mask: Tensor | None) -> Tensor | None:
    return None if slot_mask is None else _plain(slot_mask, torch.uint8)


def _narrowed(grads: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(grad.to(like.dtype) for grad, like in zip(grads, inputs, strict=True))


def cross_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, scale: float, slot_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """q [B,H,L,d], k, v [B,H,K,d], any strides -> out [B,H,L,d], slot_map [B,L,K] (fp32 or wider)."""
    dtype = _wide(q.dtype)
    out = q.new_empty(q.shape, dtype=dtype)
    slot_map = q.new_empty(q.shape[0], q.shape[2], k.shape[2], dtype=dtype)
    qkv = (_rows(t, dtype) for t in (q, k, v))
    threads = torch.get_num_threads()
    _kernel("cross_attention", dtype)(_isa, *qkv, [out, slot_map], None, None, _mask(slot_mask), scale, threads)
    return out.to(q.dtype), slot_map


def cross_attention_bwd(
    dout: Tensor, dslot_map: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, slot_mask: Tensor | None = None
) -> tuple[Tensor, ...]:
    """-> dq, dk, dv, contiguous."""
    dtype = _wide(q.dtype)
    grads = [t.new_empty(t.shape, dtype=dtype) for t in (q, k, v)]
    qkv = (_rows(t, dtype) for t in (q, k, v))
    cotangents = _rows(dout, dtype), _plain(dslot_map, dtype)
    threads = torch.get_num_threads()
    _kernel("cross_attention", dtype)(_isa, *qkv, grads, *cotangents, _mask(slot_mask), scale, threads)
    return _narrowed(grads, (q, k, v))


def slot_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, scale: float, eps: float, slot_mask: Tensor | None, return_map: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """q [B,H,K,d], k, v [B,H,L,d], any strides -> updates [B,H,K,d], totals [B,H,K], map [B,L,K] (or [0])."""
    dtype = _wide(q.dtype)
    B, _, K, _ = q.shape
    updates, totals = q.new_empty(q.shape, dtype=dtype), q.new_empty(q.shape[:3], dtype=dtype)
    slot_map = q.new_empty((B, k.shape[2], K) if return_map else 0, dtype=dtype)
    _kernel("slot_attention", dtype)(
        isa=_isa,
        q=_rows(q, dtype),
        k=_rows(k, dtype),
        v=_rows(v, dtype),
        outputs=[updates, totals, slot_map if return_map else None],
        updates_grad=None,
        map_grad=None,
        saved=[],
        slot_mask=_mask(slot_mask),
        scale=scale,
        eps=eps,
        threads=torch.get_num_threads(),
    )
    return updates.to(q.dtype), totals, slot_map


def slot_attention_bwd(
    dupdates: Tensor,
    dslot_map: Tensor | None,
    inputs: tuple[Tensor, Tensor, Tensor],
    saved: tuple[Tensor, Tensor],
    scale: float,
    eps: float,
    slot_mask: Tensor | None,
) -> tuple[Tensor, ...]:
    """inputs: q, k, v; saved: updates and totals -> dq, dk, dv, contiguous."""
    dtype = _wide(inputs[0].dtype)
    grads = [t.new_empty(t.shape, dtype=dtype) for t in inputs]
    q, k, v = (_rows(t, dtype) for t in inputs)
    _kernel("slot_attention", dtype)(
        isa=_isa,
        q=q,
        k=k,
        v=v,
        outputs=grads,
        updates_grad=_plain(dupdates, dtype),
        map_grad=None if dslot_map is None else _plain(dslot_map, dtype),
        saved=[_plain(t, dtype) for t in saved],
        slot_mask=_mask(slot_mask),
        scale=scale,
        eps=eps,
        threads=torch.get_num_threads(),
    )
    return _narrowed(grads, inputs)


def _layer_fwd(x: Tensor, weights: Sequence[Tensor], slot_mask: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    dtype = _wide(x.dtype)
    B, _, K = weights[1].shape
    y = x.new_empty(B, *x.shape[1:], dtype=dtype)
    slot_map = x.new_empty(B, x.shape[1], K, dtype=dtype)
    plain = _plain(x, dtype), [_plain(w, dtype) for w in weights]
    threads = torch.get_num_threads()
    _kernel("layer", dtype)(_isa, *plain, [y, slot_map], None, None, _mask(slot_mask), eps, threads)
    return y.to(x.dtype), slot_map


def _layer_bwd(
    dy: Tensor, dslot_map: Tensor, x: Tensor, weights: Sequence[Tensor], slot_mask: Tensor | None, eps: float
) -> tuple[Tensor, ...]:
    dtype = _wide(x.dtype)
    grads = [t.new_empty(t.shape, dtype=dtype) for t in (x, *weights)]
    plain = _plain(x, dtype), [_plain(w, dtype) for w in weights]
    cotangents = _plain(dy, dtype), _plain(dslot_map, dtype)
    threads = torch.get_num_threads()
    _kernel("layer", dtype)(_isa, *plain, grads, *cotangents, _mask(slot_mask), eps, threads)
    return _narrowed(grads, (x, *weights))


def folded_cross_attention_fwd(
    x: Tensor, G: Tensor, g: Tensor, U: Tensor, b: Tensor, slot_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x [B or 1,L,D], already normed -> y = A·U + b [B,L,D] (no residual), slot_map [B,L,K]."""
    return _layer_fwd(x, (G, g, U, b), slot_mask, 0.0)


def folded_cross_attention_bwd(
    dy: Tensor, dslot_map: Tensor, x: Tensor, G: Tensor, g: Tensor, U: Tensor, slot_mask: Tensor | None = None
) -> tuple[Tensor, ...]:
    """-> dx, dG, dg, dU, db."""
    # b itself shifts y alone, so its value does not matter here.
    return _layer_bwd(dy, dslot_map, x, (G, g, U, U.new_zeros(U.shape[3])), slot_mask, 0.0)


def decoder_layer_fwd(
    x: Tensor,
    G: Tensor,
    g: Tensor,
    U: Tensor,
    b: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    slot_mask: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """x [B or 1,L,D], not normed -> the layer's output [B,L,D], slot_map [B,L,K]."""
    return _layer_fwd(x, (G, g, U, b, norm_weight, norm_bias, w1, b1, w2, b2), slot_mask, eps)


def decoder_layer_bwd(
    dy: Tensor,
    dslot_map: Tensor,
    x: Tensor,
    G: Tensor,
    g: Tensor,
    U: Tensor,
    b: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    slot_mask: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, ...]:
    """-> gradients of x and of the ten weights, in the order of the arguments; the forward runs again."""
    weights = (G, g, U, b, norm_weight, norm_bias, w1, b1, w2, b2)
    return _layer_bwd(dy, dslot_map, x, weights, slot_mask, eps)


def token_attention_fwd(rows: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """rows [B,M,S], tokens [B,T,S] -> gathered [B,M,S], lse [B,M] (fp32 or wider)."""
    dtype = _wide(rows.dtype)
    gathered, lse = rows.new_empty(rows.shape, dtype=dtype), rows.new_empty(rows.shape[:2], dtype=dtype)
    plain = _plain(rows, dtype), _plain(tokens, dtype)
    _kernel("token_attention", dtype)(_isa, *plain, [gathered, lse], None, torch.get_num_threads())
    return gathered.to(rows.dtype), lse


def token_attention_bwd(
    dgathered: Tensor, rows: Tensor, tokens: Tensor, gathered: Tensor, lse: Tensor
) -> tuple[Tensor, ...]:
    """-> drows, dtokens, contiguous; the softmax is computed again from ``lse``."""
    dtype = _wide(rows.dtype)
    grads = [t.new_empty(t.shape, dtype=dtype) for t in (rows, tokens)]
    plain = _plain(rows, dtype), _plain(tokens, dtype)
    saved = [_plain(t, dtype) for t in (dgathered, gathered, lse)]
    _kernel("token_attention", dtype)(_isa, *plain, grads, saved, torch.get_num_threads())
    return _narrowed(grads, (rows, tokens))


def encoder_saved_size(
    images: Tensor,
    queries: Tensor,
    grid: Tensor | None,
    picks: Tensor | None,
    weights: Sequence[Tensor],
    strides: Sequence[int],
    heads: int,
) -> int:
    """Elements (fp32 or wider) that ``encoder_fwd`` keeps of an image; of the arguments only the shapes count."""
    per_image = [queries[:1], grid, None if picks is None else picks[:1], *weights]
    shapes = tuple(None if t is None else tuple(map(int, t.shape)) for t in per_image)
    return _encoder_saved_size(_isa, _wide(images.dtype), tuple(images.shape[1:]), shapes, tuple(strides), heads)


@functools.lru_cache(maxsize=64)
def _encoder_saved_size(isa: str, dtype: torch.dtype, image: tuple, shapes: tuple, strides: tuple, heads: int) -> int:
    # NumPy's arrays in place of tensors, which may be fake ones here; nobody touches their memory.
    numbers = np.float32 if dtype == torch.float32 else np.float64
    queries, grid, picks, *weights = (None if shape is None else np.empty(shape, numbers) for shape in shapes)
    seeds = None if picks is None else np.zeros((1, queries.shape[1]), np.int64)
    sizes = np.empty((1, *image), numbers), np.empty((1, *queries.shape[1:]), numbers), grid, seeds, weights
    return _kernel("encoder_saved_size", dtype)(isa, *sizes, list(strides), heads)


def encoder_fwd(
    images: Tensor,
    queries: Tensor,
    grid: Tensor | None,
    picks: Tensor | None,
    weights: Sequence[Tensor],
    strides: Sequence[int],
    heads: int,
    eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """The arguments of ``fastslots.ops.encoder.EncoderInputs`` -> out [B,K,outputs], and what the backward reads
    ([B,n], n = 0 unless ``keep``: it runs the forward again). See ``kernels/cpu/encoder.h``."""
    dtype, B = _wide(images.dtype), images.shape[0]
    size = encoder_saved_size(images, queries, grid, picks, weights, strides, heads) if keep else 0
    saved = images.new_empty(B, size, dtype=dtype)
    out = images.new_empty(B, queries.shape[1], weights[-1].shape[0], dtype=dtype)
    _kernel("encoder", dtype)(
        _isa,
        *_encoder_arrays(dtype, images, queries, grid, picks, weights),
        list(strides),
        heads,
        saved if keep else None,
        None,
        [out],
        eps,
        torch.get_num_threads(),
    )
    return out.to(images.dtype), saved


def encoder_bwd(
    dout: Tensor,
    saved: Tensor,
    images: Tensor,
    queries: Tensor,
    grid: Tensor | None,
    picks: Tensor | None,
    weights: Sequence[Tensor],
    strides: Sequence[int],
    heads: int,
    eps: float,
) -> tuple[Tensor, ...]:
    """-> gradients of queries and of the weights, in their order."""
    dtype = _wide(images.dtype)
    grads = [t.new_empty(t.shape, dtype=dtype) for t in (queries, *weights)]
    _kernel("encoder", dtype)(
        _isa,
        *_encoder_arrays(dtype, images, queries, grid, picks, weights),
        list(strides),
        heads,
        saved if saved.shape[1] else None,
        _plain(dout, dtype),
        grads,
        eps,
        torch.get_num_threads(),
    )
    return _narrowed(grads, (queries, *weights))


def _encoder_arrays(dtype: torch.dtype, images, queries, grid, picks, weights) -> tuple:
    places = None if grid is None else _plain(grid, dtype)
    seeds = None if picks is None else picks.contiguous()
    return _plain(images, dtype), _plain(queries, dtype), places, seeds, [_plain(w, dtype) for w in weights]


MAKES_QUERIES = True
"""``decoder_loss`` takes the query MLP in place of queries: they never exist for all pixels at once."""


def decoder_loss(
    inputs: Any, need_grads: Sequence[bool], grad_scale: float | Tensor = 1.0
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Loss terms of ``fastslots.ops.decoder_loss.LossInputs`` and the gradients of ``grad_scale · total``.

    A tile of pixels runs through the whole decoder and back in a core's cache; see ``kernels/cpu/decoder_loss.h``.

    Args:
        inputs: queries [B or 1,L,D] (or the MLP that makes them, tile by tile), layers, head, target [B,L,C],
            pixel_weight, slot_mask, both weights, eps.
        need_grads: in the order of ``inputs.differentiable()``; where none is asked for, only the forward runs.
        grad_scale: the loss scale of mixed precision, a float or a 0-d tensor.

    Returns:
        recon and interaction (scalars, unweighted), gradients in the same order (None where not asked for).
    """
    tensors = inputs.differentiable()
    dtype = _wide(tensors[0].dtype)
    made = None if isinstance(inputs.queries, Tensor) else inputs.queries
    grads = [t.new_empty(t.shape, dtype=dtype) if need else None for t, need in zip(tensors, need_grads, strict=True)]
    scale = float(grad_scale)
    target = _plain(inputs.target, dtype)
    recon, interaction = _kernel("decoder_loss", dtype)(
        _isa,
        [_plain(t, dtype) for t in tensors],
        grads if any(need_grads) else None,
        len(inputs.layers),
        None if made is None else _plain(made.code, dtype),
        0 if made is None else len(made.weights),
        target,
        None if inputs.pixel_weight is None else _plain(inputs.pixel_weight, dtype),
        _mask(inputs.slot_mask),
        float(inputs.recon_weight) * scale,
        float(inputs.interaction_weight) * scale,
        inputs.eps,
        torch.get_num_threads(),
    )
    narrowed = [None if grad is None else grad.to(t.dtype) for grad, t in zip(grads, tensors, strict=True)]
    return target.new_tensor(recon), target.new_tensor(interaction), narrowed


def slot_jacobian(
    tensors: Sequence[Tensor], tangents: Sequence[Sequence[Tensor]], slot_mask: Tensor | None, eps: float
) -> Tensor:
    """Σ over channels and a slot's numbers of |∂x̂/∂z|: [B, K, L]; see ``kernels/cpu/slot_jacobian.h``.

    tensors: a decoder (``ops.decoder_loss.decoder_tensors``). tangents: of each layer, query weight [H·d, D] and bias,
    weight and bias of the norm before it, output weight [D, H·d], scale · ∂k/∂z and ∂v/∂z [B, K, Z, H·d].
    """
    dtype = _wide(tensors[0].dtype)
    B, K = tangents[0][5].shape[:2]
    jacobian = tensors[0].new_empty(B, K, tensors[0].shape[1], dtype=dtype)
    _kernel("slot_jacobian", dtype)(
        _isa,
        [_plain(t, dtype) for t in tensors],
        [_plain(t, dtype) for layer in tangents for t in layer],
        jacobian,
        _mask(slot_mask),
        eps,
        torch.get_num_threads(),
    )
    return jacobian
