"""What only a GPU can show of training: ``pytest --device cuda``. A step as one graph against its operators, runs that
repeat and resume to the last bit, steps without a wait, and a GPU's numbers against a CPU's.

``--device rehearsal`` runs the same on the CPU, smaller, where a queue that calls again stands for a graph.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from jacobians import draw_slots, published_jacobian, tiny
from safetensors.torch import load_file
from tiny import same_weights
from torch import Tensor

from fastslots.cli import main
from fastslots.data import SpritesDataset, to_float
from fastslots.metrics import slot_jacobian
from fastslots.models import SlotVAE
from fastslots.runs.log import read_metrics
from fastslots.testing import assert_as_good, assert_close
from fastslots.train import TrainConfig, fit
from fastslots.train.device.queue import Cuda
from fastslots.train.device.steps import LateSteps
from fastslots.train.draws import Draws, draw
from fastslots.train.optim import Optimizers
from fastslots.train.step import Precision, Weights, gradients

pytestmark = pytest.mark.gpu

DATA = dict(data="sprites", max_objects=0, resolution=32, batch_size=8)
SMALLER = dict(resolution=16, batch_size=2, encoder_layers=1, cnn_channels=8)
"""For a rehearsal: the same paths at a size for a CPU."""
STEPS = 5


def config_of(preset: str, device: torch.device, **overrides) -> TrainConfig:
    smaller = SMALLER if device.type == "cpu" else {}
    few = dict(DATA, steps=STEPS, device=str(device), eval_every=0, eval_images=8, eval_batch=8, threads=2)
    return TrainConfig.preset(preset, **{**few, **smaller, **overrides})


def batches(config: TrainConfig, count: int = STEPS) -> Tensor:
    """[count, B, 3, R, R] on the CPU."""
    scenes = SpritesDataset(3, config.resolution, (2, 3)).batch(np.arange(count * config.batch_size))[0]
    return to_float(torch.from_numpy(scenes)).unflatten(0, (count, config.batch_size))


class Again:
    """Stands for ``Cuda`` on a CPU: a graph is the function itself."""

    def upload(self, images):
        return images

    def later(self, values):
        kept = values.clone()
        return kept.tolist

    def capture(self, work, rehearse):
        for _ in range(2):
            rehearse()
        return lambda: work()


class Trained:
    """A model that ``LateSteps`` trains, as a run does on a GPU."""

    def __init__(self, config: TrainConfig, device: torch.device, captured: bool = True):
        torch.manual_seed(0)
        self.said: list[str] = []
        self.model = SlotVAE(config).to(device).train()
        self.optimizers = Optimizers(self.model, config.optimizer, config.lr, config.weight_decay, on_device=True)
        queue = Cuda(device) if device.type == "cuda" else Again()
        parts = self.model, self.optimizers, Precision(config.precision, device), config, queue, self.said.append
        self.steps = LateSteps(*parts, None if captured else "as asked")

    def __call__(self, images: Tensor, first: int = 1) -> list[dict[str, float]]:
        """Steps from ``first`` on, one for each batch -> their values."""
        done = [one for i, batch in enumerate(images) for one in self.steps(first + i, self.steps.upload(batch))]
        return [one.values for one in (*done, *self.steps.settle())]

    def state(self) -> dict[str, Tensor]:
        tensors = {f"model.{name}": t for name, t in self.model.state_dict().items()} | self.optimizers.state()[0]
        return {name: t.detach().cpu().clone() for name, t in tensors.items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    differ = [name for name in a if not torch.equal(a[name], b[name])]
    assert not differ, f"{len(differ)} of {len(a)} tensors differ, {differ[0]} first"


# ---- one graph -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("optimizer", ["adam", "muon"])
@pytest.mark.parametrize("preset", ["sprites-mini", "clevr6"])
def test_one_graph_gives_the_bits_of_its_operators(preset, optimizer, precision, device, monkeypatch):
    config = config_of(preset, device, optimizer=optimizer, precision=precision)
    images = batches(config).to(device)
    graph = Trained(config, device)
    values = graph(images)
    assert not graph.said, "the step was to be a graph"
    monkeypatch.setenv("FASTSLOTS_CUDA_GRAPHS", "0")
    plain = Trained(config, device, captured=False)
    assert plain(images) == values
    assert_same(graph.state(), plain.state())
    assert len({one["loss"] for one in values}) == STEPS and all(np.isfinite(one["loss"]) for one in values)


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_from_a_step_that_is_not_finite_on_nothing_changes(optimizer, device):
    config = config_of("sprites-mini", device, optimizer=optimizer, precision="fp32")
    images = batches(config)
    images[2, 0, 0, 0, 0] = float("nan")
    trained, values = Trained(config, device), []
    images, states = images.to(device), []
    for i in range(STEPS):
        values += trained(images[i : i + 1], i + 1)
        states.append(trained.state())
    assert [np.isfinite(one["loss"]) for one in values] == [True, True, False, True, True]
    for state in states[2:]:
        assert_same(state, states[1])
    assert any(not torch.equal(states[0][name], states[1][name]) for name in states[0])


@contextlib.contextmanager
def no_wait(device: torch.device) -> Iterator[None]:
    """Inside, whatever makes the host wait for the GPU raises (an event that is waited for apart)."""
    if device.type == "cpu":
        yield
        return
    torch.cuda.synchronize(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("captured", [True, False], ids=["one-graph", "operators"])
@pytest.mark.parametrize(
    "overrides",
    [
        {"precision": "bf16"},
        {"queries": "sampled", "pixel_sampling": "foreground", "optimizer": "adamw", "precision": "fp32"},
        {"queries": "learned", "pixels_per_step": 0, "accumulate": 2, "grad_clip": 0.0, "precision": "tf32"},
        {"encoder": "slot-attention", "queries": "learned", "pixel_sampling": "uniform", "precision": "bf16"},
    ],
    ids=["seeded", "sampled", "learned", "slot-attention"],
)
def test_no_step_waits_for_the_device(overrides, captured, device, monkeypatch):
    if device.type == "cpu":
        overrides = {**overrides, "precision": "fp32"}
    if not captured:
        monkeypatch.setenv("FASTSLOTS_CUDA_GRAPHS", "0")
    config = config_of("sprites-mini", device, **overrides)
    images, trained = batches(config), Trained(config, device, captured)
    images = images.pin_memory() if device.type == "cuda" else images
    trained(images[:2])  # compiles, captures, makes the optimisers' state
    with no_wait(device):
        values = trained(images[2:], 3)
    assert len(values) == STEPS - 2 and all(np.isfinite(one["loss"]) for one in values) and not trained.said
    if device.type == "cuda":  # the check can fail
        with no_wait(device), pytest.raises(RuntimeError, match="synchroniz"):
            trained.steps._step.stopped.item()


def test_graphs_of_torchs_compiler_leave_this_one_alone(device):
    """They clear cuBLAS's workspaces: a graph that had taken one would write into whatever lies there then."""
    if device.type == "cpu":
        pytest.skip("graphs of CUDA")
    config = config_of("clevr6", device, precision="bf16")
    images = batches(config).to(device)
    expected, trained = Trained(config, device)(images), Trained(config, device)
    values = trained(images[:2])
    compiled = torch.compile(lambda a: (a @ a).relu() @ a, mode="reduce-overhead")
    for _ in range(4):
        compiled(torch.randn(512, 512, device=device))
    held = [torch.full((1 << 22,), 7.0, device=device) for _ in range(16)]
    assert values + trained(images[2:], 3) == expected
    assert all((t == 7).all() for t in held)


# ---- runs ------------------------------------------------------------------------------------------------------------


def lines(out: Path) -> list[dict]:
    training, evaluations = read_metrics(out / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in ("images_per_s", "seconds")} for line in training + evaluations]


@pytest.mark.parametrize("preset, precision", [("sprites-mini", "bf16"), ("clevr6", "bf16"), ("sprites-mini", "fp32")])
def test_runs_repeat_and_resume_to_the_last_bit(preset, precision, device, tmp_path, monkeypatch):
    """With an evaluation between the replays, which takes memory beside the graph's; and without a graph."""
    config = config_of(preset, device, precision=precision, steps=6, checkpoint_every=3, eval_every=2)
    said = io.StringIO()
    whole = fit(config, out=tmp_path / "whole", stream=said).out
    if device.type == "cuda":
        assert "one CUDA graph, losses read a step late" in said.getvalue(), said.getvalue()
        assert "no CUDA graph" not in said.getvalue(), said.getvalue()
    again = fit(config, out=tmp_path / "again").out
    assert lines(whole) == lines(again) and same_weights(whole, again)
    (again / "checkpoints" / "step_00000006.safetensors").unlink()  # as after a kill: the log holds more
    said = io.StringIO()
    assert same_weights(whole, fit(config, out=again, resume=True, stream=said).out)
    assert "steps 4 to 6 repeat bit for bit" in said.getvalue()
    assert lines(whole) == lines(again)
    monkeypatch.setenv("FASTSLOTS_CUDA_GRAPHS", "0")
    plain = fit(config, out=tmp_path / "plain").out
    assert lines(whole) == lines(plain) and same_weights(whole, plain)


# ---- a GPU's numbers against a CPU's ---------------------------------------------------------------------------------


def gradients_of(config: TrainConfig, device: torch.device, dtype: torch.dtype, images: Tensor) -> list[Tensor]:
    """The terms of the first step's loss and the gradient of every weight, on the CPU."""
    torch.manual_seed(0)
    model = SlotVAE(config).train().to(device, dtype)
    drawn = draw(config, 1, images)
    wide = Draws(*(t.to(device, dtype if t.is_floating_point() else None) if t is not None else None for t in drawn))
    weights = Weights(config.alpha, config.beta)
    sums = gradients(model, Precision("fp32", device), config, images.to(device, dtype), wide, weights)
    return [t.detach().cpu() for t in (sums, *(p.grad for p in model.parameters()))]


@pytest.mark.parametrize("pixels", [0, 64])
@pytest.mark.parametrize("preset", ["sprites-mini", "clevr6"])
def test_gradients_of_a_step_are_as_good_as_the_reference_of_a_cpu(preset, pixels, device, monkeypatch):
    """In fp32, against float64: each gradient's worst element within four times the error of the CPU's reference."""
    monkeypatch.setenv("FASTSLOTS_FUSED_STEP", "0")
    config = config_of(preset, device, precision="fp32", queries="learned", pixels_per_step=pixels, batch_size=2)
    images, cpu = batches(config, 1)[0], torch.device("cpu")
    exact = gradients_of(config, cpu, torch.float64, images)
    eager = gradients_of(config, cpu, torch.float32, images)
    found = gradients_of(config, device, torch.float32, images)
    assert len(found) > 30 and all(g.any() for g in exact[1:])
    assert_as_good(found, eager, exact, torch.float32)


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_the_losses_of_some_steps_are_those_of_a_cpu(optimizer, device):
    """fp32 throughout. The first step's terms are sums of rounded numbers: 2e-5 is 300 roundoffs. Then weights whose
    gradient is near 0 go either way by a whole rate, on any two machines: 1e-3."""
    values = []
    for place in (device, torch.device("cpu")):
        config = config_of("sprites-mini", device, optimizer=optimizer, precision="fp32")
        values.append(Trained(config, place, captured=place.type == "cuda")(batches(config).to(place)))
    for step, (ours, theirs) in enumerate(zip(*values, strict=True)):
        for name in ("loss", "recon", "kl"):
            assert ours[name] == pytest.approx(theirs[name], rel=2e-5 if step == 0 else 1e-3), (step, name)


def test_images_become_the_same_floats(device):
    every = torch.arange(256, dtype=torch.uint8).expand(3, 4, 256).permute(1, 2, 0)[None]
    assert torch.equal(to_float(every.to(device)).cpu(), to_float(every))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    config = TrainConfig.preset("sprites-mini", steps=20, device="cpu", eval_images=8, batch_size=8, threads=2)
    return fit(config, out=tmp_path_factory.mktemp("runs") / "sprites").out


def test_eval_gives_the_scores_of_a_cpu(run, device, capsys):
    """Means of fp32 numbers to 1e-4 of their size; scores of segmentations, where a pixel whose slots are as good as
    equal may fall to another, to 0.01."""
    found = []
    torch.backends.cudnn.allow_tf32 = True  # torch's default, which the command must not keep
    for place in (str(device), "cpu"):
        assert main(["eval", str(run), "--images", "32", "--device", place, "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    ours, theirs = found
    for name in ("recon", "kl", "interaction", "jis"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
    for name in ("j_ari", "fg_ari", "ari", "mbo", "miou"):
        assert ours[name] == pytest.approx(theirs[name], abs=0.01), name
    assert ours["images"] == theirs["images"] == 32


def test_a_run_of_a_cpu_goes_on_here(run, device, tmp_path):
    """Its weights load, and decode the same pictures to roundoffs."""
    model = SlotVAE.from_run(run)
    slots = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        here, there = model.to(device).decode(slots.to(device)).recon.cpu(), model.cpu().double().decode(slots.double())
    assert load_file(run / "model.safetensors")
    assert_close(here, there.recon, 1e-4)


@pytest.mark.parametrize("masked", [False, True])
def test_the_slot_jacobian_by_op(masked, device):
    """In fp32 on the device, against forward-mode derivatives of the published decoder in float64 on the CPU."""
    decoder = tiny()
    slots = draw_slots(decoder)
    mask = torch.tensor([[True, True, False], [True, True, True]]) if masked else None
    exact = published_jacobian(decoder, slots, slot_mask=mask)
    on_device = None if mask is None else mask.to(device)
    found = slot_jacobian(decoder.float().to(device), slots.float().to(device), slot_mask=on_device).cpu()
    keep = exact if mask is None else exact * mask[..., None]
    assert_close(found.flatten(2) if mask is None else found.flatten(2) * mask[..., None], keep, 1e-4)
