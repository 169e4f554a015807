"""Which engine serves a call, and why not another.

A backend is a module of raw functions (no autograd) in ``fastslots.kernels``, imported when first needed: ``Backend``
lists them. A module may leave ops out, and then serves none of them.

``auto`` takes the first that serves: ``triton`` for CUDA tensors, ``cpu`` for CPU tensors, else ``reference``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastslots import capture
from fastslots.records import (
    Call,
    EncoderInputs,
    FeedForward,
    FoldedDecoder,
    FoldedProjections,
    LayerGrads,
    LossInputs,
    LossResult,
    Statistics,
    StatisticsInputs,
    Tangents,
    describe,
    describe_decoder,
)
from fastslots.step_records import StepDraws, StepModel

NAMES = ("reference", "cpu", "triton")
OPS = (
    "cross_attention", "attention_statistics", "folded_cross_attention", "decoder_layer", "decoder_loss",
    "token_attention", "slot_attention", "folded_slot_attention", "encoder", "slot_jacobian", "muon", "train_step",
    "step_update",
)  # fmt: skip

Pair: TypeAlias = tuple[Tensor, Tensor]
Argument: TypeAlias = Tensor | Sequence[Tensor] | LossInputs | FoldedDecoder


class Backend(Protocol):
    """The raw functions of a backend's module. Shapes and formulas are those of ``ops.reference``; a ``slot_mask`` is
    [B, K] bool or None; forwards return what they compute and the slot map, backwards the gradients of the inputs."""

    def why_not(self, call: Call) -> str | None:
        """None when it serves this call, else the reason in words."""

    def cross_attention_fwd(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, slot_mask: Tensor | None = None
    ) -> Pair: ...

    def cross_attention_bwd(
        self, dout: Tensor, dslot_map: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float,
        slot_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]: ...  # fmt: skip

    def folded_cross_attention_fwd(
        self, x: Tensor, folded: FoldedProjections, slot_mask: Tensor | None = None
    ) -> Pair: ...

    def folded_cross_attention_bwd(
        self, dy: Tensor, dslot_map: Tensor, x: Tensor, folded: FoldedProjections, slot_mask: Tensor | None = None
    ) -> tuple[Tensor, FoldedProjections | None]: ...

    def decoder_layer_fwd(
        self, x: Tensor, folded: FoldedProjections, ff: FeedForward, slot_mask: Tensor | None = None, eps: float = 1e-5
    ) -> Pair: ...

    def decoder_layer_bwd(
        self, dy: Tensor, dslot_map: Tensor, x: Tensor, folded: FoldedProjections, ff: FeedForward,
        slot_mask: Tensor | None = None, eps: float = 1e-5,
    ) -> LayerGrads: ...  # fmt: skip

    def token_attention_fwd(self, rows: Tensor, tokens: Tensor) -> Pair:
        """-> gathered, and the log-sum-exp of each row's scores."""

    def token_attention_bwd(
        self, dgathered: Tensor, rows: Tensor, tokens: Tensor, gathered: Tensor, lse: Tensor
    ) -> Pair: ...

    def decoder_loss(self, inputs: LossInputs, need: Collection[str], grad_scale: float | Tensor = 1.0) -> LossResult:
        """See ``ops.decoder_loss.reference_decoder_loss``."""


class SlotAttentionBackend(Backend, Protocol):
    """A backend that serves ``slot_attention`` as well."""

    def slot_attention_fwd(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, eps: float, slot_mask: Tensor | None, return_map: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """-> updates, totals (each slot's sum of weights) and the map, empty where it is not wanted."""

    def slot_attention_bwd(
        self,
        dupdates: Tensor,
        dslot_map: Tensor | None,
        inputs: tuple[Tensor, Tensor, Tensor],
        saved: Pair,
        scale: float,
        eps: float,
        slot_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """inputs: q, k, v; saved: updates and totals -> dq, dk, dv."""  # fmt: skip


class OptimizerBackend(Backend, Protocol):
    """A backend that serves ``muon`` as well, and is the pool of threads beside torch's own."""

    def muon(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        buffers: Sequence[Tensor],
        settings: dict[str, float],
        coefficients: tuple[float, float, float],
        iterations: int,
    ) -> None:
        """The update of ``fastslots/train/muon.py``, in place."""  # fmt: skip

    def norm(self, tensors: Sequence[Tensor]) -> float:
        """Euclidean norm of all together."""

    def torch_on_one_thread(self) -> AbstractContextManager[None]:
        """Inside, kernels take the threads that torch had, and torch's own operators one."""


class StatisticsBackend(Backend, Protocol):
    """A backend that serves ``attention_statistics`` as well: ``cross_attention`` with more to give back."""

    def attention_statistics_fwd(self, inputs: StatisticsInputs) -> Statistics: ...

    def attention_statistics_bwd(
        self, grads: Statistics, inputs: StatisticsInputs, need_head_weights: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """-> dq, dk, dv, and the gradient of the heads' weights, empty where it is not needed."""


class EncoderBackend(Backend, Protocol):
    """A backend that serves ``encoder`` as well."""

    def encoder_saved_size(self, inputs: EncoderInputs) -> int:
        """Elements of an image that ``encoder_fwd`` keeps, if it keeps them."""

    def encoder_fwd(self, inputs: EncoderInputs, keep: bool) -> Pair:
        """-> out and, for the backward, saved."""

    def encoder_bwd(self, dout: Tensor, saved: Tensor, inputs: EncoderInputs) -> tuple[Tensor, list[Tensor]]:
        """-> the gradient of queries and those of the weights."""


class StepFunction(Protocol):
    """Loss and gradients of a model in one call."""

    def run(
        self,
        images: Tensor,
        draws: StepDraws,
        weights: tuple[float, float, float],
        seeds: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[float, float, float]:
        """images [B, C, R, R] -> recon, kl and interaction, unweighted; the gradients of ``weights`` times those are
        written. seeds: of a model with seeds, the token under each, int64 [B, K], and what is seen there,
        [B, K, C + 3]; None: the kernel chooses them as ``models.queries.farthest_patches`` does."""  # fmt: skip


class UpdateFunction(Protocol):
    """The update of arrays that stay in their places."""

    def run(self, muon: dict[str, Any], adamw: dict[str, Any], largest_norm: float, update: bool) -> float:
        """-> the gradients' norm. Where ``update`` and it is finite, both optimisers step by their groups' settings, on
        gradients scaled to a norm of at most ``largest_norm`` (0: as they are)."""  # fmt: skip


class StepBackend(Backend, Protocol):
    """A backend that serves ``train_step`` as well."""

    def train_step(self, model: StepModel, channels: int, resolution: int) -> StepFunction:
        """The step of a model whose arrays stay in their places."""

    def step_update(self, matrices: Sequence[tuple[Tensor, ...]], rest: Sequence[tuple[Tensor, ...]]) -> UpdateFunction:
        """matrices, for Muon: (param, grad, momentum) each. rest, for AdamW: (param, grad, mean, square, step)."""


class JacobianBackend(Backend, Protocol):
    """A backend that serves ``slot_jacobian`` as well."""

    def slot_jacobian(
        self, decoder: FoldedDecoder, tangents: Sequence[Tangents], slot_mask: Tensor | None, eps: float
    ) -> Tensor:
        """See ``models.decoder_jacobian``."""


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


def load(name: str) -> Backend:
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


def why_not(name: str, call: Call) -> str | None:
    """None when backend ``name`` serves this call, else the reason in words."""
    if name == "reference":
        return None
    if under_transform():
        return "kernels have no rule for forward-mode AD and functorch transforms (backend='auto' takes the reference)"
    return _absent(name, call.op) or load(name).why_not(call)


@dataclass(frozen=True)
class Explanation:
    """Which backend serves a call and why the others do not; ``str()`` is for people."""

    op: str
    backend: str
    reasons: dict[str, str] = field(default_factory=dict)  # backend -> why it does not serve
    graph: str = ""  # of an op whose kernels may be one CUDA graph: whether they are, or why not

    def __str__(self) -> str:
        others = "".join(f"\n  not {name}: {reason}" for name, reason in self.reasons.items())
        return f"{self.op}: {self.backend}{f', {self.graph}' if self.graph else ''}{others}"


def explain(*tensors: Argument, op: str = "cross_attention", backend: str = "auto") -> Explanation:
    """Say which backend would serve ``op`` on these tensors and why not each of the others.

    tensors: the call's arguments, named tuples as they are; of "decoder_loss" its ``LossInputs`` or ``FoldedDecoder``.
    Device, dtype and shape decide. Raises TypeError for anything else, ValueError for an unknown op or backend, and for
    one named outright that cannot serve.
    """
    if op not in OPS:
        raise ValueError(f"op must be one of {', '.join(OPS)}, got {op!r}")
    decoder = getattr(tensors[0], "decoder", tensors[0]) if len(tensors) == 1 else None
    if op == "decoder_loss" and isinstance(decoder, FoldedDecoder):
        return explain_call(describe_decoder(op, decoder), backend)
    flat: list[Any] = [t for of in tensors for t in (of if isinstance(of, tuple | list) else [of])]
    if not flat or not all(isinstance(t, Tensor) for t in flat):
        raise TypeError("explain takes a call's tensors, and the op by name: explain(q, k, v, op='cross_attention')")
    return explain_call(describe(op, flat), backend)


def explain_call(call: Call, backend: str = "auto") -> Explanation:
    """Which backend serves a call, and why not each of the others; ValueError as from ``explain``."""
    name, reasons = _choose(call, backend)
    for other in NAMES:
        if other != name and other not in reasons:
            first = f"{name} comes first" if backend == "auto" else f"{name} was asked for"
            reasons[other] = why_not(other, call) or first
    graph = capture.how(call.device) if (name, call.op) == ("triton", "decoder_loss") else ""
    return Explanation(call.op, name, reasons, graph)


def check_name(backend: str) -> None:
    """ValueError for a name that is no backend's."""
    if backend not in ("auto", *NAMES):
        raise ValueError(f"backend must be one of auto, {', '.join(NAMES)}, got {backend!r}")


def select(call: Call, backend: str) -> str:
    """Name of the backend that serves; ValueError with the reason where one named outright cannot."""
    # The reference is the common request in tests and under transforms: no import, no questions
    return backend if backend == "reference" else _choose(call, backend)[0]


def _choose(call: Call, backend: str) -> tuple[str, dict[str, str]]:
    """The first backend that serves, and why those before it do not; no other is imported."""
    check_name(backend)
    first = "triton" if call.device.type == "cuda" else "cpu"
    reasons: dict[str, str] = {}
    for name in (first, "reference") if backend == "auto" else (backend,):
        reason = why_not(name, call)
        if reason is None:
            return name, reasons
        reasons[name] = reason
    raise ValueError(f"backend={backend!r} cannot serve {call.op}: {reasons[backend]}")
