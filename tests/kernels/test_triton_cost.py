"""The byte and FLOP model against what the kernels load, store and multiply, counted in Triton's interpreter."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder

from fastslots.config.presets import PRESETS
from fastslots.kernels.gpu import launch
from fastslots.kernels.gpu._tiles import INTERPRETED
from fastslots.kernels.gpu.passes import bias_gelu, row_norm, token_mlp
from fastslots.kernels.tools import cost, shipped
from fastslots.train import TrainConfig


@contextlib.contextmanager
def counted(monkeypatch):
    """Bytes that unmasked lanes of loads and stores ask for, and operations of products, while kernels run."""
    seen = {"bytes": 0, "flops": 0}

    def lanes(pointers, mask):
        return int(np.count_nonzero(mask.data)) * (pointers.get_element_ty().primitive_bitwidth // 8)

    load, store, dot = (getattr(InterpreterBuilder, f"create_{n}") for n in ("masked_load", "masked_store", "dot"))

    def counted_load(self, pointers, mask, *rest):
        seen["bytes"] += lanes(pointers, mask)
        return load(self, pointers, mask, *rest)

    def counted_store(self, pointers, value, mask, *rest):
        seen["bytes"] += lanes(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def counted_dot(self, a, b, *rest):
        seen["flops"] += 2 * a.data.size * b.data.shape[-1]
        return dot(self, a, b, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_masked_load", counted_load)
        patch.setattr(InterpreterBuilder, "create_masked_store", counted_store)
        patch.setattr(InterpreterBuilder, "create_dot", counted_dot)
        yield seen


def test_shipped_shapes_are_those_of_the_presets():
    assert list(shipped.PRESETS) == [*PRESETS]
    for name, shape in shipped.PRESETS.items():
        c = TrainConfig.preset(name)
        K, H, D = c.num_slots, c.decoder_heads, c.query_width
        tokens = (c.resolution // (1 if c.input == "features" else c.cnn_stride)) ** 2
        layer = (c.resolution**2, K, H, c.slot_width // H, D, 2 * D)
        assert shape == shipped.Shape(name, c.batch_size, *layer, c.encoder_heads * K, tokens, c.token_width)


@pytest.mark.parametrize("shared", [False, True], ids=["own-x", "shared-x"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("op", shipped.OPS)
def test_model_counts_what_the_code_moves(op, precision, shared, monkeypatch):
    assert INTERPRETED.value
    shape = shipped.Shape("tail", 2, 70, 5, 3, 12, 37, 50, 20, 150, 45)
    with launch.record("interpreter") as launches:
        shipped.run_op(op, shipped.inputs(shape, shipped.PRECISIONS[precision], "cpu", shared))
    assert launches
    for item in launches:
        with counted(monkeypatch) as seen:
            launch.run(item.kernel, item.grid, item.args, item.constexprs, item.config)
        model = cost.launch_cost(item)
        assert (seen["bytes"], seen["flops"]) == (model.requested, model.issued), item.name
        assert model.bytes <= model.requested and model.flops <= model.issued, item.name


def test_model_counts_what_two_launches_of_many_keys_move(monkeypatch):
    """More than 64 keys of heads wider than 64: dk and dv are sums of a launch each."""
    shape = shipped.Shape("many", 1, 40, 70, 2, 72, 24, 8, 16, 16, 16)
    with launch.record("interpreter") as launches:
        shipped.run_op("attention_statistics", shipped.inputs(shape, torch.float32, "cpu"))
    assert [item.name for item in launches] == ["cross_attention_fwd"] + 2 * ["cross_attention_bwd"]
    for item in launches:
        with counted(monkeypatch) as seen:
            launch.run(item.kernel, item.grid, item.args, item.constexprs, item.config)
        model = cost.launch_cost(item)
        assert (seen["bytes"], seen["flops"]) == (model.requested, model.issued)
        assert model.bytes <= model.requested and model.flops <= model.issued


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_model_counts_what_passes_over_rows_move(dtype, monkeypatch):
    with launch.record("interpreter") as launches:
        x, vector = torch.zeros(150, 70, dtype=dtype), torch.zeros(70)
        bias_gelu.bias_gelu_bwd(bias_gelu.bias_gelu_fwd(x, vector), x, vector)
        for weight, pitch in ((None, 70), (vector.clone(), 128)):
            y, mean, rstd = row_norm.row_norm_fwd(x, weight, vector, 1e-5, pitch)
            row_norm.row_norm_bwd(y, x, vector, mean, rstd, weight is not None)
        w = torch.zeros(70, 70)
        y, *kept = token_mlp.token_mlp_fwd(x, w, vector, w.clone(), vector.clone(), 1e-5, True)
        token_mlp.token_mlp_bwd(x.clone(), x, w, vector, w, y, *kept)
    assert len(launches) == 8
    for item in launches:
        with counted(monkeypatch) as seen:
            launch.run(item.kernel, item.grid, item.args, item.constexprs, item.config)
        model = cost.launch_cost(item)
        assert seen["bytes"] == model.requested >= model.bytes, item.name
        assert seen["flops"] == model.issued >= model.flops, item.name


def test_forward_layer_moves_its_floor():
    """x once in, y and the map once out: the rest (weights) is below 1 % at the clevr6 preset."""
    shape = shipped.PRESETS["clevr6"]
    with launch.record("sm_90") as launches:
        shipped.run_op("decoder_layer", shipped.inputs(shape, torch.bfloat16))
    forward = next(item for item in launches if item.name == "decoder_layer_fwd")
    floor = shape.B * shape.L * (2 * shape.D * 2 + shape.K * 4)
    assert floor <= cost.launch_cost(forward).bytes < 1.01 * floor
