"""Muon against its definition and against torch's own, which iterates in bf16."""

from __future__ import annotations

import pytest
import torch

from fastslots.train import muon
from fastslots.train.muon import Muon, orthogonalise
from fastslots.train.optim import clip


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


def test_the_kernel_equals_its_definition(monkeypatch):
    """In one call for all matrices, with the same bits for any number of threads; the state keeps its name."""
    pytest.importorskip("fastslots.kernels.cpu_backend", reason="this installation has no C++ module")
    shapes = [(6, 10), (64, 24), (128, 64), (5, 5), (1, 4), (33, 70), (6, 10)]
    before, results = torch.get_num_threads(), []
    for backend, threads in (("reference", 1), ("cpu", 1), ("cpu", 2), ("cpu", 3)):
        g = torch.Generator().manual_seed(1)
        params = [torch.randn(*shape, generator=g).requires_grad_() for shape in shapes]
        optimizer = Muon(params, lr=0.1, weight_decay=0.1)
        torch.set_num_threads(threads)
        if backend == "reference":
            monkeypatch.setattr(muon.backends, "select", lambda *_: "reference")
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(*p.shape, generator=g)
            optimizer.step()
        monkeypatch.undo()
        assert all(list(optimizer.state[p]) == ["momentum_buffer"] for p in params)
        results.append([*(p.detach() for p in params), *(optimizer.state[p]["momentum_buffer"] for p in params)])
    torch.set_num_threads(before)
    for a, b in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4)
    for other in results[2:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[1], strict=True))


def test_a_step_is_seen_by_autograd():
    """A graph made before it must not be differentiated with the weights of after it."""
    p = torch.randn(4, 6, requires_grad=True)
    loss = (p**2).sum()
    p.grad = torch.ones_like(p)
    Muon([p]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("most", [0.0, 1.0, 1e9])
def test_clipping_equals_that_of_torch(most):
    ours, theirs = ([torch.zeros(n, 3).requires_grad_() for n in (5, 70)] for _ in range(2))
    for a, b in zip(ours, theirs, strict=True):
        a.grad = torch.randn(a.shape, generator=torch.Generator().manual_seed(len(a)))
        b.grad = a.grad.clone()
    torch.testing.assert_close(clip(ours, most), torch.nn.utils.clip_grad_norm_(theirs, most or float("inf")))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)
