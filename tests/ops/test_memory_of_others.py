"""What the C++ ops for others' models add at their peak: their results and little else, whatever the layout."""

from __future__ import annotations

import pytest
from peaks import PRELUDE, measured, needs_peak

pytestmark = needs_peak

LAYOUTS = (
    PRELUDE
    + """
B, H, L, K, d = 1, 8, 2**13, 32, 16
CALLS = sys.argv[1:]


def laid(n, leaf=True):  # as a projection leaves it: [B, n, H, d], seen as [B, H, n, d]
    return torch.randn(B, n, H, d).transpose(1, 2).requires_grad_(leaf)


def both_ways(op, L):
    few, many, cotangent = laid(K), laid(L), laid(L, False)
    if op == "slot_attention":
        values, cotangent = laid(L), laid(K, False)
        inputs, call = (few, many, values), lambda: [ops.slot_attention(few, many, values, backend="cpu")]
    else:
        values = laid(K)
        extra = {"statistics": ("entropy", "lse")} if op == "statistics" else {}
        inputs = many, few, values
        call = lambda: list(ops.cross_attention(many, few, values, backend="cpu", **extra))

    def run():
        out, *rest = call()
        rest = [t for part in rest for t in (part.values() if isinstance(part, dict) else [part])]
        grads = torch.autograd.grad([out, *rest], inputs, [cotangent, *(torch.zeros_like(t) for t in rest)])
        both_ways.kept = out, *rest, *grads

    return run


found = {}
for op in CALLS:
    both_ways(op, 64)()
    run = both_ways(op, L)
    peak = added(run)
    sizes = [t.untyped_storage().nbytes() for t in both_ways.kept]
    rest = sum(sizes[1 : len(sizes) - 3])  # the map and the rows: their cotangents are made inside as well
    found[op] = [peak, sum(sizes) + rest, 4 * B * H * L * d]
print(json.dumps(found))
"""
)


def test_heads_split_from_a_projection_are_copied_nowhere():
    for op, (peak, results, one) in measured(LAYOUTS, "cross_attention", "statistics", "slot_attention").items():
        # A thread's workspace and sums come to some hundred KiB; a copy of one operand, of 4 MiB, would show.
        # Cotangents of zeros are no memory until they are read.
        assert peak > 0.9 * results, f"{op}: {peak} bytes, less than its results {results}: not measured"
        assert peak < results + one // 2, f"{op} adds {peak - results} bytes beside its results of {results}"


ITERATIONS = (
    PRELUDE
    + """
from fastslots.nn import SlotAttention

B, K, S = 2, 7, 64
module = SlotAttention(S, iterations=int(sys.argv[1]), backend=sys.argv[3])


def call(L):
    tokens, slots = torch.randn(B, L, S, requires_grad=sys.argv[2] == "learned"), leaf(B, K, S)
    return lambda: module(slots, tokens).sum().backward()


call(64)()
L = 2**14
run = call(L)
print(json.dumps([added(run), 4 * B * L * S]))
"""
)


@pytest.mark.parametrize("iterations", [1, 3, 6])
def test_iterations_share_one_gradient_of_the_tokens(iterations):
    peak, tokens = measured(ITERATIONS, str(iterations), "learned", "cpu")
    assert tokens * 0.9 < peak < tokens * 1.3


def test_tokens_without_a_gradient_cost_nothing_of_their_size():
    peak, tokens = measured(ITERATIONS, "3", "frozen", "cpu")
    assert peak < tokens * 0.3
    peak, tokens = measured(ITERATIONS, "3", "frozen", "reference")  # the test can fail
    assert peak > tokens
