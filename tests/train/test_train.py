"""Training end to end at a tiny size: losses, resume, signals, NaN, files."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import MODEL_16

from fastslots.cli import main
from fastslots.data import read_batch
from fastslots.data.map_style import as_split
from fastslots.errors import UserError
from fastslots.evaluation.evaluate import evaluate
from fastslots.files import write_atomic
from fastslots.models import SlotVAE
from fastslots.report import run_facts
from fastslots.runs.folder import RunFolder
from fastslots.runs.log import read_metrics
from fastslots.train import NonFiniteLossError, TrainConfig, fit, loop, recorder
from fastslots.train.checkpoint import latest_checkpoint
from fastslots.train.draws import draw
from fastslots.train.optim import Optimizers
from fastslots.train.step import Precision, training_step

TINY = dict(
    MODEL_16, octaves=3, batch_size=4, steps=6, threads=1, eval_every=3, eval_images=4, checkpoint_every=2,
    warmup=2, alpha_start=0, alpha_warmup=4, beta_start=0,
)  # fmt: skip


def tiny(**overrides) -> TrainConfig:
    return TrainConfig.preset("sprites-mini", **{**TINY, **overrides})


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_learns_and_leaves_all_its_files(tmp_path, capsys):
    result = fit(tiny(steps=60, eval_every=30, lr=5e-3, optimizer="adam"), out=tmp_path / "run")
    training, evaluations = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in training] == list(range(1, 61))
    assert [line["step"] for line in evaluations] == [30, 60]
    recon = [line["recon"] for line in training]
    assert np.mean(recon[-10:]) < 0.5 * recon[0]
    assert {"j_ari", "jis", "fg_ari", "ari", "mbo", "miou", "recon", "kl", "interaction"} <= result.scores.keys()
    for name in ("config.json", "model.safetensors", "report.html", "checkpoints/best.safetensors"):
        assert (tmp_path / "run" / name).stat().st_size > 100
    assert len(list((tmp_path / "run" / "images").glob("*.png"))) == 2
    model = SlotVAE.from_run(tmp_path / "run", "last")
    assert same(model.state_dict(), weights(tmp_path / "run"))
    assert "images/s" in capsys.readouterr().err


@pytest.mark.parametrize("pixels", [0, 20, 100])
def test_resume_is_bit_identical_and_cuts_the_log(tmp_path, threads, pixels):
    """Few pixels have rows of their own in the queries' MLP, many are picked out of all, all need no pick."""
    config = tiny(steps=6, pixels_per_step=pixels, threads=threads)
    whole = fit(config, out=tmp_path / "whole").out
    part = tmp_path / "part"
    fit(config, out=part)
    for name in ("step_00000006.safetensors", "best.safetensors"):
        (part / "checkpoints" / name).unlink()
    with open(part / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # a line that a crash cut short
    fit(config, out=part, resume=True)
    assert same(weights(whole), weights(part))
    strip = lambda lines: [{k: v for k, v in line.items() if k != "images_per_s"} for line in lines]  # noqa: E731
    assert strip(read_metrics(whole / "metrics.jsonl")[0]) == strip(read_metrics(part / "metrics.jsonl")[0])


CLI = [sys.executable, "-c", "from fastslots.cli import main; raise SystemExit(main())", "train", "--resume"]
FLAGS = [f"--{k}={','.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in TINY.items()]


def test_sigterm_saves_a_checkpoint_and_exits_143(tmp_path):
    flags = [*FLAGS, "--steps=100000", "--checkpoint_every=0", "--eval_every=0"]
    run = subprocess.Popen([*CLI, *flags, f"--out={tmp_path}"], stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    while not (tmp_path / "metrics.jsonl").exists() or not (tmp_path / "metrics.jsonl").stat().st_size:
        time.sleep(0.01)
    run.send_signal(signal.SIGTERM)
    assert run.wait(60) == 143
    assert "--resume" in run.stderr.read()
    step = latest_checkpoint(RunFolder(tmp_path))[0].step
    assert step == read_metrics(tmp_path / "metrics.jsonl")[0][-1]["step"] > 0
    assert (tmp_path / "report.html").stat().st_size > 1000  # there was none before the first evaluation
    assert (tmp_path / "images" / f"step_{step:08d}.png").exists()


def test_the_page_of_a_stop_comes_after_the_checkpoint_and_may_fail(tmp_path, monkeypatch):
    """Whatever is wrong with it, the weights are saved and the stop is reported as what it is."""

    def broken(*_, **__):
        assert latest_checkpoint(RunFolder(tmp_path))[0].step == 1
        raise RuntimeError("no page today")

    said = io.StringIO()
    monkeypatch.setattr(loop, "evaluate", broken)
    monkeypatch.setattr(loop.Trainer, "_train_on", asked_to_stop(loop.Trainer._train_on))
    assert fit(tiny(eval_every=0, checkpoint_every=0), out=tmp_path, stream=said).stopped_by == signal.SIGTERM
    assert "no page today: the page is not up to date" in said.getvalue()


def asked_to_stop(train_on):
    def step(self, number, images):
        os.kill(os.getpid(), signal.SIGTERM)
        return train_on(self, number, images)

    return step


class SomeMasks(torch.utils.data.Dataset):
    """Images of which those at even places have a mask, or the second half of them."""

    def __init__(self, half: bool):
        self.half = half

    def __len__(self) -> int:
        return 40

    def __getitem__(self, i: int):
        masked = i >= 20 if self.half else i % 2 == 0
        return {"image": np.full((16, 16, 3), i, np.uint8)} | ({"mask": np.eye(16, dtype=np.uint8)} if masked else {})


def test_images_have_masks_all_or_none(tmp_path):
    mend = "some images have a mask and others none: give all of them one, or none"
    with pytest.raises(UserError, match=mend):
        read_batch(SomeMasks(False), np.arange(4))
    assert read_batch(SomeMasks(True), np.arange(4))[1] is None
    with pytest.raises(UserError, match=mend):  # no batch is mixed
        evaluate(SlotVAE(tiny()), as_split(SomeMasks(True)), batch_size=4)
    with pytest.raises(UserError, match=mend):
        evaluate(SlotVAE(tiny()), as_split(SomeMasks(True), range(39, -1, -1)), batch_size=4)
    with pytest.raises(UserError, match=mend):
        fit(tiny(), SomeMasks(False), tmp_path / "run")


def test_what_a_run_opened_is_closed_where_it_cannot_begin(tmp_path, monkeypatch):
    closed = []
    for name in ("MetricsLog", "Writer"):
        monkeypatch.setattr(getattr(recorder, name), "close", lambda self, *_, name=name: closed.append(name))
    monkeypatch.setattr(recorder.Recorder, "announce", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit(tiny(), out=tmp_path)
    assert closed == ["Writer", "MetricsLog"]


def test_a_run_that_has_learnt_nothing_leaves_no_checkpoint(tmp_path):
    class Vanishing(torch.utils.data.Dataset):
        gone = False

        def __len__(self) -> int:
            return 40

        def __getitem__(self, i: int):
            if self.gone:
                raise OSError("the disk has gone")
            return torch.rand(3, 16, 16)

    data = Vanishing()

    class Announced(io.StringIO):
        def write(self, text: str) -> int:
            data.gone |= text.startswith("training")  # what the run says last before its first step
            return super().write(text)

    with pytest.raises(OSError, match="the disk has gone"):
        fit(tiny(), data, tmp_path / "run", stream=Announced())
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_nan_stops_with_the_batch_saved_and_good_weights(tmp_path):
    class Poisoned(torch.utils.data.Dataset):
        def __len__(self):
            return 30

        def __getitem__(self, index):
            return torch.full((3, 16, 16), float("nan") if index == 7 else index / 30)

    with pytest.raises(NonFiniteLossError, match=r"step \d+: loss nan"):
        fit(tiny(steps=500), Poisoned(), tmp_path)
    assert torch.isnan(load_file(tmp_path / "nan_batch.safetensors")["images"]).any()
    assert all(torch.isfinite(value).all() for value in weights(tmp_path).values())
    stopped = read_metrics(tmp_path / "metrics.jsonl")[0][-1]
    assert stopped["loss"] is None and stopped["stopped"].startswith("loss nan, gradient norm ")
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert (tmp_path / "report.html").exists() and list((tmp_path / "images").iterdir())
    facts = run_facts(tmp_path)
    saved = latest_checkpoint(RunFolder(tmp_path))[0].step
    assert facts["stopped"] and facts["step"] == stopped["step"] == saved + 1
    mended = torch.utils.data.TensorDataset(torch.rand(30, 3, 16, 16))
    fit(tiny(steps=stopped["step"]), mended, tmp_path, resume=True)
    assert not run_facts(tmp_path)["stopped"]  # it said so for ever


@pytest.mark.parametrize("alpha", [0.0, 0.05])
@pytest.mark.parametrize("beta", [0.0, 0.05])
def test_every_combination_of_weights_trains(tmp_path, alpha, beta):
    result = fit(tiny(alpha=alpha, beta=beta, log_scale_bias=0.0), out=tmp_path)
    assert np.isfinite(result.scores["recon"]) and (result.scores["kl"] == 0) == (beta == 0)


def test_any_map_style_dataset_trains(tmp_path):
    images = torch.rand(24, 3, 16, 16)
    masks = torch.randint(0, 3, (24, 16, 16))
    assert "j_ari" not in fit(tiny(steps=2), torch.utils.data.TensorDataset(images), tmp_path / "a").scores
    assert "j_ari" in fit(tiny(steps=2), torch.utils.data.TensorDataset(images, masks), tmp_path / "b").scores
    with pytest.raises(UserError, match=r"images of shape \[3, 16, 16\], the model expects \[3, 32, 32\]"):
        fit(tiny(resolution=32), torch.utils.data.TensorDataset(images), tmp_path / "c")


def test_eval_of_a_run_on_a_python_data_set_asks_for_data(tmp_path, capsys):
    """It scored the built-in scenes, which the run had never seen."""
    run = fit(tiny(steps=2), torch.utils.data.TensorDataset(torch.rand(24, 3, 16, 16)), tmp_path / "run").out
    assert main(["eval", str(run)]) == 2
    said = capsys.readouterr().err
    assert "the run's images were a TensorDataset that Python code gave to fit: name a data set with --data" in said
    assert main(["eval", str(run), "--data", "sprites", "--images", "4"]) == 0


def test_accumulation_equals_the_whole_batch():
    images = torch.rand(4, 3, 16, 16)
    results = []
    for parts in (1, 2):
        torch.manual_seed(0)
        config = tiny(accumulate=parts, optimizer="sgd", lr=1e-3, pixels_per_step=20)
        model = SlotVAE(config)
        values = training_step(
            model,
            Optimizers(model, config.optimizer, config.lr, config.weight_decay),
            Precision("fp32", torch.device("cpu")),
            config,
            5,
            images,
        )
        results.append((values["loss"], torch.cat([p.detach().flatten() for p in model.parameters()])))
    (loss_1, whole), (loss_2, halves) = results
    assert loss_1 == pytest.approx(loss_2, rel=1e-5)
    torch.testing.assert_close(whole, halves, rtol=1e-4, atol=1e-6)


def test_draws_depend_on_seed_and_step_alone_and_are_unbiased():
    images = torch.zeros(4, 3, 16, 16)
    images[:, :, 4:8, 4:8] = 0.7
    config = tiny(pixels_per_step=256, pixel_sampling="foreground", jacobian_weight=1.0)
    first, again, other = draw(config, 3, images), draw(config, 3, images), draw(config, 4, images)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.pixels, other.pixels) and not torch.equal(first.noise, other.noise)
    inside = images[:, 0].flatten(1).gather(1, first.pixels) > 0
    assert 0.4 < inside.float().mean() < 0.65  # half uniform, half on the foreground's 16 of 256 pixels
    assert first.pixel_weight.mean().item() == pytest.approx(1, abs=0.1)


def test_bf16_trains(tmp_path):
    assert np.isfinite(fit(tiny(precision="bf16"), out=tmp_path).scores["recon"])
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        fit(tiny(precision="fp16", device="cpu"), out=tmp_path / "b")


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, capsys):
    fit(tiny(), out=tmp_path)
    newest = max((tmp_path / "checkpoints").glob("step_*"))
    data = bytearray(newest.read_bytes())
    data[-100] ^= 1
    newest.write_bytes(data)
    result = fit(tiny(), out=tmp_path, resume=True)
    assert result.step == 6
    assert f"{newest} is damaged (checksum differs)" in capsys.readouterr().err


def test_init_from_a_run(tmp_path):
    fit(tiny(), out=tmp_path / "a")
    start = fit(tiny(steps=1, lr=1e-30, optimizer="sgd", init_from=str(tmp_path / "a")), out=tmp_path / "b")
    assert same(start.model.state_dict(), load_file(tmp_path / "a" / "checkpoints" / "best.safetensors"))
    with pytest.raises(UserError, match="do not fit this model"):
        fit(tiny(slot_dim=7, init_from=str(tmp_path / "a")), out=tmp_path / "c")


def test_a_folder_that_holds_a_run_is_not_overwritten(tmp_path):
    fit(tiny(steps=1), out=tmp_path)
    with pytest.raises(UserError, match="already holds a run: add --resume"):
        fit(tiny(steps=1), out=tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["steps"] == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_folder_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot be written"):
        fit(tiny(), out=tmp_path / "run")


def test_tensorboard_has_the_numbers_and_the_slots(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = fit(tiny(tensorboard=True, log_to="tensorboard"), out=tmp_path)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert events.Scalars("val/j_ari")[-1].value == pytest.approx(result.scores["j_ari"])
    assert [event.step for event in events.Images("val/slots")] == [3, 6]


@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_hosted_trackers_get_the_same_and_go_on(package, tmp_path, monkeypatch):
    pytest.importorskip(package, reason=f"needs {package}: pip install 'fastslots[{package}]'")
    for name in ("WANDB_MODE", "TRACKIO_DIR", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, {"WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1"}.get(name, str(tmp_path / "trackio")))
    code = "import sys; from fastslots.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "train", *FLAGS, f"--log_to={package}", f"--out={tmp_path / 'run'}"]
    for more in ("--steps=6", "--steps=8"):
        done = subprocess.run([*command, more, "--resume"], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    stored = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.suffix in (".wandb", ".db", ".parquet"))
    assert b"train/loss" in stored and b"val/j_ari" in stored
    own = tmp_path / "run" / "images"
    assert [path for path in tmp_path.rglob("*.png") if path.parent != own]


def test_unknown_trackers_are_named():
    with pytest.raises(UserError, match="log_to must name tensorboard, wandb, trackio, got 'mlflow'"):
        tiny(log_to="wandb,mlflow")


def test_the_explorer_of_a_finished_run_shows_its_best_weights(tmp_path, monkeypatch):
    """Slow disks: the best weights of the last evaluation are still being written when the report is."""

    def slow(path, data):
        if path.name == "best.safetensors":
            time.sleep(0.5)
        write_atomic(path, data)

    monkeypatch.setattr(recorder, "write_atomic", slow)
    fit(tiny(eval_every=0), out=tmp_path)
    stamp = json.loads((tmp_path / "explorer.json").read_text())["stamp"]
    assert stamp == f"best.safetensors {(tmp_path / 'checkpoints' / 'best.safetensors').stat().st_mtime_ns}"
    assert "explorer" in (tmp_path / "report.html").read_text()


def test_precision_is_what_the_device_has(monkeypatch):
    assert TrainConfig().resolved().precision == "fp32"
    monkeypatch.setattr(TrainConfig, "torch_device", lambda self: torch.device("cuda"))
    for has_bf16, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation, has=has_bf16: has)
        assert TrainConfig().resolved().precision == expected
    assert TrainConfig(precision="tf32").resolved().precision == "tf32"


def test_a_gpu_that_torch_cannot_use_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(recorder, "nvidia_driver", lambda: "535.1")
    for device, said in (("auto", True), ("cpu", False)):
        stream = io.StringIO()
        fit(tiny(steps=1, eval_every=0, device=device), out=tmp_path / device, stream=stream)
        assert ("torch cannot use it" in stream.getvalue()) == said and "fp32, cpu" in stream.getvalue()


@pytest.mark.parametrize("preset", ["sprites-mini", "clevr6-mini"])
@pytest.mark.parametrize("pixels", [0, 32])
def test_weights_do_not_depend_on_the_number_of_threads(preset, pixels):
    """Also where it changes from step to step, as of a run that is resumed on another machine."""
    before, results = torch.get_num_threads(), []
    sizes = dict(resolution=16, batch_size=14, pixels_per_step=pixels, steps=100, data="sprites")
    config = TrainConfig.preset(preset, **sizes)
    for threads in ((1,), (2,), (3,), (8,), (3, 1, 8)):
        torch.manual_seed(0)
        model = SlotVAE(config)
        optimizers = Optimizers(model, config.optimizer, config.lr, config.weight_decay)
        precision = Precision("fp32", torch.device("cpu"))
        images = torch.rand(4, 14, 3, 16, 16, generator=torch.Generator().manual_seed(1))
        for step in range(4):
            torch.set_num_threads(threads[step % len(threads)])
            training_step(model, optimizers, precision, config, step + 1, images[step])
            assert torch.get_num_threads() == threads[step % len(threads)]
        results.append(model.state_dict())
    torch.set_num_threads(before)
    assert all(same(results[0], other) for other in results[1:])
