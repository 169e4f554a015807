"""What the package says outside a run's progress goes through logging, so whoever calls it decides."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from fastslots.data import open_dataset


@pytest.fixture
def images(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTSLOTS_CACHE", str(tmp_path / "cache"))
    np.savez(tmp_path / "images.npz", np.zeros((3, 8, 8, 3), np.uint8), np.zeros((3, 1)))
    return tmp_path / "images.npz"


def test_decoding_is_announced_on_stderr(images, capsys):
    open_dataset(images)
    assert capsys.readouterr().err.startswith(f"decoding {images} once into ")


def test_a_level_silences_it(images, capsys):
    logger = logging.getLogger("fastslots")
    before = logger.level
    logger.setLevel("ERROR")
    try:
        open_dataset(images)
    finally:
        logger.setLevel(before)
    assert capsys.readouterr().err == ""
