"""What the C++ module is handed by mistake is refused, since a fault there would end the process; its threads are
torch's."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest
import torch

from fastslots.cli import main
from fastslots.errors import UserError
from fastslots.testing import SHAPES, random_layer
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
            q=q, k=k, v=Lazy(1, 1, 3, 2), slot_mask=None, head_weights=None, scale=1.0, out=torch.zeros(1, 1, 4, 2),
            slot_map=torch.zeros(1, 4, 3), entropy=None, lse=None, isa="portable", threads=1,
        )  # fmt: skip


def test_more_threads_than_any_machine_has_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="threads must be at most 1024, got 100000: 0 is one a core"):
        TrainConfig(threads=100_000)
    for command in (["train"], ["bench", "op"]):
        assert main([*command, "--threads", "100000"]) == 2
        assert "at most 1024" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_arrays_are_never_converted():
    x, folded, _ = random_layer(SHAPES["one-slot"], torch.float32)
    B, L, D = x.shape
    named = folded._asdict()
    good = [torch.empty(B, L, D), torch.empty(B, L, 1)]

    def call(x=x, weights=named, outputs=good, isa="portable"):
        y, slot_map = outputs
        rest = dict(slot_mask=None, eps=0.0, isa=isa, threads=1)
        cpu.layer_fwd_float32(x=x, weights=weights, y=y, slot_map=slot_map, **rest)

    call()
    with pytest.raises(TypeError, match="y must be a C-contiguous float32 array"):
        call(outputs=[good[0].double(), good[1]])
    with pytest.raises(TypeError, match="y must be a C-contiguous float32 array"):
        call(outputs=[torch.empty(B, D, L).mT, good[1]])
    with pytest.raises(TypeError, match="x must be a C-contiguous float32 array"):
        call(x=x.double())
    with pytest.raises(ValueError, match=r"slot_map has shape \[2, 9, 2\], expected \[2, 9, 1\]"):
        call(outputs=[good[0], torch.empty(B, L, 2)])
    with pytest.raises(ValueError, match="no array is named b"):
        call(weights={name: getattr(folded, name) for name in "GgU"})
    with pytest.raises(ValueError, match="unknown instruction set"):
        call(isa="sse9")
    with pytest.raises(TypeError, match="incompatible function arguments"):
        cpu.layer_fwd_float32(x, folded._asdict(), None, 0.0, *good, "portable", 1)


def test_one_pool_of_threads():
    """The kernels run on torch's OpenMP threads: a process counts no more of them after a call than before."""
    program = """
import os, torch
torch.set_num_threads(2)
a = torch.randn(600, 600)
a @ a; torch.relu(torch.randn(2_000_000))
before = len(os.listdir("/proc/self/task"))
from fastslots import ops
q, k = torch.randn(2, 2, 500, 8), torch.randn(2, 2, 3, 8)
for _ in range(3):
    ops.cross_attention(q, k, k, backend="cpu")
with open("/proc/self/maps") as maps:
    pools = {line.split()[-1] for line in maps if "gomp" in line or "libomp" in line}
print(before, len(os.listdir("/proc/self/task")), len(pools))
"""
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    before, after, pools = map(int, done.stdout.split())
    assert before == after and pools == 1
