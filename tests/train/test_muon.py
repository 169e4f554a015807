"""Muon against its definition and against torch's own, which iterates in bf16."""

from __future__ import annotations

import pytest
import torch

from fastslots.train.muon import Muon, orthogonalise


@pytest.mark.parametrize("shape", [(3, 6, 10), (2, 10, 6), (1, 5, 5), (2, 1, 4)])
def test_singular_values_become_one(shape):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    y = orthogonalise(x)
    values = torch.linalg.svdvals(y)
    assert 0.4 < values.min() and values.max() < 1.3
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    cosine = torch.nn.functional.cosine_similarity(y.flatten(1), (u @ v).flatten(1))
    assert cosine.min() > 0.95


def test_zero_gradient_stays_zero():
    assert not orthogonalise(torch.zeros(2, 3, 4)).any()


def test_steps_equal_those_of_torch_within_its_bf16():
    g = torch.Generator().manual_seed(1)
    shapes = [(6, 10), (6, 10), (10, 6), (8, 8)]
    ours = [torch.randn(*shape, generator=g).requires_grad_() for shape in shapes]
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    start = [p.detach().clone() for p in ours]
    mine = Muon(ours, lr=0.1, weight_decay=0.1)
    reference = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(*a.shape, generator=g)
            b.grad = a.grad.clone()
        mine.step()
        reference.step()
    for a, b, s in zip(ours, theirs, start, strict=True):
        assert (a - b).norm() < 0.05 * (b - s).norm()
    with pytest.raises(ValueError, match="matrices alone"):
        Muon([torch.zeros(3)])
