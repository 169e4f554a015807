"""A step that never waits for its device: its numbers, its stop at a NaN, and how a run goes with it. On the CPU, with
a queue that records what it is asked and captures by calling again."""

from __future__ import annotations

import io
import json

import pytest
import torch
from safetensors.torch import load_file
from tiny import MODEL_16

from fastslots import capture
from fastslots.distributed import Group
from fastslots.errors import UserError
from fastslots.models import SlotVAE
from fastslots.runs.log import read_metrics
from fastslots.train import NonFiniteLossError, TrainConfig, fit, loop
from fastslots.train.checkpoint import load_checkpoint
from fastslots.train.device import queue as queues
from fastslots.train.device.queue import Cuda
from fastslots.train.device.queued import DeviceStep
from fastslots.train.device.steps import LateSteps, Steps, why_at_once
from fastslots.train.optim import Optimizers
from fastslots.train.step import Precision, training_step, values_of

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def plain_path(monkeypatch):
    """What a GPU's step is held against is the step of the same operators, not the CPU's own kernel of a whole loss;
    on one thread, for a CPU's step has torch's operators on one."""
    monkeypatch.setenv("FASTSLOTS_FUSED_STEP", "0")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


TINY = dict(MODEL_16, batch_size=4, eval_images=4, eval_batch=4, threads=1, data="sprites", precision="fp32")


def tiny(**overrides) -> TrainConfig:
    return TrainConfig.preset("sprites-mini", **{**TINY, "steps": 6, "eval_every": 0, **overrides})


class Recorded:
    """A queue whose graph is the function itself; ``log`` has what was asked, in order."""

    def __init__(self, refuses: str = ""):
        self.log: list[str] = []
        self._refuses = refuses

    def upload(self, images):
        self.log.append("upload")
        return images

    def later(self, values):
        self.log.append("later")
        kept = values.clone()  # the next replay overwrites it

        def read():
            self.log.append("read")
            return kept.tolist()

        return read

    def capture(self, work, rehearse):
        for _ in range(2):
            rehearse()
        self.log.append("capture")
        if self._refuses:
            raise RuntimeError(self._refuses)

        def replay():
            self.log.append("replay")
            work()

        return replay


def parts(config: TrainConfig):
    """Model and optimisers as on a GPU, and a precision."""
    torch.manual_seed(0)
    model = SlotVAE(config).train()
    optimizers = Optimizers(model, config.optimizer, config.lr, config.weight_decay, on_device=True)
    return model, optimizers, Precision("fp32", CPU)


def state(model, optimizers) -> dict[str, torch.Tensor]:
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()} | optimizers.state()[0]
    return {name: value.clone() for name, value in tensors.items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def batches(config: TrainConfig, count: int) -> torch.Tensor:
    return torch.rand(count, config.batch_size, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "muon"])
@pytest.mark.parametrize("pixels", [0, 32])
def test_replays_give_the_bits_of_the_step_that_reads_at_once(optimizer, pixels):
    """Rate, weights of the terms, noise and pixels change from step to step; the function that is replayed does not."""
    config = tiny(optimizer=optimizer, pixels_per_step=pixels, weight_decay=0.1, alpha_start=0, alpha_warmup=3)
    images = batches(config, 5)
    model, optimizers, precision = parts(config)
    step, values = DeviceStep(model, optimizers, precision, config, queue := Recorded()), []
    for i in range(5):
        values.append(values_of(model, config, i + 1, step(i + 1, images[i])()))
    assert queue.log == ["capture", *["replay", "later", "read"] * 5]
    other, others, precision = parts(config)
    for i in range(5):
        at_once = training_step(other, others, precision, config, i + 1, images[i])
        assert at_once == values[i]
    assert same(state(model, optimizers), state(other, others))
    assert values[0]["lr"] != values[1]["lr"] and values[0]["alpha"] != values[1]["alpha"]


def test_an_optimiser_with_its_rate_on_the_device_takes_the_same_steps():
    for name in ("adam", "adamw", "muon"):
        config, weights = tiny(optimizer=name, weight_decay=0.1), []
        for on_device in (False, True):
            torch.manual_seed(0)
            model = SlotVAE(config)
            optimizers = Optimizers(model, name, config.lr, config.weight_decay, on_device)
            for i in range(3):
                training_step(model, optimizers, Precision("fp32", CPU), config, i + 1, batches(config, 3)[i])
            weights.append(model.state_dict())
        for key, value in weights[0].items():
            torch.testing.assert_close(weights[1][key], value, rtol=1e-3, atol=1e-5, msg=f"{name} {key}")


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_from_a_step_that_is_not_finite_on_nothing_changes(optimizer):
    config = tiny(optimizer=optimizer)
    images = batches(config, 4)
    images[2, 0, 0, 0, 0] = float("nan")
    model, optimizers, precision = parts(config)
    step, reads, states = DeviceStep(model, optimizers, precision, config, Recorded()), [], []
    for i in range(4):
        reads.append(step(i + 1, images[i]))
        states.append(state(model, optimizers))
    finite = [all(torch.isfinite(torch.tensor(read()))) for read in reads]
    assert finite == [True, True, False, True]
    assert not same(states[0], states[1])
    assert same(states[1], states[2]) and same(states[1], states[3]), "also the finite step after it"


def test_rehearsals_change_nothing():
    config = tiny()
    model, optimizers, precision = parts(config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step = DeviceStep(model, optimizers, precision, config, Recorded())
    step._set_numbers(1)
    step._images = batches(config, 1)[0]
    step._prepared()
    assert same(before, model.state_dict()) and step.stopped == 0
    steps = [value for name, value in optimizers.state()[0].items() if name.endswith(".step")]
    assert steps and all(value == 0 for value in steps)


def test_what_cuda_refuses_to_capture_goes_operator_by_operator_and_says_so():
    config, said = tiny(), []
    model, optimizers, precision = parts(config)
    step = DeviceStep(model, optimizers, precision, config, queue := Recorded("operation not permitted"), said.append)
    values = [step(i + 1, batches(config, 2)[i])() for i in range(2)]
    assert queue.log == ["capture", "later", "read", "later", "read"]
    assert any("no CUDA graph" in line and "operation not permitted" in line for line in said)
    other, others, precision = parts(config)
    again = DeviceStep(other, others, precision, config, Recorded())
    assert values == [again(i + 1, batches(config, 2)[i])() for i in range(2)]
    assert same(state(model, optimizers), state(other, others))


def out_of_memory(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
@pytest.mark.parametrize("place", ["loss", "state"])
def test_a_rehearsal_that_breaks_off_leaves_nothing_behind(place, optimizer, monkeypatch):
    """Memory may be short for once, for a rehearsal has a stream of its own: the steps after it are whole steps."""
    config, said = tiny(optimizer=optimizer), []
    model, optimizers, precision = parts(config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step = DeviceStep(model, optimizers, precision, config, queue := Recorded(), said.append)
    if place == "loss":  # of the second rehearsal
        real, calls = model.training_loss, iter(range(1, 100))
        monkeypatch.setattr(
            model, "training_loss", lambda *a, **k: (out_of_memory if next(calls) == 2 else real)(*a, **k)
        )
    else:  # what an optimiser keeps of a parameter is half made
        zeros, made = torch.zeros_like, iter(range(1, 10**6))
        optimise = optimizers.step_unless

        def update(stopped):
            with monkeypatch.context() as patch:
                patch.setattr(
                    torch, "zeros_like", lambda *a, **k: (out_of_memory if next(made) == 4 else zeros)(*a, **k)
                )
                optimise(stopped)

        monkeypatch.setattr(optimizers, "step_unless", update)
    images = batches(config, 2)
    values = [step(i + 1, images[i])() for i in range(2)]
    assert queue.log == ["later", "read"] * 2 and any("no CUDA graph" in line for line in said)
    assert step.stopped == 0 and not same(before, model.state_dict())
    other, others, precision = parts(config)
    again = DeviceStep(other, others, precision, config, Recorded())
    assert values == [again(i + 1, images[i])() for i in range(2)]
    assert same(state(model, optimizers), state(other, others))


# ---- a run -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def late(monkeypatch):
    """``fit`` does its steps as on a GPU; the queues of its runs."""
    made: list[Recorded] = []

    def steps_of(model, optimizers, precision, config, group, losses, say):
        made.append(Recorded())
        return LateSteps(model, optimizers, precision, config, made[-1], say)

    def on_device(*args):
        return Optimizers(*args, on_device=True)

    monkeypatch.setattr(loop, "steps_of", steps_of)
    monkeypatch.setattr(loop, "Optimizers", on_device)
    return made


def lines(out) -> list[dict]:
    training, evaluations = read_metrics(out / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in ("images_per_s", "seconds")} for line in training + evaluations]


def test_losses_are_read_while_the_next_step_computes(tmp_path, late):
    said = io.StringIO()
    out = fit(tiny(checkpoint_every=4), out=tmp_path / "run", stream=said).out
    one = ["upload", "replay", "later"]
    settled = ["read"]
    expected = [
        "upload", "capture", "replay", "later", *one, "read", *one, "read", *one, "read",  # steps 1 to 4
        *settled,  # a checkpoint: all that is known of them is on the disk
        *one, *one, "read", *settled,
    ]  # fmt: skip
    assert late[0].log == expected
    assert [line["step"] for line in read_metrics(out / "metrics.jsonl")[0]] == [1, 2, 3, 4, 5, 6]
    assert "step      one CUDA graph, losses read a step late" in said.getvalue()
    assert json.loads((out / "machine.json").read_text())["step"] == "one CUDA graph, losses read a step late"


def test_a_resume_is_bit_for_bit(tmp_path, late):
    whole = fit(tiny(checkpoint_every=3), out=tmp_path / "whole").out
    fit(tiny(steps=6, checkpoint_every=3), out=tmp_path / "cut")
    newest = tmp_path / "cut" / "checkpoints" / "step_00000006.safetensors"
    newest.unlink()  # as after a kill: the log holds more than the checkpoint
    said = io.StringIO()
    cut = fit(tiny(checkpoint_every=3), out=tmp_path / "cut", resume=True, stream=said).out
    assert "steps 4 to 6 repeat bit for bit" in said.getvalue()
    assert lines(whole) == lines(cut)
    assert same(load_file(whole / "model.safetensors"), load_file(cut / "model.safetensors"))
    ends = [load_checkpoint(out / "checkpoints" / "step_00000006.safetensors") for out in (whole, cut)]
    assert same(ends[0].tensors, ends[1].tensors)


def test_a_loss_that_is_not_finite_ends_the_run_at_its_own_step(tmp_path, late, monkeypatch):
    to_float, seen = loop.to_float, iter(range(1, 100))

    def damaged(images):
        images = to_float(images)
        return images * float("nan") if next(seen) == 3 else images

    monkeypatch.setattr(loop, "to_float", damaged)
    with pytest.raises(NonFiniteLossError, match="step 3: loss nan"):
        fit(tiny(), out=tmp_path / "run")
    assert late[0].log.count("replay") == 4, "step 4 was begun before step 3 was read"
    assert load_file(tmp_path / "run" / "nan_batch.safetensors")["images"].isnan().all()
    training = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in training] == [1, 2, 3] and "stopped" in json.loads(training[-1])
    monkeypatch.setattr(loop, "to_float", to_float)
    two = fit(tiny(checkpoint_every=2, keep_checkpoints=9), out=tmp_path / "two").out
    kept = [load_checkpoint(out / "checkpoints" / "step_00000002.safetensors") for out in (tmp_path / "run", two)]
    assert same(kept[0].tensors, kept[1].tensors)


def test_callbacks_see_the_model_as_of_their_step(tmp_path, late):
    class Watch:
        def __init__(self):
            self.replays = []

        def on_step(self, step, terms):
            self.replays.append((step, late[0].log.count("replay")))

    watch = Watch()
    fit(tiny(steps=3), out=tmp_path, callbacks=[watch])
    assert watch.replays == [(1, 1), (2, 2), (3, 3)]


def test_data_that_break_leave_the_last_step_on_the_disk(tmp_path, late, monkeypatch):
    to_float, seen = loop.to_float, iter(range(1, 100))

    def broken(images):
        if next(seen) == 5:
            raise UserError("the disk has gone")
        return to_float(images)

    monkeypatch.setattr(loop, "to_float", broken)
    with pytest.raises(UserError, match="the disk has gone"):
        fit(tiny(), out=tmp_path)
    assert (tmp_path / "checkpoints" / "step_00000004.safetensors").exists()
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")[0]] == [1, 2, 3, 4]


# ---- who goes which way ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ({}, None),
        ({"precision": "fp16"}, "the loss scaler of fp16"),
        ({"optimizer": "sgd"}, "sgd cannot leave out a step on the device"),
        ({"jacobian_weight": 1.0}, "the Jacobian's penalty"),
        ({"generator": "torch"}, "drawn on the CPU"),
    ],
)
def test_what_cannot_be_late_says_why(overrides, reason):
    config = tiny(**overrides)
    with torch.device("meta"):
        found = why_at_once(SlotVAE(config), config, Group(), {})
    assert found is reason is None or reason in found


def test_parts_of_ones_own_are_read_at_once():
    class Wrapped(torch.nn.Module):
        def forward(self, images):
            return images

    config = tiny()
    with torch.device("meta"):
        own = SlotVAE(config, encoder=Wrapped())
        plain = SlotVAE(config)
    assert why_at_once(own, config, Group(), {}) == "Wrapped may wait for the device"
    losses = {"spread": (1.0, lambda result, images: images.sum())}
    assert why_at_once(plain, config, Group(), losses) == "the losses spread may wait for the device"
    group = Group()
    group.size = 2
    assert "2 processes" in why_at_once(plain, config, group, {})
    assert Steps(plain, None, None, config, Group(), {}, "a reason").how().endswith("losses read at once (a reason)")
    assert Steps(plain, None, None, config, Group(), {}).how() == ""


# ---- what is asked of CUDA -------------------------------------------------------------------------------------------


class FakeCuda:
    """Streams, events and graphs that write down what is done with them."""

    def __init__(self, monkeypatch):
        self.log: list[object] = []
        self.streams = 0
        fake, log = self, self.log

        class Stream:
            def __init__(self, *_):
                fake.streams += 1
                self.name = f"stream {fake.streams - 1}"

            def wait_stream(self, other):
                log.append((self.name, "waits for", other.name))

        class Event:
            def record(self, stream):
                log.append(("recorded on", stream.name))

            def synchronize(self):
                log.append("host waits")

        class Within:
            def __init__(self, *what, **more):
                self.what = what, more

            def __enter__(self):
                log.append(("into", *self.what))

            def __exit__(self, *_):
                log.append("out")

        class Graph:
            def replay(self):
                log.append("replay")

        self.main = Stream()
        self.main.name = "main"
        for name, value in {
            "Stream": Stream, "Event": Event, "CUDAGraph": Graph, "current_stream": lambda *_: fake.main,
            "stream": lambda stream: Within(stream.name), "device": lambda device: Within(str(device)),
            "graph": lambda graph, pool, stream, capture_error_mode: Within(stream.name, capture_error_mode),
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: log.append("clear"), raising=False)


class OnHost:
    """A pinned batch; its copy on the device notes which streams may read it."""

    device = CPU

    def __init__(self, log):
        self.log = log

    def to(self, device, non_blocking):
        assert non_blocking
        self.log.append("copy")
        return self

    def record_stream(self, stream):
        self.log.append(("kept for", stream.name))


def test_a_batch_is_copied_beside_the_work_and_waited_for_by_the_device(monkeypatch):
    fake = FakeCuda(monkeypatch)
    queue = Cuda(torch.device("cuda", 0))
    fake.log.clear()
    queue.upload(OnHost(fake.log))
    assert [entry if isinstance(entry, str) else entry[:3] for entry in fake.log] == [
        ("into", ("stream 1",), {}), "copy", "out", ("main", "waits for", "stream 1"), ("kept for", "main"),
    ]  # fmt: skip


def test_values_are_copied_where_they_stand_in_the_queue_and_read_when_they_are_there(monkeypatch):
    fake = FakeCuda(monkeypatch)
    queue = Cuda(torch.device("cuda", 0))
    pinned = torch.empty
    monkeypatch.setattr(queues.torch, "empty", lambda *size, pin_memory, **more: pinned(*size, **more))
    fake.log.clear()
    values = torch.tensor([1.0, 2.0])
    read = queue.later(values)
    values.zero_()
    assert fake.log == [("recorded on", "main")]
    assert read() == [1.0, 2.0] and fake.log[-1] == "host waits"


def test_a_capture_has_a_workspace_of_its_own_and_parts_make_no_graph_in_it(monkeypatch):
    fake = FakeCuda(monkeypatch)
    queue = Cuda(torch.device("cuda", 0))
    fake.log.clear()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert capture.wanted(torch.device("cuda", 0))

    def said(what):
        return lambda: fake.log.append((what, capture.wanted(torch.device("cuda", 0))))

    replay = queue.capture(said("work"), said("rehearsal"))
    flat = [entry for entry in fake.log if entry in ("clear", "replay") or entry[0] in ("work", "rehearsal", "into")]
    assert flat == [
        ("into", ("cuda:0",), {}), ("into", ("stream 2",), {}), ("rehearsal", False), ("rehearsal", False),
        "clear", ("into", ("stream 2", "thread_local"), {}), ("work", False), "clear",
    ]  # fmt: skip
    replay()
    assert fake.log[-1] == "replay" and capture.wanted(torch.device("cuda", 0))


def test_a_rehearsal_that_breaks_off_is_waited_for(monkeypatch):
    """What it has in its stream's queue may still be running, on tensors that others go on with."""
    fake = FakeCuda(monkeypatch)
    with pytest.raises(RuntimeError, match="out of memory"):
        capture.captured(lambda: None, torch.device("cuda", 0), rehearse=out_of_memory)
    assert fake.log[-3:] == ["out", ("main", "waits for", "stream 1"), "out"]
