"""Parameters and small layers that the encoder and the decoder share."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn as nn
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastslots.ops.reference import FeedForward


class FeedForwardLayer(nn.Module):
    """Parameters of a pre-norm feed-forward block, handed to the ops as a tuple."""

    def __init__(self, width: int, expansion: int = 2):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.w1 = nn.Linear(width, expansion * width)
        self.w2 = nn.Linear(expansion * width, width)

    def weights(self) -> FeedForward:
        w1, w2 = self.w1, self.w2
        return FeedForward(self.norm.weight, self.norm.bias, w1.weight, w1.bias, w2.weight, w2.bias)


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with GELU between them."""
    layers: list[nn.Module] = []
    for i, (fan_in, fan_out) in enumerate(pairwise(widths)):
        layers += [nn.GELU()] * (i > 0) + [nn.Linear(fan_in, fan_out)]
    return nn.Sequential(*layers)


def row_by_row(module: nn.Module, x: Tensor, rows: int) -> Tensor:
    """``module(x)`` for a module that treats rows of x [n, ...] alike, ``rows`` of them at a time.

    Only the output is kept: backward computes a part again, so that memory holds the activations of one part. Gradients
    reach the module's parameters, not x. (torch.utils.checkpoint would do, but its first call imports the compiler:
    seconds, and 140 MB.)
    """
    return _RowByRow.apply(module, x, rows, *(p for p in module.parameters() if p.requires_grad))


class _RowByRow(torch.autograd.Function):
    @staticmethod
    def forward(ctx, module: nn.Module, x: Tensor, rows: int, *parameters: Tensor):
        ctx.module, ctx.rows = module, rows
        kind = x.device.type
        ctx.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        ctx.save_for_backward(x, *parameters)  # which notices parameters that have changed since
        parts = x.split(rows)
        first = module(parts[0])
        out = first.new_empty(len(x), *first.shape[1:])
        out[:rows] = first
        for i, part in enumerate(parts[1:], 1):
            out[i * rows : i * rows + len(part)] = module(part)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor):
        x, *parameters = ctx.saved_tensors
        sums = [torch.zeros_like(p) for p in parameters]
        for part, d in zip(x.split(ctx.rows), dout.split(ctx.rows), strict=True):
            with torch.enable_grad(), torch.autocast(*ctx.autocast):
                y = ctx.module(part.detach())
            for total, grad in zip(sums, torch.autograd.grad(y, parameters, d), strict=True):
                total += grad
        return None, None, None, *sums


@torch.no_grad()
def xavier_(transformer: nn.Module) -> None:
    """The published initialisation: every matrix inside a Transformer Xavier-uniform, its biases PyTorch's default."""
    for parameter in transformer.parameters():
        if parameter.ndim == 2:
            nn.init.xavier_uniform_(parameter)


def grid(side: int) -> Tensor:
    """Coordinates (y, x) in [0, 1] of a square grid, row by row: [side², 2] fp32."""
    axis = torch.linspace(0, 1, side)
    return torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
