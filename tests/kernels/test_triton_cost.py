"""The byte and FLOP model against what the kernels load, store and multiply, counted in Triton's interpreter."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder

from fastslots.config.presets import PRESETS
from fastslots.kernels.gpu import launch
from fastslots.kernels.gpu._tiles import INTERPRETED
from fastslots.kernels.tools import cost, shipped
from fastslots.kernels.tools import tables as report
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


def test_forward_layer_moves_its_floor():
    """x once in, y and the map once out: the rest (weights) is below 1 % at the clevr6 preset."""
    shape = shipped.PRESETS["clevr6"]
    with launch.record("sm_90") as launches:
        shipped.run_op("decoder_layer", shipped.inputs(shape, torch.bfloat16))
    forward = next(item for item in launches if item.name == "decoder_layer_fwd")
    floor = shape.B * shape.L * (2 * shape.D * 2 + shape.K * 4)
    assert floor <= cost.launch_cost(forward).bytes < 1.01 * floor


def test_step_table_orders_the_methods():
    rows = {label: (bytes_, flops) for label, bytes_, flops, _ in report.step_costs(shipped.PRESETS["clevr6"], 2)}
    assert rows["published, bf16"][0] > rows["folded, bf16"][0] > 2 * rows["fused, bf16"][0]
    # Multiply-adds a pixel and layer, forward: 2·180·516 + 2·516·7 for attention and 2·180·360 for the feed-forward.
    pixels = 32 * 128 * 128
    assert rows["published, fp32"][1] == 2 * 3 * 2 * pixels * (2 * 180 * 516 + 2 * 516 * 7 + 2 * 180 * 360)


def test_step_counts_what_torch_does_around_the_launches():
    """No pass over all pixels but the launches' own, and, where x is shared, the sum of its residual over the batch."""
    shape = shipped.PRESETS["clevr6"]
    pixels = shape.B * shape.L * shape.D * 2
    for shared, passes in ((False, 0), (True, 1)):
        tensors = shipped.inputs(shape, torch.bfloat16, shared=shared)
        with launch.record("sm_90"), report._Traffic() as around:
            shipped.run_op("decoder_layer", tensors)
        assert passes * pixels <= around.bytes < (passes + 0.95) * pixels
    with report._Traffic() as seen:  # the counter counts
        torch.empty(8, device="meta").add_(1).view(2, 4).sum()
    assert seen.bytes == 32 + 36


def test_the_floors_of_the_documentation_are_those_of_the_model():
    page = Path(__file__).parents[2].joinpath("docs/kernels.md").read_text()
    table = page.split("<!-- floors:begin -->\n")[1].split("\n<!-- floors:end -->")[0]
    assert table == "\n".join(report.step_floors()).replace("## ", "### ")


def test_encoder_table_orders_the_methods():
    shape = shipped.PRESETS["clevr6"]
    rows = {label: (bytes_, flops) for label, bytes_, flops, _ in report.encoder_costs(shape, 5)}
    assert rows["published, bf16"][0] > rows["folded, bf16"][0] > rows["fused, bf16"][0]
    # Fused: tokens read by both passes and their gradient written once a layer, and one norm; the rest is small.
    token_bytes = 32 * 128 * 128 * 128 * 2
    assert (3 * 5 + 5) * token_bytes < rows["fused, bf16"][0] < 1.15 * (3 * 5 + 5) * token_bytes
    # Multiply-adds a token, forward: keys and values 2·128², scores and gathering 7·128 each; backward twice that.
    assert rows["published, fp32"][1] == 5 * 2 * 3 * 32 * 128 * 128 * (2 * 128 * 128 + 2 * 7 * 128)


def test_floor_is_the_longer_of_bytes_and_products():
    device = cost.Device("toy", "sm_90", 1e12, {"bf16": 1e12})
    assert device.floor_us(2e6, 1e6, "bf16") == 2.0 and device.floor_us(1e6, 3e6, "bf16") == 3.0


@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_the_tuner_writes_the_entries_that_launches_read(precision):
    shape = shipped.PRESETS["clevr6"]
    entries = launch.table()["sm_90"]
    launches = [item for _, item in shipped.record_shipped("sm_90", shape, precision)]
    tuned = [item for item in launches if item.name in entries]
    assert {item.name for item in tuned} == set(entries)
    for item in tuned:
        with shipped.matmul_precision(precision):
            key = launch.table_key(shipped.PRECISIONS[precision], shape.row_width(item.name))
        assert launch.LaunchConfig(**entries[item.name][key]) == item.config, item.name
