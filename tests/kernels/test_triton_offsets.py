"""Tensors of more than 2³¹ elements: the last program of every launch reads and writes inside its tensors.

Launches are recorded on tensors without memory, then run in Triton's interpreter on made-up addresses far apart: loads
give zeros, stores go nowhere, and every address of an unmasked lane is checked. An offset that wraps in 32 bits, or a
tail that is not masked, falls outside.
"""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle, _get_np_dtype

from fastslots.kernels.gpu import launch
from fastslots.kernels.gpu._tiles import INTERPRETED
from fastslots.kernels.tools import shipped

SPACING = 1 << 44
SHAPES = {
    # Batch of many images: rows of 180 and of 45 a head pass 2³¹ elements, and so do the folded weights.
    "many-images": shipped.Shape("many-images", 2**15, 509, 5, 4, 45, 180, 32, 20, 1021, 72),
    # One image of many pixels or tokens: the offset inside it passes 2³¹.
    "many-pixels": shipped.Shape("many-pixels", 1, 2**24 - 3, 5, 2, 72, 144, 32, 20, 2**24 - 3, 144),
}


class Address:
    """Stands for a tensor: a type, a first address and a length."""

    def __init__(self, place: int, like: torch.Tensor):
        self.dtype, self.start = like.dtype, (place + 1) * SPACING
        self.stop = self.start + like.numel() * like.element_size()

    def data_ptr(self) -> int:
        return self.start


@contextlib.contextmanager
def checked(monkeypatch, grid, tensors):
    """The interpreter on made-up addresses, at the last program of ``grid``."""
    spans = np.array([(t.start, t.stop) for t in tensors.values()], dtype=np.uint64)
    names = list(tensors)

    def check(pointers, mask, size):
        at = np.asarray(pointers.data)[np.broadcast_to(mask.data, pointers.data.shape)]
        if not at.size:
            return
        place = int(at.max()) // SPACING - 1
        assert 0 <= place < len(names), f"an address beyond every tensor: {int(at.max()):#x}"
        low, high = int(at.min()), int(at.max()) + size
        start, stop = (int(v) for v in spans[place])
        assert start <= low and high <= stop, f"{names[place]}: bytes {low - start}..{high - start} of {stop - start}"

    def load(self, pointers, mask, other, *rest):
        element = pointers.get_element_ty()
        check(pointers, mask, element.primitive_bitwidth // 8)
        return TensorHandle(np.zeros(pointers.data.shape, _get_np_dtype(element)), element)

    def store(self, pointers, value, mask, *rest):
        check(pointers, mask, pointers.get_element_ty().primitive_bitwidth // 8)

    def number(value):
        return TensorHandle(np.array([value], dtype=np.int32), tl.int32)

    grid = (*grid, 1, 1)[:3]
    with monkeypatch.context() as patch, np.errstate(all="ignore"):
        patch.setattr(GridExecutor, "_init_args_hst", lambda self, args, kwargs: (args, kwargs))
        patch.setattr(GridExecutor, "_restore_args_dev", lambda self, *rest: None)
        patch.setattr(InterpreterBuilder, "create_masked_load", load)
        patch.setattr(InterpreterBuilder, "create_masked_store", store)
        patch.setattr(InterpreterBuilder, "create_get_program_id", lambda self, axis: number(grid[axis] - 1))
        patch.setattr(InterpreterBuilder, "create_get_num_programs", lambda self, axis: number(grid[axis]))
        yield


def run_last_program(item: launch.Launch, monkeypatch) -> None:
    tensors = {}
    for name, value in item.args.items():
        if isinstance(value, torch.Tensor):
            tensors[name] = Address(len(tensors), value)
    with checked(monkeypatch, item.grid, tensors):
        item.kernel[(1, 1, 1)](**(dict(item.args) | tensors), **item.constexprs, num_warps=4, num_stages=1)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("op", shipped.OPS)
def test_the_last_program_stays_inside_its_tensors(op, shape, monkeypatch):
    assert INTERPRETED.value, "triton was imported before TRITON_INTERPRET was set: run these tests in a new process"
    # Tall tiles, so that a part of a reduction is one or two of them and the parts are few.
    monkeypatch.setattr(launch.split, "__defaults__", (2**10,))
    with launch.override(launch.LaunchConfig(2**14, 64, 4, 1)), launch.record("sm_90") as launches:
        shipped.run_op(op, shipped.inputs(shape, torch.bfloat16))
    assert launches
    for item in launches:
        assert max(item.grid[1:], default=1) <= 65535, f"{item.name}: only the first axis of a grid may be longer"
        run_last_program(item, monkeypatch)
    large = [t.numel() for item in launches for t in item.args.values() if isinstance(t, torch.Tensor)]
    assert max(large) > 2**31


@triton.jit
def _copy_row_kernel(x_ptr, rows, WIDE: tl.constexpr, D: tl.constexpr):
    row = tl.program_id(0)
    if WIDE:
        row = row.to(tl.int64)
    offs = row * D + tl.arange(0, D)
    tl.store(x_ptr + offs, tl.load(x_ptr + offs))


def test_an_offset_of_32_bits_is_caught(monkeypatch):
    rows, D = 2**24, 256
    x = {"x_ptr": torch.empty(rows, D, device="meta"), "rows": rows}
    item = launch.Launch(_copy_row_kernel, (rows,), x, {"WIDE": True, "D": D}, launch.LaunchConfig(1, 1, 4, 1))
    run_last_program(item, monkeypatch)
    narrow = launch.Launch(_copy_row_kernel, (rows,), x, {"WIDE": False, "D": D}, launch.LaunchConfig(1, 1, 4, 1))
    with pytest.raises(Exception, match=r"x_ptr|beyond"):
        run_last_program(narrow, monkeypatch)
    short = launch.Launch(_copy_row_kernel, (rows + 1,), x, {"WIDE": True, "D": D}, launch.LaunchConfig(1, 1, 4, 1))
    with pytest.raises(Exception, match="x_ptr"):
        run_last_program(short, monkeypatch)
