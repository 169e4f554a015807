"""What only a real GPU, a second one or a program with other settings would show, shown without one."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch
from triton.runtime.errors import OutOfResources

from fastslots.kernels import gpu_backend
from fastslots.kernels.gpu import _pack, graphs, launch
from fastslots.kernels.gpu.cross_attention import cross_attention_fwd
from fastslots.kernels.tools import shipped, tune
from fastslots.ops import reference
from fastslots.records import FeedForward, FoldedProjections, describe
from fastslots.testing import on


@pytest.fixture
def tf32_settings():
    yield torch.backends.cuda.matmul
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    torch.set_float32_matmul_precision("highest")


def test_tf32_follows_both_of_torchs_switches(tf32_settings):
    """torch.get_float32_matmul_precision raises in a program that has used the newer switch: nothing may ask it."""
    for setting, precision in (("high", "tf32"), ("highest", "ieee"), ("medium", "tf32")):
        torch.set_float32_matmul_precision(setting)
        assert launch.precision(torch.float32) == precision and launch.precision(torch.bfloat16) == "ieee"
    for setting, precision in (("tf32", "tf32"), ("ieee", "ieee")):
        tf32_settings.fp32_precision = setting
        assert launch.precision(torch.float32) == precision
    tf32_settings.fp32_precision = "tf32"
    with shipped.matmul_precision("fp32"):
        assert launch.precision(torch.float32) == "ieee"
    assert launch.precision(torch.float32) == "tf32"


def test_autocast_leaves_folding_in_fp32():
    """Autocast reaches into custom ops: a product among these would come back in 16 bits."""
    gen = torch.Generator().manual_seed(0)
    nw, nb, w1, b1 = (torch.randn(*s, generator=gen) for s in ((24,), (24,), (40, 24), (40,)))
    with torch.autocast("cpu", torch.bfloat16):
        ff = FeedForward(nw, nb, w1, b1, w2=w1.T, b2=nb)
        merged = _pack.merge_norm(ff)
        grads = _pack.split_norm_grads(merged.w, merged.b, ff)
    leaves = [t.double().requires_grad_() for t in (nw, nb, w1)]
    w, b = leaves[2] * leaves[0], b1.double() + leaves[2] @ leaves[1]
    expected = torch.autograd.grad([w, b], leaves, [merged.w.double(), merged.b.double()])
    for got, want in zip((*merged, *grads), (w, b, *expected), strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=1e-5)


class FakeCuda:
    """Notes what ``capture_cuda`` asks of torch.cuda, in order."""

    def __init__(self, fail: int = 0):
        """fail: which capture does, counted from 1. The first is the empty one that keeps a stream's memory."""
        self.log: list = []
        self.current: list = ["default"]
        self.fail = fail

    def install(self, monkeypatch) -> FakeCuda:
        fake, log = self, self.log

        class Stream:
            cuda_stream = 0

            def __init__(self, *_):
                log.append("new stream")

            def wait_stream(self, other):
                log.append("wait")

        @contextlib.contextmanager
        def within(name, *_):
            fake.current.append(name)
            yield
            fake.current.pop()

        @contextlib.contextmanager
        def graph(graph, pool=None, stream=None, capture_error_mode="global"):
            log.append(("capture", isinstance(stream, Stream), capture_error_mode, pool))
            with within("capture"):
                yield
                if sum("capture" in entry for entry in log) == fake.fail:
                    raise RuntimeError("operation not permitted when stream is capturing")

        class CUDAGraph:
            def replay(self):
                log.append("replay")

        for name, value in {
            "Stream": Stream, "current_stream": Stream, "CUDAGraph": CUDAGraph, "graph": graph,
            "stream": lambda s: within("side"), "device": lambda d: within(("device", d)),
            "set_stream": lambda s: log.append("stream set back"), "graph_pool_handle": lambda: "a pool",
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(graphs, "_memory", {})
        return self


def test_capture_is_on_a_stream_of_the_device_and_lets_other_threads_call_cuda(monkeypatch):
    """torch's default capture stream belongs to whichever device captured first; its default mode breaks a capture
    when another thread (the loader) pins memory."""
    fake = FakeCuda().install(monkeypatch)
    seen = []
    tensor = torch.zeros(1)
    replay, outputs = graphs.capture_cuda(lambda t: seen.append(tuple(fake.current)) or list(t), [tensor])
    device = ("device", tensor.device)
    assert seen == [("default", device, "side"), ("default", device, "capture")]  # compiled first, then captured
    assert ("capture", True, "thread_local", "a pool") in fake.log and outputs == [tensor]
    replay()
    assert fake.log[-1] == "replay"


@pytest.mark.parametrize("fail", [1, 2])
def test_a_failed_capture_names_the_switch(fail, monkeypatch):
    fake = FakeCuda(fail).install(monkeypatch)
    with pytest.raises(RuntimeError, match=r"not permitted.*FASTSLOTS_CUDA_GRAPHS=0"):
        graphs.capture_cuda(list, [torch.zeros(1)])
    assert fake.log[-1] == "stream set back"


class Kernel:
    """Fits a device with room for ``fits`` stages."""

    def __init__(self, fits: int):
        self.fits, self.asked = fits, []

    def fn(self):
        raise AssertionError("never run")

    fn.__name__ = "_toy_kernel"

    def __getitem__(self, grid):
        def run(num_stages, num_warps, enable_fp_fusion, **_):
            self.asked.append(num_stages)
            if num_stages > self.fits:
                raise OutOfResources(num_stages * 64 * 1024, 99 * 1024, "shared memory")

        return run


@pytest.fixture
def no_memory(monkeypatch):
    monkeypatch.setattr(launch, "_stages_that_fit", {})


def test_a_device_with_less_shared_memory_runs_fewer_stages(no_memory):
    config = launch.LaunchConfig(64, 32, 8, 3)
    kernel = Kernel(fits=1)
    for _ in range(2):
        launch.run(kernel, (1,), {"x_ptr": torch.zeros(1)}, {"D": 4}, config)
    assert kernel.asked == [3, 2, 1, 1]  # the second launch asks for what fitted
    with pytest.raises(OutOfResources):  # the tuner must not time what it did not ask for
        launch.run(Kernel(fits=1), (1,), {"x_ptr": torch.zeros(1)}, {"D": 8}, config, as_given=True)
    other = Kernel(fits=3)  # bf16 rows fit where fp32 ones do not
    launch.run(other, (1,), {"x_ptr": torch.zeros(1, dtype=torch.bfloat16)}, {"D": 4}, config)
    assert other.asked == [3]
    with pytest.raises(RuntimeError, match=r"toy does not fit this GPU.*kernels tune"):
        launch.run(Kernel(fits=0), (1,), {"x_ptr": torch.zeros(1)}, {"D": 16}, config)


@pytest.mark.parametrize(
    "arch, serves",
    [("sm_75", "sm_80"), ("sm_87", "sm_86"), ("sm_89", "sm_86"), ("sm_90", "sm_90"), ("sm_103", "sm_100"),
     ("sm_110", "sm_100"), ("sm_120", "sm_86"), ("sm_121", "sm_86"), ("gfx90a", "sm_80")],
)  # fmt: skip
def test_an_architecture_without_entries_has_a_static_default(arch, serves):
    """99 KiB of shared memory a block: sm_86, sm_89 and sm_12x may not be served by the entries of A100 and B200."""
    assert launch.table_arch(arch) == serves


def test_every_architecture_has_every_entry_or_says_why_not(monkeypatch, tf32_settings):
    table = launch.table()
    every = {(kernel, key) for kernel, found in table["sm_80"].items() for key in found}
    missing = {arch: every - {(k, key) for k, f in found.items() for key in f} for arch, found in table.items()}
    wide = {(kernel, "tf32/384") for kernel in ("folded_attention_dw",)}
    assert {arch: lacks for arch, lacks in missing.items() if lacks} == {"sm_86": wide}
    tensors = [torch.empty(s) for s in ((1, 4, 360), (1, 360, 12, 11), (1, 12, 11), (1, 12, 11, 360), (360,))]
    monkeypatch.setattr(launch, "arch_of", lambda like: "sm_89")
    assert gpu_backend.why_not(describe("decoder_layer", tensors)) is None
    torch.set_float32_matmul_precision("high")
    assert "shared memory" in gpu_backend.why_not(describe("decoder_layer", tensors))
    assert gpu_backend.why_not(describe("decoder_layer", [tensors[0].bfloat16(), *tensors[1:]])) is None


@pytest.mark.parametrize("arch", ["sm_89", "sm_120"])
def test_tools_leave_out_what_an_architecture_does_not_serve(arch):
    """Both the compiler and the tuner go through every preset: on these, one of them has ops without block sizes."""
    wide = shipped.PRESETS["clevrtex"]
    names = {item.name for _, item in shipped.record_shipped(arch, wide, "tf32")}
    narrow = ("cross_attention", "token_attention", "slot_attention")
    assert names == {f"{n}_{d}" for n in narrow for d in ("fwd", "bwd")} | {f"{n}_combine" for n in narrow[1:]}
    assert len(shipped.record_shipped(arch, wide, "bf16")) > 10
    lines: list[str] = []
    tune.plan(lines.append, ["clevrtex"], ["bf16", "tf32"], arch)
    assert lines[-1] == "22 entries"


def test_many_slots_of_wide_rows_are_refused_where_a_head_does_not_fit(monkeypatch):
    """Bytes of shared memory a block: 99 KiB (sm_86, sm_89, sm_12x), 163 (sm_80), 227 (sm_90, sm_100)."""

    def reason(dtype, width, slots):
        tensors = [torch.empty(s, dtype=dtype, device="meta") for s in ((1, 4, width), (1, width, 8, slots))]
        return gpu_backend.why_not(describe("decoder_layer", tensors))

    kib = {}
    monkeypatch.setattr(gpu_backend, "_shared_memory", lambda device: kib["has"] * 1024)
    for has, dtype, width, most in (
        (99, torch.float32, 180, 32), (99, torch.bfloat16, 180, 64), (99, torch.bfloat16, 360, 32),
        (163, torch.float32, 180, 64), (163, torch.float32, 360, 32), (227, torch.bfloat16, 360, 64),
    ):  # fmt: skip
        kib["has"] = has
        assert reason(dtype, width, most) is None
        if most < 64:
            assert f"this GPU has {has}" in reason(dtype, width, 64)
    assert reason(torch.float32, 360, 11) is None


def test_more_images_than_a_grid_has_programs_are_refused():
    folded = [torch.empty(s, device="meta") for s in ((65536, 4, 1, 2), (65536, 1, 2), (65536, 1, 2, 4), (4,))]
    x = torch.empty(1, 1, 4, device="meta")
    assert "65536 images" in gpu_backend.why_not(describe("decoder_layer", (x, *folded)))
    fewer = [t[:65535] for t in folded[:3]]
    assert gpu_backend.why_not(describe("decoder_layer", (x, *fewer, folded[3]))) is None
    rows = torch.empty(65536, 1, 4, device="meta")
    assert "65536 images" in gpu_backend.why_not(describe("token_attention", (rows, rows)))
    q = torch.empty(1, 65536, 1, 4, device="meta")
    assert "65536 heads" in gpu_backend.why_not(describe("cross_attention", (q, q, q)))


def test_rows_far_apart_are_copied_before_offsets_wrap():
    """A tile's offsets are 32 bits wide: 128 rows 2²⁵ elements apart pass 2³¹."""
    q = torch.empty(1, 1, 200, 4, device="meta").as_strided((1, 1, 200, 4), (0, 0, 2**25, 1))
    k = torch.empty(1, 1, 3, 4, device="meta")
    with launch.record("sm_90") as launches:
        cross_attention_fwd(q, k, k, 1.0)
    (item,) = launches
    assert item.args["stride_ql"] * item.constexprs["UNIT"] * item.constexprs["BLOCK_L"] < 2**31
    q = torch.randn(2, 200, 3, 4).transpose(1, 2)  # as a projection leaves it: read where it lies
    with launch.record("sm_90") as launches:
        cross_attention_fwd(q, k.expand(2, 3, 3, 4), k.expand(2, 3, 3, 4), 1.0)
    assert launches[0].args["q_ptr"] is q


@pytest.mark.parametrize("slots", [64, 33, 16])
def test_many_slots_take_shorter_tiles(slots):
    """A group of columns is at least one head: 64 slots in a table's 16 columns must not grow a tile fourfold."""
    shape = replace(shipped.PRESETS["clevr6"], K=slots, H=8)
    q = torch.empty(1, 2, 300, 43, dtype=torch.bfloat16, device="meta")
    k = torch.empty(1, 2, slots, 43, dtype=torch.bfloat16, device="meta")
    with launch.record("sm_90") as launches:
        cross_attention_fwd(q, k, k, 1.0)
    assert launches[0].constexprs["BLOCK_L"] * launches[0].constexprs["KP"] <= 128 * 32
    usual = {}
    for target, K in ((usual, 7), (many := {}, slots)):
        with launch.record("sm_90") as launches:
            shipped.run_op("decoder_layer", shipped.inputs(replace(shape, K=K), torch.bfloat16))
        for item in launches:
            target[item.name] = item.constexprs["BLOCK_L"] * item.constexprs["BLOCK_C"]
    for name in ("decoder_layer_fwd", "folded_attention_fwd", "folded_attention_dx", "folded_attention_dw"):
        assert many[name] <= usual[name], name


def test_short_tiles_of_many_slots_give_the_right_numbers(device):
    gen = torch.Generator().manual_seed(0)
    x, G, g, U, b = (
        torch.randn(*s, generator=gen) * 0.5 for s in ((1, 70, 20), (1, 20, 2, 40), (1, 2, 40), (1, 2, 40, 20), (20,))
    )
    ff = [torch.randn(*s, generator=gen) * 0.3 for s in ((20,), (20,), (24, 20), (24,), (20, 24), (20,))]
    from fastslots.kernels.gpu.decoder_layer import decoder_layer_fwd

    x, G, g, U, b, ff = on(device, (x, G, g, U, b, ff))
    got = decoder_layer_fwd(x, FoldedProjections(G, g, U, b), FeedForward(*ff))
    want = reference.decoder_layer(x, FoldedProjections(G, g, U, b), FeedForward(*ff), None)
    for a, r in zip(got, want, strict=True):
        torch.testing.assert_close(a, r, atol=2e-5, rtol=2e-5)


@pytest.fixture
def own_table(tmp_path, monkeypatch):
    path = tmp_path / "launches.json"
    path.write_text(launch.TABLE.read_text())
    monkeypatch.setattr(launch, "TABLE", path)
    launch.reload_table()
    yield path
    monkeypatch.undo()
    launch.reload_table()


def test_tuner_finds_the_fastest_and_writes_what_launches_read(own_table):
    """A made-up clock: fastest at 32 rows, 32 columns, 4 warps, 1 stage, chunks of 64; nothing of 128 rows fits."""

    def clock(item: launch.Launch) -> float | None:
        c = item.config
        if c.block_l > 64:
            return None
        return 1 + abs(c.block_l - 32) + abs(c.block_c - 32) + c.num_warps + c.num_stages + (64 - c.block_d)

    lines: list[str] = []
    tune.tune(lines.append, ["clevr6"], ["bf16"], arch="sm_99", device="meta", measure=clock)
    best = launch.LaunchConfig(32, 32, 4, 1)
    table = launch.table()["sm_99"]
    assert len(lines) == len(table) == 16
    for kernel, entries in table.items():
        key = launch.table_key(torch.bfloat16, shipped.PRESETS["clevr6"].row_width(kernel))
        for found in (entries[key], entries[key.replace("bf16", "fp16")]):
            assert replace(launch.LaunchConfig(**found), block_f=0) == best, kernel
    with launch.record("sm_99") as launches:
        shipped.run_op("decoder_layer", shipped.inputs(shipped.PRESETS["clevr6"], torch.bfloat16))
    assert all(replace(item.config, block_f=0) == best for item in launches)
    assert launch.table_arch("sm_99") == "sm_99" and launch.table()["sm_90"] != table


def test_tuner_leaves_an_entry_that_nothing_beats(own_table):
    before = own_table.read_text()
    lines: list[str] = []
    tune.tune(lines.append, ["sprites-mini"], ["fp32"], arch="sm_90", device="meta", measure=lambda item: None)
    assert lines and all("nothing fits" in line for line in lines) and own_table.read_text() == before
