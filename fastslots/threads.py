"""How many threads a command's process computes with, and how they wait for one another.

OpenMP's runtime reads both from the environment when torch is imported, so the commands call ``prepare`` before.

Threads wait asleep. By default they spin for milliseconds at every barrier, of which a training step has hundreds: on
a machine where another program has one of the cores, even a niced one, the others then burn theirs waiting for it. For
some 25 µs (libgomp's; others ignore it) they do spin: a thread that sleeps takes that long to come back, and in a step
that is two calls of kernels, most waits are shorter.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from pathlib import Path

COUNT, POLICY, SPINS = "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"
LOOKS = "1000"
"""How often a thread looks whether it can go on, before it sleeps."""
TOPOLOGY = Path("/sys/devices/system/cpu")
CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


@dataclass(frozen=True)
class Threads:
    """A choice: how many, why, and what the environment had asked for (None: nothing)."""

    count: int
    why: str
    asked: str | None


_chosen: Threads | None = None


def prepare(environ: MutableMapping[str, str] = os.environ) -> None:
    """Choose the threads of this process; without effect where torch has been imported already."""
    global _chosen
    if "torch" in sys.modules or _chosen is not None:
        return
    _chosen = choose(environ)
    environ[COUNT] = str(_chosen.count)
    if SPINS not in environ and POLICY not in environ:
        environ.update({POLICY: "passive", SPINS: LOOKS})


def chosen() -> Threads | None:
    """What ``prepare`` chose; None where it had no say."""
    return _chosen


def asked() -> str | None:
    """OMP_NUM_THREADS as the user had it, before ``prepare``."""
    return _chosen.asked if _chosen else os.environ.get(COUNT)


def waits_asleep(environ: MutableMapping[str, str] = os.environ) -> bool:
    """Whether the environment has OpenMP's threads sleep rather than spin."""
    return environ.get(POLICY, "").lower() == "passive" or environ.get(SPINS, "").isdigit()


def choose(environ: MutableMapping[str, str] = os.environ) -> Threads:
    """OMP_NUM_THREADS where it is a number of threads and not above the processors allowed; else a thread a core.

    Cores are counted, not their hyperthreads: the kernels fill a core's arithmetic units with one. Of several
    processes that torchrun starts on a machine, each gets its share.
    """
    asked, allowed, limits = environ.get(COUNT), usable_processors(), _limits()
    first = (asked or "").split(",")[0].strip()  # a list is for nested regions
    if first.isdigit() and 0 < int(first) <= allowed:
        return Threads(int(first), f"{COUNT} is {asked}", asked)
    cores = max(1, min(allowed, usable_cores()))
    count, why = cores, f"a thread for each core{limits}"
    ranks = environ.get("LOCAL_WORLD_SIZE", "")
    if first.isdigit() and int(first) > allowed:
        count, why = allowed, f"{COUNT} is {asked}, above the processors that this process may use{limits}"
    elif ranks.isdigit() and int(ranks) > 1:
        count, why = max(1, cores // int(ranks)), f"{why}, shared by {ranks} processes"
    if asked is not None and not (first.isdigit() and int(first)):
        why = f"{COUNT} is {asked!r}, which is no number of threads: {why}"
    return Threads(count, why, asked)


def usable_processors() -> int:
    """Processors that this process may use, which in a container are fewer than the machine's: by its affinity and the
    quotas of its control groups, a part of a processor counted as one."""
    quota = _quota()
    return len(_affinity()) if quota is None else max(1, min(len(_affinity()), math.ceil(quota)))


def usable_cores() -> int:
    """Cores with a processor that this process may use; hyperthreads of one core count once."""
    cores = set()
    for number in _affinity():
        path = TOPOLOGY / f"cpu{number}/topology/thread_siblings_list"
        try:
            cores.add(path.read_text().strip())
        except OSError:
            cores.add(str(number))
    return len(cores)


def _affinity() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _limits() -> str:
    """The limits that hold, in words."""
    quota, machine, own = _quota(), os.cpu_count() or 1, len(_affinity())
    words = [f"{own} of {machine} processors allowed"] if own < machine else []
    if quota is not None and quota < own:
        words.append(f"a quota of {quota:g} processors")
    return f" ({', '.join(words)})" if words else ""


def _quota() -> float | None:
    """Processors that the control groups of this process grant it, fractions included; None where they set no limit."""
    quotas = list(_quotas())
    return min(quotas) if quotas else None


def _quotas() -> Iterator[float]:
    """Of each control group from this process's own up to the root (version 2 and 1)."""
    try:
        lines = MEMBERSHIP.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = CGROUPS / controllers if controllers else CGROUPS
        here = root / path.lstrip("/")
        for group in (here, *here.parents):
            if group.is_relative_to(root):
                yield from _quota_of(group, bool(controllers))


def _quota_of(group: Path, version_1: bool) -> Iterator[float]:
    """The quota that one group sets: nothing, or its processors."""
    try:
        if version_1:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        else:
            quota, period = (group / "cpu.max").read_text().split()
        if quota not in ("max", "-1") and float(period) > 0 and float(quota) > 0:
            yield float(quota) / float(period)
    except (OSError, ValueError):
        return
