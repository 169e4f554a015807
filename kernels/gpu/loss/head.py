# ruff: noqa: RUF005  (the Triton front end has no starred tuples)
"""The output head with its loss: from rows to the error of their pixels and back to what the backward starts with.

    n = norm(x)   u1 = W1 n + b1   h1 = gelu(u1)   u2 = W2 h1 + b2   h2 = gelu(u2)   p = W3 h2 + b3
    e = p − target   loss = Σ weight · e²   dp = scale · weight · e   du2 = (W3ᵀ dp) ∘ gelu'(u2)
    dW3 = Σ dp h2ᵀ   db3 = Σ dp

The loss of a pixel follows from its row alone. So one kernel goes forward to u2, and a second one reads it and turns:
it writes du2 in its place, and h2 and the pixels are never stored; W3 and its gradients, of a few channels, never leave
it. (As one kernel, u2 would not be stored either, but with the hidden rows of both directions it spills some 500
registers a tile and takes as long.) What is kept is what ``loss.feed_forward`` takes, whose backward of W1 and W2, with
du2 in the place of dy, is the rest. The norm's affine part is merged into W1. Serves heads of two hidden layers, as the
published one; others go operator by operator (``output_head``).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastslots.records import FeedForward, OutputHead

from .. import launch
from .._pack import FeedForwardPacks, pitch
from .._tiles import (
    bias_rows,
    dot,
    gelu_and_grad,
    load_rows,
    load_tile,
    norm_rows,
    store_one,
    store_rows,
    store_rows_and_one,
    zero_rows,
)
from .feed_forward import Kept, feed_forward_backward

CHANNELS = 4
"""The most that are served: the sums of each have registers of their own."""
PROGRAMS = 528
"""Programs among which the tiles are dealt: four for each of an H100's multiprocessors."""


@triton.jit
def _output_head_fwd_kernel(
    x_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, n_ptr, rstd_ptr, slope_ptr, h_ptr, u2_ptr, rows, eps,
    D: tl.constexpr, OUT: tl.constexpr, DU: tl.constexpr, UNITS: tl.constexpr,
    KEEP_H: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # Rows of u2 are DU wide, zeros from OUT on. With KEEP_H also h1, which dW2 takes.
    WIDTH: tl.constexpr = triton.cdiv(OUT, BLOCK_D) * BLOCK_D
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    start = tl.program_id(0).to(tl.int64) * BLOCK_L
    mask_l = start + tl.arange(0, BLOCK_L) < rows
    x = load_rows(x_ptr + start * D, D, mask_l, D, BLOCK_L, BLOCK_D)
    normed, rstd = norm_rows(x, eps, D, BLOCK_D, DTYPE)
    store_rows_and_one(n_ptr + start * (D // 8 * 8 + 8), normed, mask_l, D, BLOCK_L, BLOCK_D)
    tl.store(rstd_ptr + start + tl.arange(0, BLOCK_L), rstd, mask=mask_l)
    if KEEP_H:
        store_one(h_ptr + start * (UNITS + 8) + UNITS, UNITS + 8, mask_l, BLOCK_L)
    u2 = bias_rows(zero_rows(BLOCK_L, BLOCK_D, WIDTH // BLOCK_D), b2_ptr, OUT, BLOCK_D)
    for unit in range(0, UNITS, BLOCK_C):
        u = tl.zeros([BLOCK_L, BLOCK_C], tl.float32)
        for c in tl.static_range(len(normed)):
            u = dot(normed[c], load_tile(w1_ptr + c * BLOCK_D * UNITS + unit, UNITS, BLOCK_D, BLOCK_C), u, PRECISION)
        u += tl.load(b1_ptr + unit + tl.arange(0, BLOCK_C))[None, :]
        hidden, slope = gelu_and_grad(u, DTYPE)
        hidden = hidden.to(DTYPE)
        at = tl.arange(0, BLOCK_L)[:, None]
        units = unit + tl.arange(0, BLOCK_C)[None, :]
        tl.store(slope_ptr + start * UNITS + (at * UNITS + units), slope.to(DTYPE), mask=mask_l[:, None])
        if KEEP_H:
            tl.store(h_ptr + start * (UNITS + 8) + (at * (UNITS + 8) + units), hidden, mask=mask_l[:, None])
        out = ()
        for c in tl.static_range(len(u2)):
            w2 = load_tile(w2_ptr + unit * WIDTH + c * BLOCK_D, WIDTH, BLOCK_C, BLOCK_D)
            out = out + (dot(hidden, w2, u2[c], PRECISION),)
        u2 = out
    store_rows(u2_ptr + start * DU, DU, u2, mask_l, DU, BLOCK_L, BLOCK_D)


@triton.jit
def _output_head_loss_kernel(
    u2_ptr, w3_ptr, b3_ptr, target_ptr, weight_ptr, scale_ptr, sums_ptr,
    rows, blocks, L, image_stride, pixel_stride, channel_stride,
    OUT: tl.constexpr, DU: tl.constexpr, C: tl.constexpr, WEIGHTED: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # Program: a part of the rows, whose u2 become du2. Its sums, [C, OUT + 2]: dW3, then db3 and the loss of a channel.
    # A few channels are no tensor-core product: their multiply-adds are a quarter of what GELU takes.
    CHUNKS: tl.constexpr = triton.cdiv(OUT, BLOCK_D)
    DTYPE: tl.constexpr = u2_ptr.dtype.element_ty
    part = tl.program_id(0).to(tl.int64)
    scale = tl.load(scale_ptr)
    dw3 = zero_rows(BLOCK_L, BLOCK_D, C * CHUNKS)
    db3 = zero_rows(BLOCK_L, 1, C)
    total = zero_rows(BLOCK_L, 1, C)
    for block in range(blocks):
        start = (part * blocks + block) * BLOCK_L
        offs_l = start + tl.arange(0, BLOCK_L)[:, None]
        mask_l = offs_l < rows
        u2 = load_rows(u2_ptr + start * DU, DU, start + tl.arange(0, BLOCK_L) < rows, DU, BLOCK_L, BLOCK_D)
        hidden = ()
        du = ()  # the slopes, until the pixels are known
        for c in tl.static_range(CHUNKS):
            h, slope = gelu_and_grad(u2[c].to(tl.float32), DTYPE)
            hidden = hidden + (h,)
            du = du + (slope,)
        place = offs_l // L * image_stride + offs_l % L * pixel_stride
        weight = tl.where(mask_l, 1.0, 0.0)
        if WEIGHTED:
            weight = tl.load(weight_ptr + offs_l, mask=mask_l, other=0.0)
        dhidden = zero_rows(BLOCK_L, BLOCK_D, CHUNKS)
        new_dw3, new_db3, new_total = (), (), ()
        for channel in tl.static_range(C):
            pixel = tl.zeros([BLOCK_L, 1], tl.float32)
            w3 = ()
            for c in tl.static_range(CHUNKS):
                offs_d = c * BLOCK_D + tl.arange(0, BLOCK_D)
                w = tl.load(w3_ptr + channel * OUT + offs_d, mask=offs_d < OUT, other=0.0).to(tl.float32)[None, :]
                w3 = w3 + (w,)
                pixel += tl.sum(hidden[c] * w, 1, keep_dims=True)
            target = tl.load(target_ptr + place + channel * channel_stride, mask=mask_l, other=0.0).to(tl.float32)
            error = pixel + tl.load(b3_ptr + channel).to(tl.float32) - target
            weighted = error * weight
            dpixel = weighted * scale
            new_db3 = new_db3 + (db3[channel] + dpixel,)
            new_total = new_total + (total[channel] + weighted * error,)
            out = ()
            for c in tl.static_range(CHUNKS):
                out = out + (dhidden[c] + dpixel * w3[c],)
                new_dw3 = new_dw3 + (dw3[channel * CHUNKS + c] + dpixel * hidden[c],)
            dhidden = out
        dw3, db3, total = new_dw3, new_db3, new_total
        out = ()
        for c in tl.static_range(CHUNKS):
            out = out + (dhidden[c] * du[c],)
        store_rows(u2_ptr + start * DU, DU, out, start + tl.arange(0, BLOCK_L) < rows, DU, BLOCK_L, BLOCK_D)
    for channel in tl.static_range(C):
        at = sums_ptr + (part * C + channel) * (OUT + 2)
        for c in tl.static_range(CHUNKS):
            offs_d = c * BLOCK_D + tl.arange(0, BLOCK_D)
            tl.store(at + offs_d, tl.sum(dw3[channel * CHUNKS + c], 0), mask=offs_d < OUT)
        tl.store(at + OUT, tl.sum(tl.sum(db3[channel], 1), 0))
        tl.store(at + OUT + 1, tl.sum(tl.sum(total[channel], 1), 0))


def serves(head: OutputHead, D: int) -> bool:
    """Whether the kernel takes this head."""
    if len(head.weights) != 3 or len(head.weights[2]) > CHANNELS:
        return False
    return max(D, len(head.weights[1])) <= launch.WIDTH_CLASSES[-1]


class HeadPacks:
    """The head's weights as its kernels load them."""

    def __init__(self, head: OutputHead, dtype: torch.dtype) -> None:
        (w1, w2, w3), (b1, b2, b3) = head.weights, head.biases
        self.head = head
        self.first = FeedForwardPacks(FeedForward(head.norm_weight, head.norm_bias, w1, b1, w2, b2), dtype)
        self.b2 = b2.float().contiguous()
        like, width = torch.empty(0, device=w1.device, dtype=dtype), max(w1.shape[1], w2.shape[0])
        self.forward = launch.select(_output_head_fwd_kernel, like, width)
        self.turn = launch.select(_output_head_loss_kernel, like, width)
        self.w3, self.b3 = w3.contiguous(), b3.contiguous()  # as they are: nothing is rounded to the compute dtype


class HeadLoss(NamedTuple):
    squares: Tensor  # Σ weight · error², fp32 0-d
    dx: Tensor  # [N, above D], as wide as ``pitch``
    grads: OutputHead | None  # in fp32


def head_loss(
    x: Tensor, packs: HeadPacks, target: Tensor, weight: Tensor | None, scale: Tensor, need: bool, eps: float
) -> HeadLoss:
    """x [N,D], target [B,L,C] with B·L = N, however it lies, weight [B,L] fp32 or None, scale fp32 0-d.

    scale: the gradient's factor on error · weight. need: whether the head's weights need gradients.
    """
    rows, D = x.shape
    OUT, config = len(packs.head.weights[1]), packs.forward
    units = packs.first.feed_forward(config)
    kept = Kept(
        x.new_empty(rows, pitch(D + 1)), x.new_empty(rows, dtype=torch.float32), x.new_empty(rows, units.columns),
        x.new_empty(rows if need else 0, units.columns + 8),
    )  # fmt: skip
    u2 = x.new_empty(rows, pitch(OUT))
    args = {
        "x_ptr": x, "w1_ptr": units.w_in, "b1_ptr": units.b_in, "w2_ptr": units.w_out, "b2_ptr": packs.b2,
        "n_ptr": kept.n, "rstd_ptr": kept.rstd, "slope_ptr": kept.slope, "h_ptr": kept.h, "u2_ptr": u2,
        "rows": rows, "eps": eps,
    }  # fmt: skip
    values = {
        "D": D, "OUT": OUT, "DU": u2.shape[1], "UNITS": units.columns, "KEEP_H": need,
        "PRECISION": launch.precision(x.dtype), "BLOCK_L": config.block_l, "BLOCK_C": units.block,
        "BLOCK_D": config.block_d,
    }  # fmt: skip
    launch.run(_output_head_fwd_kernel, (triton.cdiv(rows, config.block_l),), args, values, config)
    total = _turn(u2, packs, target, weight, scale)
    dx, first = feed_forward_backward(u2, kept, packs.first, need, residual=False)
    squares = total[:, OUT + 1].sum()
    if first is None:
        return HeadLoss(squares, dx, None)
    weights, biases = [first.w1, first.w2, total[:, :OUT]], [first.b1, first.b2, total[:, OUT]]
    return HeadLoss(squares, dx, OutputHead(first.norm_weight, first.norm_bias, weights, biases))


def _turn(u2: Tensor, packs: HeadPacks, target: Tensor, weight: Tensor | None, scale: Tensor) -> Tensor:
    """u2 becomes du2 -> the kernel's sums over all rows, [C, OUT + 2]."""
    rows, (_, L, C), config, OUT = len(u2), target.shape, packs.turn, packs.w3.shape[1]
    parts, blocks = launch.split(rows, config.block_l, 1, PROGRAMS)
    sums = u2.new_empty(parts, C, OUT + 2, dtype=torch.float32)
    args = {
        "u2_ptr": u2, "w3_ptr": packs.w3, "b3_ptr": packs.b3, "target_ptr": target,
        "weight_ptr": scale if weight is None else weight.contiguous(), "scale_ptr": scale, "sums_ptr": sums,
        "rows": rows, "blocks": blocks, "L": L, "image_stride": target.stride(0),
        "pixel_stride": target.stride(1), "channel_stride": target.stride(2),
    }  # fmt: skip
    values = {
        "OUT": OUT, "DU": u2.shape[1], "C": C, "WEIGHTED": weight is not None, "BLOCK_L": config.block_l,
        "BLOCK_D": config.block_d,
    }  # fmt: skip
    launch.run(_output_head_loss_kernel, (parts,), args, values, config)
    return sums.sum(0)
