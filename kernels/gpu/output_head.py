"""The output head on a GPU: a norm and a few products, which are cuBLAS's, differentiated by hand.

cuBLAS has its fast kernels for operands whose rows are multiples of 16 bytes, and rows of 180 numbers, or pixels of 3,
are none in 16 bits. So all that lies between the norm and the pixels has columns in the padding, which are zeros
throughout: those of the norm and of the weights are, and GELU(0 + 0) = 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastslots.records import OutputHead

from ._pack import matmul_fp32, pad_rows, pitch, round_up
from .passes.bias_gelu import bias_gelu_bwd, bias_gelu_fwd
from .passes.row_norm import row_norm_bwd, row_norm_fwd


class PackedHead(NamedTuple):
    """The head's parameters as its products take them."""

    norm_weight: Tensor  # [D]
    norm_bias: Tensor  # [D]
    weights: list[Tensor]  # each [out, in] in the compute dtype, padded
    biases: list[Tensor]  # each [out], padded; the last one in the compute dtype
    shapes: list[tuple[int, int]]  # of the weights without padding


class SavedHead(NamedTuple):
    """What the head's forward leaves for its backward."""

    x: Tensor  # [N, D]
    mean: Tensor  # [N] of each row, fp32
    rstd: Tensor  # [N], fp32
    inputs: list[Tensor]  # of each linear map, padded
    sums: list[Tensor]  # what each but the last gives, before its bias and GELU


def padded(width: int, dtype: torch.dtype) -> int:
    """Columns of a row of ``width``: in 16 bits whole chunks of 64, and 16 bytes for a few; in fp32 as they are."""
    return width if dtype == torch.float32 else round_up(width, 64 if width > 64 else 8)


def pack_head(head: OutputHead, dtype: torch.dtype) -> PackedHead:
    shapes = [(w.shape[0], w.shape[1]) for w in head.weights]
    wide = [(padded(out, dtype), padded(width, dtype)) for out, width in shapes]
    weights = [
        w.to(dtype) if s == p else pad_rows(w, *p, dtype) for w, s, p in zip(head.weights, shapes, wide, strict=True)
    ]
    biases = [_pad(b, out) for b, (out, _) in zip(head.biases, wide, strict=True)]
    biases[-1] = biases[-1].to(dtype)
    return PackedHead(head.norm_weight, head.norm_bias, weights, biases, shapes)


def _pad(t: Tensor, columns: int) -> Tensor:
    return t if t.shape[-1] == columns else F.pad(t, (0, columns - t.shape[-1]))


def output_head_fwd(x: Tensor, head: PackedHead, eps: float) -> tuple[Tensor, SavedHead]:
    """x [N, D] -> pixels [N, C] and what the backward needs."""
    normed, mean, rstd = row_norm_fwd(x, head.norm_weight, head.norm_bias, eps, head.weights[0].shape[1])
    inputs: list[Tensor] = [normed]
    sums: list[Tensor] = []
    for weight, bias in zip(head.weights[:-1], head.biases[:-1], strict=True):
        sums.append(inputs[-1] @ weight.t())
        inputs.append(bias_gelu_fwd(sums[-1], bias))
    pixels = torch.addmm(head.biases[-1], inputs[-1], head.weights[-1].t())
    return pixels[:, : head.shapes[-1][0]], SavedHead(x, mean, rstd, inputs, sums)


def output_head_bwd(
    dpixels: Tensor, head: PackedHead, saved: SavedHead, need: bool
) -> tuple[Tensor, OutputHead | None]:
    """-> dx, as wide as ``pitch``, and, where there is need, the head's gradients in fp32. Empties ``saved``."""
    x, mean, rstd, inputs, sums = saved
    dweights: list[Tensor] = []
    dbiases: list[Tensor] = [dpixels.sum(0, dtype=torch.float32)] if need else []
    d = _pad(dpixels, len(head.weights[-1]))
    for i in reversed(range(len(head.weights))):
        out, width = head.shapes[i]
        if need:
            dweights.insert(0, matmul_fp32(d.t(), inputs[i])[:out, :width].contiguous())
        inputs.pop()
        d = d @ head.weights[i]
        if i:
            d, dbias = bias_gelu_bwd(d, sums.pop(), head.biases[i - 1])
            if need:
                dbiases.insert(0, dbias[: head.shapes[i - 1][0]])
    dx, of_norm = row_norm_bwd(d, x, head.norm_weight, mean, rstd, affine=True, dx_pitch=pitch(x.shape[-1]))
    return dx, OutputHead(of_norm[0], of_norm[1], dweights, dbiases) if need else None
