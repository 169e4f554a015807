"""torch's FLOP counter sees each operator, in both directions, and counts the products of its formula."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastslots import ops
from fastslots.nn import FoldedTokens
from fastslots.ops.autograd import IMPLEMENTATIONS
from fastslots.ops.flops import FORMULAS
from fastslots.testing import SHAPES, random_layer, random_qkv

SHAPE = SHAPES["one-slot"]._replace(B=2, K=3)
NORM = torch.nn.LayerNorm(8)


def calls():
    """name -> a call by backend, its leaves, and how often its forward's products stand in its backward."""
    q, k, v = (t.requires_grad_() for t in random_qkv(SHAPE, torch.float32))
    x, folded, ff = random_layer(SHAPE, torch.float32)
    leaves = [t.requires_grad_() for t in (x, *folded, *ff)]
    rows, tokens = torch.randn(2, 6, 8, requires_grad=True), torch.randn(2, 40, 8, requires_grad=True)
    return {
        "cross_attention": (lambda b: ops.cross_attention(q, k, v, backend=b), 2.5),
        "attention_statistics": (lambda b: ops.cross_attention(q, k, v, backend=b, statistics=("lse",))[:2], 2.5),
        "slot_attention": (lambda b: (ops.slot_attention(k, q, q, backend=b),), 2.5),
        "folded_slot_attention": (lambda b: (FoldedTokens(tokens, rows, NORM, b).gather(rows, 0.5, 1e-3)[0],), 2.5),
        "token_attention": (lambda b: (ops.token_attention(rows, tokens, b),), 2.5),
        "folded_cross_attention": (
            lambda b: ops.folded_cross_attention(leaves[0], ops.FoldedProjections(*leaves[1:5]), b),
            2.5,
        ),
        "decoder_layer": (
            lambda b: ops.decoder_layer(
                leaves[0], ops.FoldedProjections(*leaves[1:5]), ops.FeedForward(*leaves[5:]), b
            ),
            None,
        ),
    }


def counted(call, backend: str) -> tuple[int, int]:
    with FlopCounterMode(display=False) as counter:
        outputs: tuple[Tensor, ...] = call(backend)
        forward = counter.get_total_flops()
        torch.stack([t.square().sum() for t in outputs]).sum().backward()
    return forward, counter.get_total_flops() - forward


@pytest.mark.parametrize("name", list(calls()))
def test_a_forward_counts_what_the_reference_s_products_count(name):
    call, ratio = calls()[name]
    forward, backward = counted(call, "cpu")
    expected, expected_backward = counted(call, "reference")
    assert forward == expected > 0
    assert backward > expected_backward, "a kernel's backward makes its scores anew"
    assert ratio is None or backward == ratio * forward


def test_every_operator_of_attention_has_a_formula():
    assert {name for name in IMPLEMENTATIONS if "attention" in name or "layer" in name} == set(FORMULAS)


COUNT = """
q, k, v = torch.randn(1, 2, 9, 4), *torch.randn(2, 1, 2, 3, 4)
with flop_counter.FlopCounterMode(display=False) as counter:
    ops.cross_attention(q, k, v, backend="cpu")
assert counter.get_total_flops() == 2 * 2 * 2 * 9 * 3 * 4
"""


@pytest.mark.parametrize("first", ["from fastslots import ops", "from torch.utils import flop_counter"])
def test_whichever_is_imported_first(first):
    rest = "from fastslots import ops\nfrom torch.utils import flop_counter"
    subprocess.run([sys.executable, "-c", f"import torch\n{first}\n{rest}\n{COUNT}"], check=True)


def test_nobody_who_counts_nothing_imports_the_counter():
    code = "import sys, fastslots.ops, fastslots.train; assert 'torch.utils.flop_counter' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
