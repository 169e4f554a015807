"""The C++ module as ``kernels/cpu/bindings.cpp`` defines it, where a compiler built it."""

from collections.abc import Callable
from typing import Any

most_maps: int

def instruction_sets() -> list[str]: ...

# Every kernel, by its name and dtype: ``cross_attention_fwd_float32``. Each takes keywords alone and says which.
def __getattr__(name: str) -> Callable[..., Any]: ...
