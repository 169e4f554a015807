"""The ops in a process of their own: as its first call, in a second thread, after a fork, without optional packages."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

MAKE = """
import torch
from fastslots import ops
from fastslots.ops import reference

def make(dtype=torch.float32, grad=True):
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 3, 40, 8, generator=g).to(dtype).requires_grad_(grad)
    k, v = (torch.randn(2, 3, 5, 8, generator=g).to(dtype).requires_grad_(grad) for _ in range(2))
    return q, k, v

def step(function, inputs):
    out, slot_map = function(*inputs)
    (out.square().sum() + slot_map.square().sum()).backward()
    return [out, slot_map, *(t.grad for t in inputs)]

def check(got):
    expected = step(lambda *t: reference.cross_attention(*t, 8**-0.5), make(torch.float64))
    for a, b in zip(got, expected, strict=True):
        assert (a.double() - b).abs().max() < 1e-5 * b.abs().max(), "not the reference's numbers"
"""

FIRST = {
    "call": "check(step(ops.cross_attention, make()))",
    "compiled call": "check(step(torch.compile(ops.cross_attention, fullgraph=True), make()))",
    "call of another thread": """
        import threading
        got = []
        thread = threading.Thread(target=lambda: got.append(step(ops.cross_attention, make())))
        thread.start()
        thread.join()
        check(got[0])
    """,
    "calls of eight threads at once": """
        from concurrent.futures import ThreadPoolExecutor
        with ThreadPoolExecutor(8) as pool:
            for got in pool.map(lambda _: step(ops.cross_attention, make()), range(32)):
                check(got)
    """,
    "call of a forked child": """
        import os
        child = os.fork()
        if not child:
            check(step(ops.cross_attention, make()))
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        check(step(ops.cross_attention, make()))
    """,
    "call after a fork of a process that has called": """
        import os
        torch.set_num_threads(2)
        got = step(ops.cross_attention, make())
        check(got)
        before = got[0].detach()
        child = os.fork()
        if not child:
            with torch.no_grad():  # autograd's own threads, and those of torch's products, do not survive a fork
                out, _ = ops.cross_attention(*make(grad=False), backend="cpu")
            os._exit(not torch.equal(out, before))
        assert os.waitpid(child, 0)[1] == 0
    """,
    "call of meta tensors": """
        out, slot_map = ops.cross_attention(*(t.to("meta") for t in make()))
        assert out.shape == (2, 3, 40, 8) and slot_map.shape == (2, 40, 5)
    """,
}
OPTIONAL = ("triton", "xformers", "h5py", "flask", "tensorboard", "wandb", "pyarrow", "pycocotools", "rich", "pynvml")


def run(code: str) -> None:
    command = [sys.executable, "-c", MAKE + textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert not done.returncode, done.stderr


@pytest.mark.parametrize("first", list(FIRST))
def test_the_first(first):
    run(FIRST[first])


def test_without_optional_packages():
    run(f"""
        import sys
        assert not set({OPTIONAL}) & set(sys.modules), "imported before anybody asked"
        sys.modules.update(dict.fromkeys({OPTIONAL}))  # importing one raises ImportError
        check(step(ops.cross_attention, make()))
        import fastslots.nn, fastslots.models, fastslots.metrics, fastslots.data, fastslots.train, fastslots.interop
    """)


def test_a_backend_imports_no_other():
    run("""
        import sys
        check(step(ops.cross_attention, make()))
        assert "fastslots.kernels.gpu_backend" not in sys.modules
    """)
