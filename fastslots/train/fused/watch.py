"""Whether a model is still the one that a kernel was given the arrays of. Asked before every step.

A step sweeps the caches, and Python after it takes four times as long as in a loop of its own; so here the
interpreter's own functions run through the objects, without a bytecode for each.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from operator import attrgetter, is_, methodcaller

from torch import Tensor, nn

from fastslots.models.layers import hooks_of

_values = methodcaller("values")
_requires_grad, _hooks, _grad = map(attrgetter, ("requires_grad", "_backward_hooks", "grad"))


def addresses(tensors: Iterable[Tensor]) -> list[int]:
    """Where the data of tensors lie."""
    return list(map(Tensor.data_ptr, tensors))


def have_gradients(parameters: Iterable[Tensor], grads: Iterable[Tensor]) -> bool:
    """Whether the gradient of each parameter is the very tensor of ``grads``, as many."""
    return all(map(is_, map(_grad, parameters), grads))


class Watch:
    """The parts of a model, their hooks, and where its parameters lie, as of now. Keeps no hold of the model itself."""

    def __init__(self, model: nn.Module):
        modules = list(model.modules())
        self.parameters = list(model.parameters())
        self._places = addresses(self.parameters)
        self._hooks = [hooks for m in modules for hooks in hooks_of(m)]
        self._parts = [parts for m in modules for parts in (m._modules, m._parameters)]
        self._members = self._seen()

    def _seen(self) -> list[object]:
        return list(chain.from_iterable(map(_values, self._parts)))

    def unchanged(self) -> bool:
        """Whether no part or parameter has been replaced, moved, frozen or hooked."""
        seen = self._seen()
        return (
            len(seen) == len(self._members)
            and all(map(is_, seen, self._members))
            and addresses(self.parameters) == self._places
            and all(map(_requires_grad, self.parameters))
            and not any(map(_hooks, self.parameters))
            and not any(self._hooks)
        )
