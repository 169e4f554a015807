"""No operator of a GPU's training step waits for the device: on tensors that say they lie on a GPU and have no values.

There every read of a value raises (``item``, ``cpu``, ``nonzero``, a branch on a tensor), and here whatever comes from
the host's memory too: a copy from there is waited for, and a graph would keep the address of memory that is gone.
"""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastslots.kernels.gpu import launch
from fastslots.models import SlotVAE
from fastslots.ops.autograd import IMPLEMENTATIONS
from fastslots.testing.stand_in import cuda_stand_in
from fastslots.train import TrainConfig
from fastslots.train.device import queued as module
from fastslots.train.device.queued import DeviceStep
from fastslots.train.optim import Optimizers
from fastslots.train.step import Precision

WAITS = (RuntimeError, NotImplementedError, AssertionError)
UNORDERED = {"index_add", "index_add_", "scatter_add", "scatter_add_", "scatter_reduce", "histc", "bincount",
             "kthvalue", "median", "upsample_bilinear2d_backward", "grid_sampler_2d_backward", "put_"}  # fmt: skip
"""Operators whose sums have no fixed order on a GPU (torch.use_deterministic_algorithms), or that it has not at all."""


class OnDevice(TorchDispatchMode):
    """Raises for a tensor of the host among an operator's; ``seen`` has the operators' names."""

    def __init__(self, stand_in):
        super().__init__()
        self.seen: list[str] = []
        self._stand_in = stand_in

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        if func.namespace == "fastslots":  # its launchers, and what torch does around them
            with self, self._stand_in:
                return IMPLEMENTATIONS[name](*args, **kwargs)
        self.seen.append(name)
        assert not name.startswith("lift_fresh"), "a tensor is made of numbers on the host: that copy is waited for"
        out = func(*args, **kwargs)
        for tensor in tree_leaves((args, kwargs, out)):
            if isinstance(tensor, torch.Tensor):
                assert tensor.is_meta, f"{name} takes or gives a tensor of the host"
        assert name not in UNORDERED, f"{name} has no fixed order on a GPU"
        return out


HOST_RATE = torch.tensor(0.1)
MADE_ON_HOST = (torch.tensor, torch.as_tensor, torch.from_numpy, torch.Tensor.new_tensor)


class NotFromHost(TorchFunctionMode):
    """Raises where a tensor is made of numbers: the copy of those to the device is waited for, below any operator."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert func not in MADE_ON_HOST, f"{func.__name__} makes a tensor of numbers on the host"
        return func(*args, **(kwargs or {}))


class Queue:
    """Neither captures nor reads."""

    def upload(self, images):
        return images

    def later(self, values):
        return lambda: []

    def capture(self, work, rehearse):
        rehearse()
        return work


@contextlib.contextmanager
def on_gpu(preset: str, **overrides):
    """A step of a preset on a GPU that is not there, and what watches it."""
    data = {} if preset == "clevrtex" else {"data": "sprites", "max_objects": 0, "resolution": 32}
    settings = {"batch_size": 2, "precision": "bf16", **data, **overrides}
    config = TrainConfig.preset(preset, **settings)
    with torch.device("meta"):
        model = SlotVAE(config).train()
        images = torch.empty(2, config.channels, config.resolution, config.resolution)
    with cuda_stand_in((9, 0)) as stand_in, launch.record("sm_90") as launches:
        optimizers = Optimizers(model, config.optimizer, config.lr, config.weight_decay)
        step = DeviceStep(model, optimizers, Precision("bf16", torch.device("cuda")), config, Queue())
        step(1, images)  # compiles, and makes the optimisers' state and the table of normal numbers
        with OnDevice(stand_in) as watching, NotFromHost():
            yield step, images, watching, launches


PRESETS = ("sprites", "clevr6", "clevrtex", "sprites-mini", "clevr6-mini")


@pytest.mark.parametrize("preset", PRESETS)
def test_nothing_waits_for_the_device(preset):
    with on_gpu(preset) as (step, images, watching, launches):
        launches.clear()
        step(2, images)
    assert "_fused_adamw_" in watching.seen if "mini" in preset else "_fused_adam_" in watching.seen
    assert len(watching.seen) > 300 and len(launches) > 5


@pytest.mark.parametrize(
    "overrides",
    [
        {"pixel_sampling": "foreground", "queries": "sampled", "optimizer": "adamw", "weight_decay": 0.1},
        {"pixels_per_step": 0, "queries": "learned", "accumulate": 2, "grad_clip": 0.0, "precision": "fp32"},
        {"encoder": "slot-attention", "queries": "learned", "pixel_sampling": "uniform"},
        {"decoder": "broadcast", "alpha": 0.0, "beta": 0.0, "log_scale_bias": 0.0},
    ],
    ids=lambda overrides: ",".join(map(str, overrides.values())),
)  # fmt: skip
def test_nor_with_other_fields(overrides):
    with on_gpu("sprites-mini", **overrides) as (step, images, *_):
        step(2, images)


def put_back(cause: str, step: DeviceStep, monkeypatch) -> None:
    """What a step did before it waited for nothing."""
    draw, clip, gradients = module.draw, module.clip, module.gradients
    if cause == "noise of the CPU's generator":
        monkeypatch.setattr(module, "draw", lambda config, *args, **kwargs: draw(torch_draws(config), 1, args[1]))
    elif cause == "a branch on the norm":
        monkeypatch.setattr(module, "clip", lambda *args: max(clip(*args), 1.0))
    elif cause == "the loss read at once":
        monkeypatch.setattr(module, "gradients", lambda *args: read(gradients(*args)))
    elif cause == "a constant made on the host":
        monkeypatch.setattr(module, "clip", lambda *args: clip(*args) + step.stopped.new_tensor(math.log(0.5)))
    elif cause == "a rate on the host":
        step._optimizers.parts[1][0].param_groups[0]["lr"] = HOST_RATE
    elif cause == "places of pixels by nonzero":
        monkeypatch.setattr(module, "draw", lambda *args, **kwargs: args[2].nonzero())
    elif cause == "a boolean index":
        monkeypatch.setattr(module, "gradients", lambda *args: gradients(*args)[gradients(*args) > 0])
    elif cause == "sums without an order":
        none, first = torch.zeros(1, device="cuda"), step._keys[:1]
        monkeypatch.setattr(module, "clip", lambda *args: none.index_add(0, first, clip(*args)[None])[0])


def read(values):
    values.tolist()
    return values


def torch_draws(config):
    import dataclasses

    return dataclasses.replace(config, generator="torch")


CAUSES = (
    "noise of the CPU's generator", "a branch on the norm", "the loss read at once", "a constant made on the host",
    "a rate on the host", "places of pixels by nonzero", "a boolean index", "sums without an order",
)  # fmt: skip


@pytest.mark.parametrize("cause", CAUSES)
def test_each_cause_is_noticed_where_it_is_put_back(cause, monkeypatch):
    with on_gpu("sprites-mini") as (step, *_):
        put_back(cause, step, monkeypatch)
        with pytest.raises(WAITS):
            step.work()


def test_a_step_makes_no_graph_of_a_part_inside_its_own(monkeypatch):
    """The decoder's loss has graphs for whoever calls it alone; in a step they would be captured twice."""
    from fastslots import capture
    from fastslots.kernels.gpu import decoder_loss

    monkeypatch.setattr(decoder_loss, "GRAPHS", None)  # would fail where it is called
    with capture.whole_step(), on_gpu("sprites-mini") as (step, images, *_):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        step(2, images)
