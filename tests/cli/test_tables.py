"""Tables on a terminal: never wider than it, every number whole, and the columns that name a row in each part."""

from __future__ import annotations

import io
import re
import sys

import pytest

from fastslots.cli.common import blocks, show_table

METRICS = ["j_ari", "jis", "fg_ari", "ari", "mbo", "miou", "recon", "kl", "interaction_normalized"]
SWEEP = [["alpha", "beta", "trials", *METRICS]]
SWEEP += [[alpha, beta, "2", *["-0.002 ± 0.021"] * len(METRICS)] for alpha in ("0", "3") for beta in ("0", "0.1")]
COMPARED = [
    ["", "a-first-run", "b"],
    ["data", "/home/somebody/data/scenes-of-discs", "sprites"],
    ["j_ari", "0.86", "0.4"],
]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(monkeypatch, width: int, rows, keys: int) -> list[str]:
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    show_table(rows, "a title", keys=keys)
    return re.sub(r"\x1b\[[0-9;]*m", "", terminal.getvalue()).splitlines()


@pytest.mark.parametrize("width", [60, 80, 100, 160, 250])
def test_a_sweep_on_a_terminal(monkeypatch, width):
    """At 60 columns there was a digit a line."""
    lines = shown(monkeypatch, width, SWEEP, 3)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert text.count("-0.002 ± 0.021") == 4 * len(METRICS) and text.count("a title") == 1
    assert text.count("alpha   beta   trials") == len(blocks(SWEEP, width, 3))
    assert all(name in text for name in METRICS[:-1])  # the last may be folded


def test_long_texts_are_folded_before_a_table_is_cut():
    assert blocks(COMPARED, 100) == [[(0, 5), (1, 35), (2, 7)]]
    assert blocks(COMPARED, 50) == [[(0, 5), (1, 24), (2, 7)]]
    assert blocks(COMPARED, 33) == [[(0, 5), (1, 12), (2, 7)]]
    assert blocks(COMPARED, 25) == [[(0, 5), (1, 12)], [(0, 5), (2, 7)]]
    assert blocks([["a"], ["b"]], 80) == [[(0, 1)]] and blocks(COMPARED, 4)  # narrower than anything


def test_plain_where_it_is_no_terminal(capsys):
    show_table(COMPARED, "a title")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "a title" and lines[3] == "j_ari  0.86                                 0.4"
