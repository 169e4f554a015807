"""Machine code of the shipped launches, compiled without a GPU and disassembled.

Each case is a process of its own: the other Triton tests run with the interpreter on, which leaves nothing to compile.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest
import torch

from fastslots.cli import kernels
from fastslots.config.presets import PRESETS
from fastslots.errors import UserError
from fastslots.kernels.tools import roofline, spills

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is made for Linux alone", allow_module_level=True)

MAX_SPILLS = 128
"""Instructions on local memory outside loops: a few words that a program writes and reads once. The block sizes that
were the fastest of folded_attention_dx on an H100 have 120 in its form for shared queries in fp16."""
TARGETS = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}
OTHERS = [*(f"text-{d}" for d in (40, 64, 80, 160)), "slots-7", "slots-11"]
PRECISIONS = ("bf16", "fp16", "tf32", "fp32")
SCRIPT = """
import json, sys
from fastslots.kernels.tools import tables as report, shipped
arch, preset, precision, wanted = sys.argv[1:]
shape = shipped.SHAPES[preset]
for name, launch in shipped.record_shipped(arch, shape, precision):
    if wanted in ("all", name):
        print(json.dumps(report.compile_row(name, launch, arch, shape, precision)[0]))
"""


def compiled(arch: str, preset: str, precision: str, kernel: str) -> list[dict]:
    env = os.environ | {"TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, arch, preset, precision, kernel],
        capture_output=True, text=True, env=env, timeout=1500, check=False, cwd=os.path.expanduser("~"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert rows, f"no launch is called {kernel}"
    return rows


def check(row: dict) -> None:
    name = f"{row['target']} {row['preset']} {row['precision']} {row['kernel']}"
    # Block sizes are chosen by executed instructions; what is spilled once a trip is among them, and none is.
    assert row["loop_spills"] == 0 and row["spills"] <= MAX_SPILLS, f"{name}: {row['spills']} spills"
    assert not row["unwritten"], f"{name} is miscompiled: registers are read that nothing has written"
    assert row["atomics"] == 0, f"{name} has atomics: its sums have no fixed order"
    assert row["occupancy"] > 0, f"{name} does not fit a multiprocessor"
    if row["precision"] != "fp32" and row["model"]["flops"]:  # the combining kernel has no product
        assert row["tensor_cores"], f"{name} has products but no tensor-core instruction"
    wide = "16 B" if row["precision"] in ("fp32", "tf32") else "8 B"  # rows of 180 bf16 are aligned to 8 bytes
    if row["kernel"].endswith("_combine"):
        wide = "8 B"  # a row of 64 partial sums is 8 bytes a lane of one warp
    assert row["tma_loads"] or any(row["global_loads"].get(w) for w in (wide, "16 B")), f"{name} has no wide load"


@pytest.mark.parametrize("arch", TARGETS)
def test_decoder_layer_forward_compiles_clean(arch):
    (row,) = compiled(arch, "clevr6", "bf16", "decoder_layer_fwd")
    check(row)
    assert any(op.startswith(TARGETS[arch]) for op in row["tensor_cores"]), row["tensor_cores"]


def test_token_attention_compiles_clean():
    (row,) = compiled("sm_90", "clevr6", "bf16", "token_attention_bwd")
    check(row)
    assert any(op.startswith("HGMMA") for op in row["tensor_cores"]) and row["global_loads"].get("16 B")


@pytest.mark.parametrize(
    "preset, kernel", [("text-64", "cross_attention_bwd_statistics"), ("slots-7", "slot_attention_bwd_folded")]
)
def test_ops_of_others_models_compile_clean(preset, kernel):
    (row,) = compiled("sm_90", preset, "bf16", kernel)
    check(row)
    assert any(op.startswith("HGMMA") for op in row["tensor_cores"]) and row["global_loads"].get("16 B")


def test_a_map_of_one_number_compiles():
    """Triton makes an argument that is 1 a constant, which is no tensor."""
    script = """
import torch
from fastslots.kernels.gpu import launch
from fastslots.kernels.gpu.loss.slot_map import slot_map_loss
from fastslots.kernels.tools.compile import compile_launch, source
with launch.record("sm_90") as launches:
    slot_map_loss(torch.empty(1, 1, 1, 1, device="meta"), None, torch.empty((), device="meta"))
(one,) = launches
assert source(one).signature["size"] == "constexpr"
assert compile_launch(one, "sm_90").registers > 0
"""
    run = dict(capture_output=True, text=True, timeout=100, cwd=os.path.expanduser("~"), check=False)
    done = subprocess.run([sys.executable, "-c", script], env=os.environ | {"TRITON_INTERPRET": "0"}, **run)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.long
@pytest.mark.timeout(1600)
@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("preset", OTHERS)
def test_every_launch_at_shapes_of_others_models_compiles_clean(arch, preset, precision):
    for row in compiled(arch, preset, precision, "all"):
        check(row)


@pytest.mark.long
@pytest.mark.timeout(1600)  # up to 18 compilations, on a machine that may be shared
@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize(
    "preset, precision",
    [(preset, precision) for preset in PRESETS for precision in PRECISIONS],
)
def test_every_shipped_launch_compiles_clean(arch, preset, precision):
    for row in compiled(arch, preset, precision, "all"):
        check(row)


@pytest.mark.long
@pytest.mark.timeout(1600)  # up to 18 compilations, on a machine that may be shared
@pytest.mark.parametrize("arch", ["sm_86", "sm_89", "sm_120"])
@pytest.mark.parametrize("preset, precision", [("clevr6", "bf16"), ("clevr6", "tf32"), ("clevr6", "fp32"),
                                               ("clevrtex", "bf16"), ("clevrtex", "fp32")])  # fmt: skip
def test_every_launch_fits_a_gpu_with_less_shared_memory(arch, preset, precision):
    for row in compiled(arch, preset, precision, "all"):
        assert row["occupancy"] > 0, f"{row['kernel']} takes {row['shared_bytes']} bytes of shared memory"
        assert row["spills"] <= 64 and row["atomics"] == 0, f"{row['kernel']}: {row['spills']} spills"


@pytest.mark.long
@pytest.mark.timeout(1600)  # up to 18 compilations, on a machine that may be shared
def test_every_shipped_launch_compiles_for_amd():
    for row in compiled("gfx942", "clevr6", "bf16", "all"):
        assert row["atomics"] == 0 and not row["spills"] and not row["stack_bytes"], row["kernel"]
        assert row["tensor_cores"] or not row["model"]["flops"], row["kernel"]
        assert row["shared_bytes"] <= 64 * 1024, f"{row['kernel']} takes more than a workgroup's local memory"


def cli(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    kernels.add_parser(parser.add_subparsers())
    return parser.parse_args(arguments)


def test_report_writes_table_and_roofline(tmp_path):
    (row,) = compiled("sm_90", "clevr6", "bf16", "folded_attention_dx")
    (tmp_path / "row.json").write_text(json.dumps(row))
    args = cli("kernels", "report", str(tmp_path))
    assert args.run(args) == 0
    table = (tmp_path / "report.md").read_text()
    assert "| folded_attention_dx |" in table
    spills = f"bf16: folded_attention_dx {row['spills']}" if row["spills"] else "none"
    assert not row["loop_spills"] and f"| {row['triton']} | sm_90 | 1 bf16 | {spills} | none | none |" in table
    ET.fromstring((tmp_path / "roofline-sm_90.svg").read_text())  # well-formed


def test_spills_are_named_by_triton_and_target():
    """Those inside a loop apart from those outside; a launch that is too large for a block is named too."""

    def row(kernel, precision, spills, inside, occupancy=0.5, target="sm_80"):
        return {"kernel": kernel, "precision": precision, "target": target, "triton": "3.6.0", "spills": spills,
                "loop_spills": inside, "occupancy": occupancy, "shared_bytes": 259 << 10}  # fmt: skip

    rows = [row("fwd", "bf16", 20, 0), row("dx", "bf16", 35, 27), row("dx", "fp32", 2, 2), row("dw", "bf16", 0, 0, 0.0)]
    lines = spills.spill_table([*rows, row("fwd", "bf16", 0, 0, target="sm_90")])
    assert lines[2:] == [
        "| 3.6.0 | sm_80 | 3 bf16, 1 fp32 | bf16: fwd 20 | bf16: dx 27 (35); fp32: dx 2 (2) | bf16: dw 259 KiB |",
        "| 3.6.0 | sm_90 | 1 bf16 | none | none | none |",
    ]


def test_roofline_leaves_out_what_has_no_product():
    """A launch without FLOPs has no place on logarithmic axes; launches of one intensity share a dot."""

    def row(kernel, flops):
        model = {"flops": flops, "bytes": 1e6}
        return {"kernel": kernel, "target": "sm_90", "preset": "clevr6", "precision": "bf16", "model": model}

    rows = [row("combine", 0), row("first", 2e8), row("second", 2e8), row("third", 9e8)]
    svg = roofline.roofline_svg(rows, "sm_90")
    ET.fromstring(svg)
    assert "combine" not in svg and "first, second: 200 FLOP/B" in svg and svg.count("<circle") == 2
    assert roofline.roofline_svg(rows[:1], "sm_90") is None and roofline.roofline_svg(rows, "gfx942") is None


def test_every_nvidia_target_has_an_occupancy(tmp_path):
    """sm_89 could not be asked for, though GPUs of that kind are served."""
    script = "from fastslots.kernels.tools.compile import MULTIPROCESSORS as known; print(*known)"
    start = dict(text=True, env=os.environ | {"TRITON_INTERPRET": "0"}, cwd=tmp_path)
    known = subprocess.check_output([sys.executable, "-c", script], **start)
    assert {*known.split(), "gfx942"} == set(kernels.TARGETS)
    (row,) = compiled("sm_89", "clevr6", "bf16", "folded_attention_dx")
    assert row["occupancy"] > 0 and row["spills"] == 0 and "HMMA" in next(iter(row["tensor_cores"]))


def test_tune_says_what_it_would_time(capsys):
    args = cli("kernels", "tune", "--dry", "--preset", "clevr6", "--precision", "bf16", "--target", "sm_80")
    assert args.run(args) == 0
    out = capsys.readouterr().out
    assert "sm_80 clevr6 bf16 feed_forward_dx (bf16/192): from {" in out and out.endswith("16 entries\n")
    args = cli("kernels", "tune", "--dry", "--preset", "clevr7")
    with pytest.raises(UserError, match="clevr7"):
        args.run(args)


def test_report_without_compiled_kernels_names_the_command(tmp_path):
    args = cli("kernels", "report", str(tmp_path))
    with pytest.raises(UserError, match="fastslots kernels compile"):
        args.run(args)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: tuning would run")
def test_tune_needs_a_gpu():
    args = cli("kernels", "tune")
    with pytest.raises(UserError, match="GPU"):
        args.run(args)


def test_disassembly_is_read():
    """The reader counts what is there: opcodes behind predicates, widths, local memory, atomics."""
    script = """
from fastslots.kernels.tools import compile as c
sass = '''
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0010*/              @!P0 LDG.E.64.CONSTANT R8, desc[UR4][R2.64] ;
        /*0020*/             @!UP1 LDGSTS.E.BYPASS.128 [R9], desc[UR4][R2.64] ;
        /*0030*/                   STL [R1], R5 ;
.L_x_1:
        /*0040*/              @P3  LDL.LU R5, [R1] ;
        /*0048*/              @P0  BRA `(.L_x_1) ;
        /*004c*/                   BRA `(.L_x_2) ;
        /*0050*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0060*/                   LDG.E.U16 R4, desc[UR4][R2.64] ;
        /*0070*/                   RED.E.ADD.F32 [R2], R3 ;
.L_x_2:
'''
ops = c._opcodes(sass)
assert c._by_width(ops, c._GLOBAL_LOAD) == {"2 B": 1, "8 B": 1, "16 B": 2}, ops
assert c.spilled(sass) == (2, 1)  # of which one between a label and the branch back to it
assert dict(c._count(ops, c._TENSOR_CORE)) == {"HMMA.16816": 1}
assert sum(n for op, n in ops.items() if c._ATOMIC.match(op)) == 1
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=100, cwd=os.path.expanduser("~"))
