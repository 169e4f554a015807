"""A decoder layer in plain PyTorch, operation by operation: bytes and FLOPs of a model, not of a run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EagerOp:
    """Per pixel or token: values read and written by the forward, and the multiply-adds of a product."""

    reads: int
    writes: int
    product: int = 0


def eager_ops(method: str, D: int, F: int, H: int, d: int, K: int) -> list[EagerOp]:
    """The operations of one layer as eager PyTorch runs them: "published" or "folded"."""
    HK, Hd = H * K, H * d
    published = [
        EagerOp(D, D),  # norm
        EagerOp(D, Hd, D * Hd),  # query projection
        EagerOp(Hd, Hd),  # scale
        EagerOp(Hd, HK, Hd * K),  # scores
        EagerOp(HK, HK),  # softmax
        EagerOp(HK, K),  # slot map
        EagerOp(HK, Hd, Hd * K),  # A v
        EagerOp(Hd, D, D * Hd),  # output projection
    ]
    folded = [
        EagerOp(D, D),  # norm
        EagerOp(D, HK, D * HK),  # x G
        EagerOp(HK, HK),  # + g
        EagerOp(HK, HK),  # softmax
        EagerOp(HK, K),  # slot map
        EagerOp(HK, D, D * HK),  # A U
        EagerOp(D, D),  # + b
    ]
    feed_forward = [
        EagerOp(2 * D, D),  # residual
        EagerOp(D, D),  # norm
        EagerOp(D, F, D * F),
        EagerOp(F, F),  # gelu
        EagerOp(F, D, F * D),
        EagerOp(2 * D, D),  # residual
    ]
    return {"published": published, "folded": folded}[method] + feed_forward


def eager_cost(ops: list[EagerOp], rows: int, element: int, backward: bool = True) -> tuple[int, int]:
    """Bytes and FLOPs of operations on so many rows of elements of so many bytes, forward or forward and backward.

    The backward of an operation reads the gradient and what the forward read, and writes a gradient of that; a product
    reads the gradient once more (two products) and does twice the operations.
    """
    values = macs = 0
    for op in ops:
        values += op.reads + op.writes
        macs += op.product
        if backward:
            values += op.writes * (2 if op.product else 1) + 2 * op.reads
            macs += 2 * op.product
    return values * rows * element, 2 * macs * rows
