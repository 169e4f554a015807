"""The tuner tells a launch that does not fit from a device that is broken."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from fastslots.kernels import tune


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
