"""What the C++ module is handed by mistake is refused: a fault there would end the process, and the run with it."""

from __future__ import annotations

import ctypes

import pytest
import torch

from fastslots.cli import main
from fastslots.errors import UserError
from fastslots.train import TrainConfig

cpu = pytest.importorskip("fastslots._cpu", reason="the C++ kernels are not built here")


def test_no_heads_are_no_division_by_zero():
    D, H, K, L, F = 4, 0, 2, 4, 4
    layer = {"G": (1, D, H, K), "g": (1, H, K), "U": (1, H, K, D), "b": (D,), "norm_weight": (D,), "norm_bias": (D,)}
    layer |= {"w1": (F, D), "b1": (F,), "w2": (D, F), "b2": (D,)}
    shapes = {"queries": (1, L, D), **{f"layers.0.{name}": shape for name, shape in layer.items()}}
    shapes |= {"head.norm_weight": (D,), "head.norm_bias": (D,), "head.weights.0": (3, D), "head.biases.0": (3,)}
    inner, Z = 8, 3
    tangents = {"query_weight": (inner, D), "query_bias": (inner,), "query_norm_weight": (D,), "query_norm_bias": (D,)}
    tangents |= {"out_weight": (D, inner), "keys": (1, K, Z, inner), "values": (1, K, Z, inner)}
    decoder, of_layer = ({name: torch.zeros(shape) for name, shape in part.items()} for part in (shapes, tangents))
    with pytest.raises(ValueError, match="the last axis must be a multiple of the heads"):
        cpu.slot_jacobian_float32(
            decoder=decoder, tangents=[of_layer], slot_mask=None, eps=1e-5, jacobian=torch.zeros(1, K, L),
            isa="portable", threads=1,
        )  # fmt: skip


class Tensor(ctypes.Structure):
    """DLPack's managed tensor, version 0."""

    _fields_ = (
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64), ("manager", ctypes.c_void_p), ("deleter", ctypes.c_void_p),
    )  # fmt: skip


class Lazy:
    """Has a shape, and no memory until something computes it."""

    def __init__(self, *shape: int):
        self._shape = (ctypes.c_int64 * len(shape))(*shape)
        self._tensor = Tensor(None, 1, 0, len(shape), 2, 32, 1, self._shape, None, 0, None, None)

    def __dlpack__(self, **_: object) -> object:
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
        return new(ctypes.addressof(self._tensor), b"dltensor", None)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0


def test_a_tensor_that_is_not_computed_is_refused():
    q, k = torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 3, 2)
    with pytest.raises(TypeError, match="v must be a materialised float32 array on the CPU"):
        cpu.cross_attention_fwd_float32(
            q=q, k=k, v=Lazy(1, 1, 3, 2), slot_mask=None, scale=1.0, out=torch.zeros(1, 1, 4, 2),
            slot_map=torch.zeros(1, 4, 3), isa="portable", threads=1,
        )  # fmt: skip


def test_more_threads_than_any_machine_has_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="threads must be at most 1024, got 100000: 0 is one a core"):
        TrainConfig(threads=100_000)
    for command in (["train"], ["bench", "op"]):
        assert main([*command, "--threads", "100000"]) == 2
        assert "at most 1024" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
