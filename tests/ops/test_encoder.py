"""The encoder as one operator: values and gradients against its PyTorch definition in float64 on each instruction
set of this machine, the same bits for any number of threads, and the operator's contract."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from fastslots import ops
from fastslots.config.model import SlotVAEConfig
from fastslots.models.encoder import Encoder, operator_inputs
from fastslots.ops import encoder as operator
from fastslots.testing import assert_close

ABSENT = "this installation has no C++ module"
cpu_backend = pytest.importorskip("fastslots.kernels.cpu_backend", reason=ABSENT, exc_type=ImportError)

SETS = [*((isa, torch.float32) for isa in cpu_backend.ISAS), ("portable", torch.float64)]
BOUNDS = {torch.float32: 2e-4, torch.float64: 1e-11}
"""Relative to the RMS of what is expected. The worst seen in fp32 is 5e-5; eager PyTorch is off by 4e-5 there."""
ODD = dict(resolution=12, slot_dim=5, num_slots=3, cnn_channels=6, encoder_width=12, cnn_stride=2, encoder_layers=1)
CASES = {
    "sprites-mini": ("sprites-mini", {}),
    "clevr6": ("clevr6", dict(resolution=20, encoder_layers=2)),
    "odd widths": ("sprites-mini", ODD),
    "no output layer": ("sprites", dict(resolution=12, encoder_layers=1)),
    "plain autoencoder": ("sprites", dict(resolution=8, encoder_layers=1, beta=0.0)),
    "Winograd": ("sprites", dict(resolution=17, encoder_layers=1, cnn_kernel=3)),
    "kernels of 3": ("sprites-mini", {**ODD, "cnn_kernel": 3, "cnn_stride": 4}),
    "features": ("clevrtex", dict(resolution=4, channels=20, encoder_layers=1)),
    "seeded": ("sprites-mini", dict(queries="seeded", encoder_layers=1, cnn_stride=4)),
    "seeded by a surface": ("sprites-mini", dict(queries="seeded-surface", encoder_layers=1, cnn_stride=4)),
    "sampled": ("sprites-mini", dict(queries="sampled", encoder_layers=1)),
}


@pytest.fixture(autouse=True)
def best_isa_and_threads_as_they_were():
    before = torch.get_num_threads()
    yield
    cpu_backend.set_isa(None)
    torch.set_num_threads(before)


def encoder_of(case: str, dtype=torch.float64) -> Encoder:
    preset, overrides = CASES[case]
    torch.manual_seed(0)
    encoder = Encoder(SlotVAEConfig.preset(preset, **overrides))
    for parameter in encoder.parameters():
        if parameter.ndim == 1:  # biases of 0 and norms of 1 would hide a gradient at the wrong place
            nn.init.normal_(parameter, 0.5, 0.3)
    return encoder.to(dtype)


def images_of(case: str, batch: int = 3, dtype=torch.float64) -> torch.Tensor:
    preset, overrides = CASES[case]
    config = SlotVAEConfig.preset(preset, **overrides)
    generator = torch.Generator().manual_seed(1)
    return torch.rand(batch, config.channels, config.resolution, config.resolution, generator=generator).to(dtype)


def values_and_gradients(encoder: Encoder, images: torch.Tensor, backend: str = "cpu") -> list[torch.Tensor]:
    torch.manual_seed(2)  # of sampled queries
    out = encoder(images, backend=backend)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, list(encoder.parameters()), cotangent)]


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_against_float64(case, keep, monkeypatch):
    """keep: whether the forward leaves its activations, or the backward makes them again."""
    if not keep:
        monkeypatch.setattr(operator, "KEPT_BYTES", 0)
    if case == "sampled":  # drawn in the dtype of the weights: others in fp32 and fp64
        encoder_of(case).train(False)
    exact = values_and_gradients(encoder_of(case).train(case != "sampled"), images_of(case), "reference")
    for isa, dtype in SETS:
        cpu_backend.set_isa(isa)
        encoder = encoder_of(case, dtype).train(case != "sampled")
        got = values_and_gradients(encoder, images_of(case, dtype=dtype))
        for a, b, name in zip(got, exact, ["out", *dict(encoder.named_parameters())], strict=True):
            assert a.dtype == dtype
            if name.endswith(("to_kv.bias", "to_qkv.bias")):  # their keys' part is an exact 0
                assert torch.equal(a == 0, b == 0)
            assert_close(a, b, BOUNDS[dtype], f"{isa} {dtype} {name}")


@pytest.mark.parametrize("case", ["sprites-mini", "sampled"])
@pytest.mark.parametrize("isa", cpu_backend.ISAS)
@pytest.mark.parametrize("keep", [True, False])
def test_same_bits_for_any_number_of_threads(isa, keep, case, monkeypatch):
    if not keep:
        monkeypatch.setattr(operator, "KEPT_BYTES", 0)
    cpu_backend.set_isa(isa)
    encoder, images = encoder_of(case, torch.float32), images_of(case, 26, torch.float32)
    torch.set_num_threads(1)
    first = values_and_gradients(encoder, images)
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(values_and_gradients(encoder, images), first, strict=True))


def test_several_python_threads_at_once():
    encoder, images = encoder_of("seeded", torch.float32), images_of("seeded", 5, torch.float32)
    first, results = values_and_gradients(encoder, images), {}

    def call(number: int) -> None:
        results[number] = [values_and_gradients(encoder, images) for _ in range(5)]

    callers = [threading.Thread(target=call, args=(number,)) for number in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    for result in (result for several in results.values() for result in several):
        assert all(torch.equal(a, b) for a, b in zip(result, first, strict=True))
    assert len(results) == 3


@pytest.mark.parametrize("case", ["odd widths", "seeded"])
def test_no_images(case):
    got = values_and_gradients(encoder_of(case), images_of(case, 0))
    assert got[0].shape[0] == 0 and all(not grad.any() for grad in got[1:])


def test_what_needs_no_gradient_and_sixteen_bits():
    encoder, images = encoder_of("odd widths", torch.bfloat16), images_of("odd widths", 2, torch.bfloat16)
    exact = values_and_gradients(encoder_of("odd widths"), images.double(), "reference")
    got = values_and_gradients(encoder, images)
    assert got[0].dtype == torch.bfloat16
    assert_close(got[0], exact[0], 0.1)
    with torch.no_grad():
        assert torch.equal(encoder(images, backend="cpu"), got[0])


def arguments(case: str, keep: bool) -> tuple:
    i = operator_inputs(encoder_of(case), images_of(case, 2), None)
    weights = [w.detach().requires_grad_() for w in i.weights]
    return (
        i.images,
        i.queries.detach().requires_grad_(),
        i.grid,
        i.picks,
        weights,
        i.strides,
        i.heads,
        i.eps,
        keep,
        "cpu",
    )


@pytest.mark.parametrize("case, keep", [("odd widths", True), ("seeded", False), ("features", True)])
def test_the_operator_is_registered_right(case, keep):
    given = arguments(case, keep)
    # Not test_aot_dispatch_dynamic: the memory that is kept has a size that follows from the sizes of the images.
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.fastslots.encoder.default, given, test_utils=utils)
    out, saved = torch.ops.fastslots.encoder.default(*given)
    back = (torch.randn_like(out), saved.detach(), *given[:8], "cpu")
    torch.library.opcheck(torch.ops.fastslots.encoder_backward.default, back, test_utils=utils[::2])


def test_gradients_by_differences():
    given = arguments("odd widths", True)
    queries, first, last = given[1], given[4][0], given[4][-2]

    def call(queries, first, last):
        weights = [first, *given[4][1:-2], last, given[4][-1]]
        return torch.ops.fastslots.encoder.default(given[0], queries, *given[2:4], weights, *given[5:])[0]

    assert torch.autograd.gradcheck(call, (queries, first, last), fast_mode=True)


def test_every_mode_of_torch():
    encoder, images = encoder_of("odd widths"), images_of("odd widths", 2)
    compiled = torch.compile(lambda x: encoder(x).sin().sum(), fullgraph=True, backend="aot_eager")
    parameters = list(encoder.parameters())
    eager = torch.autograd.grad(encoder(images).sin().sum(), parameters)
    for a, b in zip(torch.autograd.grad(compiled(images), parameters), eager, strict=True):
        torch.testing.assert_close(a, b)
    _, tangent = torch.func.jvp(encoder, (images,), (torch.ones_like(images),))
    assert tangent.abs().max() > 0
    needed = images.clone().requires_grad_()
    (dimages,) = torch.autograd.grad(encoder(needed).sum(), needed)
    assert dimages.abs().max() > 0 and encoder.serving_backend(needed) == "reference"
    (grad,) = torch.autograd.grad(encoder(images).square().sum(), encoder.queries, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()


def test_who_serves_and_why_not():
    encoder, images = encoder_of("odd widths", torch.float32), images_of("odd widths", 2, torch.float32)
    assert encoder.serving_backend(images) == ops.explain(images, op="encoder").backend == "cpu"
    assert "need a gradient" in ops.explain(images.requires_grad_(), op="encoder").reasons["cpu"]
    assert "fp64" in ops.explain(images, encoder.queries.double(), op="encoder").reasons["cpu"]


class Wider(nn.Sequential):
    pass


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda e: e.cnn.insert(2, nn.BatchNorm2d(6)), "BatchNorm2d, no convolution"),
        (lambda e: e.cnn.append(nn.Dropout2d(0.1)), "Dropout2d, no convolution|ends without GELU"),
        (lambda e: setattr(e.cnn[1], "approximate", "tanh"), "not the exact GELU"),
        (lambda e: setattr(e.cnn[2], "padding_mode", "reflect"), "another padding"),
        (lambda e: setattr(e.token_mlp, "1", nn.ReLU()), "token MLP"),
        (lambda e: e.transformer[0].ff.register_forward_hook(lambda *_: None), "hook"),
        (lambda e: e.transformer[0].ff.register_full_backward_pre_hook(lambda *_: None), "hook"),
        (lambda e: setattr(e, "output", nn.Sequential(e.output)), "output layer"),
        (lambda e: e.transformer.append(nn.Identity()), "other layers"),
    ],
)
def test_an_encoder_that_somebody_changed_goes_through_pytorch(change, words):
    encoder, images = encoder_of("odd widths"), images_of("odd widths", 2)
    change(encoder)
    assert encoder.serving_backend(images) == "reference"
    with pytest.raises(ValueError, match=words):
        encoder(images, backend="cpu")


def test_wrong_arrays_are_named():
    given = list(arguments("seeded", False))
    call = torch.ops.fastslots.encoder.default
    with pytest.raises(ValueError, match=r"picks must lie in 0\.\.63"):
        call(*given[:3], given[3] + 64, *given[4:])
    with pytest.raises(ValueError, match="convolution has shape"):
        call(*given[:4], [given[4][1], *given[4][1:]], *given[5:])
    with pytest.raises(ValueError, match="grid has shape"):
        call(*given[:2], given[2][:9], *given[3:])
    with pytest.raises(ValueError, match="weights: expected"):
        call(*given[:4], given[4][:-3], *given[5:])
