"""What one PyTorch operator costs on a GPU: bytes, FLOPs, kernels launched. From shapes alone; nothing runs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

FREE = ("empty", "new_empty", "detach", "alias", "view", "_unsafe_view", "as_strided", "expand", "lift_fresh", "set_")
"""What launches nothing, besides views."""
NOT_READ = ("copy_", "fill_", "zero_", "normal_", "uniform_")
"""Operators that write their first argument without reading it."""
KERNELS = {"index_put_": 5, "_index_put_impl_": 5, "sort": 4}
"""Kernels of an operator that launches several."""
NEAR = 65536
"""Bytes of a row that a norm reads twice and finds the second time in its multiprocessor's own cache."""
LISTS = (0, 110, 64, 48, 36, 30)
"""Tensors that one kernel of a ``_foreach_*`` or ``_fused_*`` operator takes, by how many lists it works on."""


class Work(NamedTuple):
    """Of one operator, or of several together."""

    bytes: float = 0.0
    flops: float = 0.0
    launches: int = 0
    processors: float = math.inf  # those that can share the work, where it has fewer parts than that

    @property
    def free(self) -> bool:
        return not self.launches


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes that reading these tensors once moves; what an expanded one repeats comes from the cache."""
    return sum(
        t.element_size() * math.prod(n for n, s in zip(t.shape, t.stride(), strict=True) if s or n == 0)
        for t in tensors
    )


def work(func: Any, args: Any, kwargs: Any, out: Any) -> Work:
    """Of a call of ``func``, an ``OpOverload`` of torch's own."""
    name = func.overloadpacket.__name__
    returns = func._schema.returns
    if name.startswith(FREE) or any(r.alias_info is not None and not r.alias_info.is_write for r in returns):
        return Work()
    if name.startswith(("_foreach", "_fused")):
        return _lists(args, kwargs)
    inputs = {id(t): t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
    outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
    if name in NOT_READ:
        inputs.pop(id(args[0]), None)
        outputs = [args[0]]
    if not outputs:
        return Work()
    moved = size(inputs.values()) + size(outputs)
    counted = flop_registry.get(func.overloadpacket)
    # torch's formula of bmm does not know the type of the result, which comes third.
    flops = counted(*(args[:2] if name == "bmm" else args), **kwargs, out_val=out) if counted else 0
    if name == "convolution":
        return _convolution(args, outputs[0], flops)
    if name == "convolution_backward":
        return _convolution_backward(args, flops)
    processors, kernels = math.inf, KERNELS.get(name, 1)
    if name == "native_layer_norm":  # a row is one block's
        processors = outputs[1].numel()
        moved += size([args[0]]) if size([args[0]]) > NEAR * processors else 0  # read for the moments, then again
    if name == "native_layer_norm_backward":
        processors = args[3].numel()
        moved += size(args[:2]) if size([args[1]]) > NEAR * processors else 0
        # One for the rows, one for the affine part; of many rows that one leaves partial sums of both.
        kernels = 1 + bool(args[7][1]) * (3 if processors > 65536 else 1)
    return Work(moved, flops, kernels, processors)


def laid_out(func: Any, args: Any, out: Any) -> Any:
    """The result as a GPU lays it out: convolutions of ``meta`` forget that channels came last."""
    name = func.overloadpacket.__name__
    if not name.startswith("convolution"):
        return out
    tensors = [t for t in args[:3] if isinstance(t, Tensor) and t.ndim == 4]
    if not any(_channels_last(t) for t in tensors):
        return out
    if name == "convolution":
        return torch.empty_like(out, memory_format=torch.channels_last)
    return tuple(
        None if t is None else t if t.ndim < 4 else torch.empty_like(t, memory_format=torch.channels_last) for t in out
    )


def _channels_last(t: Tensor) -> bool:
    return t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()


def _lists(args: Any, kwargs: Any) -> Work:
    """In place: every tensor of every list read, those of the first written."""
    lists = [a for a in (*args, *kwargs.values()) if isinstance(a, list | tuple) and a and isinstance(a[0], Tensor)]
    if not lists:
        return Work()
    wide = [group for group in lists if group[0].numel() > 1 or len(lists) == 1]
    moved = sum(size(group) for group in wide) + size(lists[0]) * (3 if len(wide) > 3 else 1)
    return Work(moved, 0, math.ceil(len(lists[0]) / LISTS[min(max(len(wide), 1), 5)]))


def _turns(*tensors: Tensor) -> tuple[float, int]:
    """cuDNN's tensor-core convolutions take channels last: others are turned first, read and written once more."""
    turned = [t for t in tensors if not t.is_contiguous(memory_format=torch.channels_last)]
    return 2.0 * size(turned), len(turned)


def _convolution(args: Any, out: Tensor, flops: int) -> Work:
    x, weight, bias = args[:3]
    moved, launches = _turns(x, weight, out)
    moved += size([x, weight, out])
    if bias is not None:  # an addition of its own
        moved, launches = moved + 2 * size([out]), launches + 1
    return Work(moved, flops, launches + 1)


def _convolution_backward(args: Any, flops: int) -> Work:
    dout, x, weight, mask = args[0], args[1], args[2], args[10]
    moved, launches = _turns(dout, x, weight)
    for wanted, tensors in zip(mask, ((dout, weight, x), (dout, x, weight), (dout,)), strict=True):
        if wanted:
            moved, launches = moved + size(tensors), launches + 1
            if len(tensors) > 1 and not tensors[2].is_contiguous(memory_format=torch.channels_last):
                moved, launches = moved + 2 * size(tensors[2:]), launches + 1
    return Work(moved, flops, launches)
