"""What a run tells whoever watches it: the interface of a view, and the plain lines of a cluster's log."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import Any, Protocol, TextIO

import numpy as np
from PIL.Image import Image

SILENCE = 10.0  # seconds without a line, after which one is printed whatever the step


class ProgressView(Protocol):
    """What a run tells whoever watches it: ``Progress``, ``LiveProgress`` on a terminal, ``Silent``."""

    def update(self, step: int, values: dict[str, float]) -> None:
        """A step is done."""

    def evaluated(self, step: int, scores: dict[str, Any], tiles: Sequence[Sequence[np.ndarray]]) -> None:
        """The scores of an evaluation, and its pictures (``SlotPictures.tiles``)."""

    def say(self, text: str) -> None:
        """A line that is to stay."""

    def note(self, text: str) -> None:
        """What is being done between steps, where there has been silence for long."""

    def close(self) -> None: ...


class Silent:
    """In place of MetricsLog and of a ``ProgressView`` on processes that write nothing."""

    energy_wh = 0.0
    cut: tuple[bytes, ...] = ()

    def sync(self) -> None:
        pass

    def write(self, values: dict[str, object]) -> None:
        pass

    def cost(self, values: dict[str, object]) -> None:
        pass

    def update(self, step: int, values: dict[str, float]) -> None:
        pass

    def picture(self, name: str, picture: Image, step: int) -> None:
        pass

    def evaluated(self, step: int, scores: dict[str, Any], tiles: Sequence[Sequence[np.ndarray]]) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def close(self, *_: object) -> None:
        pass


class Progress:
    """Losses, images/s, time left: a line each ``log_every`` steps. On a terminal ``LiveProgress`` stands for it."""

    def __init__(self, steps: int, log_every: int, first_step: int, stream: TextIO):
        self._stream = stream
        self._steps, self._log_every = steps, log_every
        self._first, self._start, self._shown = first_step, time.monotonic(), time.monotonic()

    def update(self, step: int, values: dict[str, float]) -> None:
        now = time.monotonic()
        if step % self._log_every and step != self._steps and now - self._shown < SILENCE:
            return
        done = step - self._first
        left = (now - self._start) / done * (self._steps - step) if done else 0.0
        losses = "  ".join(f"{name} {values[name]:.4g}" for name in ("loss", "recon", "kl"))
        rate = f"{values['images_per_s']:.0f} images/s  {duration(left)} left"
        self.say(f"step {step}/{self._steps}  {losses}  R/H² {values['interaction_normalized']:.4f}  {rate}")

    def evaluated(self, step: int, scores: dict[str, Any], tiles: Sequence[Sequence[np.ndarray]]) -> None:
        """The scores; pictures are for terminals."""
        self.say(evaluation_line(step, scores))

    def say(self, text: str) -> None:
        self._shown = time.monotonic()
        with contextlib.suppress(OSError):  # a log on a full disk: no reason to stop
            self._stream.write(f"{text}\n")
            self._stream.flush()

    def note(self, text: str) -> None:
        if time.monotonic() - self._shown > SILENCE:
            self.say(text)

    def close(self) -> None:
        pass


def evaluation_line(step: int, scores: dict[str, Any]) -> str:
    names = ("recon", "kl", "j_ari", "jis", "fg_ari", "mbo")
    shown = "  ".join(f"{name} {scores[name]:.4g}" for name in names if name in scores)
    return f"eval at step {step} on {scores['images']} images, {scores['latent']} latent: {shown}"


def duration(seconds: float) -> str:
    """1:02:03 or 4:05."""
    minutes, s = divmod(int(seconds + 0.5), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"
