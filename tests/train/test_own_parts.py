"""Models, losses, metrics and callbacks of one's own in a run: trained, resumed, scored, reported, swept."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from processes import as_torchrun
from safetensors.torch import load_file
from tiny import MODEL_8

from fastslots.cli import main
from fastslots.errors import UserError
from fastslots.models import SlotVAE, SlotVAEConfig
from fastslots.runs.log import read_metrics
from fastslots.train import TrainConfig, fit

EXAMPLES = Path(__file__).parents[2] / "examples"
LINEAR = '''
"""K x D numbers -> a linear layer -> an image: a decoder in one file."""
import torch.nn as nn
from fastslots.models import SlotDecoder, SlotVAE

class Linear(SlotDecoder):
    def __init__(self, config):
        super().__init__()
        self.to_image = nn.Linear(config.num_slots * config.slot_dim, config.channels * config.resolution**2)
        self.shape = (config.channels, config.resolution, config.resolution)

    def forward(self, slots):
        return self.to_image(slots.flatten(1)).unflatten(1, self.shape)

def build(config):
    return SlotVAE(config, decoder=Linear(config))
'''
DROPOUT = """
import torch.nn as nn
from fastslots.models import SlotVAE

def build(config):
    model = SlotVAE(config)
    encoder = nn.Sequential(
        nn.Flatten(), nn.Dropout(0.5),
        nn.Linear(config.channels * config.resolution**2, config.num_slots * config.posterior_width),
        nn.Unflatten(1, (config.num_slots, config.posterior_width)),
    )
    return SlotVAE(config, encoder=encoder)

def brightness(result, images):
    return result.recon.mean()

def count(result, images, masks):
    return len(images) if masks is None else masks.amax((1, 2)).float().mean()
"""


def config(**changes) -> TrainConfig:
    fields = dict(MODEL_8, steps=4, batch_size=4, eval_images=4, eval_every=2, checkpoint_every=2, threads=1)
    return TrainConfig.preset("sprites-mini", **fields | changes)


def flags(**changes) -> list[str]:
    fields = dict(MODEL_8, steps=4, batch_size=4, eval_images=4, eval_every=2, checkpoint_every=2, threads=1) | changes
    return [f"--{k}={','.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in fields.items()]


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr("fastslots.report.explorer.PIXELS", 0)  # the smallest slot explorer there is


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory in which ``code(name, text)`` leaves modules of other names than any other test's."""
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)

    def code(text: str) -> str:
        name = f"own_{abs(hash(str(tmp_path)))}_{len(list(tmp_path.glob('own_*.py')))}"
        (tmp_path / f"{name}.py").write_text(text)
        return name

    yield code
    sys.path[:] = before


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors")


@pytest.fixture
def fresh(commands, tmp_path):
    """Runs a command in a process that has trusted nothing yet, in another folder -> exit code, stderr."""

    def run(*argv: str) -> tuple[int | None, str]:
        stderr = tmp_path / f"said_{len(list(tmp_path.glob('said_*')))}"
        command = commands.start([str(part) for part in argv], stderr)
        return command.wait(), command.said()

    return run


def test_a_decoder_in_one_file_is_trained_scored_reported_and_swept(place, tmp_path, capsys):
    name = f"{place(LINEAR)}:build"
    run = str(tmp_path / "run")
    assert main(["train", "sprites-mini", *flags(alpha=0), "--model", name, "--out", run]) == 0
    stored = json.loads((tmp_path / "run/code.json").read_text())["model"]
    assert stored["name"] == name and stored["folder"] == str(tmp_path) and len(stored["digest"]) == 64
    assert json.loads((tmp_path / "run/config.json").read_text())["model"] == name
    capsys.readouterr()
    assert main(["eval", run, "--images", "4", "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert 0 <= scores["jis"] <= 1 and -1 <= scores["j_ari"] <= 1 and scores["fg_ari"] is None
    assert main(["report", run]) == 0
    page = (tmp_path / "run/report.html").read_text()
    assert re.search(r'"maps": ?false', page)
    loaded = SlotVAE.from_run(run)  # this process has named the code
    assert type(loaded.decoder).__name__ == "Linear" and not loaded.training
    sweep = ["sweep", "sprites-mini", *flags(alpha=0, steps=2), "--model", name, "--out", "swept"]
    assert main([*sweep, "--eval=--images 2"]) == 0
    rows = json.loads((tmp_path / "swept/sweep.json").read_text())
    assert "jis" in json.dumps(rows)


def test_code_of_somebody_elses_run_is_not_imported_unasked(place, fresh, tmp_path):
    """What trusting it gives, and what a change of it says."""
    flag, run = tmp_path / "imported", tmp_path / "run"
    name = place(f"from pathlib import Path\nPath({str(flag)!r}).touch()\n{LINEAR}")
    fit(config(alpha=0.0, model=f"{name}:build"), out=run, stream=open(os.devnull, "w"))
    flag.unlink()
    for command in (["eval"], ["report"], ["explore"], ["train", "--config", run / "config.json", "--resume", "--out"]):
        code, said = fresh(*command, run)
        assert code == 2 and "add --trust-code where you trust it" in said and said.count("\n") == 1
    script = f"from fastslots.models import SlotVAE; SlotVAE.from_file({str(run / 'model.safetensors')!r})"
    refused = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "names code" in refused.stderr and not flag.exists()
    with open(tmp_path / f"{name}.py", "a") as file:
        file.write("# another line\n")
    code, said = fresh("eval", run, "--trust-code", "--images=2")  # the folder of the code is known
    assert code == 0 and flag.exists()
    assert f"warning   {tmp_path / name}.py is not as it was when the run was trained" in said
    code, said = fresh("train", "--resume", "--out", run, "--trust-code", "--steps=5")
    assert code == 0 and "is not as it was when the run was trained" in said
    (tmp_path / f"{name}.py").rename(tmp_path / "moved.py")
    code, said = fresh("eval", run, "--trust-code")
    assert code == 2 and f"there is no module {name!r} in" in said
    code, said = fresh("eval", run, "--model=moved:build", "--images=2")
    assert code == 0 and "not as it was" not in said


def test_a_resume_repeats_what_a_model_of_ones_own_draws(place, fresh, tmp_path):
    class Stops:
        def on_step(self, step, terms):
            if step == 3:
                raise EOFError

    name = place(DROPOUT)
    sys.path.append(str(tmp_path))
    module = importlib.import_module(name)
    given = {"losses": {"brightness": (2.0, module.brightness)}, "metrics": {"count": module.count}}
    settings, run = config(model=f"{name}:build", pixels_per_step=16), tmp_path / "run"
    whole = fit(settings, out=tmp_path / "whole", **given)
    with pytest.raises(EOFError):
        fit(settings, out=run, callbacks=[Stops()], **given)
    with pytest.raises(UserError, match="was trained with the losses brightness: give them to fit again"):
        fit(settings, out=run, resume=True)
    code, said = fresh("train", "--resume", "--out", run, "--model", f"{name}:build")  # the loss is code as well
    assert code == 2 and "--trust-code" in said
    code, said = fresh("train", "--resume", "--out", run, "--trust-code")  # functions of a module are found again
    assert code == 0, said
    for key, value in weights(whole.out).items():
        assert torch.equal(value, weights(run)[key]), key
    (training, evaluations), (again, scores) = (read_metrics(f / "metrics.jsonl") for f in (whole.out, run))
    assert [line["brightness"] for line in training] == [line["brightness"] for line in again]
    assert [line["count"] for line in evaluations] == [line["count"] for line in scores]
    assert 1 <= evaluations[0]["count"] <= 3  # shapes of built-in scenes


def test_two_processes_train_a_model_of_ones_own_as_one(place, commands, tmp_path):
    own = f"{LINEAR}\nimport torch\ntorch.seed()\n"  # as if it drew other weights in each process
    name, run = f"{place(own)}:build", tmp_path / "run"
    argv = ["train", "sprites-mini", *flags(alpha=0), "--model", name, "--out", str(run)]
    processes = as_torchrun(commands, 2, argv, tmp_path, cwd=tmp_path)
    assert [p.wait(120) for p in processes] == [0, 0], processes[0].said()
    training, _ = read_metrics(run / "metrics.jsonl")
    assert len(training) == 4 and SlotVAE.from_run(run, model=name).config.alpha == 0


# ---- losses, metrics, callbacks


def test_losses_are_added_and_logged_by_hand(tmp_path):
    """One step of plain gradient descent, against the loss written out."""
    seen = []

    def spread(result, images):
        seen.append((type(result).__name__, images.shape))
        return result.slots.square().mean() + result.recon.mean()

    settings = config(steps=1, optimizer="sgd", lr=0.1, schedule="constant", warmup=0, alpha_start=0, alpha_warmup=0)
    settings = TrainConfig(**{**settings.__dict__, "beta_start": 0, "grad_clip": 0.0})
    plain = fit(settings, out=tmp_path / "plain", stream=open(os.devnull, "w"))
    result = fit(settings, out=tmp_path / "run", losses={"spread": (0.5, spread)}, stream=open(os.devnull, "w"))
    (line,), (other,) = (read_metrics(f.out / "metrics.jsonl")[0] for f in (result, plain))
    assert seen == [("TrainingOutput", (4, 3, 8, 8))]
    assert line["loss"] == pytest.approx(other["loss"] + 0.5 * line["spread"], rel=1e-5)
    assert line["recon"] == other["recon"] and line["spread"] != 0
    a, b = weights(plain.out), weights(result.out)
    assert any(not torch.equal(a[name], b[name]) for name in a)
    # The gradient of the further loss alone, from the model that the run started with
    from fastslots.data import Loader, to_float
    from fastslots.data.sources import open_source
    from fastslots.train.draws import draw

    torch.manual_seed(settings.seed)
    model = SlotVAE(settings)
    images = next(iter(Loader(open_source(settings).splits["train"], settings.seed, 4))).images
    images = to_float(images)
    noise = draw(settings, 1, images).noise
    total = 0.5 * spread(model(images, noise), images)
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(total, parameters, allow_unused=True)
    for name, grad in zip(names, grads, strict=True):
        moved = (a[name] - b[name]) / 0.1
        torch.testing.assert_close(moved, torch.zeros_like(moved) if grad is None else grad, rtol=1e-2, atol=2e-4)


def test_a_loss_on_slots_decodes_nothing_more(tmp_path, monkeypatch):
    calls = []
    decode = SlotVAE.decode
    monkeypatch.setattr(SlotVAE, "decode", lambda self, z: calls.append(len(z)) or decode(self, z))
    losses = {"size": (0.1, lambda result, images: result.slots.square().mean())}
    fit(config(steps=2, eval_every=0, eval_images=1), out=tmp_path / "run", losses=losses)
    assert 4 not in calls  # no training batch


def test_callbacks_see_every_step_and_the_end(tmp_path):
    told = []

    class Everything:
        def on_step(self, step, terms):
            told.append(("step", step, terms["loss"]))

        def on_evaluation(self, step, scores):
            told.append(("evaluation", step, scores["j_ari"]))

        def on_end(self, folder):
            told.append(("end", folder, None))

    class Last:
        def on_end(self, folder):
            told.append(("last", (folder / "model.safetensors").is_file(), None))

    run = tmp_path / "run"
    fit(config(steps=3), out=run, callbacks=[Everything(), Last()])
    training, evaluations = read_metrics(run / "metrics.jsonl")
    steps = [("step", line["step"], line["loss"]) for line in training]
    scores = [("evaluation", line["step"], line["j_ari"]) for line in evaluations]
    assert told == [*steps[:2], scores[0], steps[2], scores[1], ("end", run, None), ("last", True, None)]


def test_what_was_learnt_is_saved_where_a_callback_fails(tmp_path):
    class Fails:
        def on_step(self, step, terms):
            if step == 3:
                raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fit(config(checkpoint_every=0), out=tmp_path / "run", callbacks=[Fails()])
    assert [path.name for path in (tmp_path / "run/checkpoints").glob("step_*")] == ["step_00000003.safetensors"]


def test_a_model_given_to_fit_needs_its_builder_again_and_one_of_ours_does_not(place, tmp_path, capsys):
    name = place(LINEAR)
    sys.path.append(str(tmp_path))
    module = importlib.import_module(name)
    settings = config(alpha=0.0, steps=2)
    fit(settings, out=tmp_path / "run", model=module.build(settings))
    assert "explorer.json" in {path.name for path in (tmp_path / "run").iterdir()}
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "run")]) == 2
    assert "name what builds it with --model" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"a SlotVAE that Python code gave to fit: give it to fit again"):
        fit(TrainConfig(**json.loads((tmp_path / "run/config.json").read_text())), out=tmp_path / "run", resume=True)
    assert main(["eval", str(tmp_path / "run"), "--images=2", "--model", f"{name}:build"]) == 0
    assert SlotVAE.from_run(tmp_path / "run", model=module.build).config.alpha == 0
    fields = {name: getattr(settings, name) for name in SlotVAEConfig.__dataclass_fields__}
    fit(settings, out=tmp_path / "ours", model=SlotVAE(SlotVAEConfig(**fields)))
    assert not (tmp_path / "ours/code.json").exists() and SlotVAE.from_run(tmp_path / "ours")


@pytest.mark.parametrize(
    "body, message",
    [
        ("def build(config): return 3", "gives a int, expected a SlotVAE"),
        (
            "import dataclasses\nfrom fastslots.models import SlotVAE\n"
            "def build(config): return SlotVAE(dataclasses.replace(config, num_slots=9))",
            r"another configuration, num_slots 9 \(the run's 2\)",
        ),
        ("import no_such_package", "its module imports 'no_such_package', which is not installed"),
        ("1 / 0", r"importing its module fails \(ZeroDivisionError: division by zero\)"),
        ("def make(config): pass", r"has no 'build'; it has make"),
        (LINEAR, "the decoder Linear gives no slot map, so there is no interaction penalty: set alpha to 0"),
        (
            LINEAR.replace("self.to_image(slots.flatten(1))", "Cut.apply(self.to_image(slots.flatten(1)))")
            + """
import torch
class Cut(torch.autograd.Function):
    generate_vmap_rule = True
    @staticmethod
    def forward(x): return x * 1
    @staticmethod
    def setup_context(ctx, inputs, output): pass
    @staticmethod
    def backward(ctx, grad): return grad
    @staticmethod
    def jvp(ctx, tangent): return tangent * 0
""",
            "forward derivatives that differ from its gradients",
        ),
    ],
)
def test_what_is_wrong_with_ones_own_model_is_said_before_the_first_step(place, tmp_path, body, message):
    name = place(body)
    alpha = 0.0 if "Cut" in body else 0.1
    with pytest.raises(UserError, match=message):
        fit(config(model=f"{name}:build", alpha=alpha), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_wrong_losses_metrics_and_callbacks_are_named(tmp_path):
    ok = lambda *_: torch.zeros(())  # noqa: E731
    for given, message in [
        ({"losses": {"recon": (1.0, ok)}}, "losses has the name 'recon', which is taken"),
        ({"losses": {"mine": ok}}, r"loss 'mine' must be a pair \(weight, function\)"),
        ({"losses": {"mine": (float("nan"), ok)}}, "a finite number as its weight"),
        ({"losses": {"mine": (1.0, lambda *_: torch.zeros(2))}}, r"loss 'mine' gives a tensor \[2\], expected a 0-d"),
        ({"metrics": {"mine": lambda *_: "high"}}, "metric 'mine' gives a str, expected one number"),
        ({"metrics": {"j_ari": ok}}, "metrics has the name 'j_ari'"),
        ({"callbacks": [object()]}, "callback object has none of on_step, on_evaluation, on_end"),
        ({"model": nn.Linear(1, 1)}, "model gives a Linear, expected a SlotVAE"),
    ]:
        with pytest.raises(UserError, match=message):
            fit(config(steps=1), out=tmp_path / "run", resume=True, **given)
    with pytest.raises(UserError, match=r"model must be package\.module:function, got 'my\.py'"):
        config(model="my.py")


# ---- the examples of docs/change-the-model.md


@pytest.mark.parametrize("name", ["unet_encoder", "slot_attention_encoder"])
def test_an_encoder_of_the_examples_learns(name, tmp_path, monkeypatch):
    monkeypatch.chdir(EXAMPLES)
    monkeypatch.setattr(sys, "path", [*sys.path])
    small = flags(steps=30, eval_every=0, resolution=16, lr=0.02, batch_size=8)
    assert main(["train", "sprites-mini", *small, "--model", f"{name}:build", "--out", str(tmp_path / "run")]) == 0
    training, evaluations = read_metrics(tmp_path / "run/metrics.jsonl")
    assert sum(line["recon"] for line in training[-5:]) < sum(line["recon"] for line in training[:5])
    assert "jis" in evaluations[-1]


def test_the_loss_of_the_examples_is_in_log_and_page(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("loss_on_slots", EXAMPLES / "loss_on_slots.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(tmp_path / "run", **{**MODEL_8, "steps": 8, "batch_size": 4, "eval_images": 4, "eval_every": 4})
    training, evaluations = read_metrics(tmp_path / "run/metrics.jsonl")
    assert all(0 <= line["overlap"] <= 1 for line in training)
    assert all(1 <= line["used_slots"] <= 2 for line in evaluations)
    page = (tmp_path / "run/report.html").read_text()
    assert '"overlap"' in page and '"used_slots"' in page
    assert "best J-ARI" in capsys.readouterr().out
    assert all(len(path.read_text().splitlines()) < 60 for path in EXAMPLES.glob("*_encoder.py"))
