"""The encoder's layers as a GPU runs them: the same values and gradients as the modules, and fewer operators."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastslots.models import SlotVAEConfig
from fastslots.models.encoder import Encoder, _of_layer
from fastslots.ops.parts.query_layers import Maps, encode_queries


@pytest.fixture
def encoder(device):
    torch.manual_seed(0)
    config = SlotVAEConfig.preset("sprites-mini", encoder_layers=3, encoder_width=24, encoder_heads=3)
    encoder = Encoder(config).double().to(device)
    for p in encoder.parameters():  # biases and norms too: their initial values would hide a missing term
        torch.nn.init.normal_(p, std=0.2)
    return encoder


def layers_of(encoder):
    return [t for layer in encoder.transformer for t in _of_layer(layer)]


def test_layers_are_the_modules_gradients_too(encoder, device):
    width = encoder.norm.normalized_shape[0]
    queries = torch.randn(1, 4, width, dtype=torch.float64, device=device, requires_grad=True)
    tokens = torch.randn(2, 19, width, dtype=torch.float64, device=device, requires_grad=True)
    wanted = queries.expand(2, -1, -1)
    for layer in encoder.transformer:
        wanted = layer(wanted, tokens)
    leaves = [queries, tokens, *layers_of(encoder)]
    weight = torch.randn(2, 4, width, dtype=torch.float64, device=device)
    expected = torch.autograd.grad((wanted * weight).sum(), leaves)
    got = encode_queries(queries, tokens, layers_of(encoder), 3, encoder.norm.eps)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    for _ in range(2):  # a second backward finds its own rows
        found = torch.autograd.grad((got * weight).sum(), leaves, retain_graph=True)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


class Counted(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_gradients_of_all_layers_weights_are_one_product(device):
    weights, biases = (
        [torch.randn(*shape, device=device, requires_grad=True) for _ in range(5)] for shape in ((6, 4), (6,))
    )
    x = torch.randn(7, 4, device=device)
    maps = Maps(weights, biases)
    total = sum(maps(i, x * (i + 1)).sin().sum() for i in range(5))
    with Counted() as counted:
        grads = torch.autograd.grad(total, [*weights, *biases])
    assert counted.names.count("bmm") == 1 and counted.names.count("sum") == 1 and "mm" not in counted.names
    plain = sum(torch.nn.functional.linear(x * (i + 1), weights[i], biases[i]).sin().sum() for i in range(5))
    for a, b in zip(grads, torch.autograd.grad(plain, [*weights, *biases]), strict=True):
        torch.testing.assert_close(a, b)


def test_maps_of_frozen_weights_and_of_layers_that_nothing_reads(device):
    weights, biases = ([torch.randn(*shape, device=device) for _ in range(3)] for shape in ((4, 4), (4,)))
    x = torch.randn(2, 4, device=device, requires_grad=True)
    maps = Maps(weights, biases)
    (dx,) = torch.autograd.grad(maps(1, x).sum(), x)
    torch.testing.assert_close(dx, weights[1].sum(0).expand(2, 4))
    assert not maps._rows  # nothing is kept for gradients that nobody needs
    weights = [w.requires_grad_() for w in weights]
    maps = Maps(weights, biases)
    maps(0, x.detach())
    grads = torch.autograd.grad(maps(2, x).sum(), weights, allow_unused=True)
    assert grads[0] is None and grads[1] is None
    torch.testing.assert_close(grads[2], x.detach().sum(0).expand(4, 4))
