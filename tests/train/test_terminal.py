"""The live view on a terminal: sparklines, pictures in half blocks, and a cursor that is given back."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import threading
import time

import numpy as np
import pytest
from tiny import MODEL_16

from fastslots.runs.progress import Progress
from fastslots.runs.terminal import REDRAWS, LiveProgress, sparkline, thumbnails
from fastslots.runs.view import open_progress
from fastslots.train import TrainConfig, fit

VALUES = {"loss": 3.0, "recon": 2.0, "kl": 1.0, "interaction_normalized": 0.25, "images_per_s": 99.0}
SCORES = {"images": 4, "latent": "mean", "recon": 2.0, "kl": 1.0, "j_ari": 0.5, "jis": 0.25}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def terminal(monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm-256color", "COLORTERM": "truecolor", "COLUMNS": "100", "LINES": "30"}.items():
        monkeypatch.setenv(name, value)


def test_sparklines_show_the_shape_and_long_falls_by_their_logarithm():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([1, 3, 5, 7], 2) == "▁█" and sparkline([2, 2, 2], 9) == "▁▁▁"
    assert sparkline([1000, 100, 10], 3) == "█▅▁" and sparkline([1000, 0, 10], 3) == "█▁▁"
    assert len(sparkline(range(512), 70)) == 70 and len(sparkline([5.0], 70)) == 1


def test_a_character_holds_two_pixels():
    red, blue = np.zeros((24, 24, 3), np.uint8), np.zeros((24, 24, 3), np.uint8)
    red[..., 0], blue[..., 2] = 255, 255
    red[12:] = (0, 255, 0)
    lines = "".join(s.text for s in thumbnails([[red, blue, red, red]] * 3, 200).segments).splitlines()
    assert len(lines) == 12 and lines[0].count("▀") == 2 * 3 * 24 and all(len(line) <= 200 for line in lines)
    first = thumbnails([[red, blue, red, red]], 200).segments[0]
    assert str(first.style) == "#ff0000 on #ff0000"
    for width in (20, 40, 80, 100, 132):
        rows = "".join(s.text for s in thumbnails([[red, blue, red, red]] * 8, width).segments).splitlines()
        assert max(map(len, rows)) <= max(width, 34), width


@pytest.mark.parametrize("colours", ["truecolor", "", "none"])
def test_what_stays_is_printed_above_the_view(colours, monkeypatch, tmp_path):
    if colours == "none":
        monkeypatch.setenv("NO_COLOR", "1")
    else:
        monkeypatch.setenv("COLORTERM", colours)
    stream = Terminal()
    progress = open_progress(10, 1, 0, stream, tmp_path / "none")
    assert isinstance(progress, LiveProgress)
    progress.say("data [bold]x[/bold] /path")
    progress.update(1, VALUES)
    progress.evaluated(1, SCORES, [[np.zeros((16, 16, 3), np.uint8)] * 4] * 2)
    progress.note("evaluating: 1 of 4 images")
    progress.update(10, VALUES)  # the last step is drawn whatever the time
    progress.close()
    text = stream.getvalue()
    assert "data [bold]x[/bold] /path\n" in text and "eval at step 1 on 4 images, mean latent: recon 2" in text
    assert ("▀" in text) == (colours == "truecolor")
    assert "step 10 of 10" in text and "J-ARI" in text and "▁" in text
    assert text.index("\x1b[?25l") < text.rindex("\x1b[?25h")


def test_a_run_that_goes_on_shows_its_curves_from_their_beginning(tmp_path):
    lines = [{"step": n, **VALUES, "loss": 2.0**n} for n in range(1, 9)] + [{"step": 8, "eval": "val", **SCORES}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    stream = Terminal()
    progress = open_progress(20, 5, 8, stream, tmp_path / "metrics.jsonl")
    progress.note("evaluating")  # before its first step
    progress.update(9, VALUES | {"loss": 2.0**9})
    progress.close()
    assert "▁▂▃▄▅▅▆▇█" in re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", stream.getvalue()) and "J-ARI" in stream.getvalue()


def test_steps_cost_little():
    stream = Terminal()
    progress = LiveProgress(100_000, 0, stream)
    start = time.monotonic()
    for step in range(1, 3001):
        progress.update(step, VALUES)
    seconds = time.monotonic() - start
    progress.close()
    assert stream.getvalue().count("images/s") <= seconds * REDRAWS + 2


def test_a_terminal_that_was_closed_does_not_stop_a_run():
    class Closed(Terminal):
        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

    progress = LiveProgress(2, 0, Closed())
    progress.say("hello")
    progress.update(1, VALUES)
    progress.update(2, VALUES)
    progress.close()


def test_logs_and_dumb_terminals_get_plain_lines(monkeypatch, tmp_path):
    stream = io.StringIO()
    progress = open_progress(20, 5, 0, stream, tmp_path / "none")
    for step in range(1, 21):
        progress.update(step, VALUES)
    progress.evaluated(20, SCORES, [])
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines[:4]] == ["5/20", "10/20", "15/20", "20/20"] and "\x1b" not in "".join(
        lines
    )
    assert lines[4].startswith("eval at step 20 on 4 images, mean latent: recon 2  kl 1  j_ari 0.5")
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(open_progress(20, 5, 0, Terminal(), tmp_path / "none"), Progress)


def test_a_run_in_a_real_terminal(tmp_path, monkeypatch):
    monkeypatch.setattr("fastslots.runs.terminal.REDRAWS", 1e9)  # a run this small is over before a second view
    ours, theirs = pty.openpty()
    said: list[bytes] = []

    def read() -> None:
        try:
            while part := os.read(ours, 1 << 16):
                said.append(part)
        except OSError:  # the other end was closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(theirs, "w") as stream:
        config = TrainConfig.preset(
            "sprites-mini", **MODEL_16, steps=4, batch_size=4, eval_every=2, eval_images=4, threads=1
        )
        fit(config, out=tmp_path / "run", stream=stream)
    reader.join(10)
    os.close(ours)
    text = b"".join(said).decode()
    assert text.count("eval at step") == 2 and text.count("input, reconstruction") == 2
    assert re.search(r"step 4 of 4 ", text) and "slot explorer" in text and text.rstrip().endswith("\x1b[?25h")
