"""The report page: facts of a run, bounded in size, safe against what a run's files hold, and alive in a browser."""

from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import MODEL_16

from fastslots.cli import main
from fastslots.data import SpritesDataset, open_dataset, read_batch, to_float
from fastslots.data.open import pack
from fastslots.metrics import jacobian_ari, slot_jacobian
from fastslots.models import SlotVAE, SlotVAEConfig
from fastslots.report import render, run_facts
from fastslots.report.explorer import (
    FIXED,
    PER_SLOT,
    PIXELS,
    SIDE,
    WALKS,
    Plan,
    affordable,
    decode,
    explore,
    views,
)
from fastslots.report.pictures import data_uri
from fastslots.report.write import write_report
from fastslots.runs.curves import POINTS, Curve, MetricsReader
from fastslots.train import TrainConfig, fit, loop, recorder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run whose name and data text try to be markup."""
    folder = tmp_path_factory.mktemp("runs") / "<img src=x onerror=alert(1)>"
    config = TrainConfig.preset(
        "sprites-mini", **MODEL_16, steps=12, batch_size=4, eval_every=4, eval_images=8, threads=1
    )
    with open(os.devnull, "w") as silence:
        fit(config, out=folder, stream=silence)
    return folder


def write_log(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


# ---- curves


def test_a_curve_keeps_every_spike_and_the_mean_whatever_its_length():
    values = np.random.default_rng(0).normal(size=5 * POINTS + 77)
    values[1234], values[2000] = 50.0, -60.0
    curve = Curve()
    for start in range(0, len(values), 100):
        part = values[start : start + 100].tolist()
        curve.extend(range(start + 1, start + 1 + len(part)), part)
    table = curve.table()
    assert POINTS // 2 <= len(table["step"]) <= POINTS and max(table["high"]) == 50 and min(table["low"]) == -60
    assert curve.size == 8 and table["step"][:3] == [1, 9, 17]
    assert table["mean"][3] == pytest.approx(values[24:32].mean(), rel=1e-4)


def test_a_short_curve_is_kept_as_it_is():
    curve = Curve()
    curve.extend([1, 2, 3], [0.5, 0.25, 1e-9])
    assert curve.table() == {"step": [1, 2, 3], "mean": [0.5, 0.25, 1e-9]}


def test_the_log_is_read_on_from_where_it_was_and_anew_after_a_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": n, "loss": float(n), "bad": None} for n in range(1, 8)]
    write_log(path, lines[:3])
    reader = MetricsReader(path).update()
    with open(path, "a") as file:
        file.write(
            json.dumps(lines[3])
            + "\n"
            + json.dumps({"step": 4, "eval": "val", "j_ari": 0.5})
            + "\n"
            + '{"step": 5, "lo'
        )
    reader.update()
    assert reader.training["loss"].table()["step"] == [1, 2, 3, 4] and reader.last["step"] == 4
    assert reader.evaluations == [{"step": 4, "eval": "val", "j_ari": 0.5}] and "bad" not in reader.training
    write_log(path, [{"step": n, "loss": -1.0} for n in range(1, 60)])  # longer than before, but another log
    assert reader.update().training["loss"].table()["mean"] == [-1.0] * 59 and not reader.evaluations


def test_a_log_of_half_a_million_steps_gives_a_small_page(tmp_path):
    names = ("loss", "recon", "kl", "interaction", "lr", "grad_norm")
    rest = ", ".join(f'"{name}": {{0}}.5' for name in names)
    tails = [", " + rest.format(n) + "}\n" for n in range(97)]
    with open(tmp_path / "metrics.jsonl", "w") as file:
        file.writelines(f'{{"step": {n}{tails[n % 97]}' for n in range(1, 500_001))
    facts = run_facts(tmp_path)
    assert facts["step"] == 500_000
    for table in facts["training"].values():
        assert len(table["step"]) <= POINTS and max(table["high"]) == 96.5 and min(table["low"]) == 0.5
    assert len(render([facts])) < 400_000


# ---- explorer


def tiny_model(**changes) -> SlotVAE:
    torch.manual_seed(0)
    return SlotVAE(
        SlotVAEConfig.preset("sprites-mini", **{k: v for k, v in MODEL_16.items() if k != "pixels_per_step"} | changes)
    ).eval()


def test_explorer_tiles_are_what_they_say():
    model, dataset = tiny_model(), SpritesDataset(seed=1, size=16, objects=(2, 2), count=6)
    raw, masks = read_batch(dataset, np.arange(6))
    images = to_float(raw)
    stored: list[np.ndarray] = []
    import fastslots.report.explorer as module

    original = module.data_uri
    module.data_uri = lambda sheet, limit: stored.append(sheet) or "uri"
    try:
        data = explore(model, images, masks)
    finally:
        module.data_uri = original

    def tile(image: int, n: int) -> np.ndarray:
        y, x = divmod(n, data["columns"])
        return stored[image][16 * y : 16 * y + 16, 16 * x : 16 * x + 16]

    def picture(slots) -> np.ndarray:
        return (model.decoder(slots)[0][0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).detach().numpy()

    K, L, V = 3, len(data["latents"]), len(data["values"][0])
    z = model.encode(images, torch.zeros(6, K, 4)).slots.detach()
    partner = data["images"][4]["partners"][1]
    assert data["images"][4]["partners"] == [3, 5]
    assert np.array_equal(tile(4, 0), raw[4].numpy().transpose(1, 2, 0)) or np.array_equal(tile(4, 0), raw[4].numpy())
    close = lambda a, b: np.abs(a.astype(int) - b.astype(int)).max() <= 1  # noqa: E731  (batches round differently)
    assert close(tile(4, 2), picture(z[4:5]))
    assert close(tile(4, FIXED + PER_SLOT * 1 + 2), picture(z[4:5, [0, 2]]))
    swapped = z[4:5].clone()
    swapped[0, 2] = z[partner, 1]
    assert close(tile(4, FIXED + PER_SLOT * K + (1 * K + 2) * K + 1), picture(swapped))
    walked = z[4:5].clone()
    walked[0, 1, data["latents"][1]] = data["values"][1][6]
    assert close(tile(4, FIXED + PER_SLOT * K + 2 * K * K + (1 * L + 1) * V + 6), picture(walked))
    for i, entry in enumerate(data["images"]):
        score = jacobian_ari(slot_jacobian(model.decoder, z[i : i + 1]), masks[i : i + 1].long())
        assert entry["j_ari"] == pytest.approx(score, abs=1e-3)
        assert all(math.isclose(sum(row), 1, abs_tol=1e-3) for row in entry["confusion"])


@pytest.mark.parametrize("decoder", ["transformer", "broadcast"])
def test_large_images_are_thinned_not_moved(decoder):
    model = tiny_model(resolution=128, decoder=decoder, broadcast_channels=4)
    z = torch.randn(2, 3, 4)
    whole, thin = views(model.decoder, z), model.decoder.thinned(2)
    few = [v.detach()[..., :: v.shape[-1] // SIDE, :: v.shape[-1] // SIDE] for v in views(thin, z)]
    for a, b in zip(whole, few, strict=True):
        torch.testing.assert_close(a[..., ::2, ::2], b, atol=2e-5, rtol=1e-4)
    assert decode(model.decoder, z, 1).shape == (2, 3, 128, 128)


@pytest.mark.parametrize("slots, side", [(1, 32), (4, 32), (7, 64), (16, 64), (40, 64)])
def test_the_plan_is_bounded_and_partners_swap_both_ways(slots, side):
    for budget in (PIXELS, PIXELS // 4):
        plan = Plan.of(24, slots, 9, budget, side)
        tiles = FIXED + slots * (PER_SLOT + (plan.group - 1) * slots + plan.latents * plan.values)
        assert plan.tiles(slots) == tiles and (plan.latents, plan.values) in WALKS
        assert 1 <= plan.images <= 6 and (plan.images * tiles * side**2 <= budget or plan.images == 1)
        for image in range(plan.images):
            assert all(image in plan.partners_of(partner) for partner in plan.partners_of(image))


def test_large_decoders_are_shown_less_of_on_a_cpu():
    small, large = (SlotVAE(SlotVAEConfig.preset(name)) for name in ("sprites-mini", "clevr6"))
    assert affordable(small.decoder, torch.zeros(1, 4, 32), 32) == PIXELS
    plan = Plan.of(24, 7, 64, affordable(large.decoder.thinned(2), torch.zeros(1, 7, 64), SIDE), SIDE)
    assert plan == Plan(images=3, group=3, latents=2, values=5)


def test_noise_is_stored_within_its_limit():
    noise = np.random.default_rng(0).integers(0, 256, (600, 600, 3), dtype=np.uint8)
    assert len(data_uri(noise, 400_000)) < 540_000
    assert data_uri(noise[:8, :8], 400_000).startswith("data:image/png")


# ---- page


@pytest.mark.parametrize("kind", ["packed", "shards", "npz"])
def test_the_page_names_the_data_by_their_fingerprint(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("FASTSLOTS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / ("data.npz" if kind == "npz" else "data")
    images = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), np.uint8)
    np.savez(tmp_path / "data.npz", images)
    for number in range({"packed": 1, "shards": 2, "npz": 0}[kind]):
        pack(tmp_path / "data.npz", data / f"shard-{number}" if kind == "shards" else data)
    config = TrainConfig.preset(
        "sprites-mini", **MODEL_16, data=str(data), steps=1, batch_size=2, eval_images=2, threads=1
    )
    fit(config, out=tmp_path / "run", stream=io.StringIO())
    facts = run_facts(tmp_path / "run")
    assert facts["fingerprint"] == open_dataset(data, size=16).info.digest != "" and "digest" not in facts["machine"]


def test_the_page_has_no_way_out_and_text_cannot_become_markup(run):
    (run / "data.txt").write_text("</script><script>alert(1)</script>\u2028 <b>bold</b>")
    text = write_report([run], run / "evil.html", explorer=False).read_text()
    head, facts = text.split("<script type=application/json id=facts>")
    assert "alert(1)</script>" not in facts and "<img src=x" not in text
    assert "default-src 'none'" in head and not re.search(r"(src|href)=[\"']?https?:", text)
    assert "</script><script>alert(1)" in json.loads(facts.split("</script>")[0])["runs"][0]["data"]


def test_a_page_of_a_run_that_has_just_begun(tmp_path):
    (tmp_path / "config.json").write_text(TrainConfig.preset("sprites-mini").to_json())
    (tmp_path / "scores.json").write_text("")  # torn
    page = write_report([tmp_path])
    assert page.stat().st_size < 100_000 and json.loads(page.read_text().split("id=facts>")[1].split("</script>")[0])


@pytest.mark.parametrize("command", [["report"], ["eval", "--images", "2", "--json"]])
def test_a_run_from_a_gpu_is_read_where_there_is_none(run, tmp_path, capsys, command):
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"device": "cuda:99"}))
    assert main([command[0], str(tmp_path / "run"), *command[1:]]) == 0, capsys.readouterr().err


def test_every_evaluation_leaves_the_scores_of_its_images(run):
    scores = json.loads((run / "scores.json").read_text())
    last = run_facts(run)["evaluations"][-1]
    assert scores["step"] == last["step"] == 12
    for name in ("j_ari", "fg_ari"):
        assert len(scores[name]) == 8 and np.mean(scores[name]) == pytest.approx(last[name], abs=1e-4)


def test_images_given_in_python_are_explored_at_the_end_of_their_run(tmp_path):
    config = TrainConfig.preset("sprites-mini", **MODEL_16, steps=2, batch_size=4, eval_images=4, threads=1)
    images, said = torch.utils.data.TensorDataset(torch.rand(60, 3, 16, 16)), io.StringIO()
    fit(config, images, tmp_path, stream=said)
    shown = json.loads((tmp_path / "explorer.json").read_text())
    assert len(shown["images"]) == 3 and not shown["masks"] and "no slot explorer" not in said.getvalue()


def test_images_given_in_python_are_not_explored_from_elsewhere_later(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "explorer.json").unlink(missing_ok=True)
    (tmp_path / "run" / "data.txt").write_text("MyDataset of 50 images")
    write_report([tmp_path / "run"], explorer=True)
    assert not (tmp_path / "run" / "explorer.json").exists()


# ---- a signal once all steps are done


@pytest.mark.parametrize("while_in", ["write_explorer", "evaluate"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_ends_a_run_in_its_last_evaluation_or_explorer(tmp_path, monkeypatch, while_in, number):
    home = recorder if while_in == "write_explorer" else loop
    original = getattr(home, while_in)

    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), number)
        deadline = time.monotonic() + (10 if while_in == "write_explorer" else 0.05)
        while time.monotonic() < deadline:
            time.sleep(0.01)
        return original(*args, **kwargs)

    monkeypatch.setattr(home, while_in, interrupted)
    config = TrainConfig.preset(
        "sprites-mini", **MODEL_16, steps=2, batch_size=4, eval_every=0, eval_images=1, threads=1
    )
    start, said = time.monotonic(), io.StringIO()
    result = fit(config, out=tmp_path, stream=said)
    assert result.stopped_by == number and result.step == 2 and time.monotonic() - start < 10
    assert f"stopped by signal {number:d} at step 2: all steps are done" in said.getvalue()
    assert (tmp_path / "report.html").exists() and not (tmp_path / "explorer.json").exists()
    assert ("no slot explorer yet" in said.getvalue()) == (while_in == "write_explorer")
