"""Runs of several processes (gloo on CPUs) against one: same weights within rounding, one writer, clean ends."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from processes import as_torchrun
from safetensors.torch import load_file
from tiny import MODEL_16

from fastslots.distributed import Group, own_store
from fastslots.errors import UserError
from fastslots.runs.folder import RunFolder
from fastslots.runs.log import read_metrics
from fastslots.train import TrainConfig, fit
from fastslots.train.checkpoint import latest_checkpoint

# 7 images a step: shares of 3 and 4, or of 1, 2, 2, 2. Adam, and clipping that acts, see the whole gradient.
SMALL = dict(
    MODEL_16, octaves=3, pixels_per_step=20, batch_size=7, steps=12, threads=1, eval_every=6, eval_images=5,
    checkpoint_every=4, optimizer="adam", lr=1e-3, schedule="constant",
    warmup=2, alpha_start=0, alpha_warmup=4, beta_start=0,
)  # fmt: skip
BOUND = 2e-6
"""Relative difference of final weights that summing in another order may make in 12 steps of Adam (seen: 7e-8)."""


def small(**overrides) -> TrainConfig:
    return TrainConfig.preset("sprites-mini", **{**SMALL, **overrides})


def flags(config: TrainConfig, folder: Path) -> list[str]:
    path = folder / "fields.json"
    path.write_text(json.dumps(dataclasses.asdict(config)))
    return ["train", "--config", str(path)]


def weights(folder: Path) -> torch.Tensor:
    return torch.cat([w.flatten() for _, w in sorted(load_file(folder / "model.safetensors").items())])


def difference(a: Path, b: Path) -> float:
    return ((weights(a) - weights(b)).norm() / weights(a).norm()).item()


def steps_done(out: Path) -> int:
    return len(read_metrics(out / "metrics.jsonl")[0])


def wait_for_steps(processes, out: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while steps_done(out) < count:
        assert time.monotonic() < deadline and processes[0].running(), processes[0].said()
        time.sleep(0.01)


def test_shares_are_contiguous_and_even():
    group = Group()
    for size in (1, 2, 3, 4, 7):
        group.size, parts = size, []
        for group.rank in range(size):
            parts.append(group.share(7))
        assert [i for part in parts for i in part] == list(range(7))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_process_group_of_somebody_else_is_refused(tmp_path):
    """Alone in each of its processes, every one of them would compute the whole batch."""
    code = """
import sys
import torch
import torch.distributed as dist
from fastslots.errors import UserError
from fastslots.distributed import Group

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=int(sys.argv[3]))
try:
    print(Group.join(torch.device("cpu"), 4).size)
except UserError as error:
    print(error)
dist.destroy_process_group()
"""
    for size, expected in ((2, "a process group is initialised already"), (1, "1\n")):
        commands = [[sys.executable, "-c", code, str(rank), f"{tmp_path}/{size}", str(size)] for rank in range(size)]
        processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
        for process in processes:
            assert expected in process.communicate(timeout=120)[0]


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    return fit(small(), out=tmp_path_factory.mktemp("one") / "run").out


def agrees(out: Path, one: Path) -> None:
    assert 0 < difference(one, out) < BOUND
    (training, evaluations), (expected, scores) = (read_metrics(run / "metrics.jsonl") for run in (out, one))
    assert [line["step"] for line in training] == list(range(1, 13))
    for name in ("loss", "recon", "kl", "interaction", "grad_norm"):
        assert [line[name] for line in training] == pytest.approx([line[name] for line in expected], rel=1e-4)
    assert [line["step"] for line in evaluations] == [6, 12]
    for name in ("recon", "kl", "interaction", "j_ari", "jis", "fg_ari", "mbo", "miou", "foreground_pixels"):
        assert evaluations[-1][name] == pytest.approx(scores[-1][name], rel=1e-3, abs=1e-6)
    assert {p.name for p in out.iterdir()} == {p.name for p in one.iterdir()}


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """By torchrun itself."""
    folder = tmp_path_factory.mktemp("two")
    argv = ["--nproc-per-node=2", "--no-python", sys.executable, "-m", "fastslots", *flags(small(), folder)]
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", *argv, f"--out={folder / 'run'}"],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=250,
    )
    assert run.returncode == 0, run.stderr
    assert "2 processes on cpu" in run.stderr and run.stdout.count("12 steps done") == 1
    return folder / "run"


def test_two_processes_train_as_one(one, two):
    agrees(two, one)


@pytest.mark.long
@pytest.mark.parametrize("size, accumulate", [(3, 1), (4, 1), (2, 7)])
def test_more_processes_train_as_one(commands, tmp_path, one, size, accumulate):
    processes = as_torchrun(
        commands, size, [*flags(small(accumulate=accumulate), tmp_path), f"--out={tmp_path / 'run'}"], tmp_path
    )
    assert [p.wait(250) for p in processes] == [0] * size, processes[0].said()
    agrees(tmp_path / "run", one)


def test_resume_on_fewer_processes(one, two, tmp_path):
    shutil.copytree(two, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").glob("*0012.safetensors"):
        path.unlink()
    fit(small(), out=tmp_path / "run", resume=True)
    agrees(tmp_path / "run", one)


def test_a_signal_to_one_process_stops_all_after_the_same_step(commands, tmp_path):
    argv = [*flags(small(steps=10**6, eval_every=0, checkpoint_every=0), tmp_path), f"--out={tmp_path / 'run'}"]
    processes = as_torchrun(commands, 2, argv, tmp_path)
    wait_for_steps(processes, tmp_path / "run", 3)
    processes[1].kill(signal.SIGTERM)
    assert [p.wait(60) for p in processes] == [143, 143]
    step = latest_checkpoint(RunFolder(tmp_path / "run"))[0].step
    assert step == steps_done(tmp_path / "run") and f"stopped by signal 15 at step {step}" in processes[0].said()
    assert not processes[1].said()  # one writer


@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_process_ends_the_others_soon_and_is_named(commands, tmp_path, lost):
    """Within 20 s: gloo notices at once, the roll call takes two."""
    config = small(steps=10**6, eval_every=0, checkpoint_every=1 - lost)  # the first one saves what has been learnt
    argv = [*flags(config, tmp_path), f"--out={tmp_path / 'run'}"]
    processes = as_torchrun(commands, 2, argv, tmp_path)
    wait_for_steps(processes, tmp_path / "run", 3)
    deadline = time.monotonic() + 60  # a checkpoint is written behind the steps
    while lost == 0 and not latest_checkpoint(RunFolder(tmp_path / "run"))[0]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    processes[lost].kill(signal.SIGKILL)
    began = time.monotonic()
    assert processes[lost].wait(10) == -signal.SIGKILL
    assert processes[1 - lost].wait(60) == 2
    assert time.monotonic() - began < 20
    said = processes[1 - lost].said()
    assert "has ended or does not answer" in said and "--resume" in said and "Traceback" not in said
    if lost == 1:  # process 0 also holds the rendezvous here, and with it the list of names; torchrun holds it apart
        assert f"process 1 (host {socket.gethostname()}, process id {processes[1].pid}) of the 2 has ended" in said
    saved = latest_checkpoint(RunFolder(tmp_path / "run"))[0].step
    assert saved == steps_done(tmp_path / "run") if lost == 1 else saved > 0


def test_a_restart_takes_nothing_for_its_own_that_an_earlier_start_left():
    """torchrun keeps the store; whoever comes first must not meet those that have ended."""
    store = torch.distributed.HashStore()

    def start(rank: int, attempt: int):
        time.sleep((0.0, 0.7, 0.2)[(rank + attempt) % 3])
        own = own_store(store, rank, 3)
        own.set(f"{rank}", f"of start {attempt}")
        return own

    for attempt in range(3):
        with ThreadPoolExecutor(3) as pool:
            stores = list(pool.map(start, range(3), [attempt] * 3))
        assert {own.get(f"{rank}") for own in stores for rank in range(3)} == {f"of start {attempt}".encode()}
        assert not any(own.check(["roll call"]) for own in stores)
        stores[0].set("roll call", "")


def test_a_process_in_a_long_step_answers_the_roll_call():
    """Process 2 has not come to the exchange that failed: it is at work, and process 1 alone is missing."""
    store, groups = torch.distributed.HashStore(), [Group(), Group(), Group()]
    for rank, group in enumerate(groups):
        group.rank, group.size, group._store = rank, 3, store
        store.set(f"who/{rank}", f"host h, process id {rank}")
    groups[2]._listener.start()
    said = str(groups[0]._lost(RuntimeError("connection closed")))
    groups[2].leave()
    assert said.startswith("process 1 (host h, process id 1) of the 3 has ended") and not groups[2]._listener.is_alive()


def test_nan_on_one_process_stops_all(commands, tmp_path):
    argv = [*flags(small(lr=1e30, steps=500, grad_clip=0.0, optimizer="sgd"), tmp_path), f"--out={tmp_path / 'run'}"]
    processes = as_torchrun(commands, 2, argv, tmp_path)
    assert [p.wait(60) for p in processes] == [1, 1]
    assert "stopped: step" in processes[0].said()
    assert (tmp_path / "run" / "nan_batch.safetensors").exists()
    # the step that was not finite has a line, and the checkpoint is of the one before it
    assert latest_checkpoint(RunFolder(tmp_path / "run"))[0].step == steps_done(tmp_path / "run") - 1


def test_what_the_first_process_refuses_all_refuse(commands, tmp_path, one):
    processes = as_torchrun(commands, 2, [*flags(small(), tmp_path), f"--out={one}"], tmp_path)
    assert [p.wait(60) for p in processes] == [2, 2]
    assert all("already holds a run: add --resume" in p.said() for p in processes)


def test_scaling_table(one, two, tmp_path):
    """What ``python -m fastslots.bench.processes`` prints; its runs need a machine that does nothing else."""
    from fastslots.bench.processes import difference, rate, table

    assert 0 < difference(one, two) < BOUND
    lines = [{"step": step, "images_per_s": 5.0 if step > 10 else 1e9} for step in range(1, 14)]
    lines.append({"step": 13, "eval": "val"})
    (tmp_path / "log").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert rate(tmp_path / "log") == 5.0
    assert "| 2 | 15.0 | 75% | 5.0e-08 |" in table({1: 10.0, 2: 15.0}, {2: 5e-8})


def test_fewer_images_than_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(UserError, match="batch_size 7 is less than the 8 processes"):
        Group.join(torch.device("cpu"), 7)
