"""The output head on a GPU: a norm and a few products 180 wide, which are cuBLAS's, differentiated by hand."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastslots.records import OutputHead

from ._pack import matmul_fp32


class SavedHead(NamedTuple):
    """What the head's forward leaves for its backward."""

    x: Tensor  # [N, D]
    mean: Tensor  # [N, 1] of each row
    rstd: Tensor  # [N, 1]
    inputs: list[Tensor]  # of each linear map
    sums: list[Tensor]  # what each gives, before its GELU


def output_head_fwd(x: Tensor, head: OutputHead, eps: float) -> tuple[Tensor, SavedHead]:
    """x [N, D] -> pixels [N, C] and what the backward needs."""
    normed, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], head.norm_weight, head.norm_bias, eps)
    inputs: list[Tensor] = [normed]
    sums: list[Tensor] = []
    for weight, bias in zip(head.weights, head.biases, strict=True):
        if sums:
            inputs.append(torch.nn.functional.gelu(sums[-1]))
        sums.append(torch.addmm(bias, inputs[-1], weight.t()))
    return sums[-1], SavedHead(x, mean, rstd, inputs, sums)


def output_head_bwd(
    dpixels: Tensor, head: OutputHead, saved: SavedHead, need: bool
) -> tuple[Tensor, OutputHead | None]:
    """-> dx and, where there is need, the head's gradients in fp32. Empties ``saved`` as it goes."""
    x, mean, rstd, inputs, sums = saved
    dweights: list[Tensor] = []
    dbiases: list[Tensor] = []
    d = dpixels
    for i in reversed(range(len(head.weights))):
        if need:
            dweights.insert(0, matmul_fp32(d.t(), inputs[i]))
            dbiases.insert(0, d.sum(0, dtype=torch.float32))
        inputs.pop(), sums.pop()
        d = d @ head.weights[i]
        if i:
            d = torch.ops.aten.gelu_backward(d, sums[-1])
    norm, mask = (head.norm_weight, head.norm_bias), [True, need, need]
    dx, dnorm_weight, dnorm_bias = torch.ops.aten.native_layer_norm_backward(
        d, x, x.shape[-1:], mean, rstd, *norm, mask
    )
    return dx, OutputHead(dnorm_weight.float(), dnorm_bias.float(), dweights, dbiases) if need else None
