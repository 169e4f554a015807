"""Packed sets on a plain web server, which may give half of a file, all of it for a range, or bytes without end."""

from __future__ import annotations

import http.server
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import MODEL_8

from fastslots.cli import main
from fastslots.data import open_dataset
from fastslots.data.builtin.sprites import SpritesDataset
from fastslots.data.open import pack
from fastslots.errors import UserError
from fastslots.train import TrainConfig, fit

pytest.importorskip("aiohttp", reason="what fsspec asks web servers with")

IMAGES, MASKS, FACTORS = SpritesDataset(5, 8, (2, 4), 40).scenes(range(40))
TINY = dict(MODEL_8, batch_size=3, threads=1, eval_every=0, eval_images=2, checkpoint_every=3)


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder with ranges; ``faults`` says of a file's name what goes wrong with it, and how often."""

    daemon_threads, request_queue_size = True, 128

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.faults, self.sent = folder, dict[str, list[str]](), 0
        self.over = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/packed"

    def fault(self, path: str) -> str:
        waiting = self.faults.get(path.rpartition("/")[2], [])
        return waiting.pop(0) if len(waiting) > 1 else waiting[0] if waiting else ""


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.server.folder / self.path.strip("/")
        fault = self.server.fault(self.path) if body or self.server.faults.get(path.name) == ["no length"] else ""
        if path.is_dir():
            names = (f"{item.name}/" if item.is_dir() else item.name for item in path.iterdir())
            data = "".join(f'<a href="{name}">{name}</a>' for name in names).encode()
        elif path.is_file():
            data = path.read_bytes()
        else:
            return self.send_error(404)
        first, last, wanted = 0, len(data), self.headers.get("Range")
        if wanted and fault != "whole":
            first, _, end = wanted.removeprefix("bytes=").partition("-")
            first, last = int(first), min(int(end) + 1, len(data))
        self.send_response(206 if wanted and fault != "whole" else 200)
        if wanted and fault != "whole":
            self.send_header("Content-Range", f"bytes {first}-{last - 1}/{len(data)}")
        part = data[first:last]
        if fault == "short":
            part = part[: len(part) // 2]
        if fault not in ("endless", "no length"):
            self.send_header("Content-Length", str(len(part)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        if not body:
            return None
        if fault == "silent":
            self.server.over.wait(30)
        while fault == "endless" and not self.server.over.is_set():
            self.wfile.write(bytes(1 << 16))
            self.server.sent += 1 << 16
        self.wfile.write(part[: len(part) // 2] if fault == "half" else part)
        return None

    def log_message(self, *_: object) -> None:
        pass


def soon(fault: str, monkeypatch) -> None:
    """No minute of waiting where the test is of silence."""
    if fault == "silent":
        monkeypatch.setattr("fastslots.data.packed.web.SILENCE", 1.0)


@pytest.fixture
def server(tmp_path, monkeypatch) -> Iterator[Server]:
    np.savez(tmp_path / "a.npz", IMAGES, FACTORS["x"], MASKS)
    (tmp_path / "root").mkdir()
    pack(tmp_path / "a.npz", tmp_path / "root" / "packed")
    monkeypatch.setenv("FASTSLOTS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FASTSLOTS_CACHE_GB", "0")
    monkeypatch.setattr("fastslots.data.packed.ranges.WAITS", (0.0, 0.0))
    server = Server(tmp_path / "root")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("limit", ["0", "1"], ids=["ranges", "whole"])
def test_the_same_run_as_from_the_local_folder(server, tmp_path, monkeypatch, limit):
    monkeypatch.setenv("FASTSLOTS_CACHE_GB", limit)
    near, far = str(tmp_path / "root" / "packed"), server.url
    weights = []
    for name, where in (("near", near), ("far", far)):
        config = TrainConfig.preset("sprites-mini", **TINY, data=where, steps=5)
        weights.append(load_file(fit(config, out=tmp_path / name).out / "model.safetensors"))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("fault", ["half", "short", "silent"])
def test_half_an_answer_is_asked_for_again(server, monkeypatch, fault):
    soon(fault, monkeypatch)
    dataset = open_dataset(server.url)
    server.faults["images.u8"] = [fault, "sound"] if fault == "half" else ["sound"]
    assert np.array_equal(dataset.batch(np.array([4, 5]), masks=False)[0], IMAGES[[4, 5]])
    server.faults["images.u8"] = [fault]
    with pytest.raises(UserError, match=r"images.u8 at byte \d+ cannot be read .*go on with --resume when it can"):
        dataset.batch(np.array([4]), masks=False)


@pytest.mark.parametrize("fault", ["half", "short", "silent", "endless", "no length"])
@pytest.mark.parametrize("name", ["meta.json", "images.u8"])
@pytest.mark.parametrize("limit", ["0", "1"], ids=["ranges", "whole"])
def test_what_a_server_does_not_give_is_one_line(server, tmp_path, monkeypatch, capsys, limit, name, fault):
    """Nothing of it is kept for whole, little of it is taken, and nobody waits for long."""
    soon(fault, monkeypatch)
    monkeypatch.setenv("FASTSLOTS_CACHE_GB", limit)
    server.faults[name] = [fault]
    began = time.monotonic()
    assert main(["data", "check", server.url]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fastslots: error: ")]
    assert len(error) == 1 and server.url in error[0]
    assert server.sent < 64 << 20 and time.monotonic() - began < 60
    kept = [path for path in (tmp_path / "cache").rglob("*.u8") if ".partial" not in str(path)]
    assert not kept or (limit == "0" and name == "images.u8")  # the counts, which are always kept
    server.faults.clear()
    assert np.array_equal(open_dataset(server.url).batch(np.array([7]), masks=False)[0], IMAGES[[7]])


def test_a_server_without_ranges_is_refused_unless_the_cache_takes_all(server, monkeypatch):
    """Each image drawn would be a transfer of the whole set."""
    server.faults["images.u8"] = ["whole"]
    with pytest.raises(UserError, match=r"images.u8 cannot be read by parts .*takes no Range.*FASTSLOTS_CACHE_GB"):
        open_dataset(server.url)
    monkeypatch.setenv("FASTSLOTS_CACHE_GB", "1")
    assert np.array_equal(open_dataset(server.url).batch(np.array([7]), masks=False)[0], IMAGES[[7]])
