"""The live explorer: pictures for any latent, and nothing for anybody else."""

from __future__ import annotations

import base64
import http.client
import importlib.util
import io
import json
import re
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import MODEL_16

from fastslots.cli import main
from fastslots.data.readers.pictures import read_picture
from fastslots.models import SlotVAE, SlotVAEConfig
from fastslots.report import server as server_module
from fastslots.report.live import Session
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
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
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
    port = int(re.match(r"http://127\.0\.0\.1:(\d+) ", said)[1])
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
