"""The losses of golden.json are those of this program: a change that moves a bit must change that file."""

from __future__ import annotations

import json

import pytest
import torch
from golden import FILE, STEPS, WHOLE, computed_by, losses, machine, names, ways

GOLDEN = json.loads(FILE.read_text())
ROUNDING = 2e-4
"""Relative: what other processors' and versions' products may differ by after so many steps of single precision."""


def largest_difference(values: list[list[float]], golden: list[list[float]]) -> float:
    a, b = torch.tensor(values, dtype=torch.float64), torch.tensor(golden, dtype=torch.float64)
    return ((a - b).abs() / b.abs()).max().item()


def test_the_file_holds_every_preset_on_every_path():
    assert set(GOLDEN) == set(names())
    for paths in GOLDEN.values():
        assert set(paths) == {"reference", "cpu avx512", "cpu avx2", "cpu portable"}
        assert all(len(one["losses"]) == STEPS for one in paths.values())


SLOW = {"sprites", "clevr6", "clevrtex"}  # of the published widths: ten seconds each, and minutes at their own sizes


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.long if n.removesuffix(WHOLE) in SLOW else ()) for n in names()],
)
def test_losses_are_those_of_the_file(name):
    """To the last bit on the machine that wrote it, within rounding on another."""
    for way in ways():
        if way not in GOLDEN[name]:  # of an instruction set that no machine has written
            continue
        values, golden = losses(name, way), GOLDEN[name][way]["losses"]
        if GOLDEN[name][way]["machine"] == machine():
            assert values == golden, f"{way}: `python tests/golden.py` writes the file anew, if that is meant"
        assert largest_difference(values, golden) < ROUNDING, way


def test_the_paths_agree_within_rounding():
    """The file's own values: no path has drifted from the reference."""
    for name, paths in GOLDEN.items():
        for way, one in paths.items():
            assert largest_difference(one["losses"], paths["reference"]["losses"]) < ROUNDING, (name, way)


def test_another_path_is_really_taken():
    """Else all rows would be the same one."""
    if len(ways()) > 1:
        assert losses("sprites-mini", "reference") != losses("sprites-mini", ways()[1])
    with computed_by("reference"):
        pass
