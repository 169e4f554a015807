"""The command line: flags, exit codes, and one line without traceback for every mistake."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from tiny import MODEL_16, flags

from fastslots.cli import build_parser, main
from fastslots.cli.fields import headings
from fastslots.cli.train import config_of
from fastslots.config.presets import preset_names
from fastslots.config.run import read_config
from fastslots.errors import UserError
from fastslots.models import SlotVAEConfig
from fastslots.train import TrainConfig

TINY = [*flags(MODEL_16), *"--batch_size 4 --threads 1 --steps 2 --eval_images 4".split()]


def config(*argv: str) -> TrainConfig:
    return config_of(build_parser().parse_args(["train", *argv]))


def test_an_explicit_flag_beats_the_preset_in_both_spellings():
    assert config().preset_name == "sprites-mini" and TrainConfig.preset("clevr6").preset_name == "clevr6"
    for flag in ("--batch_size", "--batch-size"):
        assert config("clevr6", flag, "4").batch_size == 4
    assert config("clevr6", "--alpha", "0").alpha == 0
    assert config("clevr6").max_objects == 6 and config("sprites").max_objects == 0
    assert config("clevr6", "--compile").compile and not config("clevr6", "--compile", "false").compile
    assert config("--output_hidden", "8,9").output_hidden == (8, 9)


def test_every_field_is_a_flag(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = capsys.readouterr().out
    for field in dataclasses.fields(TrainConfig):
        assert field.name == "preset_name" or f"--{field.name}" in text, field.name


@pytest.mark.parametrize(
    "argv, code",
    [
        ("--help", 0),
        ("--version", 0),
        ("train clevr6 --help", 0),
        ("sweep --help-all", 0),
        ("eval --help", 0),
        ("data check --help", 0),
        ("train --print-config", 0),
        ("train --stepz 3", 2),
        ("train --steps many", 2),
        ("train --steps -1", 2),
        ("eval --splitt test", 2),
        ("comparee", 2),
        ("data", 2),
    ],
)
def test_a_help_and_a_wrong_flag_import_no_torch(argv, code):
    """They took 1.6 s, most of it torch's import."""
    heavy = "('torch', 'numpy', 'scipy', 'PIL', 'rich', 'fsspec')"
    program = (
        "import sys\nfrom fastslots.cli import main\n"
        f"try: code = main({argv.split()})\nexcept SystemExit as end: code = end.code\n"
        f"print(code or 0, [name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"{code} []"


def help_of(capsys, *argv: str) -> list[str]:
    with pytest.raises(SystemExit) as ended:
        main([*argv])
    assert ended.value.code == 0
    return capsys.readouterr().out.splitlines()


def test_the_help_fits_two_screens_and_has_the_values_of_the_preset(monkeypatch, capsys):
    """It had 230 lines, each field in both spellings, and the defaults of no preset."""
    monkeypatch.setenv("COLUMNS", "100")
    short, everything = help_of(capsys, "train", "clevr6", "--help"), help_of(capsys, "train", "--help-all")
    assert len(short) <= 50 and max(map(len, short + everything)) <= 100
    assert "  --batch_size INT        images a step, over all processes [32]" in short
    assert "  --steps INT             training steps [500000]" in short
    assert "  --steps INT             training steps [4000]" in help_of(capsys, "train", "--help")
    assert any(line.startswith("  --output_hidden TUPLE   hidden widths of") for line in everything)
    assert not any(line.startswith("  --output_hidden") and "widths" in line for line in short)
    assert len(help_of(capsys, "sweep", "--help")) <= 60
    for heading in ("data:", "model:", "loss:", "training:", "evaluation and records:"):
        assert heading in short and heading in everything


@pytest.mark.parametrize("columns", ["80", "100"])
@pytest.mark.parametrize("command", ["train", "sweep"])
def test_the_help_names_every_preset(monkeypatch, capsys, command, columns):
    """At 80 columns clevr6-mini was cut off."""
    monkeypatch.setenv("COLUMNS", columns)
    text = " ".join(" ".join(help_of(capsys, command, "--help")).split())
    assert f"one of {', '.join(preset_names())}" in text and "Without PRESET: sprites-mini" in text


def test_every_field_stands_under_one_heading():
    under = [name for names in headings().values() for name in names]
    assert len(under) == len(set(under))
    assert set(under) == {field.name for field in dataclasses.fields(TrainConfig)} - {"preset_name"}


@pytest.mark.parametrize("preset", preset_names())
def test_a_printed_configuration_is_taken_again(preset, tmp_path, capsys):
    flags = ["--seed", "5", "--output_hidden", "8,9", "--warmup", "3%"]
    assert main(["train", preset, *flags, "--print-config"]) == 0
    printed = capsys.readouterr().out
    path = tmp_path / "config.json"
    path.write_text(printed)
    assert config("--config", str(path)) == config(preset, "--config", str(path)) == config(preset, *flags)
    assert main(["train", "--config", str(path), "--print-config"]) == 0
    assert capsys.readouterr().out == printed


def test_a_device_that_is_not_here_is_refused_before_anything_is_made(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(dataclasses.asdict(config("--data", "nowhere.npz")) | {"device": "cuda:99"}))
    assert read_config(path).device == "cuda:99"  # what a run was trained on can be read anywhere
    for argv in (
        ["train", "--config", str(path)],
        ["sweep", "--device", "cuda:99", "--out", "sweep"],
        ["data", "features", "nowhere.npz", "--checkpoint", "no.pth", "--out", "out", "--device", "cuda:99"],
    ):
        assert main(argv) == 2
        assert "device 'cuda:99' cannot be used" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [path]


def test_config_file_round_trip(tmp_path):
    first = config("clevr6", "--lr", "0.001")
    (tmp_path / "config.json").write_text(first.to_json())
    assert config("--config", str(tmp_path / "config.json")) == first
    assert config("--config", str(tmp_path / "config.json"), "--seed", "5").seed == 5


def test_a_preset_fills_what_a_config_file_leaves_out(tmp_path):
    """Both together were refused, and a file of a few fields took the others from no preset."""
    path = tmp_path / "few.json"
    path.write_text('{"alpha": 0.5, "lr": 0.1}')
    found = config("sprites", "--config", str(path), "--lr", "0.2")
    assert found == TrainConfig.preset("sprites", preset_name="sprites", alpha=0.5, lr=0.2)
    path.write_text(found.to_json())
    assert config("sprites", "--config", str(path)) == config("--config", str(path)) == found
    assert read_config(path, SlotVAEConfig, "sprites") == SlotVAEConfig.preset("sprites", alpha=0.5)


def test_a_field_that_a_configuration_lacks_is_named():
    with pytest.raises(UserError, match=r"SlotVAEConfig has no field pixels_per_step: .*fastslots\.train\.TrainConfig"):
        SlotVAEConfig.preset("sprites-mini", pixels_per_step=0)
    with pytest.raises(UserError, match=r"^TrainConfig has no field pixels$"):
        TrainConfig.preset("sprites-mini", pixels=0)


def test_train_eval_report(tmp_path, capsys):
    run = str(tmp_path / "run")
    assert main(["train", *TINY, "--out", run]) == 0
    capsys.readouterr()
    assert main(["eval", run, "--images", "6", "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    names = {
        "recon",
        "kl",
        "interaction",
        "j_ari",
        "jis",
        "fg_ari",
        "ari",
        "mbo",
        "miou",
        "images",
        "latent",
        "seconds",
    }
    assert names <= scores.keys() and scores["images"] == 6 and scores["latent"] == "mean"
    assert main(["eval", run, "--images", "6", "--split", "test", "--latent", "sample"]) == 0
    table = capsys.readouterr().out
    assert "j_ari" in table and "sample" in table
    assert main(["report", run, run, "--out", str(tmp_path / "both.html")]) == 0
    assert (tmp_path / "both.html").read_text().count("<h1>run</h1>") == 2
    assert main(["train", "--out", run, "--resume", "--steps", "3"]) == 0  # the fields come from the run


def test_data_commands(tmp_path, capsys):
    out = str(tmp_path / "sprites")
    assert main(["data", "generate", "sprites", out, "--count", "30", "--size", "16"]) == 0
    capsys.readouterr()
    assert main(["data", "check", out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["info"]["kind"] == "generated sprites"
    assert main(["train", *TINY, "--data", out, "--out", str(tmp_path / "run")]) == 0
    assert main(["data", "generate", "sprites", out, "--count", "30"]) == 2


def test_a_reader_that_has_gone_is_no_error(tmp_path):
    """As in `fastslots ... | head`."""
    np.savez(tmp_path / "data.npz", np.zeros((30, 8, 8, 3), np.uint8))
    code = f"from fastslots.cli import main; raise SystemExit(main(['data', 'check', '{tmp_path}/data.npz']))"
    reading, writing = os.pipe()
    os.close(reading)
    env = os.environ | {"FASTSLOTS_CACHE": str(tmp_path / "cache"), "PYTHONUNBUFFERED": ""}
    done = subprocess.run([sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE, text=True, env=env)
    os.close(writing)
    assert done.returncode == 0 and "BrokenPipe" not in done.stderr, done.stderr


def test_doctor(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "self-check passed" in text and "decoder_loss" in text and ": cpu" in text


@pytest.mark.parametrize(
    "argv, words",
    [
        (["train", "clevr7"], "unknown preset 'clevr7': choose one of sprites, clevr6"),
        (["train", "clevr6"], "preset clevr6 is for data that are not built in: name them with --data (docs/data.md"),
        (["train", "clevr6-mini"], "preset clevr6-mini is for data that are not built in: name them with --data"),
        (["sweep", "clevr6", "--out", "out"], "preset clevr6 is for data that are not built in"),
        (["train", "--batchsize", "4"], "unknown argument --batchsize: did you mean --batch"),
        (
            ["train", "--preset", "clevr6"],
            "unknown argument --preset: the preset has no flag: `fastslots train clevr6`",
        ),
        (["sweep", "--preset=sprites", "--out", "out"], "the preset has no flag: `fastslots sweep sprites`"),
        (["train", "--batch_size", "0"], "batch_size must be at least 1"),
        (["train", "--steps", "-5"], "steps must be at least 1"),
        (["train", "--output_hidden", "64", "64"], "unknown preset '64': a list is given with commas"),
        (["train", "sprites-mini", "--output_hidden", "64", "64"], "unknown argument 64: a list is given with commas"),
        (["sweep", "--alpha", "0", "0.05", "--out", "out"], "unknown preset '0.05': a list is given with commas"),
        (["train", "--tensorboard", "sprites-mini"], "put the preset before the flags"),
        (["train", "sprites", "--config", "clevr6.json"], "clevr6.json is of preset 'clevr6', not 'sprites'"),
        (["train", "sprites", "--config", "typo.json"], "typo.json has unknown fields: apha"),
        (["train", "--lr", "fast"], "argument --lr: 'fast' is no number"),
        (["train", "--alpha", "nan"], "alpha must be a number"),
        (["train", "--resolution", "31"], "resolution 31 must be a multiple of cnn_stride 2"),
        (["train", "--decoder_heads", "7"], "slot_width 64 must be a multiple of decoder_heads 7"),
        (["train", "--encoder_width", "65"], "encoder_width 65 must be a multiple of encoder_heads 4"),
        (
            ["train", "--slot_dim", "33", "--encoder_width", "0"],
            "encoder_width 0 stands for 66 (slot_dim 33), which must",
        ),
        (["train", "--optimizer", "adamm"], "optimizer must be muon or a class of torch.optim"),
        (["train", "--device", "cuda:99"], "device 'cuda:99' cannot be used"),
        (["train", "--pixels_per_step", "2000"], "pixels_per_step 2000 is more than the image has (1024)"),
        (["train", "--data", "nowhere.npz"], "nowhere.npz: no such file"),
        (["train", "--out", "file"], "is a file: name a folder"),
        (["train", "--resume"], "--resume needs --out"),
        (["train", "--config", "nowhere.json"], "nowhere.json cannot be read"),
        (["train", "--config", "file"], "is no JSON"),
        (["train", "--init_from", "nowhere"], "nowhere"),
        (["train", "--data", "nan.npz"], "NaN or infinite pixels"),
        (["train", "--data", "named.npz"], "numpy.savez('named.npz', arr_0=images, arr_2=masks)"),
        (["eval", "nowhere"], "nowhere is no run directory"),
        (["eval", "sprites"], "wrote, or a model that ships: clevr6-mini, sprites-mini"),
        (["explore", "sprites"], "wrote, or a model that ships: clevr6-mini, sprites-mini"),
        (["report", "nowhere"], "nowhere is no run directory"),
        (["data", "check", "file"], "not recognised"),
        (["data", "pack", "small.npz", "file"], "exists already"),
        (["data", "generate", "sprites", "out", "--count", "0"], "count >= 1"),
        (["trian"], "invalid choice: 'trian'"),
        ([], "required"),
    ],
)
def test_mistakes_exit_2_with_one_line(tmp_path, monkeypatch, capsys, argv, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTSLOTS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "file").write_text("hello")
    (tmp_path / "clevr6.json").write_text('{"preset_name": "clevr6"}')
    (tmp_path / "typo.json").write_text('{"apha": 0}')
    np.savez("small.npz", np.zeros((4, 24, 24, 3), np.uint8))
    np.savez("named.npz", images=np.zeros((4, 24, 24, 3), np.uint8), masks=np.zeros((4, 24, 24), np.uint8))
    np.savez("nan.npz", np.full((4, 32, 32, 3), np.nan))
    assert main(argv) == 2
    error = capsys.readouterr().err.splitlines()
    assert error[-1].startswith("fastslots: error: ") and words in error[-1]
    assert "Traceback" not in "".join(error)
    assert not (tmp_path / "runs").exists() and not (tmp_path / "out").exists()
