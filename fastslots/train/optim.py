"""The optimiser: torch's own by name, or Muon; and its state as named tensors for checkpoints without pickle."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastslots.config.run import optimizer_class
from fastslots.ops import backends
from fastslots.records import describe
from fastslots.train.muon import Muon

MUON_REST = 0.3
"""Share of muon's rate that AdamW gives to what is no matrix: convolutions, biases, norms, the learned queries."""


GUARDED = ("adam", "adamw", "muon")
"""Optimisers that can leave a step out on the device's own word, which a step that waits for nothing needs."""


class Optimizers:
    """One or two of torch's optimisers behind one rate.

    On a GPU those of ``GUARDED`` take the rate from a tensor and keep their counts there, so that a CUDA graph of a
    step goes on with the next one's.
    """

    def __init__(self, model: nn.Module, name: str, lr: float, weight_decay: float, on_device: bool | None = None):
        """name: "muon", or a class of torch.optim in lower case. The model is where it is to be trained.

        on_device: rate and counts there, as on a GPU; None: on a GPU.
        """
        parameters = list(model.parameters())
        if on_device is None:
            on_device = bool(parameters) and parameters[0].is_cuda
        guarded: dict[str, Any] = {"fused": True, "capturable": True} if on_device and name in GUARDED else {}

        self.parts: list[tuple[torch.optim.Optimizer, float]] = []
        if name == "muon":
            # Matrices of Transformers and MLPs; Muon makes their update orthogonal, scaled to the size of Adam's.
            matrices = [p for p in parameters if p.ndim == 2]
            rest = [p for p in parameters if p.ndim != 2]
            if matrices:
                self.parts.append((Muon(matrices, lr=lr, weight_decay=weight_decay), 1.0))
            if rest:
                settings = {"fused": True, **guarded, "weight_decay": weight_decay, "betas": (0.9, 0.99)}
                self.parts.append((torch.optim.AdamW(rest, lr=lr * MUON_REST, **settings), MUON_REST))
        else:
            cls = optimizer_class(name)
            assert cls is not None  # TrainConfig has checked it
            self.parts.append((cls(parameters, lr=lr, weight_decay=weight_decay, **guarded), 1.0))
        if guarded:  # not at once, for an optimiser reads the rate that it is made with
            for optimizer, share in self.parts:
                for group in optimizer.param_groups:
                    group["lr"] = torch.full((), lr * share, device=parameters[0].device)

    def set_lr(self, lr: float) -> None:
        for optimizer, share in self.parts:
            for group in optimizer.param_groups:
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(lr * share)
                else:
                    group["lr"] = lr * share

    def step_unless(self, stopped: Tensor) -> None:
        """An update that changes nothing where ``stopped``, fp32 0-d on the device, is 1. For those of ``GUARDED``."""
        for optimizer, _ in self.parts:
            # As a loss scaler tells an optimiser that a gradient is not finite.
            optimizer.found_inf = stopped  # type: ignore[attr-defined]
            try:
                optimizer.step()
            finally:
                del optimizer.found_inf  # type: ignore[attr-defined]

    def zero_grad(self) -> None:
        for optimizer, _ in self.parts:
            optimizer.zero_grad(set_to_none=True)

    def state(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Tensors and numbers under the names part.parameter.key; the groups follow from the configuration."""
        tensors: dict[str, Tensor] = {}
        numbers: dict[str, float] = {}
        for part, (optimizer, _) in enumerate(self.parts):
            for index, entry in optimizer.state_dict()["state"].items():
                for key, value in entry.items():
                    name = f"{part}.{index}.{key}"
                    if isinstance(value, Tensor):
                        tensors[name] = value
                    else:
                        numbers[name] = value
        return tensors, numbers

    def load_state(self, tensors: dict[str, Tensor], numbers: dict[str, float]) -> None:
        for part, (optimizer, _) in enumerate(self.parts):
            state: dict[int, dict[str, object]] = {}
            for name, value in {**tensors, **numbers}.items():
                owner, index, key = name.split(".", 2)
                if int(owner) == part:
                    state.setdefault(int(index), {})[key] = value
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def clip(parameters: Iterable[Tensor], most: float) -> Tensor:
    """The gradients' norm before they are scaled to at most ``most`` (0: left as they are); torch's, in fewer steps."""
    params = [p for p in parameters if p.grad is not None]
    grads = [p.grad for p in params if p.grad is not None]
    plain = grads and all(g.device.type == "cpu" and g.dtype == torch.float32 and g.is_contiguous() for g in grads)
    if not plain or backends.select(describe("muon", grads), "auto") != "cpu":
        return torch.nn.utils.clip_grad_norm_(params, most) if most else torch.nn.utils.get_total_norm(grads)
    norm = torch.tensor(cast(backends.OptimizerBackend, backends.load("cpu")).norm(grads), dtype=torch.float32)
    if most and not norm <= most:
        torch._foreach_mul_(grads, float(most / (norm + 1e-6)))
    return norm
