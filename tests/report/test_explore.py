"""The live explorer: pictures for any latent, and nothing for anybody else."""

from __future__ import annotations

import base64
import contextlib
import http.client
import importlib.util
import io
import json
import random
import re
import socket
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import MODEL_16

from fastslots.cli import main
from fastslots.data.readers.pictures import read_picture
from fastslots.models import SlotVAE, SlotVAEConfig
from fastslots.report import server as server_module
from fastslots.report.live import BadRequestError, Session
from fastslots.report.server import LARGEST_UPLOAD, serve
from fastslots.train import TrainConfig, fit

TINY = {name: value for name, value in MODEL_16.items() if name != "pixels_per_step"}  # fields of SlotVAEConfig


@pytest.fixture(scope="module")
def session() -> Session:
    torch.manual_seed(0)
    model = SlotVAE(SlotVAEConfig.preset("sprites-mini", **TINY))
    return Session(model, torch.rand(2, 3, 16, 16), "<b>run</b>")


@pytest.fixture(scope="module")
def server(session):
    server = serve(session)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def ask(server, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(*server.server_address, timeout=20)
    connection.request(
        method, f"/{server.token}{path}", body, {name.replace("_", "-"): value for name, value in headers.items()}
    )
    answer = connection.getresponse()
    return answer.status, answer.read()


def pixels(uri: str) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))))


def test_decoding_gives_what_the_model_gives(session, server):
    z, shown = session.images[1]["z"], [True, False, True]
    status, body = ask(server, "POST", "/decode", json.dumps({"z": z, "shown": shown}).encode())
    recon, _ = session.model.decoder(torch.tensor(z)[None, [0, 2]])
    expected = (recon[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).detach().numpy()
    result = json.loads(body)
    assert status == 200 and np.abs(pixels(result["recon"]).astype(int) - expected).max() <= 1
    assert pixels(result["maps"][1]).max() == 0 and pixels(result["maps"][0]).max() > 0


def test_an_uploaded_picture_is_cropped_and_encoded(session, server):
    picture = Image.new("RGB", (50, 20), "red")
    picture.paste("blue", (15, 0, 35, 20))  # all that a centred square holds
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    status, body = ask(server, "POST", "/encode", buffer.getvalue())
    result = json.loads(body)
    assert status == 200 and np.array(result["z"]).shape == (3, 4)
    assert (pixels(result["input"]) == (0, 0, 255)).all()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "MPO", "BMP", "WEBP"])
def test_pictures_of_every_known_format_are_taken(session, kind, tmp_path):
    several = {"save_all": True, "append_images": [Image.new("RGB", (16, 16))]} if kind == "MPO" else {}
    Image.new("RGB", (16, 16), "white").save(tmp_path / "picture.png", kind, **several)
    assert (pixels(session.encode((tmp_path / "picture.png").read_bytes())["input"]) > 250).all()
    assert (read_picture(tmp_path / "picture.png") > 250).all()


@pytest.mark.parametrize(
    "path, body, words",
    [
        ("/decode", b"{", "z and shown are needed"),
        ("/decode", b"[]", "z and shown are needed"),
        ("/decode", b'{"z": [[1]], "shown": [1, 1, 1]}', "3 x 4 finite numbers"),
        ("/decode", b'{"z": [[1, 2], [3]], "shown": [1, 1, 1]}', "z and shown are needed"),
        ("/encode", b"text", "no picture"),
    ],
)
def test_bad_requests_are_answered_with_a_reason(server, path, body, words):
    status, answer = ask(server, "POST", path, body)
    assert status == 400 and words in json.loads(answer)["error"]


def test_too_large_an_upload_is_refused_unread(server):
    status, answer = ask(server, "POST", "/encode", b"", Content_Length=str(LARGEST_UPLOAD + 1))
    assert status == 413 and "at most 32 MB" in json.loads(answer)["error"]


def test_other_sites_and_other_machines_get_nothing(server):
    assert server.server_address[0] == "127.0.0.1"
    for host in ("evil.example", "127.0.0.1.evil.example:80", "", "user@127.0.0.1"):
        assert ask(server, "GET", "/", Host=host)[0] == 400, host
    for origin in ("http://evil.example", "null", "https://127.0.0.1", "http://127.0.0.1:1"):
        assert ask(server, "POST", "/decode", b"{}", Origin=origin)[0] == 403, origin
    own = f"http://127.0.0.1:{server.server_address[1]}"
    assert ask(server, "POST", "/decode", b"{}", Origin=own)[0] == 400  # heard, and found wanting
    status, page = ask(server, "GET", "/")
    assert status == 200 and b"<b>run" not in page and b"connect-src 'self'" in page
    for path in ("/../etc/passwd", "/static/x", "/decode"):
        assert ask(server, "GET", path)[0] in (404, 405), path


@pytest.mark.parametrize("path", ["/", "/wrong/", "/%C3%A4/", "/encode", "/decode", "/wrong/decode"])
def test_without_the_token_of_its_address_nobody_is_served(server, path):
    """Another user of the machine can reach the port, as can a page that guesses it."""
    connection = http.client.HTTPConnection(*server.server_address, timeout=20)
    connection.request("POST" if path.endswith("code") else "GET", path, b"{}" if path.endswith("code") else None)
    answer = connection.getresponse()
    assert answer.status in (403, 404, 405) and b"id=facts" not in answer.read()


def test_no_page_frames_it_and_no_address_leaves_it(server):
    connection = http.client.HTTPConnection(*server.server_address, timeout=20)
    connection.request("GET", f"/{server.token}/")
    headers = connection.getresponse().headers
    assert headers["Content-Security-Policy"] == "frame-ancestors 'none'" and headers["X-Frame-Options"] == "DENY"
    assert headers["Referrer-Policy"] == "no-referrer"


@pytest.mark.parametrize(
    "z",
    [
        "[[1" + "0" * 400 + "]]",
        "[" * 5_000 + "]" * 5_000,
        '[{"a": 1}]',
        "1e999",
        '"text"',
        "[[null]]",
        "[[[[]]]]",
        "[[true]]",
    ],
)
def test_no_latents_are_a_fault_of_the_server(server, z):
    status, answer = ask(server, "POST", "/decode", f'{{"z": {z}, "shown": [1, 1, 1]}}'.encode())
    assert status == 400 and json.loads(answer)["error"]


def test_a_large_request_to_decode_is_refused(server):
    assert ask(server, "POST", "/decode", b"[" + b"0," * (1 << 19) + b"0]")[0] == 413


def test_a_picture_of_13000_pixels_a_side_is_refused_unread(session):
    """0.6 MB of PNG that are 507 MB of pixels."""
    buffer = io.BytesIO()
    Image.new("1", (13_000, 13_000)).save(buffer, "PNG")
    tracemalloc.start()
    with pytest.raises(BadRequestError, match=r"13000 x 13000 pixels are over 33,554,432"):
        session.encode(buffer.getvalue())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_slow_clients_hold_nobody_up(session, monkeypatch):
    """Twice as many as there may be, each sending a byte now and then; all are gone in the end."""
    monkeypatch.setattr(server_module, "MOST_CONNECTIONS", 20)
    monkeypatch.setattr(server_module, "SECONDS", 2.0)
    server = serve(session)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    slow = [socket.create_connection(server.server_address, timeout=20) for _ in range(40)]
    try:
        for client in slow:
            client.sendall(b"POST /x/decode HTTP/1.1\r\nContent-Length: 100\r\n")
        deadline = time.monotonic() + 30
        while server._open and time.monotonic() < deadline:
            assert ask(server, "GET", "/")[0] == 200
            for client in slow:
                with contextlib.suppress(OSError):
                    client.sendall(b"X")
            time.sleep(0.2)
        assert not server._open
    finally:
        for client in slow:
            client.close()
        server.shutdown()
        server.server_close()


@pytest.mark.long
@pytest.mark.timeout(300)
def test_two_hundred_clients_for_a_minute(session):
    """Sound ones, slow ones, and such as send what is no HTTP: every sound one is answered, and memory stays flat."""
    server, ends, counts = serve(session), time.monotonic() + 60, {"sound": 0, "slow": 0, "malformed": 0}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    failures: list[str] = []
    resident: list[int] = []
    body = json.dumps({"z": session.images[0]["z"], "shown": [1, 1, 1]}).encode()

    def client(number: int) -> None:
        rng, kind = random.Random(number), ("sound", "slow", "malformed")[number % 3]
        while time.monotonic() < ends:
            try:
                if kind == "sound":
                    status, _ = ask(server, "POST", "/decode", body)
                    if status != 200:
                        failures.append(f"status {status}")
                    time.sleep(1)
                else:
                    with socket.create_connection(server.server_address, timeout=20) as raw:
                        raw.sendall(b"GET / HTTP/1.1\r\n" if kind == "slow" else rng.randbytes(200))
                        time.sleep(rng.uniform(0, 3))
                counts[kind] += 1
            except OSError as error:
                if kind == "sound":
                    failures.append(repr(error))

    clients = [threading.Thread(target=client, args=(number,), daemon=True) for number in range(200)]
    for thread in clients:
        thread.start()
    while time.monotonic() < ends:
        resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096)
        time.sleep(1)
    for thread in clients:
        thread.join(60)
    server.shutdown()
    server.server_close()
    growth = max(resident[-10:]) - max(resident[5:15])
    print(f"{counts}, {len(failures)} failures, memory {growth / 2**20:+.1f} MiB")
    assert not failures[:5] and counts["sound"] > 60 and growth < 64 << 20


def test_a_port_in_use_is_an_error_of_its_own(session, server):
    with pytest.raises(OSError):
        serve(session, server.server_address[1])


def test_the_command_serves_a_run_until_it_is_ended(tmp_path, monkeypatch, capsys):
    small = dict(**MODEL_16, steps=1, batch_size=4, eval_images=1, threads=1)
    with open(tmp_path / "said", "w") as said:
        fit(TrainConfig.preset("sprites-mini", **small), out=tmp_path / "run", stream=said)
    servers: list = []
    monkeypatch.setattr(server_module, "serve", lambda *given: servers.append(serve(*given)) or servers[-1])
    codes: list[int] = []
    command = ["explore", str(tmp_path / "run"), "--port", "0"]
    thread = threading.Thread(target=lambda: codes.append(main(command)), daemon=True)
    thread.start()
    said, deadline = "", time.monotonic() + 60
    while "Ctrl-C ends" not in said and thread.is_alive() and time.monotonic() < deadline:
        said += capsys.readouterr().out
        time.sleep(0.01)
    port = int(re.match(r"http://127\.0\.0\.1:(\d+)/[\w-]{20,}/ ", said)[1])
    status, page = ask(servers[0], "GET", "/")
    assert status == 200 and port == servers[0].server_address[1]
    facts = json.loads(page.split(b"id=facts>")[1].split(b"</script>")[0])
    assert facts["name"] == "run" and len(facts["images"]) == 12
    assert main(["explore", str(tmp_path / "run"), "--port", str(port)]) == 2
    assert f"port {port} cannot be used (Address already in use)" in capsys.readouterr().err
    servers[0].shutdown()
    thread.join(20)
    assert codes == [0]


def test_without_flask_the_mend_is_named(tmp_path, monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "flask" else find_spec(name))
    assert main(["explore", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "fastslots: error: explore needs Flask: pip install 'fastslots[explore]'\n"
