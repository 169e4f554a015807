"""Takes the pictures of docs/report.md anew: python scripts/docs_screenshots.py [FOLDER] [FLAG OF TRAIN ...]

A run of sprites-mini is trained in a terminal of its own, whose last screen is terminal.png; of its page Chromium takes
report.png and report-pages.png. Needs rich, pyte and selenium (the extra dev), chromium and chromedriver.
"""

from __future__ import annotations

import fcntl
import html
import io
import os
import pty
import re
import shutil
import struct
import sys
import tempfile
import termios
import time
from pathlib import Path
from typing import Any

import pyte
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

COLUMNS, LINES = 110, 26
WIDE, PHONE, HEIGHT, GAP = 1280, 400, 1400, 24
HEX = re.compile("[0-9a-f]{6}")
STYLE = "body { margin: 0; background: #111; color: #ddd; display: inline-block }"
STYLE += "pre { margin: 8px; font: 15px/18px monospace }"


def main(folder: Path, flags: list[str]) -> None:
    with tempfile.TemporaryDirectory() as place:
        screen = trained(Path(place), flags)
        browser = chromium()
        try:
            terminal(browser, screen, Path(place) / "terminal.html").save(folder / "terminal.png", optimize=True)
            page = Path(place) / "runs" / "sprites-mini-1" / "report.html"
            explorer, pages = pictures(browser, page.as_uri())
        finally:
            browser.quit()
    explorer.save(folder / "report.png", optimize=True)
    pages.save(folder / "report-pages.png", optimize=True)


def trained(place: Path, flags: list[str]) -> pyte.Screen:
    """What a terminal of COLUMNS x LINES shows at the end of `fastslots train`, run in ``place``."""
    child, terminal = pty.fork()
    if not child:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
        os.chdir(place)
        os.environ |= {"TERM": "xterm-256color", "COLORTERM": "truecolor"}
        os.environ.pop("COLUMNS", None)
        os.execv(sys.executable, [sys.executable, "-m", "fastslots", "train", *flags])
    screen = pyte.Screen(COLUMNS, LINES)
    stream = pyte.ByteStream(screen)
    while written := read(terminal):
        stream.feed(written)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        raise SystemExit("\n".join(line.rstrip() for line in screen.display))
    return screen


def read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # Linux says so where the child has ended
        return b""


def chromium() -> Any:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    for flag in ("headless=new", "no-sandbox", "hide-scrollbars"):
        options.add_argument(f"--{flag}")
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))


def terminal(browser: Any, screen: pyte.Screen, page: Path) -> Image.Image:
    """The screen from the last evaluation on as a browser draws it, without the empty lines at its end."""
    shown = [y for y, line in enumerate(screen.display) if line.strip() or coloured(screen, y)]
    first = max((y for y in shown if screen.display[y].startswith("eval at step")), default=shown[0])
    lines = ["".join(cell(screen.buffer[y][x]) for x in range(COLUMNS)) for y in range(first, shown[-1] + 1)]
    page.write_text(f"<meta charset=utf-8><style>{STYLE}</style><pre>{chr(10).join(lines)}</pre>")
    sized(browser, WIDE, HEIGHT)
    browser.get(page.as_uri())
    return Image.open(io.BytesIO(browser.find_element(By.TAG_NAME, "body").screenshot_as_png)).convert("RGB")


def coloured(screen: pyte.Screen, y: int) -> bool:
    return any(screen.buffer[y][x].bg != "default" for x in range(COLUMNS))


def cell(char: Any) -> str:
    front, back = (f"#{c}" if HEX.fullmatch(c) else c for c in (char.fg, char.bg))
    style = "".join(f"{name}:{c};" for name, c in (("color", front), ("background", back)) if c != "default")
    style += "font-weight:bold" if char.bold else ""
    text = html.escape(char.data)
    return f'<span style="{style}">{text}</span>' if style else text


def pictures(browser: Any, url: str) -> tuple[Image.Image, Image.Image]:
    """The explorer alone; and the page's beginning, wide and dark beside narrow and light."""
    opened(browser, url, WIDE, "light")
    card = browser.find_element(By.CSS_SELECTOR, ".explorer")
    explorer = Image.open(io.BytesIO(card.screenshot_as_png)).convert("RGB")
    tops = []
    for width, scheme in ((WIDE, "dark"), (PHONE, "light")):
        opened(browser, url, width, scheme)
        tops.append(Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB"))
    both = Image.new("RGB", (sum(top.width for top in tops) + GAP, HEIGHT), "white")
    both.paste(tops[0], (0, 0))
    both.paste(tops[1], (tops[0].width + GAP, 0))
    return explorer, both


def opened(browser: Any, url: str, width: int, scheme: str) -> None:
    sized(browser, width, HEIGHT)
    wanted = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", wanted)
    browser.get(url)
    undrawn = ".explorer:not([data-ready]), .chart svg:not(:has(path, rect))"
    WebDriverWait(browser, 60).until(lambda _: not browser.find_elements(By.CSS_SELECTOR, undrawn))
    time.sleep(0.5)  # pictures are decoded after they are put in


def sized(browser: Any, width: int, height: int) -> None:
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


if __name__ == "__main__":
    named = sys.argv[1:2]
    main(Path(named[0] if named else "docs"), sys.argv[2:])
