"""Damaged and hostile files: every reader answers with a UserError or with data, soon and within bounded memory.

Small seed files are mutated, some of them inside their checksums or archives so that the parsers behind those are
reached. The quick form lets hypothesis choose and shrink mutations; the long form runs 100,000 cases and
prints a table.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import re
import resource
import signal
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from fuzz_mutations import OPERATIONS, Mutation, mutate, random_mutations
from fuzz_targets import TARGETS, Target, checkpoint, picture, with_header, zipped
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastslots.config.run import TrainConfig
from fastslots.data.readers.hdf5 import Hdf5Reader
from fastslots.data.readers.pictures import FolderReader
from fastslots.errors import UserError

HEADROOM = 512 << 20  # bytes that a case may map beyond what the process has: the seeds have at most 40 KB
SECONDS = 10.0  # of processor time: a case that takes longer hangs,
WAITING = 120.0  # and of waiting: a busy machine may give a case nothing for long

# ---- running a case --------------------------------------------------------------------------------------------------


class Hang(BaseException):
    """Not an Exception, so that no reader takes it for a damaged file."""


@contextmanager
def limits() -> Iterator[None]:
    """Cases may take ``SECONDS`` and ``WAITING`` each and map ``HEADROOM`` more than the process has."""

    def hang(*_: object) -> None:
        raise Hang

    old = {number: signal.signal(number, hang) for number in (signal.SIGALRM, signal.SIGPROF)}
    memory = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + HEADROOM, memory[1]))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, memory)
        clocks(0, 0)
        for number, handler in old.items():
            signal.signal(number, handler)


def clocks(seconds: float, waiting: float) -> None:
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, waiting)


def run_case(target: Target, data: bytes, folder: Path) -> str:
    """'read', 'refused', or what went wrong: 'hang', 'over-allocation', 'crash: ...'."""
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    clocks(SECONDS, WAITING)
    try:
        target.read(data, folder)
        return "read"
    except target.allowed as error:
        # A reader that reports a failed allocation had believed a size that the file claims
        return "over-allocation" if re.search("allocate|MemoryError", str(error)) else "refused"
    except Hang:
        return "hang"
    except MemoryError:
        return "over-allocation"
    except Exception as error:
        return f"crash: {type(error).__name__}: {error}"
    finally:
        clocks(0, 0)


@pytest.mark.parametrize("name", TARGETS)
def test_mutated_files_are_read_or_refused(name, tmp_path):
    target = TARGETS[name]
    seed = target.seed()
    assert run_case(target, seed, tmp_path) == "read", "the seed itself must be sound"

    @settings(max_examples=30, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(
        st.lists(
            st.tuples(st.integers(0, OPERATIONS - 1), st.floats(0, 1, exclude_max=True), st.integers(0, (1 << 16) - 1)),
            min_size=1,
            max_size=6,
        )
    )
    def case(mutations: list[Mutation]) -> None:
        assert run_case(target, mutate(seed, mutations), tmp_path) in ("read", "refused")

    with limits():
        case()


FOUND = (  # by the long form: an encrypted member, a type without a NumPy equivalent, fields of another type
    ("npz", [(2, 0.6467700978386741, 59501)]),
    ("npz", [(1, 0.3246098319071088, 57377), (1, 0.6498868060352899, 2971)]),
    ("HDF5", [(2, 0.9232173762227837, 9348)]),
    ("config.json", [(8, 0.6058386400683866, 14530)]),
    ("config.json", [(8, 0.6053099672937724, 40152)]),
    ("config.json", [(8, 0.3625770079689645, 31956)]),
    ("config.json", [(8, 0.3728637587607473, 16615)]),
)


@pytest.mark.parametrize("name, mutations", FOUND)
def test_what_was_found_is_refused(name, mutations, tmp_path):
    assert run_case(TARGETS[name], mutate(TARGETS[name].seed(), mutations), tmp_path) in ("read", "refused")


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("optimizer", None, "optimizer must be text, got None"),
        ("compile", 3, "compile must be true or false, got 3"),
        ("output_hidden", ["x"], "output_hidden must be a list of whole numbers"),
        ("output_hidden", 5, "output_hidden must be a list of whole numbers"),
        ("output_hidden", [2.5], "output_hidden must be a list of whole numbers"),
        ("lr", 10**400, "lr must be a number"),
        ("steps", 1 << 63, "steps must be a whole number"),
    ],
)
def test_fields_of_another_type_are_named(field, value, words):
    with pytest.raises(UserError, match=words):
        TrainConfig(**{field: value})


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_hundred_thousand_mutated_files(tmp_path):
    """Prints reader, cases, and how they ended; every number of the last three columns must be zero.

    FASTSLOTS_FUZZ_SEED (any text) gives cases that no run has seen, FASTSLOTS_FUZZ_SHARE a part of their number.
    """
    assert sum(target.cases for target in TARGETS.values()) >= 100_000
    share = float(os.environ.get("FASTSLOTS_FUZZ_SHARE", "1"))
    wrong: list[str] = []
    rows = [f"{'reader':<24}{'cases':>8}{'read':>8}{'refused':>9}{'crashes':>9}{'hangs':>7}{'over-alloc.':>13}"]
    with limits():
        for name, target in TARGETS.items():
            rng, seed = random.Random(name + os.environ.get("FASTSLOTS_FUZZ_SEED", "")), target.seed()
            counts = dict.fromkeys(("read", "refused", "crash", "hang", "over-allocation"), 0)
            for _ in range(int(target.cases * share)):
                mutations = random_mutations(rng)
                end = run_case(target, mutate(seed, mutations), tmp_path)
                counts[end.split(":")[0]] += 1
                if end not in ("read", "refused"):
                    wrong.append(f"{name}: {end}: {mutations}")
            columns = zip(counts.values(), (8, 9, 9, 7, 13), strict=True)
            rows.append(f"{name:<24}{sum(counts.values()):>8}" + "".join(f"{n:>{width}}" for n, width in columns))
    print("\n" + "\n".join(rows))
    assert not wrong, "\n".join(wrong[:50])


# ---- what a mutation would not find ----------------------------------------------------------------------------------


class Bomb:
    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder / "bomb-went-off"),)


def test_pickles_are_never_executed(tmp_path):
    """Not as a data set, a member, a checkpoint, weights or a configuration."""
    bomb = pickle.dumps(Bomb(tmp_path))
    objects = io.BytesIO()
    np.save(objects, np.array([Bomb(tmp_path)], object))
    saved = io.BytesIO()
    torch.save({"model": Bomb(tmp_path)}, saved)
    for number, data in enumerate((bomb, zipped(objects.getvalue()), saved.getvalue())):
        for name, target in TARGETS.items():
            folder = tmp_path / f"{number}-{name}"
            folder.mkdir()
            if target.allowed == (UserError,):
                assert run_case(target, data, folder) in ("read", "refused"), name
    assert not (tmp_path / "bomb-went-off").exists()


def test_claims_beyond_the_file_allocate_nothing(tmp_path):
    """Headers that promise terabytes in a few hundred bytes."""
    big_png = bytearray(picture("png"))
    big_png[16:24] = struct.pack(">II", 8000, 8000)
    big_png[29:33] = struct.pack(">I", zlib.crc32(big_png[12:29]))
    (tmp_path / "a.png").write_bytes(big_png)
    with h5py.File(tmp_path / "big.h5", "w") as file:
        file.create_dataset("image", (1 << 20, 1 << 14, 1 << 14, 3), "u1", chunks=(1, 64, 64, 3))
    header = json.dumps({"w": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    with limits():
        with pytest.raises(UserError, match="more than a file of"):
            list(Hdf5Reader(tmp_path / "big.h5").scenes())
        with pytest.raises(UserError, match="8000 x 8000 pixels are too many"):
            FolderReader(tmp_path)
        (tmp_path / "c").mkdir()
        assert run_case(TARGETS["checkpoint"], with_header(checkpoint(), header), tmp_path / "c") == "refused"
