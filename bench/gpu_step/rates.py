"""How near to a GPU's roofs PyTorch's kernels come, by kind.

The shares are those of an H100 80GB with torch 2.11, fitted on the kernels of the published step (docs/results/
h100-step.json, "published, fused Adam, bf16"), which has all kinds but small fp32 products: these are our own step's.
docs/kernels.md says how well they tell our step. Other devices are taken to reach the same shares of their own roofs:
that is extrapolated.
"""

from __future__ import annotations

from typing import NamedTuple

BLOCKS = 16
"""Blocks of 128 threads that a multiprocessor holds, with its 2,048 threads."""


class Rate(NamedTuple):
    """Of a kind of kernel."""

    bandwidth: float = 1.0  # share of what the device copies
    products: float = 1.0  # share of what it multiplies
    least: float = 1.3e-6  # seconds of a launch, however little it does
    step: float = 0.0  # seconds of one step of a chain of loads that wait for one another


RATES = {
    # Same shapes, strides and width: 16 bytes a load.
    "elementwise": Rate(0.97),
    # PyTorch reads one 16-bit number a load where a cast makes 32 bits of it.
    "widening": Rate(0.62),
    # An operand is repeated: offsets are computed, and no load holds more than one number.
    "broadcast": Rate(0.55, least=2e-6),
    # Operands differ in the order of their axes, or parts are joined along an inner axis: what lies side by side in the
    # one does not in the other.
    "permuted": Rate(0.37, least=2e-6),
    # Convolutions' operands, turned by cuDNN so that channels come last: through shared memory.
    "turn": Rate(0.53, least=2e-6),
    "reduction": Rate(0.9, least=2.5e-6),
    # After a sum over rows that all blocks share, a thread adds the partial sums of its columns one by one.
    "tail": Rate(least=0.0, step=0.5e-6),
    "softmax": Rate(0.8),
    # A row is one block of 128 threads, whose mean and variance each 4 numbers of a thread update in turn (Welford).
    "norm": Rate(0.9, least=2e-6, step=1.40e-6),
    "norm backward": Rate(0.9, least=2e-6, step=0.97e-6),
    # Of 16 bits; rows of whole 16 bytes: Hopper's own kernels (nvjet), which stream.
    "product": Rate(0.85, least=2.7e-6),
    # Rows of whole 4 bytes, as of width 180: cutlass kernels of Ampere that copy 4 bytes at a time.
    "unaligned product": Rate(0.85, 0.165, least=2.7e-6),
    # Rows of an odd number of 16 bits (43, 7, 3): 2 bytes at a time.
    "odd product": Rate(0.25, least=3e-6),
    # Small products without tensor cores: a chain of multiply-adds as long as the rows.
    "fp32 product": Rate(0.85, 0.5, least=6.4e-6),
    # cuDNN, at channels that fill half a tile and more.
    "convolution": Rate(0.85, 0.68, least=5e-6),
    "convolution, input": Rate(0.85, 0.54, least=5e-6),
    "convolution, weight": Rate(0.85, 0.66, least=5e-6),
    # Channels of an image, less than 16 bytes of them: filled up, and 4 bytes at a time.
    "convolution, few channels": Rate(0.85, 0.045, least=5e-6),
    # Many small tensors in one kernel: blocks are dealt by tensor and most have little to do.
    "lists": Rate(0.25, least=1.6e-6),
}  # fmt: skip


class Kernel(NamedTuple):
    """One launch, or several alike."""

    kind: str
    bytes: float = 0.0
    flops: float = 0.0
    launches: int = 1
    steps: float = 0.0  # of a chain of loads in each block
    blocks: int = 1  # that go through such a chain

    def seconds(self, bandwidth: float, products: float, processors: int) -> dict[str, float]:
        """By what binds; the longest is the kernel's. bandwidth: bytes/s; products: FLOP/s."""
        rate = RATES[self.kind]
        rounds = max(1.0, self.blocks / (BLOCKS * processors))
        return {
            "bytes": self.bytes / (bandwidth * rate.bandwidth), "flops": self.flops / (products * rate.products),
            "waits": rate.step * self.steps * rounds, "launch": rate.least * self.launches,
        }  # fmt: skip
