"""``fastslots data get`` against a server on this machine: whole, continued, changed, damaged, absent."""

from __future__ import annotations

import base64
import hashlib
import http.server
import threading

import numpy as np
import pytest
from scenes import write_tfrecord

import fastslots.data.storage.fetch as fetching
from fastslots.cli import main
from fastslots.data.storage.fetch import fetch
from fastslots.data.storage.published import PUBLISHED
from fastslots.errors import UserError

DATA = np.random.default_rng(0).integers(0, 256, 300_000, dtype=np.uint8).tobytes()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTSLOTS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


class Server(http.server.ThreadingHTTPServer):
    """Files by name; knows what was asked for, and misbehaves when told to."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {"/set.bin": DATA}
        self.asked: list[tuple[str, str | None]] = []
        self.cut_after: list[int] = []  # bytes after which each of the next answers breaks off
        self.ranges = self.tags = True
        self.md5 = ""  # "" for the right one, "-" for none
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server, wanted = self.server, self.headers.get("Range")
        server.asked.append((self.path, wanted))
        if self.path not in server.files:
            return self.send_error(404)
        data = server.files[self.path]
        tag = '"' + hashlib.sha1(data).hexdigest() + '"'
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and server.ranges else 0
        if server.tags and self.headers.get("If-Range", tag) != tag:
            start = 0
        if start and start >= len(data):
            return self.send_error(416)
        part = data[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(part)))
        if server.tags:
            self.send_header("ETag", tag)
        if server.md5 != "-":
            digest = server.md5 or base64.b64encode(hashlib.md5(data).digest()).decode()
            self.send_header("x-goog-hash", f"crc32c=AAAAAA==,md5={digest}")
        self.end_headers()
        self.wfile.write(part[: server.cut_after.pop(0)] if server.cut_after else part)
        self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with Server() as made:
        thread = threading.Thread(target=made.serve_forever, daemon=True)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def test_a_file_is_fetched_once(server, tmp_path):
    seen = []
    for _ in range(2):
        fetch(
            f"{server.url}/set.bin",
            tmp_path / "deep" / "set.bin",
            progress=lambda done, total: seen.append((done, total)),
        )
    assert (tmp_path / "deep" / "set.bin").read_bytes() == DATA and seen[-1] == (len(DATA), len(DATA))
    assert len(server.asked) == 1 and [p.name for p in (tmp_path / "deep").iterdir()] == ["set.bin"]


def test_broken_connections_go_on_where_they_ended(server, tmp_path):
    server.cut_after = [100_000, 50_000, 0]
    fetch(f"{server.url}/set.bin", tmp_path / "set.bin")
    assert (tmp_path / "set.bin").read_bytes() == DATA
    assert [wanted for _, wanted in server.asked] == [None, "bytes=100000-", "bytes=150000-", "bytes=150000-"]


@pytest.mark.parametrize("change", ["nothing", "file", "file, no tags", "no ranges", "whole"])
def test_a_later_call_goes_on(server, tmp_path, monkeypatch, change):
    monkeypatch.setattr(fetching, "ATTEMPTS", 1)
    server.tags = change != "file, no tags"
    server.cut_after = [120_000]
    with pytest.raises(UserError, match=r"the connection has broken .*: call again, it goes on"):
        fetch(f"{server.url}/set.bin", tmp_path / "set.bin")
    assert (tmp_path / "set.bin.partial").stat().st_size == 120_000 and not (tmp_path / "set.bin").exists()
    if change.startswith("file"):
        server.files["/set.bin"] = DATA[::-1] + b"more"
    elif change == "no ranges":
        server.ranges = False
    elif change == "whole":
        (tmp_path / "set.bin.partial").write_bytes(DATA)
    fetch(f"{server.url}/set.bin", tmp_path / "set.bin")
    assert (tmp_path / "set.bin").read_bytes() == server.files["/set.bin"]
    assert server.asked[1][1] == ("bytes=120000-" if change != "whole" else f"bytes={len(DATA)}-")


@pytest.mark.parametrize("by", ["server", "table"])
def test_what_is_not_what_was_published_is_refused(server, tmp_path, by):
    server.md5 = base64.b64encode(bytes(16)).decode() if by == "server" else "-"
    with pytest.raises(UserError, match=r"set.bin: what has come is not what was published \(MD5\)"):
        fetch(f"{server.url}/set.bin", tmp_path / "set.bin", md5="" if by == "server" else "0" * 32)
    assert not (tmp_path / "set.bin").exists() and not (tmp_path / "set.bin.partial").exists()
    server.md5 = "-"
    fetch(f"{server.url}/set.bin", tmp_path / "set.bin", hashlib.md5(DATA).hexdigest())
    assert (tmp_path / "set.bin").read_bytes() == DATA


def test_what_cannot_be_had_is_said(server, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"/none is not to be had \(404 Not Found\)"):
        fetch(f"{server.url}/none", tmp_path / "none")
    for url in ("file:///etc/passwd", "ftp://host/x", "http:///x", "/etc/passwd"):
        with pytest.raises(UserError, match="is no http or https address of a file"):
            fetch(url, tmp_path / "x")
    gone = Server()
    gone.server_close()
    with pytest.raises(UserError, match=r"cannot be reached \(.*refused\): fetch it elsewhere, into"):
        fetch(f"{gone.url}/set.bin", tmp_path / "x")
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(UserError, match=r"300,000 bytes are more than .* has room for"):
        fetch(f"{server.url}/set.bin", tmp_path / "x")


def test_the_command_fetches_and_checks(server, tmp_path, capsys):
    name = PUBLISHED["multi-dsprites"].files[0].name
    server.files[f"/mirror/{name}"] = write_tfrecord(tmp_path / "source").read_bytes()
    assert main(["data", "get", "multi-dsprites", "--out", "here", "--from", f"{server.url}/mirror/"]) == 0
    out = capsys.readouterr().out
    for line in (
        "page         https://github.com/google-deepmind/multi_object_datasets",
        "licence      Apache 2.0",
        "file         https://storage.googleapis.com/multi-object-datasets/multi_dsprites/",
        f"fetched      here/{name}",
        "data set     Multi-dSprites, coloured on coloured",  # what was fetched here, and read
        f"train        fastslots train sprites --max_objects 0 --data here/{name}",
    ):
        assert line in out
    assert (
        main(["data", "get", "multi-dsprites", "--out", "here", "--from", "http://127.0.0.1:1/gone"]) == 0
    )  # is there


def test_the_command_lists_and_names(capsys):
    assert main(["data", "get"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("clevr6", "multi-dsprites", "clevrtex", "voc2012"))
    assert main(["data", "get", "clevrtex", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "size         23.5 GB" in out and out.count("clevrtex_full_part") == 5
    assert main(["data", "get", "clever6"]) == 2
    assert "no set is known as 'clever6': there are clevr6, " in capsys.readouterr().err
    for known in PUBLISHED.values():
        assert (
            known.licence
            and known.page.startswith("http")
            and len({file.name for file in known.files}) == len(known.files)
        )
