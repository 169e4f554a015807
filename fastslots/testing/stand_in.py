"""Tensors that say they lie on a GPU, on a machine without one: shapes and types without values.

torch's own fake tensors of a CUDA device cannot be differentiated by a torch that was built for CPUs. Here tensors lie
on ``meta``, where everything runs but values; inside ``CudaStandIn`` they say that they are on ``cuda``, what is made
on ``cuda`` is made on ``meta``, and autocast casts by the table of CUDA (torch's "Autocast Op Reference"). Whatever
would wait for the device (``item``, ``cpu``, ``nonzero``) raises, since there is no value to wait for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _foreach_utils
from torch.utils._pytree import tree_map

LOWER = {
    "conv1d", "conv2d", "conv3d", "linear", "matmul", "mm", "bmm", "addmm", "addmv", "mv", "baddbmm", "addbmm",
    "einsum", "chain_matmul", "multi_dot", "scaled_dot_product_attention",
}  # fmt: skip
"""Functions that autocast gives 16 bits."""
FULL = {
    "exp", "expm1", "log", "log10", "log1p", "log2", "pow", "reciprocal", "rsqrt", "layer_norm", "group_norm", "norm",
    "softmax", "log_softmax", "sum", "cumsum", "prod", "mse_loss", "l1_loss", "dist", "logsumexp",
}  # fmt: skip
"""Functions that autocast gives 32 bits."""
WIDEST = {"cat", "stack", "addcmul", "addcdiv", "cross", "dot", "index_put", "scatter_add", "tensordot"}
CUDA, META = torch.device("cuda", 0), torch.device("meta")


def _name(func: Callable[..., Any]) -> str:
    return getattr(func, "__name__", "").strip("_").removeprefix("r")


class CudaStandIn(TorchFunctionMode):
    """While active, ``meta`` tensors pass for CUDA tensors. Enter by ``cuda_stand_in``."""

    def __init__(self) -> None:
        super().__init__()
        self._cast: dict[int, tuple[Tensor, Tensor]] = {}  # as autocast keeps its copies of parameters

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == Tensor.device.__get__:
            return CUDA if func(*args).type == "meta" else func(*args)
        if func == Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return args[0].is_meta or func(*args)
        if func is torch.device:
            return func(*args, **kwargs)
        args, kwargs = tree_map(_off_cuda, args), tree_map(_off_cuda, kwargs)
        if not torch.is_autocast_enabled("cuda"):
            self._cast.clear()
            return func(*args, **kwargs)
        name, sixteen = _name(func), torch.get_autocast_dtype("cuda")
        if name in LOWER:
            return func(*self._to(sixteen, args), **self._to(sixteen, kwargs))
        if name in FULL:
            return func(*self._to(torch.float32, args), **self._to(torch.float32, kwargs))
        if name in WIDEST:
            wide = any(t.dtype == torch.float32 for t in _tensors(args))
            return func(*(self._to(torch.float32, args) if wide else args), **kwargs)
        return func(*args, **kwargs)

    def _to(self, dtype: torch.dtype, values: Any) -> Any:
        def cast(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.is_meta or value.dtype == dtype:
                return value
            if value.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                return value
            kept = value.is_leaf and value.requires_grad and dtype != torch.float32
            if kept and id(value) in self._cast:
                return self._cast[id(value)][1]
            new = value.to(dtype)
            if kept:
                self._cast[id(value)] = value, new
            return new

        return tree_map(cast, values)


def _off_cuda(value: Any) -> Any:
    if isinstance(value, torch.device) and value.type == "cuda":
        return META
    return "meta" if isinstance(value, str) and value.split(":")[0] == "cuda" else value


def _tensors(values: Any) -> list[Tensor]:
    return [
        t for value in values for t in (value if isinstance(value, tuple | list) else [value]) if isinstance(t, Tensor)
    ]


@contextlib.contextmanager
def cuda_stand_in(capability: tuple[int, int] = (9, 0), memory: int = 80 << 30) -> Iterator[CudaStandIn]:
    """Inside, ``torch.device("cuda")`` is a GPU of this compute capability and memory that computes nothing."""
    properties = mock.Mock(
        total_memory=memory, L2_cache_size=50 << 20, shared_memory_per_block_optin=227 << 10, multi_processor_count=132,
        major=capability[0], minor=capability[1], name="stand-in", gcnArchName="",
    )  # fmt: skip
    properties.name = "a GPU that is not there"
    answers: dict[str, Any] = {
        "is_available": lambda: True, "is_bf16_supported": lambda *a, **k: True, "device_count": lambda: 1,
        "current_device": lambda: 0, "get_device_capability": lambda *a: capability,
        "get_device_properties": lambda *a: properties, "get_device_name": lambda *a: properties.name,
        "is_current_stream_capturing": lambda: True, "mem_get_info": lambda *a: (memory, memory),
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        updates = stack.enter_context(torch.library._scoped_library("aten", "IMPL"))
        for name in ("_fused_adam_", "_fused_adamw_"):
            updates.impl(f"{name}.tensor_lr", lambda *args, **kwargs: None, "Meta")  # in place, and torch has no fake
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        # Tensors are grouped by device in C++, which says ``meta``.
        devices = lambda: ["cuda", "meta"]  # noqa: E731
        stack.enter_context(mock.patch.object(_foreach_utils, "_get_foreach_kernels_supported_devices", devices))
        yield stack.enter_context(CudaStandIn())
