"""Which URLs are opened: those of few protocols, and of a foreign configuration only with the user's word."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import fsspec
import numpy as np
import pytest
from tiny import MODEL_8

from fastslots.cli import main
from fastslots.data.builtin.sprites import SpritesDataset
from fastslots.data.open import pack
from fastslots.train import TrainConfig, fit

TINY = dict(MODEL_8, batch_size=2, threads=1, eval_every=0, eval_images=2)
TEMPLATE = {"version": 1, "templates": {"u": "{{ cycler.__init__.__globals__.os.system('touch owned') }}"}, "refs": {}}
EVIL = "reference://::data:application/json;base64," + base64.b64encode(json.dumps(TEMPLATE).encode()).decode()


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """URLs that fsspec was asked for."""
    from fsspec import core

    urls: list[str] = []

    def url_to_fs(url: str, **_: object) -> None:
        urls.append(url)
        raise OSError("no network here")

    monkeypatch.setattr(core, "url_to_fs", url_to_fs)
    return urls


@pytest.fixture
def run(tmp_path, monkeypatch, request) -> Path:
    """A run whose configuration names other data than it was trained on."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTSLOTS_CACHE", str(tmp_path / "cache"))
    return fit(TrainConfig.preset("sprites-mini", **TINY, steps=1), out=tmp_path / "run").out


def name(run: Path, url: str) -> None:
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"data": url}))
    (run / "explorer.json").unlink(missing_ok=True)


def contents(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*")) if path.is_file()}


COMMANDS = (
    ["train", "--config", "run/config.json", "--out", "new"],
    ["train", "--out", "run", "--resume"],
    ["eval", "run"],
    ["report", "run"],
)


@pytest.mark.parametrize("url", [EVIL, "s3://somebody/data", "https://127.0.0.1:1/data"])
def test_a_configuration_opens_no_url_by_itself(run, tmp_path, asked, capsys, url):
    name(run, url)
    before = contents(tmp_path)
    capsys.readouterr()
    for argv in COMMANDS:
        assert main(argv) == 2, argv
        error = capsys.readouterr().err.splitlines()
        assert len(error) == 1 and error[0].startswith("fastslots: error: "), (argv, error)
        words = ("(::)",) if url is EVIL else ("run/config.json", url, "--allow-remote")
        assert all(word in error[0] for word in words), error
    assert contents(tmp_path) == before and not asked


@pytest.mark.parametrize("argv", COMMANDS)
def test_the_user_may_allow_it(run, asked, argv):
    """It is asked for then; that there is no network is another matter."""
    name(run, "s3://somebody/data")
    main([*argv, "--allow-remote"])
    assert asked == ["s3://somebody/data"]
    asked.clear()
    if argv[0] != "report":
        assert main([*argv, "--data", "s3://somebody/other"]) == 2
        assert asked == ["s3://somebody/other"]


@pytest.mark.parametrize(
    "url, words",
    [
        (EVIL, "chains file systems (::), which are never opened"),
        ("s3://bucket/a::zip://b", "chains file systems"),
        ("simplecache::s3://bucket/a", "chains file systems"),
        ("reference://x", "data are not read through 'reference'"),
        ("memory://x", "data are not read through 'memory'"),
        ("S3://bucket/a", "data are not read through 'S3'"),
        ("ssh://host/a", "data are not read through 'ssh'"),
        ("dask://x", "data are not read through 'dask'"),
        ("github://a:b@c/", "data are not read through 'github'"),
        ("zip://x", "data are not read through 'zip'"),
        ("://x", "data are not read through ''"),
        ("s3://", "names no folder: give s3://BUCKET/FOLDER"),
        ("s3://a\nb", "names no folder"),
    ],
)
def test_other_protocols_never_reach_fsspec(tmp_path, monkeypatch, asked, capsys, url, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTSLOTS_CACHE", str(tmp_path / "cache"))
    for argv in (["data", "check", url], ["train", "--data", url], ["eval", "nowhere", "--data", url]):
        assert main(argv) == 2
        error = capsys.readouterr().err.splitlines()
        assert len(error) == 1 and (words in error[0] or argv[0] == "eval"), error
    assert not asked and not list(tmp_path.iterdir())


def test_a_run_of_ones_own_goes_on_without_a_flag(tmp_path, monkeypatch, capsys):
    """On the machine where its data were named; on another the URL is a stranger's again."""
    monkeypatch.setenv("FASTSLOTS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("fastslots.data.packed.urls.PROTOCOLS", ("memory",))
    images, masks, factors = SpritesDataset(5, 8, (2, 4), 40).scenes(range(40))
    np.savez(tmp_path / "a.npz", images, factors["x"], masks)
    pack(tmp_path / "a.npz", tmp_path / "packed")
    url = f"memory://own-{tmp_path.name}/packed"
    fsspec.filesystem("memory").put(str(tmp_path / "packed"), url, recursive=True)
    flags = [f"--{field}={','.join(map(str, v)) if isinstance(v, tuple) else v}" for field, v in TINY.items()]
    train = ["train", "--out", str(tmp_path / "run")]
    assert main([*train, *flags, "--data", url, "--steps", "1"]) == 0
    for argv in (
        [*train, "--resume", "--steps", "2"],
        ["eval", str(tmp_path / "run")],
        ["report", str(tmp_path / "run")],
    ):
        assert main(argv) == 0, argv
    capsys.readouterr()
    monkeypatch.setenv("FASTSLOTS_CACHE", str(tmp_path / "another machine's cache"))
    assert main([*train, "--resume", "--steps", "3"]) == 2
    assert "--allow-remote" in capsys.readouterr().err
    assert main([*train, "--resume", "--steps", "3", "--allow-remote"]) == 0
    assert main([*train, "--resume", "--steps", "4"]) == 0
