"""Every system call that changes a run's files fails once: the run goes on or says why not, and a resume loses nothing.

``faults.c`` is preloaded into a run of 60 steps with evaluations and rotation; call number N fails with an error.
"""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import MODEL_8

from fastslots.runs.log import read_metrics
from fastslots.train import TrainConfig, fit

EVERY = 20  # steps between checkpoints
ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES, errno.EINTR)
CONFIG = TrainConfig.preset(
    "sprites-mini",
    **dict(MODEL_8, pixels_per_step=40, batch_size=2, threads=1, eval_every=30, eval_images=2, steps=60),
    checkpoint_every=EVERY,
    keep_checkpoints=1,
)

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("cc"), reason="needs Linux and a C compiler for the preloaded library"
)


@pytest.fixture(scope="module")
def faulty(commands_with, tmp_path_factory):
    library = tmp_path_factory.mktemp("faults") / "faults.so"
    source = Path(__file__).with_name("faults.c")
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
    return commands_with(LD_PRELOAD=str(library))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return fit(CONFIG, out=tmp_path_factory.mktemp("whole") / "run").out


def calls_of(faulty, folder: Path, **env: str) -> tuple[int | None, str, list[str]]:
    """Train in ``folder``/run -> exit code, what was said, and the calls that changed files there."""
    (folder / "fields.json").write_text(json.dumps(asdict(CONFIG)))
    log, said = folder / "calls", folder / f"said-{len(list(folder.iterdir()))}"
    argv = ["train", "--config", str(folder / "fields.json"), "--resume", "--out", str(folder / "run")]
    process = faulty.start(argv, said, FAULT_ROOT=str(folder / "run"), FAULT_LOG=str(log), **env)
    code = process.wait(300)
    return code, process.said(), log.read_text().splitlines() if log.exists() else []


def one_fault(faulty, whole: Path, folder: Path, number: int, error: int) -> str:
    """What came of it: "went on" or "stopped". An AssertionError where anything was lost."""
    folder.mkdir()
    code, said, calls = calls_of(faulty, folder, FAULT_AT=str(number), FAULT_ERRNO=str(error))
    what = f"call {number} ({calls[number - 1] if len(calls) >= number else 'none'}), {errno.errorcode[error]}: {said}"
    assert len(calls) < number or calls[number - 1].endswith(" failed"), what
    assert code in (0, 2) and "Traceback" not in said, what
    if code == 2:
        assert said.splitlines()[-1].startswith("fastslots: error: ") and said.count("fastslots: error") == 1, what
    run = folder / "run"
    steps = [line["step"] for line in read_metrics(run / "metrics.jsonl")[0]]
    if code == 2:
        again, said, _ = calls_of(faulty, folder)
        assert again == 0, f"{what}\nthen {said}"
        resumed = re.search(r"resumed at step (\d+)", said)
        assert max(steps, default=0) - int(resumed[1] if resumed else 0) <= EVERY, f"{what}\nthen {said}"
        assert "differs from before" not in said, f"{what}\nthen {said}"
    ours, theirs = load_file(run / "model.safetensors"), load_file(whole / "model.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours), what
    shutil.rmtree(folder)
    return "stopped" if code else "went on"


def sweep(faulty, whole: Path, folder: Path, faults: list[tuple[int, int]]) -> dict[str, int]:
    ends = {"went on": 0, "stopped": 0}
    for place, (number, error) in enumerate(faults):
        ends[one_fault(faulty, whole, folder / str(place), number, error)] += 1
        print(f"{place + 1} of {len(faults)}: call {number}, {errno.errorcode[error]}: {ends}", flush=True)
    return ends


def each_call_once(kind: list[str], seed: int) -> list[tuple[int, int]]:
    """Each call with one error, such that each kind of call has each error; calls of a rare kind have several."""
    rng, faults = random.Random(seed), []
    for name in dict.fromkeys(kind):
        numbers = [number for number, other in enumerate(kind, 1) if other == name]
        errors = rng.sample(ERRORS, len(ERRORS))
        faults += [(numbers[i % len(numbers)], errors[i % len(errors)]) for i in range(max(len(numbers), len(errors)))]
    rng.shuffle(faults)
    return faults


def kinds(calls: list[str]) -> list[str]:
    """What each call did, without random names and numbers."""
    names = (call.split(" ", 1) for call in calls)
    return [f"{name} {re.sub(r'[0-9a-f]{16}|[0-9]+', 'N', Path(path).name)}" for name, path in names]


def test_a_call_of_each_kind_may_fail(faulty, whole, tmp_path):
    """The first of each kind, and one chosen at random, each with one of the errors."""
    (tmp_path / "sound").mkdir()
    code, _, calls = calls_of(faulty, tmp_path / "sound")
    assert code == 0 and len(calls) > 100
    kind, rng = kinds(calls), random.Random(0)
    first = [kind.index(name) + 1 for name in dict.fromkeys(kind)]
    numbers = [*rng.sample(first, min(4, len(first))), rng.randrange(1, len(calls))]
    ends = sweep(faulty, whole, tmp_path, [(number, rng.choice(ERRORS)) for number in numbers])
    assert sum(ends.values()) == len(numbers)


@pytest.mark.long
@pytest.mark.timeout(4 * 3600)
def test_every_call_may_fail(faulty, whole, tmp_path):
    """Each of them once, and each kind with each error. FASTSLOTS_FAULTS: the first so many, or "all" pairs."""
    (tmp_path / "sound").mkdir()
    kind = kinds(calls_of(faulty, tmp_path / "sound")[2])
    most, faults = os.environ.get("FASTSLOTS_FAULTS", ""), each_call_once(kind, seed=2)
    assert {number for number, _ in faults} == set(range(1, len(kind) + 1))
    if most == "all":
        pairs = [(number, error) for number in range(1, len(kind) + 1) for error in ERRORS]
        faults += [pair for pair in pairs if pair not in faults]
    elif most:
        faults = faults[: int(most)]
    ends = sweep(faulty, whole, tmp_path, faults)
    print(f"{len(kind)} calls of {len(set(kind))} kinds, {len(faults)} faults: {ends}, nothing lost")


def test_what_is_old_goes_when_what_is_new_is_on_the_disk(faulty, tmp_path):
    """A file is written, brought to the disk and renamed, then its folder is; only then is anything removed."""
    _, _, calls = calls_of(faulty, tmp_path)
    assert not [call for call in calls if call.startswith("open") and "/." not in call and ".jsonl" not in call]
    seen = 0
    for number, call in enumerate(calls):
        name, path = call.split(" ", 1)
        if name == "rename":
            begins, folder = f"{Path(path).parent}/.{Path(path).name[:50]}.", str(Path(path).parent)
            before = [earlier for earlier in calls[:number] if begins in earlier]
            assert before[-1].startswith("fsync "), call  # the last that was done to the file
            others = [later for later in calls[number + 1 :] if later == f"fsync {folder}"]
            assert others, call
        if name == "unlink" and re.search(r"/step_\d+\.safetensors$", path):
            renamed = max(i for i in range(number) if re.match(r"rename .*/step_\d+\.safetensors", calls[i]))
            assert f"fsync {Path(path).parent}" in calls[renamed:number], call
            seen += 1
    assert seen == 2
