"""The model of a training step on a GPU: what it counts, from shapes and machine code; no GPU and nothing compiled."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from fastslots.bench.gpu_step import report
from fastslots.bench.gpu_step.rates import Kernel
from fastslots.bench.gpu_step.walk import walk_published, walk_step, works
from fastslots.kernels.gpu import launch
from fastslots.kernels.tools import executed, shipped
from fastslots.testing.stand_in import cuda_stand_in
from fastslots.train import TrainConfig

SASS = """
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
.L_x_1:
        /*0010*/                   HGMMA.64x16x16.F32.BF16 R80, R132, gdesc[UR4].tnspB, RZ, !UPT ;
.L_x_2:
        /*0020*/              @!P0 HGMMA.64x64x16.F32.BF16 R80, R132, gdesc[UR4] ;
        /*0030*/                   LDL R4, [R1] ;
        /*0040*/               @P1 BRA `(.L_x_2) ;
        /*0050*/               @P3 BRA `(.L_x_1) ;
.L_x_3:
        /*0060*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R8], R9 ;
        /*0070*/               @P0 BRA `(.L_x_3) ;
        /*0080*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0090*/                   EXIT ;
"""


def test_executed_instructions_are_loops_times_trips():
    code = executed.read_code(SASS)
    assert code.loops == [(1, 5), (2, 4)] and len(code.opcodes) == 10  # one that only waits is no loop
    nested = (executed.Loop(5, (executed.Loop(3),)),)
    times = executed.times_executed(code, nested, 0)
    assert times == [1, 5, 15, 15, 15, 5, 1, 1, 1, 1]
    narrow, wide, single = 2 * 64 * 16 * 16 // 4, 2 * 64 * 64 * 16 // 4, 2 * 16 * 8 * 16
    assert executed.tensor_flops(code.opcodes, times) == 5 * narrow + 15 * wide + single
    assert executed.tensor_flops(code.opcodes, times, 32) == 5 * 2 * narrow + 15 * wide + single


def test_a_loop_that_the_compiler_unrolled_is_seen_by_its_products():
    """Of two loops of the source one is left in the code: the one whose trips give the products that are made."""
    code = executed.read_code(SASS.replace("BRA `(.L_x_2)", "NOP"))
    made = {5: 5, 7: 7}
    for trips in made:
        times = [trips if 1 <= at <= 5 else 1 for at in range(10)]
        products = executed.tensor_flops(code.opcodes, times)
        assert executed.times_executed(code, (executed.Loop(5), executed.Loop(7)), products) == times


@pytest.mark.parametrize("shared", [False, True])
def test_the_loops_of_every_kernel_of_a_step_are_known(shared):
    """Trips times what a loop takes at once are all columns, units, or tiles of rows."""
    shape = shipped.PRESETS["clevr6"]
    seen = {}
    for op in ("decoder_layer", "token_attention", "folded_cross_attention"):
        with launch.record("sm_90") as launches:
            shipped.run_op(op, shipped.inputs(shape, torch.bfloat16, shared=shared))
        seen |= {item.name: (item, executed.source_loops(item)) for item in launches}
    item, loops = seen["decoder_layer_fwd"]
    c = item.constexprs
    assert [loop.trips for loop in loops] == [c["COLUMNS"] // c["BLOCK_C"], c["UNITS"] // c["BLOCK_F"]]
    item, loops = seen["folded_attention_dx"]
    assert len(loops) == 1
    item, loops = seen["token_attention_bwd"]
    assert loops[0].trips * item.grid[0] * item.constexprs["BLOCK_L"] >= shape.T


def noted(function, *tensors):
    """The work of the one operator that ``function`` runs."""
    (found,) = works(function, *tensors)
    return found


def kinds(work):
    return [kernel.kind for kernel in work.kernels]


def test_operators_move_their_tensors():
    a, b = torch.empty(30, 20, device="meta"), torch.empty(20, 10, device="meta", dtype=torch.float32)
    (product,) = noted(torch.mm, a, b).kernels
    assert product == Kernel("fp32 product", 4 * (600 + 200 + 300), 2 * 30 * 20 * 10)
    assert noted(lambda t: t.add_(1), a).bytes == 2 * 4 * 600
    assert noted(lambda t: t.zero_(), a).bytes == 4 * 600  # written alone
    row = torch.empty(1, 20, device="meta").expand(30, 20)
    assert noted(torch.add, a, row).bytes == 4 * (600 + 20 + 600)  # an expanded tensor is read once
    assert noted(lambda t: t.to(torch.bfloat16), a).bytes == 6 * 600
    few = torch.empty(32, 1000, device="meta")
    (norm,) = noted(lambda t: F.layer_norm(t, (1000,)), few).kernels
    assert (norm.kind, norm.blocks, norm.steps) == ("norm", 32, 3)  # a row is one block's


def test_the_kind_of_a_kernel_follows_from_how_its_operands_lie():
    x = torch.empty(64, 8, 180, device="meta", dtype=torch.bfloat16)
    wide, vector = x.float(), torch.empty(180, device="meta", dtype=torch.bfloat16)
    assert kinds(noted(torch.add, x, x)) == kinds(noted(lambda t: t.bfloat16(), wide)) == ["elementwise"]
    assert kinds(noted(lambda t: t.float(), x)) == ["widening"]
    assert kinds(noted(torch.add, x, vector)) == ["broadcast"]
    assert kinds(noted(lambda t: t.transpose(0, 1).contiguous(), x)) == ["permuted"]
    assert kinds(noted(lambda t: torch.cat([t, t], 2), x)) == ["permuted"]
    assert kinds(noted(lambda t: torch.cat([t, t], 0), x)) == ["elementwise"]
    assert kinds(noted(lambda t: t.flatten(0, 1).sum(0), wide)) == ["reduction", "tail"]
    assert kinds(noted(lambda t: t.sum(-1), wide)) == ["reduction"]
    assert kinds(noted(lambda t: F.layer_norm(t, (180,)), wide.transpose(0, 1))) == ["permuted", "norm"]
    for width, kind in ((192, "product"), (180, "unaligned product"), (43, "odd product")):
        rows = torch.empty(512, width, device="meta", dtype=torch.bfloat16)
        assert kinds(noted(torch.mm, rows.t(), rows)) == [kind], width


def test_convolutions_are_turned_where_channels_do_not_come_last():
    x, w = torch.empty(2, 8, 16, 16, device="meta"), torch.empty(8, 8, 3, 3, device="meta")
    plain = noted(lambda a, b: F.conv2d(a, b, padding=1), x, w)
    last = noted(lambda a, b: F.conv2d(a, b, padding=1), *(t.to(memory_format=torch.channels_last) for t in (x, w)))
    assert last.launches == 1 and plain.launches == 4 and plain.bytes == 3 * last.bytes
    assert plain.flops == last.flops == 2 * 2 * 256 * 8 * 8 * 9


def test_the_stand_in_casts_as_autocast_does_on_cuda():
    with cuda_stand_in():
        x = torch.empty(4, 8, device="cuda", requires_grad=True)
        linear = torch.nn.Linear(8, 8, device="cuda")
        assert x.device.type == "cuda" and x.is_cuda and linear.weight.device.type == "cuda"
        with torch.autocast("cuda", torch.bfloat16):
            y = F.gelu(linear(x))
            z = F.layer_norm(y, (8,))
            weights = torch.softmax(y @ y.t(), -1)
        assert (y.dtype, z.dtype, weights.dtype) == (torch.bfloat16, torch.float32, torch.float32)
        (z.sum() + weights.sum()).backward()
        assert x.grad.dtype == torch.float32 and linear.weight.grad.shape == (8, 8)
        for wait in (lambda: x.sum().item(), lambda: x.cpu(), lambda: x.nonzero()):
            with pytest.raises((RuntimeError, NotImplementedError)):
                wait()
    assert not torch.is_autocast_enabled("cuda") and not torch.empty(1, device="meta").is_cuda


@pytest.fixture(scope="module")
def clevr6():
    return TrainConfig.preset("clevr6", batch_size=32, precision="bf16")


@pytest.fixture(scope="module")
def step(clevr6):
    return walk_step(clevr6, "sm_90")


def test_a_step_is_walked_to_its_launches(step, clevr6):
    names = {n.name for n in step.noted if isinstance(n.work, launch.Launch)}
    assert {"decoder_layer_fwd", "feed_forward_dz", "token_attention_fwd", "token_attention_bwd"} <= names
    assert {n.region for n in step.noted} == {"encoder", "decoder", "update"}
    products = sum(n.work.flops for n in step.noted if n.name == "convolution")
    pixels, C, S = 32 * 128 * 128, 64, 128
    assert products == 2 * pixels * 25 * (3 * C + C * C + C * C + C * S)
    assert step.nodes() == sum(step.nodes(region) for region in ("encoder", "decoder", "update"))


def test_a_step_is_few_nodes_and_keeps_tokens_in_16_bits(step):
    """Tokens are [32, 16384, 128]: a copy in fp32 would be 268 MB, and every layer would make one."""
    assert step.nodes("decoder") <= 250 and step.nodes() <= 700
    wide = [n for n in step.noted if (torch.float32, (32, 128 * 128, 128)) in zip(n.dtypes, n.shapes, strict=True)]
    assert not wide, wide[0]


def test_every_launch_of_a_step_takes_the_whole_batch_at_once(step):
    """One tile: as many launches of a kernel as the decoder has layers, all pixels of all images in each."""
    pixels, of = 32 * 128 * 128, {}
    for noted in step.noted:
        if isinstance(noted.work, launch.Launch):
            of.setdefault(noted.name, []).append(noted.work)
    for name in ("decoder_layer_fwd", "folded_attention_dx"):
        assert len(of[name]) == 2, name
    assert len(of["feed_forward_dz"]) == 3  # and of the head's first two maps
    assert all(len(of[name]) == 1 for name in ("output_head_fwd", "output_head_loss", "slot_map_loss"))
    assert "folded_attention_fwd" not in of  # the forward keeps n, so no attention runs again
    assert not {"folded_attention_dw", "feed_forward_dx"} & set(of)  # nor is anything made twice for gradients
    assert all(item.args["n_ptr"].shape == (32, 128 * 128, 184) for item in of["decoder_layer_fwd"])
    assert all(item.args["slope_ptr"].shape == (32, 128 * 128, 384) for item in of["decoder_layer_fwd"])
    assert all(item.constexprs["KEEP"] for item in of["folded_attention_dx"])
    assert all(item.args["rows"] == pixels and item.constexprs["KEEP"] for item in of["feed_forward_dz"])
    assert len(of["token_attention_bwd"]) == 5 and len(of["joint_norm_fwd"]) == len(of["joint_norm_bwd"]) == 1
    assert len(of["bias_gelu_fwd"]) == len(of["bias_gelu_bwd"]) == 4  # convolutions
    assert len(of["token_mlp_fwd"]) == len(of["token_mlp_bwd"]) == 1
    assert not {"row_norm_fwd", "row_norm_bwd"} & set(of)  # norms are parts of what stands before or behind them


def test_biases_and_gelus_of_all_pixels_are_no_operators_of_torch(step):
    """Each is one pass over memory: a sum, an addition or a GELU of its own would be another."""
    rows = 32 * 128 * 128
    whole = [n for n in step.noted if any(s and s.numel() >= 64 * rows for s in map(torch.Size, n.shapes))]
    names = [n.name for n in whole if not isinstance(n.work, launch.Launch)]
    assert "add" not in names  # positions are added by the joint norm, gradients of the tokens by the attention
    assert names and not {*names} & {"gelu", "gelu_backward", "native_layer_norm", "native_layer_norm_backward"}


def test_the_published_step_stores_the_weights_of_every_head(clevr6):
    walked = walk_published(clevr6, "sm_90")
    assert not [n for n in walked.noted if isinstance(n.work, launch.Launch)]
    assert [n for n in walked.noted if n.name == "_softmax" and n.shapes[0] == (32, 12, 128 * 128, 7)]


def test_the_report_adds_up(clevr6):
    """With a made-up count in the place of compiled code."""
    count = executed.Executed(1e9, 1e12, 10**8, 0, 0, 1)
    small = replace(clevr6, batch_size=2)
    found = report.step_report(small, "sm_90", lambda item: count)
    told = json.loads(found.as_json())
    assert told["step_ms"] == pytest.approx(sum(part["ms"] for part in told["parts"]), abs=0.01)
    assert told["nodes"] == sum(part["launches"] for part in told["parts"])
    assert told["decoder_nodes"] == sum(p["launches"] for p in told["parts"] if p["name"].startswith("decoder"))
    (part,) = [p for p in found.parts if p.name == "decoder: decoder_layer_fwd"]
    on = executed.machine("sm_90")
    one = max(1e8 / 3.0e12, 1e9 / (0.6 * 4 * 132 * 1.755e9) + 1e12 / 798e12)
    assert on.bandwidth == pytest.approx(3.0e12) and part.ms == pytest.approx(1e3 * one * part.launches)
    assert f"{found.step_ms:8.3f}" in found.as_text() and "published" in found.as_text()
