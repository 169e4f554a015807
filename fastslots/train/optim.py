"""The optimiser: torch's own by name, or Muon; and its state as named tensors for checkpoints without pickle."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from fastslots.config.run import optimizer_class
from fastslots.ops import backends
from fastslots.records import describe
from fastslots.train.muon import Muon

MUON_REST = 0.3
"""Share of muon's rate that AdamW gives to what is no matrix: convolutions, biases, norms, the learned queries."""


class Optimizers:
    """One or two of torch's optimisers behind one rate."""

    def __init__(self, model: nn.Module, name: str, lr: float, weight_decay: float):
        """name: "muon", or a class of torch.optim in lower case."""
        parameters = list(model.parameters())
        if name == "muon":
            # Matrices of Transformers and MLPs; Muon makes their update orthogonal, scaled to the size of Adam's.
            matrices = [p for p in parameters if p.ndim == 2]
            rest = [p for p in parameters if p.ndim != 2]
            self.parts: list[tuple[torch.optim.Optimizer, float]] = []
            if matrices:
                self.parts.append((Muon(matrices, lr=lr, weight_decay=weight_decay), 1.0))
            if rest:
                adamw = torch.optim.AdamW(rest, lr=lr, weight_decay=weight_decay, betas=(0.9, 0.99), fused=True)
                self.parts.append((adamw, MUON_REST))
        else:
            cls = optimizer_class(name)
            assert cls is not None  # TrainConfig has checked it
            self.parts = [(cls(parameters, lr=lr, weight_decay=weight_decay), 1.0)]

    def set_lr(self, lr: float) -> None:
        for optimizer, share in self.parts:
            for group in optimizer.param_groups:
                group["lr"] = lr * share

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
        return torch.nn.utils.clip_grad_norm_(params, most or float("inf"))
    norm = torch.tensor(cast(backends.OptimizerBackend, backends.load("cpu")).norm(grads), dtype=torch.float32)
    if most and not norm <= most:
        torch._foreach_mul_(grads, float(most / (norm + 1e-6)))
    return norm
