"""The threads of a command: how many, by what the machine and its user allow, and how they wait."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from fastslots import threads


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """-> function that sets up a machine: processors allowed, hyperthreads a core, control groups' files."""
    monkeypatch.setattr(threads, "TOPOLOGY", tmp_path / "cpus")
    monkeypatch.setattr(threads, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(threads, "MEMBERSHIP", tmp_path / "membership")

    def make(processors: int, siblings: int = 1, membership: str = "", **files: str) -> None:
        monkeypatch.setattr(threads, "_affinity", lambda: set(range(processors)))
        for number in range(processors):
            path = tmp_path / f"cpus/cpu{number}/topology/thread_siblings_list"
            path.parent.mkdir(parents=True)
            path.write_text(f"{number // siblings * siblings}-{number // siblings * siblings + siblings - 1}\n")
        (tmp_path / "membership").write_text(membership)
        for name, text in files.items():
            path = tmp_path / "cgroup" / name.replace("__", "/").replace("_max", ".max").replace("cpu_cfs", "cpu.cfs")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return make


@pytest.mark.parametrize(
    "asked, count, why",
    [
        (None, 4, "a thread for each core"),
        ("3", 3, "OMP_NUM_THREADS is 3"),
        ("8", 8, "OMP_NUM_THREADS is 8"),  # hyperthreads, but asked for
        ("2,1", 2, "OMP_NUM_THREADS is 2,1"),
        ("99", 8, "above the processors"),
        ("0", 4, "'0', which is no number of threads"),
        ("-2", 4, "'-2', which is no number"),
        ("many", 4, "'many', which is no number"),
        ("", 4, "'', which is no number"),
    ],
)
def test_what_the_environment_asks_for(machine, asked, count, why):
    machine(8, siblings=2)
    environ = {} if asked is None else {"OMP_NUM_THREADS": asked}
    choice = threads.choose(environ)
    assert choice.count == count and why in choice.why and choice.asked == asked


@pytest.mark.parametrize(
    "membership, files, count",
    [
        ("0::/\n", dict(cpu_max="50000 100000\n"), 1),
        ("0::/a/b\n", dict(a__cpu_max="150000 100000\n", a__b__cpu_max="max 100000\n"), 2),
        ("0::/elsewhere\n", dict(cpu_max="300000 100000\n"), 3),  # in a container the path is the host's
        ("4:cpu:/a\n", dict(cpu__a__cpu_cfs_quota_us="200000\n", cpu__a__cpu_cfs_period_us="100000\n"), 2),
        ("4:cpu:/a\n3:memory:/b\n", dict(cpu__a__cpu_cfs_quota_us="-1\n", cpu__a__cpu_cfs_period_us="100000\n"), 4),
        ("0::/\n", dict(cpu_max="nonsense\n"), 4),
    ],
)
def test_quotas_of_control_groups(machine, membership, files, count):
    machine(4, membership=membership, **files)
    choice = threads.choose({})
    assert choice.count == count and ("quota" in choice.why) == (count < 4)


def test_processes_of_one_machine_share_it(machine):
    machine(8)
    assert threads.choose({"LOCAL_WORLD_SIZE": "4"}).count == 2
    assert threads.choose({"LOCAL_WORLD_SIZE": "4", "OMP_NUM_THREADS": "1"}).count == 1  # as torchrun sets it
    assert threads.choose({"LOCAL_WORLD_SIZE": "99"}).count == 1


def test_a_machine_that_tells_nothing(monkeypatch, tmp_path):
    for name in ("TOPOLOGY", "CGROUPS", "MEMBERSHIP"):
        monkeypatch.setattr(threads, name, tmp_path / "nowhere")
    assert threads.choose({}).count == len(os.sched_getaffinity(0))


CODE = """
import os
from fastslots import threads
threads.prepare()
import torch
threads.prepare({})
torch.set_num_threads(torch.get_num_threads())
print(torch.get_num_threads(), threads.asked(), threads.waits_asleep())
"""


def test_torch_takes_what_was_chosen():
    """Each value in a process of its own, as OpenMP reads it once; a bad one is no word of warning."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    running = []
    for asked in ("0", "999", "many"):
        argv = [sys.executable, "-c", CODE]
        env = environ | {"OMP_NUM_THREADS": asked}
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        running.append((asked, subprocess.Popen(argv, env=env, **pipes)))
    for asked, process in running:
        out, err = process.communicate()
        count, told, asleep = out.split()
        assert process.returncode == 0 and not err and (told, asleep) == (asked, "True")
        assert 1 <= int(count) <= len(os.sched_getaffinity(0))


def test_commands_choose_before_torch_is_there():
    """Whatever a command imports: the choice is made, and its threads wait asleep."""
    code = "import sys, fastslots.cli; assert 'torch' not in sys.modules; sys.exit(fastslots.cli.main(['doctor']))"
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "wait for one another asleep" in done.stdout and "a thread for each core" in done.stdout
