"""Muon (Jordan et al., 2024): momentum whose matrices are made orthogonal by Newton-Schulz iterations.

torch.optim.Muon does the same one matrix at a time in bf16: 83 ms a step for the 42 small matrices of ``sprites-mini``
on two CPU threads, most of a training step, and slower still without bf16 units. Here matrices of one shape are
stacked and iterated together in fp32; on a CPU the whole update is one call of a kernel, a matrix a task.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor

from fastslots.ops import backends
from fastslots.records import describe

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # the published quintic: steep at 0, singular values end in about 0.7..1.2
ITERATIONS = 5


def orthogonalise(matrices: Tensor) -> Tensor:
    """[n, rows, columns] fp32 -> about U Vᵀ of each singular value decomposition, by Newton-Schulz."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.transpose(1, 2) if tall else matrices
    x = x / x.flatten(1).norm(dim=1).clamp_min(1e-7)[:, None, None]
    for _ in range(ITERATIONS):
        gram = x @ x.transpose(1, 2)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.transpose(1, 2) if tall else x


class Muon(torch.optim.Optimizer):
    """For matrices alone. The update is scaled by 0.2·√max(rows, columns), the RMS of Adam's, so rates carry over.

    params: 2-D parameters. lr, momentum (Nesterov), weight_decay (decoupled, times lr) as in torch.optim.Muon. Where lr
    is a 0-d tensor on the parameters' device, a step reads nothing of it, and one whose ``found_inf`` (0-d too) is 1
    changes nothing.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float | Tensor = 1e-3, momentum: float = 0.95, weight_decay: float = 0.0
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        if any(p.ndim != 2 for group in self.param_groups for p in group["params"]):
            raise ValueError("Muon takes matrices alone: give the other parameters to another optimiser")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient. No closure: the gradients are taken as they are."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads = [p.grad for p in params]
            for p in params:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffers = [self.state[p]["momentum_buffer"] for p in params]
            tensors = [*params, *grads, *buffers]
            plain = all(t.is_contiguous() for t in tensors) and {t.dtype for t in tensors} == {torch.float32}
            if isinstance(group["lr"], Tensor):
                _update_on_device(params, grads, buffers, group, getattr(self, "found_inf", None))
                continue
            name = backends.select(describe("muon", tensors), "auto") if plain else "reference"
            if name == "reference":
                _update(params, grads, buffers, group)
                continue
            settings = {key: group[key] for key in ("momentum", "lr", "weight_decay")}
            cast(backends.OptimizerBackend, backends.load(name)).muon(
                params, grads, buffers, settings, COEFFICIENTS, ITERATIONS
            )
            torch.autograd.graph.increment_version(params)


def _update(params: list[Tensor], grads: list[Tensor], buffers: list[Tensor], group: dict[str, Any]) -> None:
    """One group's step in plain PyTorch."""
    momentum, lr = group["momentum"], group["lr"]
    by_shape: dict[torch.Size, list[tuple[Tensor, Tensor, Tensor]]] = defaultdict(list)
    for p, grad, buffer in zip(params, grads, buffers, strict=True):
        by_shape[p.shape].append((p, grad, buffer))
    for shape, alike in by_shape.items():
        params, grads, buffers = map(list, zip(*alike, strict=True))
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        directions = torch._foreach_lerp(grads, buffers, momentum)
        update = orthogonalise(torch.stack(directions).float())
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        torch._foreach_add_(params, update.unbind(), alpha=-lr * 0.2 * max(shape) ** 0.5)


def _update_on_device(
    params: list[Tensor], grads: list[Tensor], buffers: list[Tensor], group: dict[str, Any], stopped: Tensor | None
) -> None:
    """The same with a rate that is a tensor; where ``stopped`` is 1, nothing is changed, whatever the gradients are."""
    momentum, lr = group["momentum"], group["lr"]
    goes_on = torch.ones_like(lr) if stopped is None else 1 - stopped
    by_shape: dict[torch.Size, list[int]] = defaultdict(list)
    for i, p in enumerate(params):
        by_shape[p.shape].append(i)
    for shape, places in by_shape.items():
        grad, buffer = (torch.stack([of[i] for i in places]) for of in (grads, buffers))
        grad = torch.where(goes_on > 0, grad, 0.0)  # NaN times 0 is NaN
        buffer = torch.lerp(buffer, grad, (1 - momentum) * goes_on)
        update = orthogonalise(torch.lerp(grad, buffer, momentum).float())
        here = [params[i] for i in places]
        if group["weight_decay"]:
            torch._foreach_mul_(here, 1 - lr * group["weight_decay"] * goes_on)
        torch._foreach_add_(here, (update * (lr * goes_on * -0.2 * max(shape) ** 0.5)).unbind())
        torch._foreach_copy_([buffers[i] for i in places], buffer.unbind())
