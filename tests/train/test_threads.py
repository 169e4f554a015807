"""Weights are the same bits on any number of threads, through kills and resumes with another number of them; and what
several Python threads, a forked process or a loader's workers call at once gives what it gives alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from tiny import same_weights

from fastslots.models import SlotVAE, SlotVAEConfig
from fastslots.runs.folder import RunFolder
from fastslots.train import TrainConfig, fit
from fastslots.train.checkpoint import latest_checkpoint

COUNTS = (1, 2, 3, 8)


@pytest.fixture
def restored_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


LONG = pytest.mark.long
RUNS = [
    pytest.param("sprites-mini", 64, 40, id="sprites-mini"),
    pytest.param("sprites-mini", 0, 40, marks=LONG, id="sprites-mini, all pixels"),
    pytest.param("clevr6-mini", 128, 40, marks=LONG, id="clevr6-mini"),
    pytest.param("clevr6-mini", 0, 40, marks=LONG, id="clevr6-mini, all pixels"),
]


@pytest.mark.timeout(1200)  # the long ones, on a busy machine
@pytest.mark.parametrize(("preset", "pixels", "steps"), RUNS)
def test_forty_steps_on_any_number_of_threads(preset, pixels, steps, tmp_path, commands, restored_threads):
    """Whole on 1, 2, 3 and 8 threads; and killed twice, going on with 3 and then with 8."""
    few = dict(
        batch_size=8 if pixels else 2,
        eval_every=0,
        eval_images=2,
        checkpoint_every=4,
        pixels_per_step=pixels,
        data="sprites",
    )
    config = TrainConfig.preset(preset, steps=steps, **few)
    whole = [
        fit(TrainConfig.preset(preset, steps=steps, threads=n, **few), out=tmp_path / f"on_{n}").out for n in COUNTS
    ]
    assert all(same_weights(whole[0], other) for other in whole[1:])
    out, flags = tmp_path / "run", [f"--{name}={value}" for name, value in few.items()]
    for number, goal in enumerate((8, 20, steps)):
        argv = [
            "train",
            preset,
            f"--steps={steps}",
            *flags,
            f"--threads={(2, 3, 8)[number]}",
            "--out",
            str(out),
            "--resume",
        ]
        process, deadline = commands.start(argv, tmp_path / f"err_{number}"), time.monotonic() + 300
        while goal < steps and process.running():
            newest = latest_checkpoint(RunFolder(out))[0] if (out / "checkpoints").exists() else None
            if newest and newest.step >= goal:
                process.kill(signal.SIGKILL)
                break
            assert time.monotonic() < deadline, process.said()
            time.sleep(0.02)
        assert process.wait(400) in (0, -signal.SIGKILL), process.said()  # the last one also makes the report
    assert same_weights(whole[0], out)
    assert config.steps == steps


# ---- who calls -------------------------------------------------------------------------------------------------------

SIZES = dict(resolution=16, cnn_channels=8, encoder_width=16, query_width=16, query_hidden=16, slot_width=16)


def gradients(seed: int) -> list[torch.Tensor]:
    """Of a small model on images of a seed, through the encoder's and the decoder's kernels."""
    generator = torch.Generator().manual_seed(seed)
    model = SlotVAE(SlotVAEConfig.preset("sprites-mini", **SIZES))
    for p in model.parameters():
        p.data = 0.1 * torch.randn(p.shape, generator=generator)
    images = torch.rand(6, 3, 16, 16, generator=generator)
    noise = torch.randn(6, model.config.num_slots, model.config.slot_dim, generator=generator)
    model.training_loss(images, noise).total.backward()
    return [p.grad for p in model.parameters()]


def test_several_python_threads_at_once():
    """Eight of them, each with a model of its own, ten times over."""
    alone = [gradients(seed) for seed in range(8)]
    wrong: list[int] = []

    def work(seed: int) -> None:
        for _ in range(10):
            if not all(torch.equal(a, b) for a, b in zip(gradients(seed), alone[seed], strict=True)):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    assert not wrong


class Gradients(torch.utils.data.Dataset):
    """Items that the kernels make, in whichever process asks."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.cat([grad.flatten() for grad in gradients(index)])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_loader_with_forked_workers():
    """Workers forked from a process whose pool of threads is up already; each has one thread, as torch sets it."""
    data = Gradients()
    alone = torch.stack([data[i] for i in range(6)])
    loader = torch.utils.data.DataLoader(data, batch_size=2, num_workers=2, multiprocessing_context="fork", timeout=60)
    # torch's own products, which are cut by the number of threads, round otherwise in a worker
    for other in (torch.cat(list(loader)), torch.stack([data[i] for i in range(6)])):  # and the parent goes on
        assert ((other - alone).norm() <= 1e-5 * alone.norm()).item()


MACHINES = {
    "one core": ("taskset", dict()),
    "unset": ("", dict(OMP_NUM_THREADS=None)),
    "zero": ("", dict(OMP_NUM_THREADS="0")),
    "above the cores": ("", dict(OMP_NUM_THREADS="4096")),
    "no AVX2": ("", dict(FASTSLOTS_ISA="portable")),
}
QUICK = ("one core", "no AVX2")


@pytest.mark.parametrize("machine", [pytest.param(m, marks=() if m in QUICK else LONG) for m in MACHINES])
def test_a_bad_machine_trains_alike_and_says_what_it_has(machine, tmp_path):
    """Three steps of the first command, the same bits as here but on the portable path; doctor says the choice."""
    how, variables = MACHINES[machine]
    env = {**os.environ, **{name: value for name, value in variables.items() if value is not None}}
    for name, value in variables.items():
        if value is None:
            env.pop(name, None)
    if how and not hasattr(os, "sched_setaffinity"):
        pytest.skip("no affinity here")
    pin = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); " if how else ""
    run = pin + "import runpy; runpy.run_module('fastslots', run_name='__main__')"
    few = ["--steps=3", "--batch_size=4", "--eval_every=0", "--eval_images=2"]
    for argv in (["train", "sprites-mini", *few, "--out", str(tmp_path / "run")], ["doctor"]):
        done = subprocess.run([sys.executable, "-c", run, *argv], env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    if how:
        assert ", 1 for this process" in done.stdout or os.cpu_count() == 1, done.stdout
    elif machine == "no AVX2":
        assert "computes with portable: FASTSLOTS_ISA" in done.stdout
    elif machine != "unset":
        assert "OMP_NUM_THREADS" in done.stdout, done.stdout
    if machine == "no AVX2":
        return
    few_fields = dict(steps=3, batch_size=4, eval_every=0, eval_images=2)
    here = fit(TrainConfig.preset("sprites-mini", **few_fields), out=tmp_path / "here").out
    assert same_weights(here, tmp_path / "run")
