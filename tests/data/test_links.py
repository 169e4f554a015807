"""Half-written folders and downloads that came with somebody else's files: links in them lead nowhere."""

from __future__ import annotations

import io
import os
import tarfile
import zipfile
from pathlib import Path

import pytest

from fastslots.cli import main
from fastslots.config.run import TrainConfig
from fastslots.data.storage.archives import unpacked
from fastslots.data.storage.fetch import fetch
from fastslots.errors import UserError
from fastslots.runs import trackers
from fastslots.runs.folder import RunFolder
from fastslots.sweep.trials import LOG, Processes, Trial, run_trial


def contents(folder: Path) -> dict[str, tuple[bytes, str]]:
    return {
        str(path): (path.read_bytes() if path.is_file() else b"", os.readlink(path) if path.is_symlink() else "")
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize("name", ["", "lock", "images.u8", "progress.json", "progress.tmp", "meta.json"])
def test_a_half_written_set_leads_nowhere(tmp_path, capsys, name):
    """OUT.partial, or a file in it, as a link to something of the user's."""
    victim, partial = tmp_path / "victim", tmp_path / "out.partial"
    if name:
        victim.write_text("precious")
        partial.mkdir()
        (partial / name).symlink_to(victim)
    else:
        victim.mkdir()
        partial.symlink_to(victim)
    before = contents(tmp_path)
    assert main(["data", "generate", "sprites", str(tmp_path / "out"), "--count", "3", "--size", "8"]) == 2
    error = capsys.readouterr().err.splitlines()
    link = partial / name if name else partial
    assert error[-1] == f"fastslots: error: {link} is a symbolic link, through which nothing is written: remove it"
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["a.npz", "a.tfrecords", "a", "folder/a.tfrecords"])
@pytest.mark.timeout(60)
def test_a_pipe_among_the_data_is_refused(tmp_path, capsys, name):
    """It was waited for, without end."""
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / name)
    asked = tmp_path / name.split("/")[0]
    for argv in (["data", "check", str(asked)], ["train", "--data", str(asked), "--out", str(tmp_path / "run")]):
        assert main(argv) == 2
        assert str(asked) in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.timeout(60)
def test_a_configuration_that_is_a_device_is_refused(tmp_path, capsys):
    (tmp_path / "config.json").symlink_to("/dev/zero")
    assert main(["train", "--config", str(tmp_path / "config.json"), "--out", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "config.json cannot be read (it is no regular file)" in line and not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["set.bin.partial", "set.bin.partial.json"])
def test_a_download_leads_nowhere(tmp_path, name):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / name).symlink_to("victim")
    with pytest.raises(UserError, match=f"{name} is a symbolic link"):
        fetch("http://127.0.0.1:1/set.bin", tmp_path / "set.bin")
    assert (tmp_path / "victim").read_text() == "precious"


@pytest.mark.parametrize("name", ["wandb", "wandb.json", "trackio.json", "code.json", "events.out.tfevents.1.x"])
def test_what_trackers_write_leads_nowhere(tmp_path, name):
    (tmp_path / "victim").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(tmp_path / "victim")
    with pytest.raises(UserError, match=f"{name} is a symbolic link"):
        RunFolder(tmp_path / "run").create()


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b'{"id": 7}'])
def test_a_damaged_identity_of_a_tracker_is_named(tmp_path, monkeypatch, content):
    monkeypatch.setattr(trackers, "_package", lambda *_: None)
    (tmp_path / "wandb.json").write_bytes(content)
    with pytest.raises(UserError, match=r"wandb.json is damaged: remove it"):
        trackers.open_trackers(["wandb"], RunFolder(tmp_path), 0, {})


def test_the_log_of_a_trial_leads_nowhere(tmp_path):
    (tmp_path / "victim").write_text("precious")
    trial = Trial({}, TrainConfig(), tmp_path / "trial")
    trial.folder.mkdir()
    (trial.folder / LOG).symlink_to(tmp_path / "victim")
    assert "is a symbolic link" in run_trial(trial, None, Processes(1)).error
    assert (tmp_path / "victim").read_text() == "precious"


NAMES = ("../escaped", "/tmp/escaped-from-an-archive", "a/../../escaped", "a/./b.png")


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_an_archive_writes_in_its_own_folder_alone(tmp_path, monkeypatch, kind):
    """Names that leave it, links and devices are left out; a link that a later name goes through is not there."""
    monkeypatch.setenv("FASTSLOTS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / f"set.{kind}"
    if kind == "tar":
        with tarfile.open(path, "w") as archive:
            for name in NAMES:
                info = tarfile.TarInfo(name)
                info.size = 4
                archive.addfile(info, io.BytesIO(b"data"))
            for kind_of, target in ((tarfile.SYMTYPE, str(tmp_path)), (tarfile.LNKTYPE, "/etc/passwd")):
                info = tarfile.TarInfo(f"link{kind_of.decode()}")
                info.type, info.linkname = kind_of, target
                archive.addfile(info)
            info = tarfile.TarInfo("link2/through")
            info.size = 4
            archive.addfile(info, io.BytesIO(b"data"))
    else:
        with zipfile.ZipFile(path, "w") as archive:
            for name in NAMES:
                archive.writestr(name, b"data")
            link = zipfile.ZipInfo("link2")
            link.external_attr = 0o120777 << 16
            archive.writestr(link, str(tmp_path))
            archive.writestr("link2/through", b"data")
    folder = unpacked(path)
    found = {str(item.relative_to(folder)) for item in folder.rglob("*") if item.is_file()}
    assert found == {"a/b.png", "link2/through"} and not any(item.is_symlink() for item in folder.rglob("*"))
    assert not list(tmp_path.glob("escaped*")) and not (tmp_path / "through").exists()
    assert not Path("/tmp/escaped-from-an-archive").exists()


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_an_archive_that_grows_beyond_its_size_is_refused(tmp_path, monkeypatch, kind):
    """Of 8 kB 8 MB of zeros; the bound is lower here than DEFLATE's best."""
    monkeypatch.setenv("FASTSLOTS_CACHE", str(tmp_path / "cache"))
    path, zeros = tmp_path / f"bomb.{kind}", bytes(8 << 20)
    if kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.png", zeros)
    else:
        with tarfile.open(path, "w:gz") as archive:
            info = tarfile.TarInfo("a.png")
            info.size = len(zeros)
            archive.addfile(info, io.BytesIO(zeros))
    monkeypatch.setattr("fastslots.data.storage.archives.MOST_RATIO", 100)
    with pytest.raises(UserError, match=r"claims 8,388,608 bytes or more, too many for it or the disk"):
        unpacked(path)
    assert not [item for item in (tmp_path / "cache").rglob("*") if item.is_file()]
