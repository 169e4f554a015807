"""The tuner tells a launch that does not fit from a device that is broken."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from fastslots.kernels.gpu import launch
from fastslots.kernels.tools import tune


def raises(message: str):
    def run(*_, **__):
        raise RuntimeError(message)

    return run


def test_a_broken_device_is_no_launch_that_does_not_fit(monkeypatch):
    monkeypatch.setattr(tune.triton.testing, "do_bench", raises("out of resources"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert tune.milliseconds(None) is None
    monkeypatch.setattr(tune.triton.testing, "do_bench", raises("an illegal memory access was encountered"))
    monkeypatch.setattr(torch.cuda, "synchronize", raises("an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal memory access"):  # every later launch would fail as well
        tune.milliseconds(None)


def test_what_has_its_default_is_left_out_of_the_table():
    plain = {"block_l": 64, "block_c": 32, "num_warps": 4, "num_stages": 3}
    for entry in (plain, plain | {"block_d": 16}, plain | {"block_f": 32}):
        assert launch.as_dict(launch.LaunchConfig(**entry)) == entry
