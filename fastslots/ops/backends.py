"""Which engine serves a call, and why not another.

A backend is a module of raw functions (no autograd) in ``fastslots.kernels``, imported when first needed:

    why_not(op, tensors) -> str | None      None when it serves this op on these tensors, else the reason in words
    cross_attention_fwd(q, k, v, scale, slot_mask) -> out, slot_map
    cross_attention_bwd(dout, dslot_map, q, k, v, scale, slot_mask) -> dq, dk, dv
    folded_cross_attention_fwd(x, G, g, U, b, slot_mask) -> y, slot_map
    folded_cross_attention_bwd(dy, dslot_map, x, G, g, U, slot_mask) -> dx, dG, dg, dU, db
    decoder_layer_fwd(x, G, g, U, b, *ff, slot_mask, eps) -> y, slot_map
    decoder_layer_bwd(dy, dslot_map, x, G, g, U, b, *ff, slot_mask, eps) -> dx, dG, dg, dU, db, *dff
    token_attention_fwd(rows, tokens) -> gathered, lse
    token_attention_bwd(dgathered, rows, tokens, gathered, lse) -> drows, dtokens
    slot_attention_fwd(q, k, v, scale, eps, slot_mask, return_map) -> updates, totals, map
    slot_attention_bwd(dupdates, dslot_map, (q, k, v), (updates, totals), scale, eps, slot_mask) -> dq, dk, dv
    encoder_saved_size(images, queries, grid, picks, weights, strides, heads) -> elements an image, if it keeps them
    encoder_fwd(images, queries, grid, picks, weights, strides, heads, eps, keep) -> out, saved (see encoder.py)
    encoder_bwd(dout, saved, images, queries, grid, picks, weights, strides, heads, eps) -> dqueries, *dweights
    decoder_loss(inputs, need_grads, grad_scale) -> recon, interaction, gradients (see decoder_loss.py)
    slot_jacobian(tensors, tangents, slot_mask, eps) -> jacobian (see fastslots/models/decoder_jacobian.py)

A module may leave ops out, and then serves none of them.

``auto`` takes the first that serves: ``triton`` for CUDA tensors, ``cpu`` for CPU tensors, else ``reference``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

NAMES = ("reference", "cpu", "triton")
OPS = (
    "cross_attention", "folded_cross_attention", "decoder_layer", "decoder_loss", "token_attention", "slot_attention",
    "encoder", "slot_jacobian",
)  # fmt: skip


def under_transform() -> bool:
    """True inside forward-mode AD or a functorch transform (jvp, vmap, jacfwd, ...), where only the reference is right:
    an operator with ``register_autograd`` answers forward-mode AD with *silent zeros*."""
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


# Dynamo is to call it rather than trace it: it models the top of an empty stack as an object too, and compiled code
# would never see a kernel. The mark is what ``torch.compiler.assume_constant_result`` sets, after an import of Dynamo
# that takes seconds.
under_transform._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_traced() -> bool:
    """True inside a transform or ``torch.compile``: what is computed becomes part of somebody's graph."""
    return torch.compiler.is_compiling() or under_transform()


def load(name: str) -> ModuleType:
    """The kernel module of a backend; ImportError where this installation has none."""
    # Plain imports: Dynamo, which traces the choice of a backend, follows them, and importlib.import_module not.
    if name == "cpu":
        from fastslots.kernels import cpu_backend

        return cpu_backend
    from fastslots.kernels import gpu_backend

    return gpu_backend


def _absent(name: str, op: str) -> str | None:
    """Why there is no such kernel in this installation, or None."""
    if name == "cpu" and importlib.util.find_spec("fastslots._cpu") is None:
        return "no C++ module: `pip install .` in fastslots' folder builds it where there is a C++ compiler"
    try:
        module = load(name)
    except ImportError as error:
        return f"not installed ({error})"
    return None if hasattr(module, op) or hasattr(module, f"{op}_fwd") else f"it has no kernel for {op}"


_absent._dynamo_marked_constant = True  # type: ignore[attr-defined]  # see under_transform


def why_not(name: str, op: str, tensors: Sequence[Tensor]) -> str | None:
    """None when backend ``name`` serves ``op`` on these tensors, else the reason in words."""
    if name == "reference":
        return None
    if under_transform():
        return "kernels have no rule for forward-mode AD and functorch transforms (backend='auto' takes the reference)"
    reason = _absent(name, op)
    return load(name).why_not(op, tensors) if reason is None else reason


@dataclass(frozen=True)
class Explanation:
    """Which backend serves a call and why the others do not; ``str()`` is for people."""

    op: str
    backend: str
    reasons: dict[str, str] = field(default_factory=dict)  # backend -> why it does not serve

    def __str__(self) -> str:
        others = "".join(f"\n  not {name}: {reason}" for name, reason in self.reasons.items())
        return f"{self.op}: {self.backend}{others}"


def explain(*tensors: Tensor | Sequence[Tensor], op: str = "cross_attention", backend: str = "auto") -> Explanation:
    """Say which backend would serve ``op`` on these tensors and why not each of the others.

    tensors: the call's arguments, named tuples of tensors as they are; device, dtype and shape decide. Raises TypeError
    for anything else, ValueError for an unknown op or backend, and for one named outright that cannot serve.
    """
    if op not in OPS:
        raise ValueError(f"op must be one of {', '.join(OPS)}, got {op!r}")
    flat: list[Any] = []
    for argument in tensors:
        flat += argument if isinstance(argument, tuple | list) else [argument]
    if not flat or not all(isinstance(t, Tensor) for t in flat):
        raise TypeError("explain takes a call's tensors, and the op by name: explain(q, k, v, op='cross_attention')")
    name, reasons = _choose(op, flat, backend)
    for other in NAMES:
        if other != name and other not in reasons:
            first = f"{name} comes first" if backend == "auto" else f"{name} was asked for"
            reasons[other] = why_not(other, op, flat) or first
    return Explanation(op, name, reasons)


def select(op: str, tensors: Sequence[Tensor], backend: str) -> str:
    """Name of the backend that serves; ValueError with the reason where one named outright cannot."""
    if backend == "reference":  # the common request in tests and under transforms: no import, no questions
        return backend
    return _choose(op, tensors, backend)[0]


def _choose(op: str, tensors: Sequence[Tensor], backend: str) -> tuple[str, dict[str, str]]:
    """The first backend that serves, and why those before it do not; no other is imported."""
    if backend not in ("auto", *NAMES):
        raise ValueError(f"backend must be one of auto, {', '.join(NAMES)}, got {backend!r}")
    if backend == "auto":
        candidates: tuple[str, ...] = ("triton", "reference") if tensors[0].is_cuda else ("cpu", "reference")
    else:
        candidates = (backend,)
    reasons: dict[str, str] = {}
    for name in candidates:
        reason = why_not(name, op, tensors)
        if reason is None:
            return name, reasons
        reasons[name] = reason
    raise ValueError(f"backend={backend!r} cannot serve {op}: {reasons[backend]}")
