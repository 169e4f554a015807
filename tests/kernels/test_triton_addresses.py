"""What makes the order of programs irrelevant; the interpreter, which runs one after another, shows it by no value.

No two programs of a launch write one address, and none reads what another writes: over all shipped kernels.
"""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder

from fastslots.kernels.gpu import launch
from fastslots.kernels.gpu.passes.bias_gelu import bias_gelu_bwd, bias_gelu_fwd
from fastslots.kernels.gpu.passes.joint_norm import BLOCK, joint_norm_bwd, joint_norm_fwd
from fastslots.kernels.gpu.passes.row_norm import row_norm_bwd, row_norm_fwd
from fastslots.kernels.gpu.passes.token_mlp import token_mlp_bwd, token_mlp_fwd
from fastslots.kernels.gpu.slot_attention import slot_attention_bwd, slot_attention_fwd
from fastslots.kernels.tools import shipped


@contextlib.contextmanager
def watched(monkeypatch):
    """Addresses that loads and stores touch, each with the number of the program that did."""
    seen = {"read": [], "written": []}
    program = [(0, 0, 0)]
    load, store, place = (
        getattr(InterpreterBuilder, n) for n in ("create_masked_load", "create_masked_store", "set_grid_idx")
    )

    def note(kind, pointers, mask):
        addresses = np.broadcast_to(pointers.data, np.broadcast(pointers.data, mask.data).shape)[
            np.broadcast_to(mask.data, np.broadcast(pointers.data, mask.data).shape)
        ]
        x, y, z = program[0]
        seen[kind].append((np.unique(addresses), (z << 40) + (y << 20) + x))

    def noted_load(self, pointers, mask, *rest):
        note("read", pointers, mask)
        return load(self, pointers, mask, *rest)

    def noted_store(self, pointers, value, mask, *rest):
        note("written", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def noted_place(self, x, y, z):
        program[0] = (x, y, z)
        return place(self, x, y, z)

    with monkeypatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_masked_load", noted_load)
        patch.setattr(InterpreterBuilder, "create_masked_store", noted_store)
        patch.setattr(InterpreterBuilder, "set_grid_idx", noted_place)
        yield seen


def clashes(seen) -> list[str]:
    """What two programs did to one address."""

    def pairs(kind):
        parts = [np.stack([a, np.full_like(a, p)], 1) for a, p in seen[kind] if a.size]
        return np.unique(np.concatenate(parts), axis=0) if parts else np.empty((0, 2), np.uint64)

    written, read = pairs("written"), pairs("read")
    found = []
    if len(np.unique(written[:, 0])) < len(written):
        found.append("two programs write one address")
    owner = dict(written.tolist())
    if any(owner.get(address, program) != program for address, program in read.tolist()):
        found.append("a program reads what another writes")
    return found


def every_launch(dtype, shared):
    """Of all ops, a layer of the decoder's loss, slot attention of several heads, the joint norm, the passes over rows;
    sizes fill no tile."""
    shape = shipped.Shape("tail", 2, 70, 5, 3, 12, 37, 50, 20, 150, 45)
    t = shipped.inputs(shape, dtype, "cpu", shared)
    with launch.record("interpreter") as launches:
        for op in shipped.OPS:
            shipped.run_op(op, t)
        heads_that_compete(dtype)
        x = torch.randn(2, 70, BLOCK // 64, dtype=torch.float32).to(dtype)
        joint_norm_fwd(x, 1e-5, x[0])
        y, rstd = joint_norm_fwd(x, 1e-5)
        joint_norm_bwd(y, y, rstd)
        row_passes(dtype)
    return launches


def heads_that_compete(dtype):
    """A program takes all heads of a tile, for their map; some slots are masked out."""
    q, k, dmap = torch.randn(2, 3, 5, 20).to(dtype), torch.randn(2, 3, 150, 20).to(dtype), torch.randn(2, 150, 5)
    mask = torch.tensor([[True, False, True, True, True], [False] * 5])
    *saved, _ = slot_attention_fwd(q, k, k, 0.2, 1e-3, mask, True)
    slot_attention_bwd(q, dmap, (q, k, k), tuple(saved), 0.2, 1e-3, mask)


def row_passes(dtype):
    x, vector = torch.randn(150, 70).to(dtype), torch.randn(70)
    w = torch.randn(70, 70)
    y, *kept = token_mlp_fwd(x, w, vector, w, vector, 1e-5, True)
    token_mlp_bwd(x, x, w, vector, w, y, *kept)
    bias_gelu_bwd(bias_gelu_fwd(x, vector), x, vector)
    for weight, pitch in ((None, 70), (vector, 128)):
        y, mean, rstd = row_norm_fwd(x, weight, vector, 1e-5, pitch)
        row_norm_bwd(y, x, vector, mean, rstd, weight is not None)


@pytest.mark.parametrize(
    "dtype, shared", [(torch.float32, False), (torch.bfloat16, True)], ids=["fp32", "bf16-shared-x"]
)
def test_no_two_programs_write_one_address_and_none_reads_what_another_writes(dtype, shared, monkeypatch):
    launches = every_launch(dtype, shared)
    assert len({item.name for item in launches}) >= 25
    for item in launches:
        for value in item.args.values():  # what a recorded launch has left unwritten
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                value.nan_to_num_(0.0)
        with watched(monkeypatch) as seen:
            launch.run(item.kernel, item.grid, item.args, item.constexprs, item.config)
        assert seen["written"], item.name
        assert not clashes(seen), (item.name, clashes(seen))


@triton.jit
def _clash_kernel(x_ptr, y_ptr, STRIDE: tl.constexpr, BLOCK_L: tl.constexpr):
    offs = tl.program_id(0) * STRIDE + tl.arange(0, BLOCK_L)
    x = tl.load(x_ptr + offs, mask=offs < 64, other=0.0)
    tl.store(y_ptr + offs, x, mask=offs < 64)


def test_the_test_sees_a_clash(monkeypatch):
    x, y = torch.zeros(64), torch.zeros(64)
    for stride, out, expected in (
        (16, y, []), (8, y, ["two programs write one address"]),
        (8, x, ["two programs write one address", "a program reads what another writes"]),
    ):  # fmt: skip
        with watched(monkeypatch) as seen:
            _clash_kernel[(4,)](x, out, STRIDE=stride, BLOCK_L=16)
        assert clashes(seen) == expected
