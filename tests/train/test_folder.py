"""A run's folder as a stranger or a failing disk leaves it: nothing is written elsewhere, and nothing is lost."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
from pathlib import Path

import pytest
from tiny import MODEL_8, flags

from fastslots.cli import main
from fastslots.errors import UserError
from fastslots.runs import log as log_module
from fastslots.runs.folder import RunFolder
from fastslots.runs.log import read_metrics
from fastslots.train import TrainConfig, checkpoint, fit, recorder
from fastslots.train.device import steps as device_steps

TINY = dict(MODEL_8, batch_size=2, threads=1, eval_every=0, eval_images=2, checkpoint_every=2)


def config_of(**overrides) -> TrainConfig:
    return TrainConfig.preset("sprites-mini", **{**TINY, **overrides})


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """Checkpoints of steps 4 and 6."""
    return fit(config_of(steps=6), out=tmp_path_factory.mktemp("folder") / "run").out


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def contents(folder: Path) -> dict[str, tuple[bytes, str]]:
    return {
        str(path): (path.read_bytes() if path.is_file() else b"", os.readlink(path) if path.is_symlink() else "")
        for path in sorted(folder.rglob("*"))
    }


def one_line(capsys) -> str:
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("fastslots: error: "), lines
    return lines[0]


# ---- links -----------------------------------------------------------------------------------------------------------

FILES = (
    "config.json", "data.txt", "machine.json", "metrics.jsonl", "machine.jsonl", "model.safetensors", "scores.json",
    "explorer.json", "report.html", "checkpoints/step_00000008.safetensors", "checkpoints/best.safetensors",
    "images/step_00000008.png", "nan_batch.safetensors",
)  # fmt: skip


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("there", [True, False])
def test_nothing_is_written_through_a_link(run, tmp_path, capsys, name, there):
    """Whether it leads to a file of the user's or to a place where one would be made."""
    victim, link = tmp_path / "victim", run / name
    if there:
        victim.write_bytes(link.read_bytes() if link.exists() else b"precious")
    link.unlink(missing_ok=True)
    link.symlink_to(victim)
    before = contents(tmp_path)
    assert main(["train", "--out", str(run), "--resume", "--steps", "8", "--eval_every", "8"]) == 2
    line = one_line(capsys)
    assert f"{link} is a symbolic link, through which nothing is written: remove it" in line
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["images", "checkpoints"])
def test_a_folder_of_a_run_is_no_link(run, tmp_path, capsys, name):
    shutil.move(run / name, tmp_path / "elsewhere")
    (run / name).symlink_to(tmp_path / "elsewhere")
    before = contents(tmp_path)
    assert main(["train", "--out", str(run), "--resume", "--steps", "8"]) == 2
    assert f"{run / name} is a symbolic link" in one_line(capsys)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["report.html", "explorer.json"])
def test_a_report_is_not_written_through_a_link(run, tmp_path, capsys, name):
    (tmp_path / "victim").write_text("precious")
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(tmp_path / "victim")
    before = contents(tmp_path)
    assert main(["report", str(run)]) == 2
    assert f"{run / name} is a symbolic link" in one_line(capsys)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("command", ["report", "train"])
def test_names_of_unfinished_files_cannot_be_foreseen(run, tmp_path, command):
    """A link under the name that was always taken for them led to the victim's end."""
    (tmp_path / "victim").write_text("precious")
    names = (".report.html.partial", ".config.json.partial", ".model.safetensors.partial", ".explorer.json.partial")
    for name in names:
        (run / name).symlink_to(tmp_path / "victim")
    (run / "explorer.json").unlink()
    argv = ["report", str(run)] if command == "report" else ["train", "--out", str(run), "--resume", "--steps", "8"]
    assert main(argv) == 0
    assert (tmp_path / "victim").read_text() == "precious"
    assert command == "report" or not list(run.rglob(".*.partial"))  # the links are gone, as a kill's remains would be


@pytest.mark.parametrize("name", ["metrics.jsonl", "machine.jsonl", "checkpoints/step_00000006.safetensors"])
@pytest.mark.timeout(60)
def test_a_pipe_in_a_run_is_refused(run, capsys, name):
    """It was waited for, without end."""
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    before = contents(run)
    assert main(["train", "--out", str(run), "--resume", "--steps", "8"]) == 2
    assert f"{run / name} is no regular file: remove it" in one_line(capsys)
    assert contents(run) == before


@pytest.mark.parametrize("name", [*FILES, "code.json"])
def test_a_folder_in_the_place_of_a_file_is_no_traceback(run, capsys, name):
    """A line says so, whether or not the run can do without the file."""
    (run / name).unlink(missing_ok=True)
    (run / name).mkdir()
    code = main(["train", "sprites-mini", *flags(TINY), "--out", str(run), "--resume", "--steps", "8"])
    said = capsys.readouterr().err
    assert (
        code in (0, 2)
        and "Traceback" not in said
        and (code == 0 or said.splitlines()[-1].startswith("fastslots: error: "))
    )
    assert (run / name).name in said or name in ("nan_batch.safetensors", "checkpoints/best.safetensors")  # not needed


# ---- disks that do not give back what they took ----------------------------------------------------------------------


@pytest.fixture
def unreadable(monkeypatch) -> set[str]:
    """Names of files that answer EIO."""
    names: set[str] = set()
    read = checkpoint.read_file

    def failing(path: Path, *args) -> bytes:
        if path.name in names:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return read(path, *args)

    monkeypatch.setattr(checkpoint, "read_file", failing)
    return names


def names_in(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir() if path.name != "best.safetensors")


def test_an_unreadable_checkpoint_pushes_out_no_good_one(run, unreadable):
    unreadable.add("step_00000006.safetensors")
    newest, said = (run / "checkpoints" / "step_00000006.safetensors").read_bytes(), io.StringIO()
    fit(config_of(steps=8, checkpoint_every=8), out=run, resume=True, stream=said)
    good, aside, new = names_in(run)
    assert (good, new) == ("step_00000004.safetensors", "step_00000008.safetensors")
    assert aside == "step_00000006.safetensors.aside" and (run / "checkpoints" / aside).read_bytes() == newest
    assert "step_00000006.safetensors cannot be read (Input/output error): set aside as" in said.getvalue()


@pytest.mark.parametrize("damage", ["unreadable", "altered"])
def test_what_a_new_checkpoint_replaces_stays_until_it_is_read_back(run, unreadable, monkeypatch, damage):
    """The disk takes it and gives something else, or nothing: the two before it are still there, and one is good."""
    if damage == "unreadable":
        unreadable.add("step_00000008.safetensors")
    else:
        write = checkpoint.write_atomic

        def altered(path: Path, data: bytes) -> None:
            write(path, data[:-1] + bytes([data[-1] ^ 1]) if path.name == "step_00000008.safetensors" else data)

        monkeypatch.setattr(checkpoint, "write_atomic", altered)
    with pytest.raises(UserError, match=r"step_00000008.safetensors (cannot be read|is damaged).*just after it"):
        fit(config_of(steps=8), out=run, resume=True)
    assert names_in(run) == [*(f"step_0000000{n}.safetensors" for n in (4, 6)), "step_00000008.safetensors.aside"]
    unreadable.clear()
    monkeypatch.undo()
    assert fit(config_of(steps=8), out=run, resume=True).step == 8


def test_without_a_readable_checkpoint_nothing_begins_by_itself(run, capsys):
    for path in (run / "checkpoints").glob("step_*"):
        path.write_bytes(path.read_bytes()[:-1])
    before = contents(run)
    for _ in range(2):
        assert main(["train", "--out", str(run), "--resume", "--steps", "8"]) == 2
        line = one_line(capsys)
        assert "step_00000006.safetensors is damaged" in line and "--restart" in line
        assert contents(run) == before
    assert main(["train", "--out", str(run), "--resume", "--restart", "--steps", "8"]) == 0
    after = contents(run)
    for name in ("metrics.jsonl", *(f"checkpoints/step_0000000{n}.safetensors" for n in (4, 6))):
        assert after[str(run / f"{name}.aside")] == before[str(run / name)]
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl")[0]] == list(range(1, 9))


def test_a_log_that_cannot_be_cut_is_one_line(run, monkeypatch, capsys):
    """The sweep of faults found a traceback."""

    def failing(log, last_step):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(log_module, "_cut", failing)
    assert main(["train", "--out", str(run), "--resume", "--steps", "8"]) == 2
    assert "metrics.jsonl cannot be cut (Input/output error): mend the disk" in one_line(capsys)


def test_last_weights_that_were_not_written_are_by_the_next_resume(run, monkeypatch):
    """The checkpoint of the last step is there, and model.safetensors is still of an earlier one."""
    sound = fit(config_of(steps=8), out=shutil.copytree(run, run.parent / "sound"), resume=True).out
    write = recorder.write_atomic

    def full(path: Path, data: bytes) -> None:
        if path.name == "model.safetensors":
            raise UserError(f"{path} cannot be written (No space left on device)")
        write(path, data)

    monkeypatch.setattr(recorder, "write_atomic", full)
    with pytest.raises(UserError, match=r"model.safetensors cannot be written"):
        fit(config_of(steps=8), out=run, resume=True)
    monkeypatch.undo()
    fit(config_of(steps=8), out=run, resume=True)
    assert (run / "model.safetensors").read_bytes() == (sound / "model.safetensors").read_bytes()


def test_a_restart_without_need_is_refused(run, capsys):
    before = contents(run)
    assert main(["train", "--out", str(run), "--resume", "--restart", "--steps", "8"]) == 2
    assert "has a good checkpoint, of step 6: leave out --restart" in one_line(capsys)
    assert main(["train", "--out", str(run), "--restart"]) == 2
    assert "--restart goes with --resume" in one_line(capsys)
    assert contents(run) == before


@pytest.mark.parametrize("gone", [["config.json"], ["config.json", "metrics.jsonl"], ["config.json", "checkpoints"]])
def test_a_run_without_its_configuration_is_a_run(run, capsys, gone):
    """``train`` without --resume went on with it, or cut its log."""
    for name in gone:
        shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()
    before = contents(run)
    flags = [f"--{field}={','.join(map(str, v)) if isinstance(v, tuple) else v}" for field, v in TINY.items()]
    assert main(["train", "--out", str(run), *flags, "--steps", "8"]) == 2
    assert "already holds a run: add --resume to go on with it" in one_line(capsys)
    assert contents(run) == before


# ---- folders that come and go ----------------------------------------------------------------------------------------


def test_two_trainers_never_take_the_same_next_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    both = [RunFolder.next_free("mini") for _ in range(2)]
    assert both[0].path == both[1].path
    for folder in both:
        folder.create()
    assert [str(folder.path) for folder in both] == ["runs/mini-1", "runs/mini-2"]
    for folder in both:
        folder.release()


def test_a_folder_that_is_removed_while_it_is_written_is_made_anew(tmp_path, monkeypatch):
    steps, said, step = iter(range(100)), io.StringIO(), device_steps.training_step

    def moving(*args, **more):
        if next(steps) == 3:
            os.rename(tmp_path / "run", tmp_path / "gone")
        return step(*args, **more)

    monkeypatch.setattr(device_steps, "training_step", moving)
    out = fit(config_of(steps=6), out=tmp_path / "run", stream=said).out
    assert "run was removed: it is made anew" in said.getvalue()
    assert [line["step"] for line in read_metrics(out / "metrics.jsonl")[0]] == [1, 2, 3, 4, 5, 6]
    assert json.loads((out / "config.json").read_text())["steps"] == 6
    assert fit(config_of(steps=7), out=out, resume=True).step == 7


def test_a_path_that_is_no_text(tmp_path, capfdbinary):
    out = Path(os.fsdecode(os.fsencode(tmp_path) + b"/run-\xff\xfe"))
    flags = [f"--{field}={','.join(map(str, v)) if isinstance(v, tuple) else v}" for field, v in TINY.items()]
    assert main(["train", "--out", str(out), *flags, "--steps", "2"]) == 0
    assert main(["train", "--out", str(out), "--resume", "--steps", "4"]) == 0
    assert main(["eval", str(out)]) == 0 and main(["report", str(out)]) == 0
    assert b"/run-" in capfdbinary.readouterr().out  # and out of the test's report, which must be text


def test_a_resume_of_no_run_says_that_it_starts_one(tmp_path, capsys):
    """A mistyped --out trained something else without a word; a cluster's script relies on the start."""
    argv = ["train", "--config", str(tmp_path / "fields.json"), "--resume", "--out", str(tmp_path / "typo")]
    (tmp_path / "fields.json").write_text(config_of(steps=1).to_json())
    note = f"note      no run in {tmp_path / 'typo'} yet: starting a new one"
    assert main(argv) == 0 and note in capsys.readouterr().err.splitlines()
    assert main(argv) == 0 and "note " not in capsys.readouterr().err
