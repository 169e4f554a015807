"""What happens to long runs: kills at any moment, full disks, data that vanish. Resumed, they end bit-equal."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import MODEL_8

from fastslots.data import SpritesDataset
from fastslots.errors import UserError
from fastslots.files import write_atomic
from fastslots.runs.folder import RunFolder
from fastslots.runs.log import read_metrics
from fastslots.train import TrainConfig, fit
from fastslots.train.checkpoint import Writer, latest_checkpoint

MINUTE = dict(MODEL_8, batch_size=2, threads=1, warmup=2, optimizer="adam", lr=1e-3, eval_every=0, eval_images=2)


def config_of(**overrides) -> TrainConfig:
    return TrainConfig.preset("sprites-mini", **{**MINUTE, **overrides})


def argv_of(config: TrainConfig, folder: Path, out: Path) -> list[str]:
    path = folder / "fields.json"
    path.write_text(json.dumps(asdict(config)))
    return ["train", "--config", str(path), "--resume", "--out", str(out)]


def last_step(out: Path) -> int:
    """The newest whole line of a log that may be long and is being written."""
    path = out / "metrics.jsonl"
    if not path.exists():
        return 0
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        lines = file.read().split(b"\n")[:-1]
    return json.loads(lines[-1])["step"] if lines and lines[-1].startswith(b"{") else 0


def wait_until(true, process, seconds: float = 120) -> bool:
    """Whether ``true()`` came to hold while the process ran."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, process.said()
        if not process.running():
            return False
        time.sleep(0.001)
    return True


def same_run(a: Path, b: Path) -> None:
    x, y = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)
    lines = [
        [{k: v for k, v in line.items() if k != "images_per_s"} for line in read_metrics(run / "metrics.jsonl")[0]]
        for run in (a, b)
    ]
    assert lines[0] == lines[1]


def killed_at_random(commands, config: TrainConfig, folder: Path, kills: int, seed: int) -> Path:
    """A run that is killed ``kills`` times: while it starts, between steps, or while a checkpoint is being written."""
    rng, out, hits = random.Random(seed), folder / "killed", {"start": 0, "step": 0, "write": 0}
    argv, saved = argv_of(config, folder, out), False
    for number in range(kills):
        process, way = commands.start(argv, folder / "err"), ("write", "step", "start")[number % 3]
        done = last_step(out)  # of the log, which a resume cuts back to its checkpoint
        goal = done + rng.randrange(1, max(2, 2 * (config.steps - done) // (kills - number + 2)))
        alive = way == "start" or wait_until(lambda: last_step(out) >= goal, process, 3600)  # noqa: B023
        if alive and way == "write":
            alive = wait_until(lambda: any((out / "checkpoints").glob(".step*.partial")), process, 3600)
        if alive and way == "start":
            time.sleep(rng.uniform(0, 0.2))
        process.kill(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, f"ended before kill {number}: {process.said()}"
        hits[way] += 1
        good = (out / "checkpoints").is_dir() and latest_checkpoint(RunFolder(out))[0] is not None
        assert good or not saved, f"after kill {number} no checkpoint can be read"
        saved = saved or good
    process = commands.start(argv, folder / "err")
    assert process.wait(3600) == 0, process.said()
    print(f"{kills} kills: {hits}")
    return out


LONG = [pytest.mark.long, pytest.mark.timeout(4 * 3600)]


@pytest.mark.parametrize("kills, steps", [(3, 200), pytest.param(50, 3000, marks=LONG)])
def test_kills_at_random_moments_change_nothing(commands, tmp_path, kills, steps):
    """On one thread; test_kills.py has the first command."""
    config = config_of(steps=steps, checkpoint_every=3, eval_every=50)
    whole = fit(replace(config, checkpoint_every=0), out=tmp_path / "whole").out
    same_run(killed_at_random(commands, config, tmp_path, kills, seed=kills), whole)


def memory(pid: int) -> int:
    """Resident bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_a_week_in_miniature(commands, tmp_path):
    """20,000 steps with 20 kills end bit-equal to as many without, whose memory stays flat."""
    config = config_of(steps=20_000, checkpoint_every=100, eval_every=1_000)
    process = commands.start(argv_of(config, tmp_path, tmp_path / "whole"), tmp_path / "err_whole")
    samples: list[tuple[int, int]] = []
    while process.running():
        samples.append((last_step(tmp_path / "whole"), memory(process.pid)))
        time.sleep(0.2)
    assert process.wait() == 0, process.said()
    first = [
        size for step, size in samples if 1_100 <= step < 3_000
    ]  # once the first evaluation has loaded what it needs
    last = [size for step, size in samples if step >= 18_000]
    growth = np.mean(last) - np.mean(first)
    print(f"resident: {np.mean(first) / 2**20:.1f} MiB, then {np.mean(last) / 2**20:.1f} MiB")
    assert growth < 8 * 2**20
    same_run(killed_at_random(commands, config, tmp_path, 20, seed=7), tmp_path / "whole")


def small_disk(folder: Path) -> bool:
    """A file system of 1 MiB at ``folder``, where this user may mount one."""
    folder.mkdir()
    mount = shutil.which("mount")
    return (
        bool(mount)
        and not subprocess.run(
            [mount, "-t", "tmpfs", "-o", "size=1m", "none", str(folder)], capture_output=True
        ).returncode
    )


@pytest.mark.parametrize("kind", ["limit", "disk"])
def test_a_full_disk_is_reported_and_outlived(commands, tmp_path, kind):
    """Checkpoints fail for a while (ENOSPC, or EFBIG by a limit), training goes on, and nothing is lost at the end."""
    config, out = config_of(steps=150, checkpoint_every=5, keep_checkpoints=1), tmp_path / "run"
    whole = fit(replace(config, checkpoint_every=0), out=tmp_path / "whole").out
    if kind == "disk" and not small_disk(out):
        pytest.skip("mounting a small file system needs root")
    try:
        process = commands.start(argv_of(config, tmp_path, out), tmp_path / "err")
        assert wait_until(lambda: list((out / "checkpoints").glob("step_*")), process), process.said()
        if kind == "limit":  # bytes that a file of this process may have; the log reaches it soon
            least = (out / "metrics.jsonl").stat().st_size + 3_000
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (least, resource.RLIM_INFINITY))
        else:
            with open(out / "filler", "wb", buffering=0) as file:
                try:
                    while file.write(bytes(1 << 10)):
                        pass
                except OSError:
                    pass
        assert wait_until(lambda: "safetensors cannot be written" in process.said(), process), process.said()
        kept, damaged = latest_checkpoint(RunFolder(out))  # what was there before
        assert kept and not damaged
        if kind == "limit":
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        else:
            (out / "filler").unlink()
        assert process.wait() == 0, process.said()
        assert "Training goes on; what was written before is kept" in process.said()
        same_run(out, whole)
    finally:
        if kind == "disk":
            subprocess.run(["umount", str(out)], capture_output=True)


def test_a_disk_full_to_the_end_is_an_error(tmp_path, monkeypatch, capsys):
    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    fit(config_of(steps=2), out=tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot be written .No space left on device.: free space"):
        fit(config_of(steps=4), out=tmp_path, resume=True)
    monkeypatch.undo()
    assert fit(config_of(steps=4), out=tmp_path, resume=True).step == 4
    assert not list(tmp_path.rglob(".*.partial"))


def test_writer_keeps_order_and_reports(tmp_path):
    said: list[str] = []
    writer = Writer(said.append)
    for text in ("a", "b", "c", "d", "e"):
        writer.submit(lambda text=text: write_atomic(tmp_path / "x", text.encode()))
    writer.finish()
    assert (tmp_path / "x").read_text() == "e" and not said
    writer.submit(lambda: write_atomic(tmp_path / "none" / "x", b""))
    with pytest.raises(UserError, match="none/x cannot be written"):
        writer.finish()
    writer.submit(lambda: write_atomic(tmp_path / "x", b"f"))
    writer.finish()  # the newest is there: no error
    writer.close()
    assert len(said) == 1


def packed_sprites(folder: Path) -> Path:
    from fastslots.cli import main

    assert main(["data", "generate", "sprites", str(folder), "--count=40", "--size=8"]) == 0
    return folder


def test_data_that_are_cut_while_in_use_stop_the_run_with_a_checkpoint(commands, tmp_path):
    data = packed_sprites(tmp_path / "data")
    config, out = config_of(data=str(data), steps=10**6, checkpoint_every=0), tmp_path / "run"
    process = commands.start(argv_of(config, tmp_path, out), tmp_path / "err")
    assert wait_until(lambda: last_step(out) >= 3, process), process.said()
    os.truncate(data / "images.u8", 100)
    assert process.wait(60) == 2
    assert "images.u8 has become shorter while it was in use" in process.said()
    assert latest_checkpoint(RunFolder(out))[0].step == last_step(out)


def test_data_that_vanished_are_named(commands, tmp_path):
    data = packed_sprites(tmp_path / "data")
    config, out = config_of(data=str(data), steps=10**6, checkpoint_every=0), tmp_path / "run"
    process = commands.start(argv_of(config, tmp_path, out), tmp_path / "err")
    assert wait_until(lambda: last_step(out) >= 3, process), process.said()
    shutil.rmtree(data)  # the maps hold on to the files: the run goes on
    seen = last_step(out)
    assert wait_until(lambda: last_step(out) > seen + 3, process), process.said()
    process.kill(signal.SIGTERM)
    assert process.wait(60) == 143
    again = commands.start(argv_of(config, tmp_path, out), tmp_path / "err_again")
    assert again.wait(60) == 2 and f"{data}: no such file or folder" in again.said()


def test_a_clock_that_jumps_changes_nothing(tmp_path, monkeypatch):
    whole = fit(config_of(steps=5), out=tmp_path / "whole").out
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + random.uniform(-1e9, 1e9))
    same_run(fit(config_of(steps=5), out=tmp_path / "jumping").out, whole)


def test_nan_in_a_batch_can_be_resumed_past(tmp_path):
    """The run stops with good weights; with the data mended it goes on from there, bit for bit."""
    from fastslots.train import NonFiniteLossError

    images = torch.from_numpy(SpritesDataset(0, 8, count=30).batch(np.arange(30))[0])
    pictures = images.permute(0, 3, 1, 2).float() / 255
    whole = fit(config_of(steps=40), torch.utils.data.TensorDataset(pictures), tmp_path / "whole").out
    poisoned = pictures.clone()
    poisoned[7] = float("nan")
    with pytest.raises(NonFiniteLossError):
        fit(config_of(steps=40), torch.utils.data.TensorDataset(poisoned), tmp_path / "run")
    fit(config_of(steps=40), torch.utils.data.TensorDataset(pictures), tmp_path / "run", resume=True)
    same_run(tmp_path / "run", whole)
