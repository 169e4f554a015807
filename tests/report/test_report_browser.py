"""The report in a real browser: headless Chromium, driven through Selenium."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

webdriver = pytest.importorskip("selenium.webdriver", reason="needs Selenium: pip install selenium")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import Select, WebDriverWait  # noqa: E402

from fastslots.cli import main  # noqa: E402
from fastslots.models import SlotVAE, SlotVAEConfig  # noqa: E402
from fastslots.report.explorer import FIXED, PER_SLOT  # noqa: E402
from fastslots.report.live import Session  # noqa: E402
from fastslots.report.pictures import data_uri  # noqa: E402
from fastslots.report.server import serve  # noqa: E402
from fastslots.report.write import write_report  # noqa: E402
from fastslots.train import TrainConfig  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver (Debian: chromium, chromium-driver)"
)
K, SIDE, COLUMNS, GROUP = 3, 16, 32, 3
LATENTS, VALUES = [0, 2, 5], [-2.0, -1.0, 0.0, 0.5, 1.0, 2.0, 3.0]


def write_run(folder: Path, seed: int, steps: int = 12) -> Path:
    """A run's files without the training. Tile n of image i of its explorer has the colour (n, i, 9)."""
    (folder / "images").mkdir(parents=True)
    (folder / "config.json").write_text(TrainConfig.preset("sprites-mini", seed=seed, steps=steps).to_json())
    lines = [{"step": n, "loss": 9.0 / n, "recon": 5.0 / n, "kl": n, "images_per_s": 50.0} for n in range(1, 13)]
    lines += [{"step": n, "eval": "val", "j_ari": n / 20, "jis": 0.5, "images": 8, "latent": "mean"} for n in (6, 12)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    Image.new("RGB", (300, 80), "teal").save(folder / "images" / "step_00000012.png")
    tiles = FIXED + K * (PER_SLOT + (GROUP - 1) * K + len(LATENTS) * len(VALUES))
    images = []
    for i in range(6):
        sheet = np.zeros((-(-tiles // COLUMNS), SIDE, COLUMNS, SIDE, 3), np.uint8)
        for n in range(tiles):
            sheet[n // COLUMNS, :, n % COLUMNS] = (n, i, 9)
        entry = {"sheet": data_uri(sheet.reshape(-1, COLUMNS * SIDE, 3), 400_000), "z": [[0.1] * len(LATENTS)] * K}
        entry["partners"] = [j for j in range(i - i % GROUP, i - i % GROUP + GROUP) if j != i]
        images.append(entry | {"objects": [0, 1], "confusion": [[1, 0, 0], [0.25, 0.5, 0.25]], "j_ari": 0.5})
    explorer = {"side": SIDE, "columns": COLUMNS, "slots": K, "latents": LATENTS, "values": [VALUES] * len(LATENTS)}
    explorer |= {"images": images, "masks": True}
    scores = {"step": 12, "j_ari": [0.1, 0.5, -0.2], "fg_ari": [1.0, 0.9, 0.9]}
    (folder / "scores.json").write_text(json.dumps(scores))
    (folder / "explorer.json").write_text(json.dumps(explorer))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    """Two finished runs; the second one's name and data try to be markup."""
    root = tmp_path_factory.mktemp("runs")
    folders = [write_run(root / name, seed) for seed, name in enumerate(("first", "<b onclick=alert(1)>second"))]
    (folders[1] / "data.txt").write_text("<script>document.title = 'gone'</script>")
    write_report(folders[:1], explorer=False)
    return folders


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "window-size=1280,900"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def opened(browser, page: Path):
    """The page, drawn: nothing was loaded from elsewhere and nothing was complained of."""
    browser.get_log("browser"), browser.get_log("performance")
    browser.get(page.as_uri())
    browser.execute_script("sessionStorage.clear()")
    browser.refresh()
    undrawn = ".explorer:not([data-ready]), .chart svg:not(:has(path, rect))"
    WebDriverWait(browser, 20).until(lambda _: not browser.find_elements(By.CSS_SELECTOR, undrawn))
    return browser


@pytest.fixture
def page(browser, runs):
    yield opened(browser, runs[0] / "report.html")
    # "rendering" is advice on speed, which reading pixels in these tests calls for
    assert [entry for entry in browser.get_log("browser") if entry["source"] != "rendering"] == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert urls and all(url.startswith(("data:", (runs[0] / "report.html").as_uri())) for url in urls)


def tile(browser, selector: str) -> tuple[int, int]:
    """(image, tile) that a canvas shows."""
    code = "return [...document.querySelector(arguments[0]).getContext('2d').getImageData(8, 8, 1, 1).data]"
    number, image, mark, _ = browser.execute_script(code, selector)
    assert mark == 9
    return image, number


def test_curves_are_drawn_read_out_and_turn_logarithmic(page):
    card = page.find_element(By.CSS_SELECTOR, "#training [data-name=recon]")
    line = lambda: card.find_element(By.CSS_SELECTOR, "path.mean").get_attribute("d")  # noqa: E731
    assert line().count("L") == 11
    read = card.find_element(By.CLASS_NAME, "read")
    last = read.text
    svg = card.find_element(By.TAG_NAME, "svg")
    webdriver.ActionChains(page).move_to_element_with_offset(svg, -60, 0).perform()
    assert " at " in read.text and read.text.split(" at ")[0] != last
    other = page.find_element(By.CSS_SELECTOR, "#training [data-name=kl]")
    assert " at " in other.find_element(By.CLASS_NAME, "read").text  # one cursor for all
    before = line()
    page.find_element(By.ID, "log").click()
    assert line() != before
    page.find_element(By.CSS_SELECTOR, "[aria-label=smoothing]").send_keys(Keys.END)
    assert len(set(line().split("L"))) > 2


def test_the_keyboard_moves_the_cursor(page):
    svg = page.find_element(By.CSS_SELECTOR, "#training [data-name=loss] svg")
    page.execute_script("arguments[0].focus()", svg)
    read = page.find_element(By.CSS_SELECTOR, "#training [data-name=loss] .read")
    svg.send_keys(Keys.HOME)
    assert read.text.endswith(" at 1")
    svg.send_keys(Keys.ARROW_RIGHT)
    assert read.text.endswith(" at 2")


def test_choosing_slots_and_images_changes_the_pictures(page):
    without = "canvas[aria-label='the image without it']"
    assert tile(page, without) == (0, FIXED + 2)
    for slot in (1, 2):  # number keys, wherever the focus is in the explorer
        page.find_element(By.CSS_SELECTOR, "[name=slot0]:checked").send_keys(str(slot + 1))
        assert page.find_element(By.CSS_SELECTOR, "[name=slot0]:checked").get_attribute("value") == str(slot)
        assert tile(page, without) == (0, FIXED + PER_SLOT * slot + 2)
        assert tile(page, "canvas[aria-label='its slot map']") == (0, FIXED + PER_SLOT * slot)
    page.find_element(By.CSS_SELECTOR, "[name=slot0]:checked").send_keys(Keys.ARROW_LEFT)  # as radio buttons do
    assert page.find_element(By.CSS_SELECTOR, "[name=slot0]:checked").get_attribute("value") == "1"
    assert page.switch_to.active_element.get_attribute("name") == "slot0"
    page.find_element(By.CSS_SELECTOR, "[name=image0][value='3']").send_keys(Keys.SPACE)
    assert tile(page, "canvas[aria-label=input]") == (3, 0)
    assert tile(page, without) == (3, FIXED + PER_SLOT + 2)
    assert "25 %" in page.find_element(By.CSS_SELECTOR, ".confusion").text


def test_swapping_and_walking_change_the_picture(page):
    swaps = FIXED + PER_SLOT * K
    assert tile(page, "#swap0") == (0, swaps)  # of partner 1, slot 0 for its slot 0
    page.find_element(By.CSS_SELECTOR, "[name=other0][value='2']").send_keys(Keys.SPACE)
    assert tile(page, "#swap0") == (0, swaps + 2)
    there = "canvas[aria-label='the other image with this slot']"
    assert tile(page, there) == (1, swaps + 2 * K)  # of its first partner, image 0: slot 2 for slot 0
    Select(page.find_element(By.ID, "partner0")).select_by_index(1)
    assert tile(page, "#swap0") == (0, swaps + K * K + 2) and tile(page, there) == (2, swaps + 2 * K)
    walks = swaps + (GROUP - 1) * K * K
    assert tile(page, "#walk0") == (0, walks + 2)  # 0.0 is nearest to the slot's own 0.1
    page.find_element(By.ID, "value0").send_keys(Keys.HOME)
    for value in range(1, len(VALUES)):
        page.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)  # the slider is made anew and keeps the focus
        assert tile(page, "#walk0") == (0, walks + value)
    Select(page.find_element(By.ID, "latent0")).select_by_index(2)
    assert tile(page, "#walk0") == (0, walks + 2 * len(VALUES) + 2)


def test_two_runs_lie_over_each_other_and_text_stays_text(browser, runs):
    opened(browser, write_report(runs, runs[0] / "both.html", explorer=False))
    assert [h.text for h in browser.find_elements(By.TAG_NAME, "h1")] == ["first", "<b onclick=alert(1)>second"]
    assert "first" in browser.title and "<script>document.title" in browser.find_element(By.TAG_NAME, "header").text
    card = browser.find_element(By.CSS_SELECTOR, "#training [data-name=loss]")
    assert (
        len(card.find_elements(By.CSS_SELECTOR, "path.mean")) == 2
        and "|" in card.find_element(By.CLASS_NAME, "read").text
    )
    assert len(browser.find_elements(By.CLASS_NAME, "explorer")) == 2
    differing = browser.find_element(By.CSS_SELECTOR, "#config table").text
    assert "seed 0 1" in differing and "resolution" not in differing


EVALUATION = {"split": "test", "latent": "mean", "weights": "best", "images": 200, "data": "sprites", "fingerprint": ""}
PROBED = {"attribute_r2_linear": 0.5, "attribute_r2_linear_hue": 0.25, "attribute_accuracy_mlp_shape": 1.0}


def test_what_eval_has_measured_is_shown(browser, tmp_path):
    run = write_run(tmp_path / "run", 0)
    entries = [EVALUATION | PROBED | {"j_ari": 0.87, "attribute_objects": 470, "fingerprint": "0123456789abcdef"}]
    entries.append(EVALUATION | {"latent": "sample", "j_ari": 0.81, "recombination_error": 0.125, "recon": None})
    (run / "evaluations.json").write_text(json.dumps({"evaluations": entries}))
    opened(browser, write_report([run], explorer=False))
    shown = [table.text.splitlines() for table in browser.find_elements(By.CSS_SELECTOR, "#measured table")]
    assert shown[0] == [
        "split latent weights images J-ARI fingerprint",
        "test mean best 200 0.87 0123456789",
        "test a sample best 200 0.81",
    ]
    assert shown[1] == ["factor R², linear accuracy, MLP", "mean 0.5", "hue 0.25", "shape 1"]
    assert shown[2][-1] == "recombination error 0.125"


def test_a_comparison_begins_with_what_differs(browser, tmp_path):
    runs = [write_run(tmp_path / name, seed) for seed, name in enumerate(("first", "<i>second"))]
    for n, run in enumerate(runs):
        entry = EVALUATION | {"j_ari": 0.5 + n / 4, "recon": 3.0 + n}
        (run / "evaluations.json").write_text(json.dumps({"evaluations": [entry]}))
    page = tmp_path / "compare.html"
    assert main(["compare", *map(str, runs), "--out", str(page)]) == 0
    opened(browser, page)
    sections = [section.get_attribute("id") for section in browser.find_elements(By.CSS_SELECTOR, "main > section")]
    assert sections == ["differences", "compared", "measured", "training", "scores", "grids", "config"]
    assert browser.find_element(By.ID, "differences").text.splitlines()[2:] == ["seed 0 1"]
    rows = browser.find_element(By.CSS_SELECTOR, "#compared table").text.splitlines()
    assert rows == ["run J-ARI recon", "first 0.5 3", "<i>second 0.75 4"]
    best = [cell.text for cell in browser.find_elements(By.CSS_SELECTOR, "#compared td.best")]
    assert best == ["3", "0.75"]
    assert len(browser.find_elements(By.CSS_SELECTOR, "#training [data-name=loss] path.mean")) == 2
    assert "null" not in browser.find_element(By.TAG_NAME, "body").text
    for width in (1280, 400):
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_phones_and_follows_the_scheme(page, width, scheme):
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    wanted = [{"name": "prefers-color-scheme", "value": scheme}]
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": wanted})
    assert page.execute_script("return document.documentElement.scrollWidth") <= width
    background = page.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (int(background.split("(")[1].split(",")[0]) > 128) == (scheme == "light")
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_steps_stay_in_one_line_on_a_phone(browser, tmp_path):
    """They were broken ("1,0" above "00") to make room for scores, which scroll."""
    run = write_run(tmp_path / "run", 0)
    scores = dict.fromkeys(("j_ari", "jis", "fg_ari", "ari", "mbo", "miou", "recon", "kl"), 0.123456)
    lines = [{"step": step, "eval": "val", "images": 8, "latent": "mean"} | scores for step in (6, 500_000)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    phone = {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    opened(browser, write_report([run], explorer=False))
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 400
    cells = browser.find_elements(By.CSS_SELECTOR, ".scroll tr td:first-child")
    shown = {cell.text: cell.size["height"] for cell in cells}
    assert shown["500,000"] == shown["6"]
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_run_that_goes_on_says_so(browser, tmp_path):
    opened(browser, write_report([write_run(tmp_path / "run", 0, steps=50)], explorer=False))
    assert browser.find_element(By.ID, "live").text == "live" and "step 12 of 50" in browser.page_source


def test_a_run_without_pictures_and_with_steady_values(browser, tmp_path):
    run = write_run(tmp_path / "run", 0)
    (run / "explorer.json").unlink()
    (run / "images" / "step_00000012.png").unlink()
    lines = [{"step": n, "loss": 1.0, "memory_mb": 4000 + n / 10, "alpha": 0.05} for n in range(1, 13)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    opened(browser, write_report([run], explorer=False))
    assert "null" not in browser.find_element(By.TAG_NAME, "body").text
    labels = (
        "[...document.querySelectorAll(`[data-name=${arguments[0]}] text[text-anchor=end]`)].map(t => t.textContent)"
    )
    for name in ("memory_mb", "alpha"):
        texts = browser.execute_script(f"return {labels}", name)
        assert len(texts) >= 2 and len(set(texts)) == len(texts), (name, texts)
    assert all(0.02 < float(text) < 0.1 for text in texts)  # near the value, not far around it


@pytest.fixture
def live(browser) -> Iterator[Any]:
    """The page of `fastslots explore` for a model of random weights."""
    small = dict(resolution=16, num_slots=K, slot_dim=4, cnn_channels=8, encoder_width=16, encoder_layers=1)
    small |= dict(query_width=16, query_hidden=16, slot_width=16, slot_hidden=16, decoder_heads=2, output_hidden=(16,))
    torch.manual_seed(0)
    model = SlotVAE(SlotVAEConfig.preset("sprites-mini", **small))
    server = serve(Session(model, torch.rand(2, 3, 16, 16), "<i>run</i>"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = server.address
    browser.get_log("browser"), browser.get_log("performance")
    browser.get(url)
    yield browser
    assert [entry for entry in browser.get_log("browser") if entry["source"] != "rendering"] == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert all(asked.startswith((url, "data:")) for asked in urls)
    browser.get("about:blank")
    server.shutdown()
    server.server_close()


def test_latents_are_decoded_live_and_pictures_taken_in(live, tmp_path):
    recon = lambda: live.find_element(By.CSS_SELECTOR, "img[alt=decoded]").get_attribute("src")  # noqa: E731

    def changes(action) -> None:
        before = recon()
        action()
        WebDriverWait(live, 20).until(lambda _: recon() not in (before, None, ""))

    WebDriverWait(live, 20).until(lambda _: recon() and live.find_elements(By.ID, "shown0"))
    assert live.find_element(By.TAG_NAME, "h1").text == "<i>run</i>"
    phone = {"width": 360, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    live.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    right = "return Math.max(...[...document.querySelectorAll('body *')].map(e => e.getBoundingClientRect().right))"
    assert live.execute_script(right) <= 360
    live.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    changes(lambda: live.find_element(By.ID, "z2").send_keys(Keys.END))  # a slider, by the keyboard
    changes(lambda: live.find_element(By.ID, "shown1").send_keys(Keys.SPACE))
    changes(lambda: live.find_element(By.CSS_SELECTOR, "[aria-label='image 2']").send_keys(Keys.SPACE))
    Image.new("RGB", (40, 30), "orange").save(tmp_path / "own.png")
    changes(lambda: live.find_element(By.ID, "file").send_keys(str(tmp_path / "own.png")))
    (tmp_path / "text.png").write_text("no picture")
    live.find_element(By.ID, "file").send_keys(str(tmp_path / "text.png"))
    status = live.find_element(By.CSS_SELECTOR, "[role=status]")
    WebDriverWait(live, 20).until(lambda _: "no picture that Pillow can read" in status.text)
    live.get_log("browser")  # the browser notes the answer 400
