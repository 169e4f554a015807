"""What the package says on its way, outside a run's progress: through ``logging``, on stderr unless told otherwise.

``logging.getLogger("fastslots").setLevel("ERROR")`` silences it; its handler may be exchanged for another.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TextIO

LOGGER = logging.getLogger("fastslots")


if TYPE_CHECKING:
    _Handler = logging.StreamHandler[TextIO]
else:  # a generic since Python 3.11 only
    _Handler = logging.StreamHandler


class StderrHandler(_Handler):
    """Writes to what ``sys.stderr`` is at the time, which a test or a notebook may have exchanged."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, _: TextIO) -> None:
        pass


if not LOGGER.handlers:
    LOGGER.addHandler(StderrHandler())
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False  # else a program that logs to stderr itself would say everything twice


def notice(text: str) -> None:
    """One line for people."""
    LOGGER.info(text)


class Progress:
    """Of scenes that are decoded: a bar on a terminal; elsewhere a line every half minute.

    share: scenes done -> 0 to 1.
    """

    def __init__(self, share: Callable[[int], float]):
        own = any(isinstance(handler, StderrHandler) for handler in LOGGER.handlers)
        self._share, self._live = share, own and LOGGER.isEnabledFor(logging.INFO) and sys.stderr.isatty()
        self._shown = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        if now - self._shown < (0.2 if self._live else 30):
            return
        self._shown = now
        share = self._share(done)
        text = f"[{'#' * int(30 * share):<30}] {share:4.0%}, {done:,} scenes"
        if self._live:
            print(f"\r{text}", end="", file=sys.stderr, flush=True)
        else:
            notice(text)

    def __exit__(self, *_: object) -> None:
        if self._live:
            print(f"\r{'':60}\r", end="", file=sys.stderr, flush=True)
