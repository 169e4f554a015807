"""A step's update in one call of a kernel: the gradients' norm, clipping, Muon and AdamW.

``clip`` and ``Optimizer.step`` are the definition, and serve everything else. State lies where torch's optimisers keep
it, so that checkpoints are the same either way.
"""

from __future__ import annotations

from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fastslots.ops import backends
from fastslots.records import describe
from fastslots.train.fused.watch import addresses, have_gradients
from fastslots.train.muon import COEFFICIENTS, ITERATIONS, Muon
from fastslots.train.optim import Optimizers

_built: WeakKeyDictionary[Optimizers, FusedUpdate] = WeakKeyDictionary()


def fused_update(optimizers: Optimizers) -> FusedUpdate | None:
    """The kernel's update, once every parameter has a gradient; None where the optimisers step themselves.

    Autograd takes the parameters for changed from now on: its counts are raised while they are in the caches.
    """
    update = _built.get(optimizers)
    if update is None or not update.fits():
        if not _serves(optimizers):
            return None
        update = _built[optimizers] = FusedUpdate(optimizers)
    torch.autograd.graph.increment_version(update.parameters)
    return update


def _serves(optimizers: Optimizers) -> bool:
    parts = [part for part, _ in optimizers.parts]
    if [type(part) for part in parts] != [Muon, torch.optim.AdamW] or any(len(p.param_groups) != 1 for p in parts):
        return False
    group = parts[1].param_groups[0]
    if group["amsgrad"] or group["maximize"] or group["differentiable"] or isinstance(group["lr"], Tensor):
        return False
    if any(p._optimizer_step_pre_hooks or p._optimizer_step_post_hooks for p in parts):
        return False
    tensors = [t for part in parts for p in part.param_groups[0]["params"] for t in (p, p.grad)]
    if any(t is None or t.dtype != torch.float32 or not t.is_contiguous() for t in tensors):
        return False
    return backends.select(describe("step_update", tensors), "auto") == "cpu"


class FusedUpdate:
    """The kernel with the arrays of both optimisers."""

    def __init__(self, optimizers: Optimizers):
        (self._muon, _), (self._adamw, _) = optimizers.parts
        matrices = []
        for p in self._muon.param_groups[0]["params"]:
            buffer = self._muon.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
            matrices.append((p, p.grad, buffer))
        rest = []
        for p in self._adamw.param_groups[0]["params"]:
            state = self._adamw.state[p]
            state.setdefault("step", torch.zeros((), dtype=torch.float32))
            means = [state.setdefault(name, torch.zeros_like(p)) for name in ("exp_avg", "exp_avg_sq")]
            rest.append((p, p.grad, *means, state["step"]))
        self.parameters, self._grads = ([of[place] for of in (*matrices, *rest)] for place in (0, 1))
        self._places = addresses(self.parameters)
        self._states = self._muon.state, self._adamw.state
        self._update = cast(backends.StepBackend, backends.load("cpu")).step_update(matrices, rest)

    def fits(self) -> bool:
        """Whether parameters, gradients and state lie where they lay."""
        return (
            self._states[0] is self._muon.state  # loading a state makes another dictionary
            and self._states[1] is self._adamw.state
            and have_gradients(self.parameters, self._grads)
            and addresses(self.parameters) == self._places
        )

    def run(self, largest_norm: float, update: bool) -> float:
        """-> the norm of the gradients, which are left as they are; the update takes place where it is finite."""
        muon: dict[str, Any] = {**self._muon.param_groups[0], "coefficients": COEFFICIENTS, "iterations": ITERATIONS}
        return self._update.run(muon, self._adamw.param_groups[0], largest_norm, update)
