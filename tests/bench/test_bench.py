"""The benchmarks at tiny sizes: providers check out and say why they can't, rows survive files, verdicts are right."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import random
import types

import pytest
import torch

from fastslots.bench import memory, peers, profile, published, scaling, timing
from fastslots.bench import run as module
from fastslots.bench.case import BOUNDS, Options, check
from fastslots.bench.cases import CASES
from fastslots.bench.reporting import compare, rows, tables
from fastslots.bench.reporting.pages import BEGIN, END, write
from fastslots.bench.reporting.rows import Row
from fastslots.bench.run import measure, memory_rows, ratios
from fastslots.cli import main
from fastslots.metrics import slot_jacobian
from fastslots.models import SlotVAEConfig
from fastslots.models.decoder import Decoder
from fastslots.train.draws import draw

COMPILED = "compiled|autotune|triton"  # minutes: bench/gpu.sh --dry has them


def tiny(case: str, **more) -> Options:
    preset = "sprites-mini" if case in ("jacobian", "step") else "clevr6"
    return Options(preset, tiny=True, rounds=2, memory=False, skip=COMPILED, overrides={"resolution": 8}, **more)


CANNOT = {"sdpa", "xformers, identity in V", "flash-attn, identity in V", "flex, two lse"}


@pytest.mark.parametrize("case", CASES)
def test_every_provider_is_right_or_says_why_not(case):
    seen = measure(case, dataclasses.replace(tiny(case), skip=COMPILED + "|workers"))
    assert len(seen) >= 4
    for row in seen:
        print(row.provider, row.status, row.error, row.error_at, row.reason)
        if row.provider in CANNOT:
            assert row.status == "cannot" and len(row.reason) > 20 and row.time is None
            continue
        assert row.status == "ok", row.reason
        assert row.error <= 1e-5 < BOUNDS["fp32"]  # seen: 1e-6
        assert 0 < row.time_q20 <= row.time <= row.time_q80 and len(row.samples[row.clock]) == 2
        assert row.ratio > 0 and row.run["sgemm_gflops"] > 0 and row.run["commit"] is not None


@pytest.mark.parametrize("case", ["op", "layer", "jacobian"])
def test_a_wrong_provider_gets_no_time(case, monkeypatch):
    def off(q, k, v, scale):
        out, weights = published.stored_weights(q, k, v, scale)
        return out, weights * 1.01

    monkeypatch.setitem(peers.ATTENTIONS, "sdpa, identity in V", off)
    wrong = lambda decoder, slots, n=None: 1.01 * slot_jacobian(decoder, slots)  # noqa: E731
    monkeypatch.setattr(published, "slot_jacobian", wrong)
    name = "published" if case == "jacobian" else "sdpa, identity in V"
    (row,) = measure(case, dataclasses.replace(tiny(case), only=name, skip=COMPILED + "|16"))
    assert row.status == "wrong" and row.time is None and not row.samples and "bound" in row.reason


def test_a_provider_that_breaks_does_not_stop_the_others(monkeypatch):
    def broken(q, k, v, scale):
        raise ZeroDivisionError("no such thing")

    monkeypatch.setitem(peers.ATTENTIONS, "sdpa, identity in V", broken)
    seen = {row.provider: row for row in measure("op", tiny("op"))}
    assert seen["sdpa, identity in V"].status == "cannot"
    assert seen["sdpa, identity in V"].reason == "ZeroDivisionError: no such thing"
    assert seen["published"].status == "ok"


def test_times_are_kept_before_memory_is_measured(monkeypatch):
    """A compiled peer's memory process once took the machine's memory, and an hour of timing with it."""
    kept: list[list[str]] = []

    def keep(rows: list[Row]) -> None:
        assert all(row.time for row in rows)
        kept.append([row.provider for row in rows])

    def killed(*_):
        raise SystemExit(137)

    monkeypatch.setattr(memory, "measure", killed)
    with pytest.raises(SystemExit):
        measure("op", dataclasses.replace(tiny("op"), only="published|reference", memory=True), keep=keep)
    assert kept == [["published"], ["published", "reference"], ["published", "reference"]]


def test_rows_are_kept_before_the_next_provider_starts(monkeypatch):
    """One that hangs, or takes its process with it, costs nothing that was timed before."""
    kept: list[list[tuple[str, bool]]] = []

    def killed(q, k, v, scale):
        raise SystemExit(137)

    monkeypatch.setitem(peers.ATTENTIONS, "sdpa, identity in V", killed)
    with pytest.raises(SystemExit):
        keep = lambda rows: kept.append([(row.provider, row.time is not None) for row in rows])  # noqa: E731
        measure("op", dataclasses.replace(tiny("op"), only="published|sdpa, identity"), keep=keep)
    assert kept == [[("published", True)]]


def test_a_step_as_trained_shows_a_wrong_gradient(monkeypatch):
    """Its noise is drawn by the step itself: with that of another step the float64 values are others."""
    from fastslots.bench.cases import step as case

    monkeypatch.setattr(case, "draw", lambda config, step, images: draw(config, step + 1, images))
    (row,) = measure("step", dataclasses.replace(tiny("step"), only="fastslots, one graph"))
    assert row.status == "wrong" and row.error > 0.01


def test_a_profile_names_what_takes_time(tmp_path):
    options = dataclasses.replace(tiny("step"), only="one graph")
    rows_ = measure("step", options)
    assert rows_[0].reason.startswith("operator by operator (the tensors are on cpu)")
    text, data = profile.write("step", options, rows_, tmp_path / "step.json")
    found = {
        one["provider"]: [operator["name"] for operator in one["operators"]] for one in json.loads(data.read_text())
    }
    assert "aten::convolution_backward" in found["published, one graph"] and found["fastslots, one graph"]
    assert "FASTSLOTS_CUDA_GRAPHS" not in os.environ
    assert "aten::convolution_backward" in text.read_text()
    assert rows.read([tmp_path]) == [], "no profile is read as rows"


def test_what_stops_the_gpu_costs_its_own_row_and_those_not_yet_tried(monkeypatch):
    """After an illegal address every call of a process fails: what was timed stands, the rest say why not."""
    ill = "sdpa padded, identity in V"
    monkeypatch.setattr(module, "_lost", lambda row, options: "not tried" if row.provider == ill else "")
    seen = measure("op", tiny("op"))
    at = [row.provider for row in seen].index(ill)
    assert all(row.time for row in seen[:at] if row.provider not in CANNOT) and seen[0].rounds == 2
    assert {(row.status, row.reason, row.time) for row in seen[at + 1 :]} == {("cannot", "not tried", None)}


def test_a_profile_of_a_gpu_counts_kernels_and_the_time_without():
    def event(name, start, end, device="CUDA", mark=False):
        kind, span = types.SimpleNamespace(name=device), types.SimpleNamespace(start=start, end=end)
        return types.SimpleNamespace(name=name, device_type=kind, time_range=span, is_user_annotation=mark)

    events = [event("host", 0, 99, "CPU"), event("step", 0, 99, mark=True)]
    for at in (0, 30, 60):  # three calls: kernels of 10 and 5 µs with 2 between, a copy beside the second
        events += [event("mm", at, at + 10), event("add", at + 12, at + 17), event("copy", at + 13, at + 16)]
    found = profile._on_device(events)
    assert found["launches"] == 3 and found["kernels"][0] == {"name": "mm", "launches": 1, "us": 10}
    assert found["span_us"] == 77 / 3 and found["busy_us"] == 15 and found["sum_us"] == 18
    assert found["in_order"] == [["mm", 0, 10], ["add", 12, 5], ["copy", 13, 3]]


def test_check_names_the_worst_tensor_and_what_is_missing():
    expected = {"a": torch.ones(3, dtype=torch.float64), "b": torch.tensor([1.0, -1.0], dtype=torch.float64)}
    assert check({"a": torch.ones(3), "b": torch.tensor([1.0, -1.1])}, expected)[1] == "b"
    assert check({"a": torch.ones(3)}, expected) == (float("inf"), "b is missing")
    assert check({"a": torch.ones(3), "b": torch.tensor([1.0, float("nan")])}, expected)[0] == float("inf")


def test_two_log_sum_exps_give_the_penalty_of_one_head():
    q, k = torch.randn(2, 1, 9, 4, dtype=torch.float64), torch.randn(2, 1, 5, 4, dtype=torch.float64)
    scores = q @ k.transpose(-1, -2)
    squares = torch.exp(torch.logsumexp(2 * scores, -1) - 2 * torch.logsumexp(scores, -1))
    expected = published.penalty([scores.softmax(-1)])
    torch.testing.assert_close(0.5 * (1 - squares).mean(), expected)


@pytest.mark.parametrize("directions", [None, 5])
def test_published_jacobian_is_ours(directions):
    torch.manual_seed(0)
    decoder = Decoder(SlotVAEConfig.preset("sprites-mini", resolution=4)).double()
    slots = torch.randn(2, 4, 32, dtype=torch.float64)
    torch.testing.assert_close(published.slot_jacobian(decoder, slots, directions), slot_jacobian(decoder, slots))


def test_quantiles():
    assert timing.quantiles([5, 1, 2, 3, 4]) == (3, 1.8, 4.2)
    assert timing.quantiles([7]) == (7, 7, 7)


def test_memory_of_a_process_of_its_own():
    """More pixels, more memory: the published step keeps 12 heads' weights and two 516-wide tensors a layer."""
    options = Options(rounds=1, batch=2, overrides={"resolution": 32})
    few, _, why = memory.measure("layer", "published", options)
    many, _, _ = memory.measure("layer", "published", dataclasses.replace(options, overrides={"resolution": 64}))
    assert why == "" and few > 2 * 32 * 32 * 4 * 2 * 516
    assert 2.5 < many / few < 5
    assert memory.measure("layer", "nobody", options).reason.endswith("KeyError: 'nobody'")


def made_up(
    case: str = "layer", seed: int = 0, when: str = "2030-01-01T00:00:00Z", ours: float = 1.0, spread=0.02, **axes
) -> list[Row]:
    """Rows as a run writes them: published 4 s, folded 2 s, ours ``ours`` s, with noise and a row that can't."""
    noise = random.Random(seed)
    run = dict(
        device="A processor", device_type="cpu", threads=1, tiny=False, when=when, isa="", torch="2", triton="",
        numpy="2", python="3", commit="abc", command="fastslots bench", sgemm_gflops=70.0, copy_gbs=10.0,
    )  # fmt: skip
    preset = "sprites" if case == "jacobian" else "clevr6"
    made = []
    for provider, time in (("published", 4.0), ("folded", 2.0), ("fastslots, cpu", ours)):
        samples = [time * (1 + spread * noise.uniform(-1, 1)) for _ in range(7)]
        row = Row(case, provider, preset, {"B": 4, "R": 128, "K": 7, **axes}, "fp32", run=run, clock="cpu", rounds=7)
        row.samples = {"cpu": samples, "wall": samples}
        row.time, row.time_q20, row.time_q80 = timing.quantiles(samples)
        row.gflops_per_s, row.error, row.peak_bytes = 30.0, 1e-6, int(time * 1e8)
        made.append(row)
    ratios(made)
    made.append(Row(case, "sdpa", preset, made[0].axes, "fp32", "cannot", "returns no weights", run=run))
    return made


def verdicts(before: list[Row], after: list[Row]) -> dict[str, str]:
    return {c.provider: c.verdict for c in compare.compare(before, after)}


def test_compare_verdicts():
    first = made_up(seed=0)
    assert verdicts(first, made_up(seed=1)) == {"published": "same", "folded": "same", "fastslots, cpu": "same"}
    assert verdicts(first, made_up(seed=1, ours=1.2))["fastslots, cpu"] == "slower"
    assert verdicts(first, made_up(seed=1, ours=0.8))["fastslots, cpu"] == "faster"
    noisy = made_up(seed=1, ours=1.2, spread=0.6)
    assert verdicts(first, noisy)["fastslots, cpu"] == "same", "a change within the noise is none"
    assert not compare.compare(first, made_up(K=8)), "another setting is not compared"


def test_compare_is_not_fooled_by_a_slower_machine():
    slower = made_up(seed=1)
    for row in slower:
        row.samples = {clock: [2 * s for s in seconds] for clock, seconds in row.samples.items()}
    assert verdicts(made_up(seed=0), slower)["fastslots, cpu"] == "same"


def test_rows_survive_files(tmp_path):
    made = made_up()
    path = rows.write(made, tmp_path, "layer")
    assert rows.read([path]) == rows.read([tmp_path]) == made
    with open(tmp_path / "layer.csv") as file:
        flat = list(csv.DictReader(file))
    assert len(flat) == 4 and {"case", "provider", "time", "axis_R", "device", "threads", "commit"} <= set(flat[0])
    assert float(flat[0]["time"]) == made[0].time and flat[3]["reason"] == "returns no weights"


def test_exponent_and_crossover():
    swept = []
    for side in (32, 64, 128, 256):
        point = made_up("scaling-resolution", resolution=side)
        for row in point:
            if row.time is not None:
                power = 2 if row.provider == "published" else 1
                row.time = {"published": 1e-3, "folded": 50.0, "fastslots, cpu": 0.1}[row.provider] * side**power
        swept += point
    grown = scaling.growth(swept, "resolution")
    assert grown["published"][1] == pytest.approx(2) and grown["fastslots, cpu"][1] == pytest.approx(1)
    assert scaling.overtakes(swept, "resolution") == {"published": 128, "folded": 32}  # 1e-3 R² > 0.1 R from R = 100 on


def checkout(folder):
    (folder / "docs").mkdir()
    (folder / "README.md").write_text(f"# Before\n{BEGIN}\nstale text\n{END}\nafter\n")
    (folder / "docs/benchmarks.md").write_text(f"{BEGIN}\n{END}\n")
    return folder


def test_report_from_rows(tmp_path):
    into = checkout(tmp_path)
    made = [
        *made_up(when="2030-01-01T00:00:00Z"),
        *(dataclasses.replace(row, peak_bytes=None) for row in made_up(when="2030-01-01T01:00:00Z", seed=1)),
        *made_up("step"),
        *made_up("jacobian"),
    ]
    for side in (64, 128):
        made += [dataclasses.replace(row, case="memory", time=None) for row in made_up(R=side) if row.time]
        made += made_up("scaling-resolution", resolution=side)
    write(made, into)
    readme, docs = (into / "README.md").read_text(), (into / "docs/benchmarks.md").read_text()
    assert readme.startswith("# Before\n") and readme.endswith("\nafter\n") and "stale text" not in readme
    assert "decoder training step (clevr6, 4 images of 128 x 128, fp32)" in readme and "**4" in readme
    goals = next(line for line in docs.splitlines() if "decoder training step, clevr6, 4 images | published |" in line)
    assert goals.endswith("| aim met |")
    assert "clevr6, 4 images, memory it adds | published | 8x | 30x | not measured" not in docs, "the first run did"
    assert "| slot Jacobian, sprites | published | 40x | 100x | " in docs and "| missed |" in docs
    assert "not measured" in docs, "the loader"
    assert "first run" in docs and "| same |" in docs and "cannot: returns no weights" in docs
    assert "## Growth with resolution" in docs and "days" in docs
    for name in ("speed", "memory"):
        svg = (into / f"docs/bench-{name}.svg").read_text()
        assert svg.startswith("<svg") and "fastslots, cpu" in svg
    write(made, into)
    assert (into / "README.md").read_text() == readme, "the same rows make the same text"


def test_runs_of_two_machines_are_not_held_against_each_other(tmp_path):
    made = []
    for when, device, ours in (("00", "old", 1.0), ("01", "new", 1.0), ("02", "old", 3.0), ("03", "new", 1.0)):
        made += made_up(when=f"2030-01-01T{when}:00:00Z", seed=int(when), ours=ours)
        for row in made[-4:]:
            row.run["device"] = device
    write(made, checkout(tmp_path))
    docs = (tmp_path / "docs/benchmarks.md").read_text()
    assert docs.count("| layer clevr6 B 4 R 128 K 7 | fastslots, cpu |") == 1 and "| slower |" not in docs
    assert "on new" in docs and "on old" not in docs, "tables are of the machine that ran last"
    write(made[:8], tmp_path)
    assert "No setting was run twice" in (tmp_path / "docs/benchmarks.md").read_text()


def test_a_processor_is_named_by_what_tells_it_from_its_kin(monkeypatch, tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n")
    monkeypatch.setattr(rows, "CPUINFO", cpuinfo)
    assert rows.device_name("cpu") == "AMD EPYC (family 25, model 17)"
    cpuinfo.write_text("model name\t: Neoverse\n")
    assert rows.device_name("cpu") == "Neoverse"
    cpuinfo.unlink()
    assert rows.device_name("cpu")


def test_tiny_rows_are_no_figures(tmp_path, capsys):
    made = made_up()
    for row in made:
        row.run["tiny"] = True
    path = rows.write(made, tmp_path, "layer")
    assert main(["bench", "report", str(path), "--into", str(checkout(tmp_path))]) == 2
    assert "no rows but tiny ones" in capsys.readouterr().err


def test_command_line(tmp_path, capsys):
    flags = ["--tiny", "--rounds", "1", "--no-memory", "--only", "fastslots, cpu", "--out", str(tmp_path)]
    assert main(["bench", "op", *flags, "--device", "cpu"]) in (0, None)
    out = capsys.readouterr().out
    assert "fastslots, cpu" in out and "sgemm" in out
    (path,) = tmp_path.glob("op-clevr6-fp32-*.json")
    first = json.loads(path.read_text())[0]
    assert (
        first["run"]["tiny"]
        and first["run"]["threads"] == 1
        and set(first) == {f.name for f in dataclasses.fields(Row)}
    )
    assert main(["bench", "compare", str(path), str(path)]) == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing"], "bench has no 'nothing'"),
        (["op", "--tiny", "--only", "nobody"], "no provider of op"),
        (["op", "--precision", "tf32", "--device", "cpu"], "tf32 is a GPU's"),
        (["op", "--rounds", "0"], "at least 1"),
        (["compare", "one.json"], "takes two"),
        (["report", "nowhere.json"], "does not exist"),
    ],
)
def test_user_errors(arguments, said, capsys, tmp_path):
    assert main(["bench", *arguments, "--out", str(tmp_path)]) == 2
    assert said in capsys.readouterr().err


def test_memory_rows_and_words():
    (row,) = memory_rows(Options(tiny=True, only="cpu"), (8,))
    assert row.status == "ok" and row.time is None and row.axes["R"] == 8
    assert tables.seconds(0.01234) == "12.3 ms" and tables.seconds(3e-6) == "3 µs" and tables.times(137.2) == "137x"
