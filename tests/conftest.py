"""Two threads at most, so that a test machine is shared fairly; ``devices`` says where ops and kernels run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):  # before torch: each its share of the cores
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin for one another take a busy machine's cores

import torch
from devices import (  # noqa: F401  (a fixture, and hooks of pytest)
    device,
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_configure,
    pytest_report_header,
    pytest_runtest_call,
    pytest_runtest_setup,
    pytest_terminal_summary,
)

torch.set_num_threads(min(2, torch.get_num_threads()))

# A test run under nohup ignores a hangup, and what it starts would inherit that.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Subprocesses started at the root of a checkout import the installed package, not the source folder (Python 3.11 on).
os.environ["PYTHONSAFEPATH"] = "1"

_COMMANDS = """
import json, os, signal, sys, time
import scipy.optimize, torch._dynamo, PIL.PngImagePlugin  # which a run imports when it needs them: 2 s of each fork
import fastslots.train, fastslots.data.check
from fastslots.cli import main
for line in sys.stdin:
    ask = json.loads(line)
    if "argv" in ask:
        pid = os.fork()
        if not pid:
            os.dup2(os.open(ask["stderr"], os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
            os.dup2(os.open(ask["stdout"], os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
            os.environ.update(ask["env"])
            os.chdir(ask["cwd"])
            code = 99
            try:
                code = main(ask["argv"])
            finally:
                os._exit(code)
        print(pid, flush=True)
    else:
        deadline = time.monotonic() + ask["seconds"]
        ended, status = os.waitpid(ask["pid"], os.WNOHANG)
        while not ended and time.monotonic() < deadline:
            time.sleep(0.002)
            ended, status = os.waitpid(ask["pid"], os.WNOHANG)
        if not ended:
            os.kill(ask["pid"], signal.SIGKILL)
            os.waitpid(ask["pid"], 0)
        print(os.waitstatus_to_exitcode(status) if ended else "null", flush=True)
"""


@dataclass(frozen=True)
class Command:
    """A running ``fastslots`` command."""

    pid: int
    stderr: Path
    _commands: Commands

    def kill(self, number: int) -> None:
        os.kill(self.pid, number)  # one that has ended stays a zombie until ``wait``, so its pid is nobody else's

    def wait(self, seconds: float = 120) -> int | None:
        """Exit code, minus the signal where one ended it; None where it had to be killed after ``seconds``."""
        self._commands.unwaited.discard(self)
        return self._commands.ask({"pid": self.pid, "seconds": seconds})

    def said(self) -> str:
        return self.stderr.read_text() if self.stderr.exists() else ""

    def running(self) -> bool:
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


class Commands:
    """Starts ``fastslots`` commands as forks of one process that has imported everything: 0.05 s in place of 4."""

    def __init__(self, **env: str) -> None:
        """env: of that process from its start on, LD_PRELOAD say."""
        self.unwaited: set[Command] = set()
        self._parent = subprocess.Popen(
            [sys.executable, "-c", _COMMANDS],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | env,
        )

    def ask(self, what: dict) -> int | None:
        assert self._parent.stdin and self._parent.stdout
        self._parent.stdin.write(json.dumps(what) + "\n")
        self._parent.stdin.flush()
        return json.loads(self._parent.stdout.readline())

    def start(
        self, argv: list[str], stderr: Path, cwd: str | Path = ".", stdout: str | Path = os.devnull, **env: str
    ) -> Command:
        pid = self.ask({"argv": argv, "stderr": str(stderr), "stdout": str(stdout), "env": env, "cwd": str(cwd)})
        assert pid is not None
        self.unwaited.add(command := Command(pid, stderr, self))
        return command

    def close(self) -> None:
        for command in self.unwaited:  # of a test that failed: it would go on for hours
            command.kill(signal.SIGKILL)
        self._parent.communicate()


@pytest.fixture(params=[2, 3])
def threads(request) -> Iterator[int]:
    """Of torch: what repeats on one thread may not on two, and three never share work evenly."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def commands() -> Iterator[Commands]:
    running = Commands()
    yield running
    running.close()


@pytest.fixture(scope="module")
def commands_with() -> Iterator[Callable[..., Commands]]:
    """Commands whose environment is another from the start: ``commands_with(LD_PRELOAD=...)``."""
    running: list[Commands] = []

    def start(**env: str) -> Commands:
        running.append(Commands(**env))
        return running[-1]

    yield start
    for one in running:
        one.close()
