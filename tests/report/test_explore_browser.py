"""Pages of other origins and ``fastslots explore`` in a real browser: they may know its address, and get nothing."""

from __future__ import annotations

import http.server
import json
import shutil
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny import MODEL_16

webdriver = pytest.importorskip("selenium.webdriver", reason="needs Selenium: pip install selenium")
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

from fastslots.models import SlotVAE, SlotVAEConfig  # noqa: E402
from fastslots.report.live import Session  # noqa: E402
from fastslots.report.server import Server, serve  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver (Debian: chromium, chromium-driver)"
)
NAME = "somebody.example"  # which this browser takes to 127.0.0.1, as a page may have its own name do


class Counted(Session):
    """Knows what it was asked for."""

    asked = 0

    def decode(self, request: Any) -> dict[str, Any]:
        self.asked += 1
        return super().decode(request)

    def encode(self, data: bytes) -> dict[str, Any]:
        self.asked += 1
        return super().encode(data)


@pytest.fixture(scope="module")
def session() -> Counted:
    torch.manual_seed(0)
    fields = {name: value for name, value in MODEL_16.items() if name != "pixels_per_step"}
    return Counted(SlotVAE(SlotVAEConfig.preset("sprites-mini", **fields)), torch.rand(2, 3, 16, 16), "run")


@pytest.fixture(scope="module")
def explorer(session) -> Iterator[Server]:
    server = serve(session)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<!doctype html><title>elsewhere</title><body>")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[str]:
    """A page of another origin: the same machine, another port."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    flags = ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage")
    for flag in (*flags, f"host-resolver-rules=MAP {NAME} 127.0.0.1"):
        options.add_argument(f"--{flag}")
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_script_timeout(60)
    yield driver
    driver.quit()


ASK = """
const [url, options, done] = arguments;
fetch(url, options).then(async r => done({type: r.type, status: r.status, text: await r.text()}),
                         error => done({type: "refused", status: 0, text: ""}));
"""


def asked(browser, url: str, **options: object) -> dict[str, Any]:
    return browser.execute_async_script(ASK, url, options)


def decode_body(session: Session) -> str:
    return json.dumps({"z": session.images[0]["z"], "shown": [1, 1, 1]})


def test_its_own_page_is_answered(browser, explorer, session):
    """The others could pass for no reason at all."""
    browser.get(explorer.address)
    before = session.asked
    answer = asked(browser, f"{explorer.address}decode", method="POST", body=decode_body(session))
    assert answer["status"] == 200 and "recon" in json.loads(answer["text"]) and session.asked == before + 1


@pytest.mark.parametrize("mode", ["cors", "no-cors"])
@pytest.mark.parametrize("what", ["decode", "encode"])
def test_a_page_of_another_origin_has_nothing_done(browser, explorer, session, elsewhere, mode, what):
    """Though it knows the token. A text in no-cors mode is sent without asking first."""
    browser.get(elsewhere)
    before = session.asked
    for host in ("127.0.0.1", "localhost"):
        url = explorer.address.replace("127.0.0.1", host) + what
        answer = asked(browser, url, method="POST", mode=mode, body=decode_body(session))
        assert answer["text"] == "" and answer["type"] in ("refused", "opaque")
    assert session.asked == before


@pytest.mark.parametrize("mode", ["cors", "no-cors"])
def test_a_page_of_another_origin_reads_nothing(browser, explorer, elsewhere, mode):
    browser.get(elsewhere)
    answer = asked(browser, explorer.address, mode=mode)
    assert answer["text"] == "" and answer["type"] in ("refused", "opaque")


def test_a_form_of_another_origin_has_nothing_done(browser, explorer, session, elsewhere):
    browser.get(elsewhere)
    before = session.asked
    browser.execute_script(
        "const form = document.createElement('form'); form.method = 'POST'; form.action = arguments[0];"
        "form.enctype = 'text/plain'; document.body.append(form); form.submit()",
        f"{explorer.address}decode",
    )
    WebDriverWait(browser, 60).until(lambda driver: "only for this machine" in driver.page_source)
    assert session.asked == before


FRAMED = """
const [url, done] = arguments, frame = document.createElement("iframe");
frame.onload = () => { try { done(frame.contentWindow.location.href) } catch (error) { done(error.name) } };
frame.src = url; document.body.append(frame);
"""


def test_no_page_frames_it(browser, explorer, elsewhere):
    """What stands in the frame is the browser's own page of an error, of no origin."""
    browser.get(elsewhere)
    assert browser.execute_async_script(FRAMED, explorer.address) == "SecurityError"
    browser.switch_to.frame(browser.find_element("tag name", "iframe"))
    assert "facts" not in browser.page_source
    browser.switch_to.default_content()


def test_a_name_that_was_made_to_lead_here_gets_nothing(browser, explorer, session):
    """The page's own origin then, as the browser sees it: the server is asked by that name, and refuses it."""
    before = session.asked
    address = explorer.address.replace("127.0.0.1", NAME)
    browser.get(address)
    assert "facts" not in browser.page_source
    answer = asked(browser, f"{address}decode", method="POST", body=decode_body(session))
    assert answer["status"] == 400 and "recon" not in answer["text"] and session.asked == before


def test_without_the_token_its_own_origin_gets_nothing(browser, explorer, session):
    before = session.asked
    browser.get(f"http://127.0.0.1:{explorer.port}/")
    assert "facts" not in browser.page_source
    answer = asked(browser, f"http://127.0.0.1:{explorer.port}/guess/decode", method="POST", body=decode_body(session))
    assert answer["status"] == 403 and session.asked == before
