"""Modes that watch, or spoil, what PyTorch does inside them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Poison(TorchDispatchMode):
    """Fills every uninitialised tensor with NaN, so that an element no kernel writes is seen."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if "empty" in func.name() and isinstance(out, Tensor) and out.is_floating_point():
            out.fill_(float("nan"))
        return out


class LargestTensor(TorchDispatchMode):
    """Elements and shape of the largest tensor made inside; a view or an expanded tensor counts what it occupies."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.elements = 0
        self.shape: tuple[int, ...] = ()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            size = t.untyped_storage().nbytes() // t.element_size() if isinstance(t, torch.Tensor) else 0
            if size > self.elements:
                self.elements, self.shape = size, tuple(t.shape)
        return out


class Operations(TorchDispatchMode):
    """Names of the operations inside, such as ``native_layer_norm`` and ``fastslots::cross_attention``."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name().removeprefix("aten::").split(".")[0])
        return func(*args, **(kwargs or {}))
