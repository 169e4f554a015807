"""What a resume finds and leaves: the log, checkpoints that are damaged, a full disk, the loss scaler, the clock."""

from __future__ import annotations

import errno
import io
import json
import os
import random
import signal
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from tiny import MODEL_8, same_weights

from fastslots.cli import main
from fastslots.errors import UserError
from fastslots.files import write_atomic
from fastslots.runs.folder import RunFolder
from fastslots.runs.log import MetricsLog, read_metrics
from fastslots.train import NonFiniteLossError, TrainConfig, fit, loop, recorder
from fastslots.train.checkpoint import Checkpoint, latest_checkpoint, save_checkpoint
from fastslots.train.own_parts import initial_model
from fastslots.train.step import LEAST_SCALE, Precision

TINY = dict(
    MODEL_8, batch_size=2, threads=1, eval_every=0, eval_images=2,
    warmup=2, optimizer="adam", lr=1e-3, schedule="constant",
    alpha_start=4, alpha_warmup=8, beta_start=4, beta_warmup=8,
)  # fmt: skip


def config_of(**overrides) -> TrainConfig:
    return TrainConfig.preset("sprites-mini", **{**TINY, **overrides})


def newest(out: Path) -> Checkpoint | None:
    return latest_checkpoint(RunFolder(out))[0] if (out / "checkpoints").exists() else None


def lines(steps) -> bytes:
    return b"".join(json.dumps({"step": step, "loss": 0.5}).encode() + b"\n" for step in steps)


# ---- the log ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("torn", [b"", b'{"step": 4', b'{"step": 4}', b"\xff\xfe\n", b"[" * 100_000 + b"\n", b"7\n"])
def test_a_resume_cuts_the_log_behind_its_checkpoint(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(lines(range(1, 8)) + torn)
    MetricsLog(RunFolder(path.parent), 3).close()
    assert path.read_bytes() == lines(range(1, 4))


def test_lines_behind_a_damaged_one_are_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(lines([1, 2]) + b"\0\0\n" + lines([4, 5, 6]))
    MetricsLog(RunFolder(path.parent), 5).close()
    assert [line["step"] for line in read_metrics(path)[0]] == [1, 2, 4, 5]


def test_a_resume_never_holds_less_of_the_log_than_it_keeps(tmp_path, monkeypatch):
    """Cut in place: a kill at any moment, or a full disk, leaves the kept lines where they are."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(lines(range(1, 100)))
    before = path.stat().st_ino

    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", refuse)
    monkeypatch.setattr(Path, "write_bytes", refuse)
    MetricsLog(RunFolder(path.parent), 50).close()
    assert path.read_bytes() == lines(range(1, 51)) and path.stat().st_ino == before


class Failing:
    """A tracker whose service has gone."""

    name = "failing"

    def __init__(self):
        self.asked = 0

    def numbers(self, values, step):
        self.asked += 1
        if step == 3:
            raise ConnectionError("no route to host")

    def picture(self, name, picture, step):
        raise AssertionError("it is asked no more")

    def close(self):
        raise ConnectionError("no route to host")


def test_a_run_outlives_a_tracker_that_fails(tmp_path, monkeypatch):
    tracker, said = Failing(), io.StringIO()
    monkeypatch.setattr(recorder, "open_trackers", lambda *_: [tracker])
    assert fit(config_of(steps=6), out=tmp_path / "run", stream=said).step == 6
    assert tracker.asked == 3 and said.getvalue().count("failing has failed (no route to host)") == 1
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")[0]] == [1, 2, 3, 4, 5, 6]


def test_the_log_is_on_the_disk_before_a_checkpoint(tmp_path, monkeypatch):
    """After a power cut it must not be shorter than what the resume goes on from."""
    synced: list[str] = []
    fsync = os.fsync

    def seen(fd: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name)
        fsync(fd)

    monkeypatch.setattr(os, "fsync", seen)
    fit(config_of(steps=2), out=tmp_path / "run")
    checkpoint = next(n for n, name in enumerate(synced) if name.startswith(".step_00000002.safetensors."))
    assert synced.index("metrics.jsonl") < checkpoint


def test_what_a_data_set_raises_leaves_a_checkpoint(tmp_path):
    class Breaking(torch.utils.data.Dataset):
        reads = 0

        def __len__(self) -> int:
            return 40

        def __getitem__(self, index: int) -> torch.Tensor:
            self.reads += 1
            if self.reads > 60:
                raise KeyError("a bug of the user's")
            return torch.zeros(3, 8, 8)

    with pytest.raises(KeyError):
        fit(config_of(steps=100), Breaking(), tmp_path / "run")
    found = newest(tmp_path / "run")
    assert found and found.step == len(read_metrics(tmp_path / "run" / "metrics.jsonl")[0]) > 3


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def checkpoint(step: int) -> Checkpoint:
    return Checkpoint(step, {"model.a": torch.full((3,), float(step))}, {}, {"best": 0.0, "scaler": {}})


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    folder = RunFolder(tmp_path)
    folder.checkpoints.mkdir()
    return folder


@pytest.mark.parametrize("keep", [1, 2])
def test_a_damaged_newer_checkpoint_pushes_out_no_good_one(folder, keep):
    for step in (2, 4):
        save_checkpoint(folder, checkpoint(step), keep=9)
    for step in (6, 8):
        (folder.checkpoints / f"step_{step:08d}.safetensors").write_bytes(b"torn")
    assert latest_checkpoint(folder)[0].step == 4
    save_checkpoint(folder, checkpoint(5), keep)
    assert latest_checkpoint(folder)[0].step == 5
    names = sorted(path.name for path in folder.checkpoints.iterdir())
    assert len([name for name in names if name.endswith(".safetensors")]) == keep
    assert [name for name in names if "aside" in name] == [f"step_0000000{n}.safetensors.aside" for n in (6, 8)]


def test_what_a_kill_left_half_written_is_removed(folder):
    (folder.checkpoints / ".step_00000007.safetensors.partial").write_bytes(b"half")
    (folder.checkpoints / ".best.safetensors.partial").write_bytes(b"another writer's")
    save_checkpoint(folder, checkpoint(9), keep=1)
    assert sorted(p.name for p in folder.checkpoints.iterdir()) == [
        ".best.safetensors.partial",
        "step_00000009.safetensors",
    ]


def test_other_files_beside_the_checkpoints_are_left_alone(folder):
    (folder.checkpoints / "step_mine.safetensors").write_bytes(b"a copy of the user's")
    for step in (99_999_999, 100_000_000, 100_000_001):
        save_checkpoint(folder, checkpoint(step), keep=1)
    assert latest_checkpoint(folder)[0].step == 100_000_001
    assert sorted(p.name for p in folder.checkpoints.iterdir()) == [
        "step_100000001.safetensors",
        "step_mine.safetensors",
    ]


def test_a_checkpoint_that_somebody_removes_meanwhile_is_no_error(folder, monkeypatch):
    save_checkpoint(folder, checkpoint(1), keep=1)
    unlink = Path.unlink

    def late(path: Path, *args, **kwargs) -> None:
        unlink(path)
        unlink(path, *args, **kwargs)

    monkeypatch.setattr(Path, "unlink", late)
    save_checkpoint(folder, checkpoint(2), keep=1)
    assert latest_checkpoint(folder)[0].step == 2


def test_a_disk_that_turns_read_only_is_reported(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "fsync", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(UserError, match=r"x cannot be written .Read-only file system."):
        write_atomic(tmp_path / "x", b"1")


def test_a_resume_with_another_model_is_refused_and_leaves_the_run_as_it_was(tmp_path, capsys):
    out = tmp_path / "run"
    fit(config_of(steps=2), out=out)
    before = (out / "config.json").read_bytes()
    assert main(["train", "--out", str(out), "--resume", "--steps=4", "--slot_dim=3"]) == 2
    said = capsys.readouterr().err
    assert "checkpoint at step 2 does not fit this configuration" in said and "size mismatch" in said
    assert (out / "config.json").read_bytes() == before
    assert main(["train", "--out", str(out), "--resume", "--steps=4"]) == 0
    assert latest_checkpoint(RunFolder(out))[0].step == 4


@pytest.mark.parametrize("what", ["nan_batch.safetensors", "data.txt", "images/step_00000003.png"])
def test_what_is_not_needed_for_a_resume_may_fail_to_be_written(tmp_path, what):
    """A full disk, or (of the batch with a NaN) another machine, whose processes may have no such folder."""
    out, said = tmp_path / "run", io.StringIO()
    (out / what).mkdir(parents=True)  # in the way of the file
    images = torch.rand(40, 3, 8, 8)
    fit(config_of(steps=3), torch.utils.data.TensorDataset(images), out, stream=said)
    images[:] = float("nan")
    with pytest.raises(NonFiniteLossError):
        fit(config_of(steps=5), torch.utils.data.TensorDataset(images), out, resume=True, stream=said)
    assert f"{what} cannot be written" in said.getvalue()
    assert latest_checkpoint(RunFolder(out))[0].step == 3


def test_two_processes_never_write_one_run(commands, tmp_path):
    """As when a job is started again while its first start still runs; after a kill the folder is free."""
    config, out = config_of(steps=10**6, checkpoint_every=5), tmp_path / "run"
    (tmp_path / "fields.json").write_text(json.dumps(asdict(config)))
    argv = ["train", "--config", str(tmp_path / "fields.json"), "--resume", "--out", str(out)]
    first = commands.start(argv, tmp_path / "err_1")
    deadline = time.monotonic() + 60
    while not newest(out):
        assert first.running() and time.monotonic() < deadline, first.said()
        time.sleep(0.01)
    second = commands.start(argv, tmp_path / "err_2")
    assert second.wait(60) == 2 and f"{out} is being written by another process" in second.said()
    assert first.running()
    first.kill(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    third = commands.start([*argv, f"--steps={latest_checkpoint(RunFolder(out))[0].step + 1}"], tmp_path / "err_3")
    assert third.wait() == 0, third.said()


def test_a_resume_on_other_data_says_so(tmp_path):
    images, said = torch.rand(50, 3, 8, 8), io.StringIO()
    for steps, count in ((1, 40), (2, 40), (3, 50)):
        data = torch.utils.data.TensorDataset(images[:count])
        fit(config_of(steps=steps), data, tmp_path / "run", resume=True, stream=said)
    assert said.getvalue().count("from here on: the run had TensorDataset of 40 images") == 1


# ---- the clock -------------------------------------------------------------------------------------------------------


def test_a_clock_that_jumps_between_two_parts_of_a_run_changes_nothing(commands, tmp_path, threads):
    """Wall clock and the times of all files, before and after a kill: what is newest is told by its step."""
    few = dict(checkpoint_every=3, eval_every=20, keep_checkpoints=3, pixels_per_step=40 if threads == 2 else 0)
    config = config_of(steps=60, threads=threads, **few)
    whole, out = fit(config, out=tmp_path / "whole").out, tmp_path / "run"
    (tmp_path / "fields.json").write_text(json.dumps(asdict(config)))
    argv, rng = ["train", "--config", str(tmp_path / "fields.json"), "--resume", "--out", str(out)], random.Random(3)
    for goal in (9, 30):
        process = commands.start(argv, tmp_path / "err")
        deadline = time.monotonic() + 60
        while not (found := newest(out)) or found.step < goal:
            assert process.running() and time.monotonic() < deadline, process.said()
            for path in out.rglob("*"):  # while it runs too
                if not path.name.endswith(".partial") and path.exists():
                    jump = rng.uniform(0, 4e9)
                    os.utime(path, (jump, jump))
        process.kill(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    last = commands.start(argv, tmp_path / "err")
    assert last.wait() == 0, last.said()
    assert same_weights(whole, out)
    steps = [line["step"] for line in read_metrics(out / "metrics.jsonl")[0]]
    assert steps == list(range(1, 61))


# ---- the loss scaler -------------------------------------------------------------------------------------------------


@pytest.fixture
def scaled(monkeypatch) -> None:
    """fp16's scaler on a CPU, around products in fp32: what it does is the same."""

    class OnCPU(Precision):
        def __init__(self, name: str, device: torch.device):
            super().__init__("fp32", device)
            self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=3)

    monkeypatch.setattr(loop, "Precision", OnCPU)


def test_the_loss_scaler_is_logged_and_resumed(tmp_path, scaled):
    """It starts so high that gradients overflow, and grows again: all goes on as without a stop."""
    whole = fit(config_of(steps=40), out=tmp_path / "whole").out
    for steps in (1, 17, 40):
        fit(config_of(steps=steps), out=tmp_path / "part", resume=True)
    ways = [read_metrics(run / "metrics.jsonl")[0] for run in (whole, tmp_path / "part")]
    scales = [[line["loss_scale"] for line in way] for way in ways]
    assert scales[0] == scales[1] and scales[0][0] == 2.0**127 and same_weights(whole, tmp_path / "part")
    left_out = [line["grad_norm"] is None for line in ways[0]]
    assert left_out[0] and not all(left_out)
    for before, after, out in zip(scales[0], scales[0][1:], left_out, strict=False):
        assert after == before / 2 if out else after in (before, 2 * before)
    assert any(after > before for before, after in zip(scales[0], scales[0][1:], strict=False))


def test_steps_that_are_left_out_change_no_weights(tmp_path, scaled):
    one = fit(config_of(steps=1), out=tmp_path / "run")
    before = {name: value.clone() for name, value in one.model.state_dict().items()}
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[0][0]["grad_norm"] is None
    torch.manual_seed(config_of().seed)
    fresh = initial_model(config_of()).state_dict()
    assert all(torch.equal(before[name], fresh[name]) for name in before)


def test_gradients_that_no_scale_helps_stop_the_run(tmp_path, scaled, monkeypatch):
    monkeypatch.setattr(loop.Group, "sum_step", lambda self, parameters, values: _spoil(parameters))
    with pytest.raises(NonFiniteLossError, match=r"gradient norm (inf|nan)"):
        fit(config_of(steps=400), out=tmp_path / "run")
    *_, last, stopped = read_metrics(tmp_path / "run" / "metrics.jsonl")[0]
    assert last["loss_scale"] == 4 * LEAST_SCALE and last["step"] < 200
    assert stopped["step"] == last["step"] + 1 and stopped["stopped"]


@pytest.mark.parametrize("spoilt", [2, 4])
def test_an_overflow_in_one_of_two_optimisers_leaves_the_step_out_of_both(tmp_path, scaled, monkeypatch, spoilt):
    """Muon has the matrices, AdamW the rest, each with its own verdict; an infinite norm makes all gradients NaN."""
    config = config_of(steps=3, optimizer="muon", precision="fp16", grad_clip=0.0)
    monkeypatch.setattr(loop.Group, "sum_step", lambda self, parameters, values: _spoil(parameters, spoilt))
    model = fit(config, out=tmp_path / "run").model
    torch.manual_seed(config.seed)
    fresh = initial_model(config).state_dict()
    assert all(torch.equal(value, fresh[name]) for name, value in model.state_dict().items())
    scales = [line["loss_scale"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")[0]]
    assert scales == [2.0**127, 2.0**126, 2.0**125]


def test_a_norm_too_large_for_a_number_is_no_matter_of_the_scale(tmp_path, scaled, monkeypatch):
    monkeypatch.setattr(loop.Group, "sum_step", lambda self, parameters, values: _spoil(parameters, value=3e38))
    monkeypatch.setattr(torch.amp.GradScaler, "unscale_", lambda self, optimizer: _verdict(self, optimizer))
    with pytest.raises(NonFiniteLossError, match="gradient norm inf"):
        fit(config_of(steps=9), out=tmp_path / "run")


def _spoil(parameters, ndim: int | None = None, value: float = float("inf")) -> None:
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.fill_(value if ndim in (None, parameter.ndim) else 1.0)


def _verdict(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> None:
    """What ``unscale_`` leaves where all gradients are finite."""
    scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"] = {torch.device("cpu"): torch.zeros(1)}
