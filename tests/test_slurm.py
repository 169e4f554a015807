"""examples/slurm.sh on this machine: two processes, Slurm's signal when the job's time is nearly over, and a resume."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import MODEL_16, flags

from fastslots.runs.folder import RunFolder
from fastslots.runs.log import read_metrics

ROOT = Path(__file__).parents[1]
SMALL = [
    "sprites-mini",
    *flags(MODEL_16 | {"cnn_stride": 1, "batch_size": 4, "threads": 1, "eval_images": 4, "device": "cpu"}),
]


@pytest.fixture
def cluster(tmp_path):
    """The environment of a job of two processes on one node, where srun and scontrol do what Slurm's would."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in {
        "srun": 'exec "$@"',
        "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
        "scontrol": f'if [ "$1" = show ]; then echo localhost; else echo "$@" >> {tmp_path}/asked; fi',
    }.items():
        (commands / name).write_text(f"#!/bin/bash\n{text}\n")
        (commands / name).chmod(0o755)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_GPUS_ON_NODE": "2", "SLURM_JOB_NODELIST": "here"}
    return {**os.environ, **job, "PATH": f"{commands}:{os.environ['PATH']}", "PORT": str(port), "OMP_NUM_THREADS": "1"}


def job(cluster, *arguments: str | Path) -> subprocess.Popen:
    command = [ROOT / "examples" / "slurm.sh", *SMALL, *arguments]
    return subprocess.Popen(command, env=cluster, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_job_that_runs_out_of_time_goes_on_in_the_next(cluster, tmp_path):
    folder = RunFolder(tmp_path / "run")
    arguments = ("--steps", "100000", "--log_every", "1", "--eval_every", "0", "--out", folder.path)
    first = job(cluster, *arguments)
    deadline = time.monotonic() + 200
    while not (folder.metrics.is_file() and len(read_metrics(folder.metrics)[0]) > 3):
        assert first.poll() is None and time.monotonic() < deadline, first.communicate()[0]
        time.sleep(0.1)
    first.send_signal(signal.SIGTERM)  # to the script alone, as `--signal=B:TERM@120` does
    said = first.communicate(timeout=100)[0]
    assert (tmp_path / "asked").read_text() == "requeue 7\n", said
    done = max(step for step, _ in folder.checkpoint_files())

    second = job(cluster, *arguments[2:], "--steps", str(done + 3))
    said = second.communicate(timeout=200)[0]
    assert second.returncode == 0 and f"resumed at step {done}" in said, said
    assert (tmp_path / "asked").read_text() == "requeue 7\n", "a job that has finished asks for no other"
