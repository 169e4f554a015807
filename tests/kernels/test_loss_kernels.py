"""The kernels of the decoder's loss alone against float64: the head with its loss, and the penalty of slot maps."""

from __future__ import annotations

import pytest
import torch

from fastslots.kernels.gpu.loss import head as head_kernels
from fastslots.kernels.gpu.loss.head import HeadPacks, head_loss, serves
from fastslots.kernels.gpu.loss.slot_map import slot_map_loss
from fastslots.ops.reference import interaction_penalty
from fastslots.ops.reference import output_head as reference_head
from fastslots.records import OutputHead

DTYPES = {"fp32": (torch.float32, 2.0**-18), "bf16": (torch.bfloat16, 2.0**-5), "fp16": (torch.float16, 2.0**-8)}
"""And the largest error of one number as a share of the largest, through six products and two roundings of each row."""


def randn(*shape, seed=0, mean=0.0):
    return mean + torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(name, got, want, bound):
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    assert got.shape == want.shape, name
    assert (got - want).abs().max() <= bound * max(1.0, want.abs().max()), (name, (got - want).abs().max())


def a_head(widths, dtype, device):
    maps = list(zip(widths[1:], widths[:-1], strict=True))
    weights = [(into**-0.5 * randn(out, into, seed=3 + i)).to(device) for i, (out, into) in enumerate(maps)]
    biases = [randn(out, seed=6 + i).to(device) for i, (out, _) in enumerate(maps)]
    weights, biases = ([t.to(dtype).float() for t in tensors] for tensors in (weights, biases))
    return OutputHead(
        1 + 0.1 * randn(widths[0], seed=9).to(device), randn(widths[0], seed=10).to(device), weights, biases
    )


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("widths", [(70, 90, 45, 3), (64, 64, 64, 1), (180, 180, 180, 3), (5, 130, 8, 4)], ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_head_with_its_loss_against_float64(widths, weighted, kind, device, monkeypatch):
    dtype, bound = DTYPES[kind]
    monkeypatch.setattr(head_kernels, "PROGRAMS", 3)  # several tiles a program, the last ones beyond the rows
    (B, L), D, C = (3, 37), widths[0], widths[-1]
    head, x = a_head(widths, dtype, device), randn(B * L, D, mean=2).to(device, dtype)
    target = randn(B, C, L, seed=1).to(device).transpose(1, 2)  # as images lie
    weight = (0.5 + randn(B, L, seed=2).abs()).to(device) if weighted else None
    scale = torch.tensor(0.3, device=device)
    leaves = [t.double().requires_grad_() for t in (x, *head[:2], *head.weights, *head.biases)]
    wide = OutputHead(leaves[1], leaves[2], leaves[3:6], leaves[6:])
    error = reference_head(leaves[0], wide, 1e-5).view(B, L, C) - target.double()
    squares = (error.square() * (1 if weight is None else weight[..., None])).sum()
    (squares * scale.double() / 2).backward()
    found = head_loss(x, HeadPacks(head, dtype), target, weight, scale, True, 1e-5)
    again = head_loss(x, HeadPacks(head, dtype), target, weight, scale, True, 1e-5)
    frozen = head_loss(x, HeadPacks(head, dtype), target, weight, scale, False, 1e-5)
    assert frozen.grads is None and torch.equal(frozen.dx, found.dx) and torch.equal(frozen.squares, found.squares)
    close("squares", found.squares, squares, bound * float(squares) / 8)
    assert not found.dx[:, D:].any()
    grads = found.grads
    names = ("dx", "norm_weight", "norm_bias", "w1", "w2", "w3", "b1", "b2", "b3")
    got = (found.dx[:, :D], *grads[:2], *grads.weights, *grads.biases)
    for name, a, leaf in zip(names, got, leaves, strict=True):
        assert name == "dx" or a.dtype == torch.float32
        close(name, a, leaf.grad, bound)
    for a, b in zip(got, (again.dx[:, :D], *again.grads[:2], *again.grads.weights, *again.grads.biases), strict=True):
        assert torch.equal(a, b)


def test_heads_that_the_kernels_leave_to_others(device):
    assert serves(a_head((70, 20, 20, 3), torch.float32, device), 70)
    assert not serves(a_head((70, 20, 3), torch.float32, device), 70)  # one hidden layer
    assert not serves(a_head((70, 20, 20, 5), torch.float32, device), 70)  # more channels
    assert not serves(a_head((70, 20, 500, 3), torch.float32, device), 70)  # wider rows than a tile holds


@pytest.mark.parametrize("layers, K", [(1, 1), (2, 7), (3, 12)])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_penalty_of_slot_maps_against_float64(layers, K, weighted, device):
    B, L = 2, 301
    maps = torch.softmax(3 * randn(layers, B, L, K), -1).to(device)
    weight = (0.5 + randn(B, L, seed=2).abs()).to(device) if weighted else None
    factor = torch.tensor(0.7, device=device)
    leaf = maps.double().requires_grad_()
    if weight is None:  # the public definition is a mean over layers, images and pixels
        want = interaction_penalty(leaf.mean(0)) * (B * L * layers**2)
    else:
        w = leaf.sum(0)
        want = (weight * (w.sum(-1) ** 2 - w.square().sum(-1)) / 2).sum()
    want.backward()
    pairs, dmap = slot_map_loss(maps, weight, factor)
    close("pairs", pairs, want, 1e-5 * max(1.0, float(want)))
    close("dmap", dmap, 0.7 * leaf.grad[0], 1e-5)
    alone, none = slot_map_loss(maps, weight, None)
    assert torch.equal(alone, pairs) and not len(none)


def test_pairs_do_not_cancel(device):
    """One slot that has all but 1e-9: as a difference of sums the pair would be 0, or 6e-8."""
    maps = torch.tensor([1.0, 1e-9], device=device).expand(1, 1, 8, 2).contiguous()
    pairs, _ = slot_map_loss(maps, None, None)
    torch.testing.assert_close(pairs.cpu(), torch.tensor(8e-9), rtol=1e-6, atol=0)
