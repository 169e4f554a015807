"""Memory and energy in the log: counters that wrap, GPUs by identity, and a reason where nothing counts."""

from __future__ import annotations

import json
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from tiny import MODEL_16

from fastslots.bench import timing
from fastslots.report import run_facts
from fastslots.runs import machine as module
from fastslots.runs.log import read_metrics
from fastslots.runs.machine import Meter, energy_counter, memory_bytes
from fastslots.train import TrainConfig, fit

CPU = torch.device("cpu")


@pytest.fixture
def packages(tmp_path, monkeypatch) -> list[Path]:
    """Two processor packages with counters of 1,000 J, a part of one, and the whole platform."""
    names = {"intel-rapl:0": "package-0", "intel-rapl:1": "package-1", "intel-rapl:0:0": "core", "intel-rapl:2": "psys"}
    for zone, name in names.items():
        (tmp_path / zone).mkdir()
        for file, text in {"name": name, "energy_uj": "900000000", "max_energy_range_uj": "999999999"}.items():
            (tmp_path / zone / file).write_text(f"{text}\n")
    monkeypatch.setattr(module, "POWERCAP", tmp_path)
    return [tmp_path / "intel-rapl:0", tmp_path / "intel-rapl:1"]


def test_memory_is_what_the_process_holds():
    before = memory_bytes(CPU)
    held = torch.ones(40_000_000)  # 160 MB
    assert 100e6 < memory_bytes(CPU) - before < 400e6 and held[0] == 1


def test_counters_of_packages_are_added_and_may_wrap(packages):
    joules, source = energy_counter(CPU)
    assert joules() == 0 and "RAPL" in source
    (packages[0] / "energy_uj").write_text("950000000")
    assert joules() == 50
    (packages[1] / "energy_uj").write_text("100000000")  # past its end: 100 J to there, and 100 J more
    assert joules() == 250


def test_a_reading_has_power_and_goes_on_from_what_was_used(packages, monkeypatch):
    meter = Meter(CPU, energy_wh=2.0)
    now = time.monotonic()
    monkeypatch.setattr(module.time, "monotonic", lambda: now + 10)
    (packages[0] / "energy_uj").write_text("936000000")
    values = meter.read()
    assert values["energy_wh"] == 2.01 and values["power_w"] == pytest.approx(3.6, rel=0.05)
    assert values["memory_mb"] > 10


def test_where_nothing_counts_the_reason_is_given(tmp_path, packages, monkeypatch):
    (packages[1] / "energy_uj").unlink()
    joules, reason = energy_counter(CPU)
    assert joules is None and "energy_uj cannot be read" in reason
    monkeypatch.setattr(module, "POWERCAP", tmp_path / "none")
    assert "not in" in energy_counter(CPU)[1] and set(Meter(CPU).read()) == {"memory_mb"}
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "fastslots[gpu]" in energy_counter(torch.device("cuda", 0))[1]


def test_gpus_are_found_by_their_identity(monkeypatch):
    millijoules = {"GPU-a": 5000, "GPU-b": 7000}
    nvml = types.SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda name: name,
        nvmlDeviceGetTotalEnergyConsumption=lambda name: millijoules[name],
        NVMLError=RuntimeError,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda n: types.SimpleNamespace(uuid="ab"[n]))
    joules, source = energy_counter(torch.device("cuda", 1))
    assert joules() == 7 and source == "of 1 GPU (NVML)"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    joules, source = energy_counter(torch.device("cuda", 1))
    assert joules() == 12 and source == "of 2 GPUs (NVML)"


def test_benchmarks_do_without_nvml_too(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert timing.energy(lambda: None) is None


def test_a_run_logs_both_and_a_resume_goes_on(tmp_path, packages):
    def config(steps: int) -> TrainConfig:
        small = dict(batch_size=4, eval_every=0, eval_images=1, log_every=2, threads=1)
        return TrainConfig.preset("sprites-mini", **MODEL_16, **small, steps=steps)

    (packages[0] / "energy_uj").write_text("900000000")
    with open(tmp_path / "said", "w") as said:
        fit(config(4), out=tmp_path / "run", stream=said)
        lines, _ = read_metrics(tmp_path / "run" / "machine.jsonl")
        assert [line["step"] for line in lines] == [2, 4] and all("memory_mb" in line for line in lines)
        lines[1]["energy_wh"] = 7.0
        (tmp_path / "run" / "machine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        fit(config(6), out=tmp_path / "run", resume=True, stream=said)
    lines, _ = read_metrics(tmp_path / "run" / "machine.jsonl")
    assert lines[2]["energy_wh"] == 7.0  # the counters of this test stand still
    facts = run_facts(tmp_path / "run")
    assert facts["training"]["energy_wh"]["step"] == [2, 4, 6] and "RAPL" in facts["machine"]["energy"]
    assert facts["versions_of"] == "trained the run" and facts["versions"]["torch"] == torch.__version__
    assert "energy    of the processor" in (tmp_path / "said").read_text()
