"""The step that is two calls of a kernel computes what the plain path does, or leaves the step to it."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import MODEL_16
from torch import Tensor, nn

from fastslots.data import SpritesDataset, to_float
from fastslots.kernels import cpu_backend
from fastslots.models import SlotVAE
from fastslots.ops import backends
from fastslots.records import describe
from fastslots.train import TrainConfig
from fastslots.train.draws import draw, normal, step_keys
from fastslots.train.fused import fused_loss, fused_update
from fastslots.train.optim import Optimizers
from fastslots.train.step import Precision, training_step

needs_cpu = pytest.mark.skipif(
    backends.why_not("cpu", describe("train_step", [torch.empty(1)])) is not None, reason="no C++ module"
)
pytestmark = needs_cpu

CASES = {
    "first command": {},
    "learned queries, foreground": dict(queries="learned", pixel_sampling="foreground", cnn_kernel=5, cnn_stride=4),
    "seeds of a surface": dict(queries="seeded-surface", cnn_stride=4),
    "uniform pixels": dict(pixel_sampling="uniform"),
    "autoencoder": dict(beta=0.0),
    "torch's generator": dict(generator="torch"),
    "torch's generator, uniform pixels": dict(generator="torch", pixel_sampling="uniform"),
    "odd widths": dict(
        encoder_width=24, query_width=20, query_hidden=28, slot_width=12, slot_hidden=36, slot_dim=6, decoder_heads=3,
        num_slots=3, output_hidden=(), pixels_per_step=41, cnn_channels=10, decoder_layers=3,
    ),
    "one pixel": dict(pixels_per_step=1),
    "two tiles and a bit": dict(pixels_per_step=200),
}  # fmt: skip


def config_of(**overrides) -> TrainConfig:
    return TrainConfig.preset("sprites-mini", **{**dict(batch_size=5, steps=100, data="sprites"), **overrides})


def images_of(config: TrainConfig) -> Tensor:
    scenes = SpritesDataset(config.batch_size, config.resolution, (2, 3))
    return to_float(torch.from_numpy(scenes.batch(np.arange(config.batch_size))[0]))


@contextmanager
def path(monkeypatch, fused: bool):
    with monkeypatch.context() as patch:
        patch.setenv("FASTSLOTS_FUSED_STEP", "1" if fused else "0")
        yield


class Run:
    """A model in training."""

    def __init__(self, config: TrainConfig, dtype=torch.float32):
        torch.manual_seed(0)
        self.config, self.model = config, SlotVAE(config)
        self.optimizers = Optimizers(self.model, config.optimizer, config.lr, config.weight_decay)
        self.precision = Precision("fp32", torch.device("cpu"))

    def step(self, number: int, images: Tensor) -> dict[str, float]:
        return training_step(self.model, self.optimizers, self.precision, self.config, number, images)


def close(a: Tensor, b: Tensor, bound: float) -> bool:
    return ((a - b).norm() <= bound * (b.norm() + 1e-6)).item()


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_the_plain_path(case, monkeypatch):
    config = replace(config_of(**CASES[case]), grad_clip=0.0)
    images, seen = images_of(config), []
    for fused in (False, True):
        run = Run(config)
        for optimizer, _ in run.optimizers.parts:
            monkeypatch.setattr(optimizer, "step", lambda: None)
        monkeypatch.setattr("fastslots.train.step.fused_update", lambda optimizers: None)
        with path(monkeypatch, fused):
            assert (fused_loss(run.model, config) is not None) is fused
            values = run.step(40, images)
        seen.append((values, {name: p.grad for name, p in run.model.named_parameters()}))
    (plain, grads), (fused_values, fused_grads) = seen
    assert plain.keys() == fused_values.keys()
    for name, value in plain.items():
        assert fused_values[name] == pytest.approx(value, rel=2e-5, abs=1e-6), name
    for name, grad in grads.items():
        assert close(fused_grads[name], grad, 3e-5), name


def test_noise_and_pixels_are_the_very_ones_of_the_plain_path(monkeypatch):
    """What a decoder was asked to decode: with a weight of 0 for all but the pixels drawn, losses agree in every bit of
    the draws or differ by far; here the draws themselves are compared, as the kernel's gradients tell them."""
    config = config_of(pixels_per_step=7)
    images = images_of(config)
    drawn = draw(config, 3, images, start=0)
    assert drawn.pixels.shape == (5, 7)
    run, given = Run(config), Run(config)
    with path(monkeypatch, True):
        fused = fused_loss(run.model, config)
        from fastslots.train.draws import step_draws

        draws = step_draws(config, 3, images, 0)
        terms = fused.run(images, draws, (1.0, 0.1, 2.0))
        grads = [p.grad.clone() for p in run.model.parameters()]
        handed = draws._replace(noise=drawn.noise, pixels=drawn.pixels, pixel_weight=drawn.pixel_weight)
        assert fused_loss(given.model, config).run(images, handed, (1.0, 0.1, 2.0)) == terms
    assert all(torch.equal(a, p.grad) for a, p in zip(grads, given.model.parameters(), strict=True))
    noise = normal(torch.tensor(step_keys(config, 3)[0]), 5, 0, config.num_slots, config.slot_dim)
    assert torch.equal(noise, drawn.noise)


def test_seeds_that_are_handed_in_are_those_that_the_kernel_would_choose():
    config = config_of()
    images, weights = images_of(config), (1.0, 0.1, 2.0)
    from fastslots.train.draws import step_draws

    draws, run = step_draws(config, 2, images, 0), Run(config)
    step, seeds = fused_loss(run.model, config)._step, run.model.encoder.first_queries.tokens_and_looks(images)
    chosen = step.run(images, draws, weights)
    grads = {name: p.grad.clone() for name, p in run.model.named_parameters() if p.grad is not None}
    assert step.run(images, draws, weights, seeds) == chosen
    assert all(torch.equal(grads[name], p.grad) for name, p in run.model.named_parameters() if p.grad is not None)
    picks, seen = seeds
    assert step.run(images, draws, weights, (picks.flip(1), seen.flip(1))) != chosen
    with pytest.raises(ValueError, match=r"picks must lie in 0\.\.255"):
        step.run(images, draws, weights, (picks + 256, seen))
    with pytest.raises(ValueError, match="seen"):
        step.run(images, draws, weights, (picks, seen[:, :, 1:]))
    learned = replace(config, queries="learned")
    with pytest.raises(ValueError, match="picks and seen: both, of a model that is seeded, or neither"):
        fused_loss(Run(learned).model, learned)._step.run(images, draws, weights, seeds)


def test_a_share_of_the_batch_draws_its_own_numbers(monkeypatch):
    config = config_of(batch_size=4)
    images, weights = images_of(config), (1.0, 0.1, 2.0)
    from fastslots.train.draws import step_draws

    with path(monkeypatch, True):
        run = Run(config)
        fused = fused_loss(run.model, config)
        whole = fused.run(images, step_draws(config, 2, images, 0), weights)
        halves = [fused.run(images[i : i + 2], step_draws(config, 2, images[i : i + 2], i), weights) for i in (0, 2)]
    for term, (first, second) in zip(whole, zip(*halves, strict=True), strict=True):
        assert term == pytest.approx((first + second) / 2, rel=1e-6)


@pytest.mark.parametrize("preset", ["sprites-mini", "clevr6-mini"])
@pytest.mark.parametrize("pixels", [0, 64])
def test_weights_are_the_same_bits_on_any_number_of_threads(preset, pixels):
    """Six steps; forty, with kills and resumes between, are ``test_resume.py``'s long form."""
    config = TrainConfig.preset(preset, batch_size=9, steps=40, data="sprites", pixels_per_step=pixels)
    images, ends, threads = images_of(config), [], torch.get_num_threads()
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            run = Run(config)
            for number in range(1, 3 if pixels == 0 else 7):
                run.step(number, images)
            ends.append([p.detach().clone() for p in run.model.parameters()])
    finally:
        torch.set_num_threads(threads)
    for end in ends[1:]:
        assert all(torch.equal(a, b) for a, b in zip(end, ends[0], strict=True))


def test_the_update_is_that_of_the_optimisers(monkeypatch):
    """Five steps of Muon and AdamW on the same gradients, clipped and not, and from a state that was loaded."""
    config = config_of()
    ours, theirs = Run(config), Run(config)
    generator = torch.Generator().manual_seed(0)
    for number in range(5):
        clip = (0.0, 1.0)[number % 2]
        for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
            b.grad = torch.randn(a.shape, generator=generator)
            a.grad = b.grad.clone()
        norm = fused_update(ours.optimizers).run(clip, True)
        expected = nn.utils.clip_grad_norm_(theirs.model.parameters(), clip or float("inf"))
        assert norm == pytest.approx(expected.item(), rel=1e-6)
        for optimizer, _ in theirs.optimizers.parts:
            optimizer.step()
        if number == 2:
            ours.optimizers.load_state(*copy.deepcopy(ours.optimizers.state()))
        for (name, a), b in zip(ours.model.named_parameters(), theirs.model.parameters(), strict=True):
            assert close(a, b, 2e-6), (number, name)
    states = [run.optimizers.state()[0] for run in (ours, theirs)]
    assert states[0].keys() == states[1].keys()
    assert all(close(a.float(), states[1][name].float(), 1e-5) for name, a in states[0].items())


def test_a_norm_that_is_not_finite_updates_nothing():
    run = Run(config_of())
    for p in run.model.parameters():
        p.grad = torch.zeros_like(p)
    next(run.model.parameters()).grad[0] = float("nan")
    before = [p.detach().clone() for p in run.model.parameters()]
    assert not fused_update(run.optimizers).run(1.0, True) < float("inf")
    for p in run.model.parameters():
        p.grad = torch.ones_like(p)
    fused_update(run.optimizers).run(1.0, False)
    assert all(torch.equal(a, p) for a, p in zip(before, run.model.parameters(), strict=True))


def changed_output(model: SlotVAE) -> None:
    model.decoder.output_mlp[1] = nn.ReLU()


def hooked(model: SlotVAE) -> None:
    model.decoder.transformer[0].register_forward_hook(lambda *_: None)


def frozen(model: SlotVAE) -> None:
    model.decoder.norm.weight.requires_grad_(False)


def reparametrised(model: SlotVAE) -> None:
    nn.utils.parametrizations.weight_norm(model.encoder.token_mlp[0])


def watched(model: SlotVAE) -> None:
    next(model.parameters()).register_hook(lambda grad: grad)


def double(model: SlotVAE) -> None:
    model.double()


@pytest.mark.parametrize("change", [changed_output, hooked, frozen, reparametrised, watched, double])
def test_a_model_that_somebody_has_changed_takes_the_plain_path(change):
    """Before its first step, and after one that the kernel took."""
    for at_once in (True, False):
        run = Run(config_of())
        assert at_once or fused_loss(run.model, run.config) is not None
        change(run.model)
        assert fused_loss(run.model, run.config) is None


def test_weights_that_move_are_followed(monkeypatch):
    """A model moved to other memory between two steps trains on as one that was not."""
    config = config_of()
    images, ends = images_of(config), []
    for moved in (False, True):
        run = Run(config)
        run.step(20, images)
        if moved:
            for p in run.model.parameters():
                p.data = p.data.clone()
        run.step(21, images)
        ends.append([p.detach().clone() for p in run.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_a_part_that_is_replaced_is_followed():
    config = config_of()
    images, run = images_of(config), Run(config)
    run.step(20, images)
    run.model.encoder = copy.deepcopy(run.model.encoder)
    run.step(21, images)
    assert all(p.grad is not None and p.grad.any() for p in run.model.encoder.parameters())


@pytest.mark.parametrize("change", [dict(pixels_per_step=0), dict(accumulate=5), dict(queries="sampled")])
def test_runs_of_another_kind_take_the_plain_path(change):
    config = config_of(**change)
    assert fused_loss(SlotVAE(config), config) is None


def test_a_group_of_one_class_of_optimiser_steps_itself():
    run = Run(config_of(optimizer="adam", lr=1e-3))
    for p in run.model.parameters():
        p.grad = torch.zeros_like(p)
    assert fused_update(run.optimizers) is None
    run.step(1, images_of(run.config))  # and so a step is still one


@pytest.mark.parametrize("isa", cpu_backend.ISAS)
def test_every_instruction_set(isa, monkeypatch):
    config = config_of(batch_size=2)
    images, losses = images_of(config), []
    try:
        for name in (isa, cpu_backend.ISAS[0]):
            cpu_backend.set_isa(name)
            losses.append(Run(config).step(30, images))
    finally:
        cpu_backend.set_isa(None)
    assert losses[0]["loss"] == pytest.approx(losses[1]["loss"], rel=1e-5)
    assert losses[0]["grad_norm"] == pytest.approx(losses[1]["grad_norm"], rel=1e-4)


def test_features_of_a_frozen_network(monkeypatch):
    """No CNN: images are features whose pixels are the tokens."""
    sizes = {**MODEL_16, "pixels_per_step": 20, "resolution": 8}
    config = config_of(**sizes, input="features", channels=6, data="x", queries="learned", pixel_sampling="uniform")
    images = torch.randn(3, 6, 8, 8)
    seen = []
    for fused in (False, True):
        with path(monkeypatch, fused):
            run = Run(replace(config, batch_size=3))
            seen.append(run.step(30, images))
    assert seen[0]["loss"] == pytest.approx(seen[1]["loss"], rel=1e-5)
    assert seen[0]["grad_norm"] == pytest.approx(seen[1]["grad_norm"], rel=1e-4)
