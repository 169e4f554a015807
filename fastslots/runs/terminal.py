"""Progress on a terminal: losses and scores as sparklines that move, and pictures of the slots at each evaluation.

The live view is a few lines high and drawn at most REDRAWS times a second, between steps: no thread of its own. What
is to stay (sentences, pictures) is printed above it. Elsewhere, as in a cluster's log: ``runs.progress.Progress``.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import sys
import time
from collections.abc import Sequence
from typing import Any, TextIO

import numpy as np
from PIL import Image
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.segment import Segment, Segments
from rich.style import Style
from rich.table import Table
from rich.text import Text

from fastslots.runs.curves import Curve, MetricsReader, evaluation_curves
from fastslots.runs.progress import duration, evaluation_line

REDRAWS = 4.0  # a second, at most
BLOCKS = "▁▂▃▄▅▆▇█"
TERMS = {"loss": "loss", "recon": "recon", "kl": "kl", "interaction_normalized": "R/H²"}
SCORES = {"j_ari": "J-ARI", "jis": "JIS"}
SHOWN_TILES = (0, 1, 3)  # of SlotPictures: input, reconstruction, slots by colour (Jacobian)
SIDES = (10, 24)  # pixels of a thumbnail; two lie in one character


class LiveProgress:
    """The ``ProgressView`` of a terminal that can move its cursor."""

    def __init__(self, steps: int, first_step: int, stream: TextIO, log: MetricsReader | None = None):
        """log: of a run that goes on, whose curves are shown from their beginning."""
        self._console = Console(file=stream, highlight=False, markup=False, emoji=False)
        self._steps, self._first, self._step = steps, first_step, first_step
        self._start, self._drawn = time.monotonic(), -math.inf
        known = log.training | _only(SCORES, evaluation_curves(log.evaluations)) if log else {}
        self._curves: dict[str, Curve] = _only(TERMS | SCORES, known)
        self._latest = {name: curve.means()[-1] for name, curve in self._curves.items()}
        self._note = ""
        self._live = Live(
            console=self._console,
            auto_refresh=False,
            get_renderable=self._view,
            redirect_stdout=sys.stdout.isatty(),  # what others print goes above the view; into a file it goes as ever
            redirect_stderr=stream is sys.stderr,
        )

    def update(self, step: int, values: dict[str, float]) -> None:
        self._step, self._note = step, ""
        self._add(step, values, TERMS)
        self._latest["images_per_s"] = values["images_per_s"]
        self._draw(at_once=step == self._steps)

    def evaluated(self, step: int, scores: dict[str, Any], tiles: Sequence[Sequence[np.ndarray]]) -> None:
        """The scores in a line, and where the terminal has 24-bit colours pictures under it."""
        self._add(step, scores, SCORES)
        self.say(evaluation_line(step, scores))
        console = self._console
        if tiles and console.color_system == "truecolor" and not console.no_color and not console.options.ascii_only:
            self._print(thumbnails(tiles, console.width))
            self._print(Text("input, reconstruction, slots by colour", style="dim"))

    def say(self, text: str) -> None:
        """A line of its own, above the view."""
        self._print(Text(text))

    def note(self, text: str) -> None:
        """What is being done between steps."""
        self._note = text
        self._draw()

    def close(self) -> None:
        """Leave the view as it is and give the cursor back."""
        self._note = ""
        with contextlib.suppress(OSError):
            self._live.stop()

    def _add(self, step: int, values: dict[str, Any], names: dict[str, str]) -> None:
        for name in names:
            if name in values and math.isfinite(values[name]):
                self._curves.setdefault(name, Curve()).extend([step], [values[name]])
                self._latest[name] = values[name]

    def _draw(self, at_once: bool = False) -> None:
        now = time.monotonic()
        if not at_once and now - self._drawn < 1 / REDRAWS:
            return
        self._drawn = now
        with contextlib.suppress(OSError):  # a terminal that was closed is no reason to stop
            if not self._live.is_started:
                self._live.start()
            self._live.refresh()

    def _print(self, what: Any) -> None:
        with contextlib.suppress(OSError):
            self._console.print(what, soft_wrap=isinstance(what, Text))

    def _view(self) -> Table:
        done, view = self._step - self._first, Table.grid()
        left = (time.monotonic() - self._start) / done * (self._steps - self._step) if done else 0.0
        head = f"step {self._step:,} of {self._steps:,}  {self._latest.get('images_per_s', 0):.0f} images/s"
        view.add_row(Text(f"{head}  {duration(left)} left", no_wrap=True))
        width = max(8, min(self._console.width - 18, 72))
        view.add_row(ProgressBar(self._steps, self._step, width=width + 16))
        lines = Table.grid(padding=(0, 2, 0, 0))
        for name, shown in (TERMS | SCORES).items():
            if name in self._curves:
                ascii_only = self._console.options.ascii_only
                spark = "" if ascii_only else sparkline(self._curves[name].means(), width)
                lines.add_row(Text(shown), Text(spark, style="cyan", no_wrap=True), Text(f"{self._latest[name]:.4g}"))
        view.add_row(lines)
        if self._note:
            view.add_row(Text(self._note, style="dim", no_wrap=True))
        return view


def _only(names: dict[str, str], curves: dict[str, Curve]) -> dict[str, Curve]:
    return {name: curve for name, curve in curves.items() if name in names}


def sparkline(values: Sequence[float], width: int) -> str:
    """At most ``width`` blocks, each the mean of a stretch; by logarithm where the values span more than tenfold."""
    columns = min(width, len(values))
    edges = [len(values) * i // columns for i in range(columns + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    if min(means) > 0 and max(means) > 10 * min(means):
        means = [math.log(mean) for mean in means]
    low, high = min(means), max(means)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((mean - low) * scale)] for mean in means)


def thumbnails(tiles: Sequence[Sequence[np.ndarray]], width: int) -> Segments:
    """One line of pictures that fits ``width`` characters: of as many images as fit, two where there is room for it.

    A character holds two pixels: the upper half block in the colour of one on a ground of the other's.
    """
    kinds = len(SHOWN_TILES)
    side = (width - kinds) // (2 * kinds) - 1
    side = max(SIDES[0], min(SIDES[1], side)) // 2 * 2
    images = max(1, (width + 2) // (kinds * (side + 1) + 1))
    rows = [[_resized(row[n], side) for n in SHOWN_TILES] for row in tiles[:images]]
    out = []
    for y in range(0, side, 2):
        for row in rows:
            for tile in row:
                out += [Segment("▀", _style(tile[y, x], tile[y + 1, x])) for x in range(side)]
                out.append(Segment(" "))
            out.append(Segment(" "))
        out.append(Segment.line())
    return Segments(out)


def _resized(tile: np.ndarray, side: int) -> np.ndarray:
    return np.asarray(Image.fromarray(tile).resize((side, side), Image.Resampling.BOX))


def _style(upper: np.ndarray, lower: np.ndarray) -> Style:
    return Style.parse("#{:02x}{:02x}{:02x} on #{:02x}{:02x}{:02x}".format(*upper, *lower))
