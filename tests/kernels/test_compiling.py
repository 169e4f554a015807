"""The first compile of kernels is told of, by Triton's own word, and a second run on a machine says nothing."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from fastslots.cli.doctor import _step
from fastslots.ops import explain
from fastslots.testing.stand_in import cuda_stand_in
from fastslots.train.device import first

PROGRAM = """
import torch, triton
from fastslots.kernels.gpu import launch
from fastslots.kernels.gpu.passes.bias_gelu import bias_gelu_bwd, bias_gelu_fwd
from fastslots.kernels.gpu_backend import compiles_told
from fastslots.kernels.tools.compile import source, target
with launch.record("sm_90") as launches, torch.device("meta"):
    u, bias = torch.empty(64, 64, dtype=torch.bfloat16), torch.empty(64)
    bias_gelu_bwd(bias_gelu_fwd(u, bias), u, bias)
ticks = iter(range(0, 1000, 6))
with compiles_told(print, lambda: next(ticks)):
    for item in [*launches, launches[0]]:
        triton.compile(source(item), target=target("sm_90"), options=launch.options(item.config))
assert triton.knobs.compilation.listener is None
print("end")
"""


def test_compiles_are_told_of_once_a_machine(tmp_path):
    env = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    runs = [
        subprocess.run(
            [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=env, timeout=600, check=True
        )
        for _ in range(2)
    ]
    first, progress, last, end = runs[0].stdout.splitlines()
    assert first.startswith("compiling Triton kernels") and "first run" in first
    assert progress == "compiling Triton kernels: 2 after 18 s ..." and end == "end"
    assert last.startswith("compiled 2 Triton kernels in ") and str(tmp_path) in last
    assert runs[1].stdout == "end\n"  # all come from the cache on disk


def test_products_repeat_where_torch_is_asked_for_it(monkeypatch):
    said = []
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    first.make_products_repeat(said.append)
    assert not said and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    torch.use_deterministic_algorithms(True)
    try:
        first.make_products_repeat(said.append)
        first.make_products_repeat(said.append)
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")  # a value of the user's that does
        first.make_products_repeat(said.append)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(said) == 1 and said[0].startswith("CUBLAS_WORKSPACE_CONFIG=:4096:8 set")


@pytest.mark.parametrize("off", [False, True])
def test_explain_and_doctor_say_whether_there_is_a_graph(off, monkeypatch):
    if off:
        monkeypatch.setenv("FASTSLOTS_CUDA_GRAPHS", "0")
    else:
        monkeypatch.delenv("FASTSLOTS_CUDA_GRAPHS", raising=False)
    with cuda_stand_in():
        found = explain(torch.empty(1, 28, 128, device="cuda"), op="decoder_loss")
        step = _step(torch.device("cuda"))
    wanted = "operator by operator (FASTSLOTS_CUDA_GRAPHS=0)" if off else "one CUDA graph"
    assert found.backend == "triton" and str(found).startswith(f"decoder_loss: triton, {wanted}")
    assert step.startswith("no CUDA graph (FASTSLOTS_CUDA_GRAPHS=0)" if off else "one CUDA graph")
    assert "graph" not in str(explain(torch.empty(1, 28, 128), op="decoder_loss"))
