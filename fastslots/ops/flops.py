"""What ``torch.utils.flop_counter.FlopCounterMode`` counts for the operators: the matrix products that a kernel runs.

A product of [m, n] by [n, p] counts 2·m·n·p, as torch counts its own. A backward counts what it recomputes too, as
torch does for scaled_dot_product_attention. Softmax, norms and activations count nothing. The tiled decoder loss is no
operator, so a counter does not see it.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

Shape = Sequence[int]
COUNTER = "torch.utils.flop_counter"

# Forward: scores, then the weighted sum. Backward: scores anew, the weights' gradients, and those of three operands.
FORWARD, BACKWARD = 2, 5


def _attention(q: Shape, k: Shape, products: int) -> int:
    """q [..., n, d], k [..., m, d]: each product is one of n x d by d x m, or of the same size."""
    return products * 2 * torch.Size(q).numel() * k[-2]


def _folded(x: Shape, folded: Sequence[Shape], products: int) -> int:
    """x [B or 1, L, D] by G [B, D, H, K], or the weights by U, which is of the same size."""
    return products * 2 * x[1] * torch.Size(folded[0]).numel()


def _feed_forward(x: Shape, folded: Sequence[Shape], ff: Sequence[Shape], products: int) -> int:
    """B·L rows by w1 [hidden, D], or a product of the same size."""
    return products * 2 * folded[0][0] * x[1] * torch.Size(ff[2]).numel()


def _layer(x: Shape, folded: Sequence[Shape], ff: Sequence[Shape], *_: Any, **__: Any) -> int:
    return _folded(x, folded, FORWARD) + _feed_forward(x, folded, ff, FORWARD)


def _layer_backward(
    dy: Shape, dmap: Shape, x: Shape, folded: Sequence[Shape], ff: Sequence[Shape], *_: Any, **__: Any
) -> int:
    # The attention's output is made anew for the feed-forward behind it, whose first product is made anew as well.
    return _folded(x, folded, BACKWARD + 1) + _feed_forward(x, folded, ff, BACKWARD)


def _folded_slots_backward(dgathered: Shape, dmap: Shape | None, rows: Shape, *others: Any, **__: Any) -> int:
    _, tokens, _, _, dtokens, *_ = others
    return _attention(rows, tokens, BACKWARD - 2 if dtokens is None else BACKWARD)


FORMULAS: dict[str, Callable[..., int]] = {
    "cross_attention": lambda q, k, *_, **__: _attention(q, k, FORWARD),
    "cross_attention_backward": lambda dout, dmap, q, k, *_, **__: _attention(q, k, BACKWARD),
    "attention_statistics": lambda q, k, *_, **__: _attention(q, k, FORWARD),
    "attention_statistics_backward": lambda grads, q, k, *_, **__: _attention(q, k, BACKWARD),
    "slot_attention": lambda q, k, *_, **__: _attention(q, k, FORWARD),
    "slot_attention_backward": lambda dout, dmap, q, k, *_, **__: _attention(q, k, BACKWARD),
    "folded_slot_attention": lambda rows, offsets, tokens, *_, **__: _attention(rows, tokens, FORWARD),
    "folded_slot_attention_backward": _folded_slots_backward,
    "token_attention": lambda rows, tokens, *_, **__: _attention(rows, tokens, FORWARD),
    "token_attention_backward": lambda dgathered, rows, tokens, *_, **__: _attention(rows, tokens, BACKWARD),
    "folded_cross_attention": lambda x, folded, *_, **__: _folded(x, folded, FORWARD),
    "folded_cross_attention_backward": lambda dy, dmap, x, folded, *_, **__: _folded(x, folded, BACKWARD),
    "decoder_layer": _layer,
    "decoder_layer_backward": _layer_backward,
}  # of shapes, in an operator's own order


class _WhenImported(importlib.abc.MetaPathFinder):
    """Registers the formulas as soon as somebody imports torch's counter: a counter knows those that are there when it
    is made. To import it here would cost everybody an eighth of a second, and import Triton."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                load(module)
                _register(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _register(counter: Any) -> None:
    for name, formula in FORMULAS.items():
        counter.register_flop_formula(getattr(torch.ops.fastslots, name))(formula)


def tell_counter() -> None:
    """Hands the formulas to torch's counter, now or when it is imported. The operators are registered already."""
    if COUNTER in sys.modules:
        _register(sys.modules[COUNTER])
    else:
        sys.meta_path.insert(0, _WhenImported())
