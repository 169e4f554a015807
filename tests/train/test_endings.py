"""How a run ends that has no memory left, whose terminal is closed, or whose folder cannot be written."""

from __future__ import annotations

import json
import os
import pty
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import MODEL_8, same_weights

from fastslots.cli import main
from fastslots.distributed import Group, StopSignals
from fastslots.runs.folder import RunFolder
from fastslots.runs.log import read_metrics
from fastslots.train import TrainConfig, fit
from fastslots.train.checkpoint import latest_checkpoint
from fastslots.train.device import steps

TINY = dict(MODEL_8, batch_size=2, threads=1, eval_every=0, eval_images=2, checkpoint_every=2)


def argv_of(folder: Path, out: Path, **fields) -> list[str]:
    config = TrainConfig.preset("sprites-mini", **(TINY | fields))
    (folder / "fields.json").write_text(json.dumps(asdict(config)))
    return ["train", "--config", str(folder / "fields.json"), "--resume", "--out", str(out)]


def until(true, process, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert process.running() and time.monotonic() < deadline, process.said()
        time.sleep(0.01)


# ---- memory ----------------------------------------------------------------------------------------------------------

ALLOCATOR = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"
REFUSALS = [
    MemoryError(),
    MemoryError("std::bad_alloc"),
    RuntimeError(ALLOCATOR),
    torch.OutOfMemoryError("CUDA out of memory."),
]


@pytest.mark.parametrize("refusal", REFUSALS, ids=["Python", "C++", "torch", "GPU"])
def test_a_step_without_memory_is_one_line_and_can_be_resumed(tmp_path, monkeypatch, capsys, refusal):
    whole = fit(TrainConfig.preset("sprites-mini", **TINY, steps=6), out=tmp_path / "whole").out
    step = steps.training_step

    def refused(*args, **more):
        if args[4] == 4:
            raise refusal
        return step(*args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(steps, "training_step", refused)
        assert main(argv_of(tmp_path, tmp_path / "run", steps=6)) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fastslots")]
    assert len(said) == 1 and "out of memory: lower --batch_size" in said[0] and "--resume" in said[0]
    assert latest_checkpoint(RunFolder(tmp_path / "run"))[0].step == 3
    assert main(argv_of(tmp_path, tmp_path / "run", steps=6)) == 0
    assert same_weights(whole, tmp_path / "run")


def test_another_error_is_not_taken_for_it(tmp_path, monkeypatch):
    def wrong(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr(steps, "training_step", wrong)
    with pytest.raises(RuntimeError, match="a bug"):
        main(argv_of(tmp_path, tmp_path / "run", steps=6))


def test_a_limit_of_memory(commands, tmp_path):
    """RLIMIT_AS: an evaluation that needs more than the steps before it."""
    out = tmp_path / "run"
    few = dict(eval_every=10**5, checkpoint_every=5)
    process = commands.start(argv_of(tmp_path, out, steps=10**6, **few), tmp_path / "err")
    until(lambda: list((out / "checkpoints").glob("step_*")), process)
    size = int(Path(f"/proc/{process.pid}/statm").read_text().split()[0]) * resource.getpagesize()
    resource.prlimit(process.pid, resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))
    process.kill(signal.SIGTERM)  # the picture of slots and the page, which a stop leaves
    assert process.wait(120) in (2, 143) and "Traceback" not in process.said(), process.said()
    found, damaged = latest_checkpoint(RunFolder(out))
    assert found and not damaged
    fields = dict(few, steps=found.step + 2)
    assert main(argv_of(tmp_path, out, **fields)) == 0
    whole = fit(TrainConfig.preset("sprites-mini", **(TINY | fields)), out=tmp_path / "whole").out
    assert load_file(out / "model.safetensors").keys() == load_file(whole / "model.safetensors").keys()


# ---- the terminal ----------------------------------------------------------------------------------------------------


def test_a_hangup_stops_after_a_step_and_can_be_resumed(commands, tmp_path):
    out = tmp_path / "run"
    process = commands.start(argv_of(tmp_path, out, steps=10**6, checkpoint_every=0), tmp_path / "err")
    until(lambda: (out / "metrics.jsonl").exists() and read_metrics(out / "metrics.jsonl")[0], process)
    process.kill(signal.SIGHUP)
    assert process.wait(60) == 128 + signal.SIGHUP and "go on with --resume" in process.said()
    steps = [line["step"] for line in read_metrics(out / "metrics.jsonl")[0]]
    assert latest_checkpoint(RunFolder(out))[0].step == steps[-1]


def test_a_hangup_is_ignored_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        group = Group()
        with StopSignals(group):
            os.kill(os.getpid(), signal.SIGHUP)
        assert not group.asked and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_terminal_that_is_closed(tmp_path):
    """A window of somebody's: its run has a checkpoint of its last step, and its log is whole."""
    out = tmp_path / "run"
    argv = argv_of(tmp_path, out, steps=10**6, checkpoint_every=0)
    pid, terminal = pty.fork()
    if not pid:
        os.execv(sys.executable, [sys.executable, "-m", "fastslots", *argv])
    try:
        deadline, shown = time.monotonic() + 200, b""
        while b"images/s" not in shown:
            assert time.monotonic() < deadline, shown
            shown += os.read(terminal, 4096)
    finally:
        os.close(terminal)
    ended, status = 0, 0
    while not ended and time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        time.sleep(0.05)
    if not ended:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert ended and os.waitstatus_to_exitcode(status) == 128 + signal.SIGHUP
    steps = [line["step"] for line in read_metrics(out / "metrics.jsonl")[0]]
    assert latest_checkpoint(RunFolder(out))[0].step == steps[-1] > 0


# ---- places that cannot be written -----------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


@pytest.mark.skipif(os.getuid() == 0 and not shutil.which("setpriv"), reason="root writes anywhere: needs setpriv")
def test_a_run_that_cannot_be_written_is_read_and_refused(tmp_path):
    """Its scores are printed; what would write ends in one line. In one process, for its imports are slow."""
    run = fit(TrainConfig.preset("sprites-mini", **TINY, steps=2), out=tmp_path / "run").out
    commands = [["eval", "run"], ["report", "run"], ["train", "--resume", "--out", "run", "--steps", "4"]]
    code = f"from fastslots.cli import main\nprint([main(argv) for argv in {commands!r}])"
    caps = "-dac_override,-dac_read_search"
    drop = ["setpriv", f"--bounding-set={caps}", f"--inh-caps={caps}"] if os.getuid() == 0 else []
    for path in (run, *run.rglob("*")):
        path.chmod(path.stat().st_mode & ~0o222)
    before = contents(run)
    try:
        done = subprocess.run([*drop, sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    finally:
        for path in (run, *run.rglob("*")):
            path.chmod(path.stat().st_mode | 0o200)
    assert done.stdout.splitlines()[-1] == "[0, 2, 2]", done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("fastslots: error: ")]
    assert len(errors) == 2 and "Traceback" not in done.stderr
    assert all("run" in line and "cannot be written" in line for line in errors)
    assert contents(run) == before


def test_without_a_home_folder(tmp_path, monkeypatch, capsys):
    """A user whom the machine does not know, as in a container: what needs no cache runs, the rest says what to set."""

    def unknown(self):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", unknown)
    monkeypatch.delenv("FASTSLOTS_CACHE", raising=False)
    assert main(argv_of(tmp_path, tmp_path / "run", steps=2)) == 0
    assert main(["eval", str(tmp_path / "run")]) == 0 and main(["report", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    assert main(["data", "check", "s3://bucket/x"]) == 2
    line = "fastslots: error: there is no home folder for ~/.cache/fastslots: set FASTSLOTS_CACHE or HOME"
    assert capsys.readouterr().err.splitlines() == [line]
