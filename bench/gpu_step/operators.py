"""What one PyTorch operator costs on a GPU: its kernels, their bytes and FLOPs. From shapes alone; nothing runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from fastslots.bench.gpu_step.rates import Kernel

FREE = ("empty", "new_empty", "detach", "alias", "view", "_unsafe_view", "as_strided", "expand", "lift_fresh", "set_")
"""What launches nothing, besides views."""
NOT_READ = ("copy_", "fill_", "zero_", "normal_", "uniform_")
"""Operators that write their first argument without reading it."""
KERNELS = {"index_put_": 5, "_index_put_impl_": 5, "sort": 4}
"""Kernels of an operator that launches several."""
LISTS = (0, 110, 64, 48, 36, 30)
"""Tensors that one kernel of a ``_foreach_*`` or ``_fused_*`` operator takes, by how many lists it works on."""
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm")
REDUCTIONS = ("sum", "mean", "linalg_vector_norm", "amax", "amin", "argmax")
SPLIT = 2112, 64
"""Blocks that share a sum over rows: at most as many as an H100 holds; and the fewest rows that each of them has."""


class Work(NamedTuple):
    """Of one operator."""

    kernels: tuple[Kernel, ...] = ()

    @property
    def launches(self) -> int:
        return sum(kernel.launches for kernel in self.kernels)

    @property
    def bytes(self) -> float:
        return sum(kernel.bytes for kernel in self.kernels)

    @property
    def flops(self) -> float:
        return sum(kernel.flops for kernel in self.kernels)


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
        return Work(_lists(args, kwargs))
    inputs = {id(t): t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
    outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
    if name in NOT_READ:
        inputs.pop(id(args[0]), None)
        outputs = [args[0]]
    if name.startswith("new_") or name.endswith("_like"):
        inputs.pop(id(args[0]), None)
    if not outputs:
        return Work()
    read, made = list(inputs.values()), outputs[0]
    moved = size(read) + size(outputs)
    counted = flop_registry.get(func.overloadpacket)
    # torch's formula of bmm does not know the type of the result, which comes third.
    flops = counted(*(args[:2] if name == "bmm" else args), **kwargs, out_val=out) if counted else 0
    if name == "convolution":
        return Work(_convolution(args, made, flops))
    if name == "convolution_backward":
        return Work(_convolution_backward(args, flops))
    if name == "native_layer_norm":
        return Work(_norm(args[0], outputs[1].numel(), moved))
    if name == "native_layer_norm_backward":
        return Work(_norm_backward(args))
    if name in PRODUCTS:
        left, right = [t for t in args if isinstance(t, Tensor)][-2:]
        return Work((Kernel(_product(left, right, made), moved, flops),))
    if name in REDUCTIONS:
        return Work(_reduction(args[0], made, moved))
    if name == "_softmax":
        return Work((Kernel("softmax", moved),))
    if name == "_softmax_backward_data":  # the gradient times the output, then the kernel
        return Work((Kernel("elementwise", moved), Kernel("softmax", moved)))
    if name in ("cat", "stack"):
        axis = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % made.ndim
        return Work((Kernel("permuted" if math.prod(made.shape[:axis]) > 1 else "elementwise", moved),))
    launches = KERNELS.get(name, 1)
    return Work((Kernel(_laid(read, made), moved, launches=launches),))


def _laid(read: Sequence[Tensor], made: Tensor) -> str:
    """The kind of an elementwise kernel, by how its operands lie."""
    wide = [t for t in read if t.numel() > 1]
    if any(t.shape != made.shape or 0 in t.stride() for t in wide):
        return "broadcast"
    if any(_axes(t) != _axes(made) for t in wide):
        return "permuted"
    if any(t.stride() != made.stride() for t in wide):  # gaps between rows
        return "broadcast"
    return "widening" if any(t.element_size() < made.element_size() for t in wide) else "elementwise"


def _axes(t: Tensor) -> list[int]:
    """Axes of more than one entry as they lie in memory, the outermost first."""
    return sorted((axis for axis in range(t.ndim) if t.shape[axis] > 1), key=t.stride, reverse=True)


def _norm(x: Tensor, rows: int, moved: int) -> tuple[Kernel, ...]:
    steps = 1 + math.ceil(x.numel() / rows / 512)  # of 128 threads with 4 numbers each
    return (*_made_dense(x), Kernel("norm", moved, steps=steps, blocks=rows))


def _norm_backward(args: Any) -> tuple[Kernel, ...]:
    """A kernel for the rows, one for the affine part; of many rows that one leaves partial sums of both."""
    dy, x, rows = args[0], args[1], args[3].numel()
    steps = 1 + math.ceil(x.numel() / rows / 512)
    kernels = [*_made_dense(dy), *_made_dense(x)]
    kernels.append(Kernel("norm backward", size([dy, x]) + size([x]), steps=steps, blocks=rows))
    if args[7][1]:
        kernels.append(Kernel("norm backward", size([dy, x])))
        if rows > 65536:
            kernels.append(Kernel("reduction", 2 * size([x]) / 32, launches=2))
    return tuple(kernels)


def _made_dense(t: Tensor) -> tuple[Kernel, ...]:
    return () if t.is_contiguous() else (Kernel("permuted", 2 * size([t])),)


def _product(a: Tensor, b: Tensor, out: Tensor) -> str:
    """By how many numbers a row of an operand or of the result begins after the one before."""
    if torch.float32 in (a.dtype, b.dtype):
        return "fp32 product"
    pitches = [
        s for t in (a, b, out) for n, s in zip(t.shape[-2:], t.stride()[-2:], strict=True) if n > 1 and s > 1
    ]  # fmt: skip
    if all(pitch % 8 == 0 for pitch in pitches):
        return "product"
    return "odd product" if any(pitch % 2 for pitch in pitches) else "unaligned product"


def _reduction(x: Tensor, out: Tensor, moved: int) -> tuple[Kernel, ...]:
    kernel = Kernel("reduction", moved)
    if out.numel() == 1 or x.ndim == 0 or out.shape[-1:] != x.shape[-1:]:
        return (kernel,)
    return kernel, _tail(x.numel() / out.numel())


def _tail(rows: float) -> Kernel:
    """A thread of the last block adds every eighth of the partial sums."""
    blocks, least = SPLIT
    return Kernel("tail", launches=0, steps=min(rows / least, blocks) / 8)


def laid_out(func: Any, args: Any, out: Any) -> Any:
    """The result as a GPU lays it out: convolutions of ``meta`` forget that channels came last."""
    name = func.overloadpacket.__name__
    if not name.startswith("convolution"):
        return out
    of = args[:2] if name == "convolution" else args[1:3]  # input and weight, whatever the gradient's layout is
    tensors = [t for t in of if isinstance(t, Tensor) and t.ndim == 4]
    if not any(_channels_last(t) for t in tensors):
        return out
    if name == "convolution":
        return torch.empty_like(out, memory_format=torch.channels_last)
    return tuple(
        None if t is None else t if t.ndim < 4 else torch.empty_like(t, memory_format=torch.channels_last) for t in out
    )


def _channels_last(t: Tensor) -> bool:
    return t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()


def _lists(args: Any, kwargs: Any) -> tuple[Kernel, ...]:
    """In place: every tensor of every list read, those of the first written."""
    lists = [a for a in (*args, *kwargs.values()) if isinstance(a, list | tuple) and a and isinstance(a[0], Tensor)]
    if not lists:
        return ()
    wide = [group for group in lists if group[0].numel() > 1 or len(lists) == 1]
    moved = sum(size(group) for group in wide) + size(lists[0]) * (3 if len(wide) > 3 else 1)
    return (Kernel("lists", moved, launches=math.ceil(len(lists[0]) / LISTS[min(max(len(wide), 1), 5)])),)


def _turns(*tensors: Tensor) -> tuple[Kernel, ...]:
    """cuDNN's tensor-core convolutions take channels last: others are turned first, read and written once more."""
    turned = [t for t in tensors if not t.is_contiguous(memory_format=torch.channels_last)]
    return tuple(Kernel("turn", 2 * size([t])) for t in turned)


def _convolved(kind: str, tensors: Sequence[Tensor], weight: Tensor, flops: int) -> Kernel:
    return Kernel(kind if weight.shape[1] >= 8 else "convolution, few channels", size(tensors), flops)


def _convolution(args: Any, out: Tensor, flops: int) -> tuple[Kernel, ...]:
    x, weight, bias = args[:3]
    kernels = (*_turns(x, weight, out), _convolved("convolution", (x, weight, out), weight, flops))
    return kernels if bias is None else (*kernels, Kernel("broadcast", 2 * size([out])))  # an addition of its own


def _convolution_backward(args: Any, flops: int) -> tuple[Kernel, ...]:
    dout, x, weight, (of_x, of_weight, of_bias) = args[0], args[1], args[2], args[10]
    products = of_x + of_weight
    kernels: list[Kernel] = []
    if of_x:
        kernels += [
            *_turns(dout, weight, x),
            _convolved("convolution, input", (dout, weight, x), weight, flops // products),
        ]
    if of_weight:  # turns the gradient anew
        kernels += [
            *_turns(dout, x, weight),
            _convolved("convolution, weight", (dout, x, weight), weight, flops // products),
        ]
    if of_bias:
        kernels.append(Kernel("reduction", size([dout])))
        if _channels_last(dout):  # a sum over rows
            kernels.append(_tail(dout.numel() / dout.shape[1]))
    return tuple(kernels)
