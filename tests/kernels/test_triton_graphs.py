"""Capture and replay of the decoder's loss, all but ``torch.cuda.CUDAGraph``: a stand-in calls the function again.

Like a graph, the stand-in sees the buffers it was given at capture and no Python value that came later.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from fastslots.kernels.gpu import decoder_loss as loss_module
from fastslots.kernels.gpu import graphs, launch
from fastslots.kernels.gpu.decoder_loss import decoder_loss
from fastslots.kernels.gpu.graphs import Graphs
from fastslots.kernels.gpu.loss import tiling
from fastslots.records import FeedForward, FoldedDecoder, FoldedLayer, FoldedProjections, LossInputs, OutputHead

B, L, K, H, D, F = 2, 6, 3, 2, 12, 10


class StandIn:
    """Counts captures; a replay overwrites the outputs of the capture, as a graph does."""

    def __init__(self):
        self.captures = self.replays = 0

    def __call__(self, function, inputs):
        self.captures += 1
        outputs = function(inputs)

        def replay():
            self.replays += 1
            for out, value in zip(outputs, function(inputs), strict=True):
                out.copy_(value)

        return replay, outputs


def loss_inputs(seed: int = 0, device: str = "cpu", pixel_weight: bool = True, slot_mask: bool = True):
    gen = torch.Generator().manual_seed(seed)

    def randn(*size, scale=0.3):
        return (torch.randn(*size, generator=gen) * scale).to(device)

    layers = [
        FoldedLayer(FoldedProjections(randn(B, D, H, K), randn(B, H, K), randn(B, H, K, D), randn(D)),
                    FeedForward(1 + randn(D), randn(D), randn(F, D), randn(F), randn(D, F), randn(D)))
    ]  # fmt: skip
    head = OutputHead(1 + randn(D), randn(D), [randn(D, D), randn(3, D)], [randn(D), randn(3)])
    mask = torch.tensor([[True] * K, [True, False, True]]).to(device)
    return LossInputs(
        FoldedDecoder(randn(1, L, D), layers, head), randn(B, L, 3), randn(B, L).abs() if pixel_weight else None,
        mask if slot_mask else None, 1.5, 0.25,
    )  # fmt: skip


def run(inputs, cache=None, need=True, **kwargs):
    recon, interaction, grads = decoder_loss(inputs, list(inputs.tensors()) if need else [], graphs=cache, **kwargs)
    return [recon, interaction, *grads.values()]


def assert_equal(got, want):
    assert len(got) == len(want) and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_replays_give_the_bits_of_the_plain_call_on_new_values():
    capture = StandIn()
    cache = Graphs(capture)
    for seed in range(3):
        inputs = replace(loss_inputs(seed), interaction_weight=0.1 * seed)  # a float that changes from step to step
        assert_equal(run(inputs, cache, rows=6), run(inputs, rows=6))  # a tile an image
    assert (capture.captures, capture.replays) == (1, 2)  # the first call of a shape is not captured


@pytest.fixture
def cheap(monkeypatch):
    """In place of the kernels, something that reads every input and takes no time."""

    def cheap_run(inputs, need, grad_scale, tiling):
        tensors = inputs.tensors()
        total = sum(t.double().sum() for t in tensors.values()) + inputs.target.double().sum()
        total = total + sum(t.double().sum() for t in (inputs.pixel_weight, inputs.slot_mask) if t is not None)
        weights = inputs.recon_weight * total + inputs.interaction_weight, grad_scale * total + tiling.rows
        return [*weights, *(tensors[name] * total for name in need)]

    monkeypatch.setattr(loss_module, "_run", cheap_run)


def test_weights_of_the_terms_are_read_at_each_replay(cheap):
    """Floats, 0-d tensors and a loss scale, in turn."""
    cache = Graphs(StandIn())
    inputs = loss_inputs()
    for weight, scale in ((0.0, 1.0), (0.5, 2.0), (torch.tensor(2.0), torch.tensor(1024.0)), (3.0, 1.0)):
        weighted = replace(inputs, interaction_weight=weight, recon_weight=1.0 + float(weight))
        assert_equal(run(weighted, cache, grad_scale=scale), run(weighted, grad_scale=scale))


def test_results_outlive_the_next_replay(cheap):
    cache = Graphs(StandIn())
    first, second = loss_inputs(0), loss_inputs(1)
    for _ in range(2):
        run(first, cache)
    kept = run(first, cache)
    run(second, cache)
    assert_equal(kept, run(first))


def test_another_shape_type_or_request_is_another_graph(cheap):
    capture = StandIn()
    cache = Graphs(capture, capacity=16)
    inputs = loss_inputs()
    twice = inputs.decoder._replace(layers=inputs.decoder.layers * 2)
    calls = [
        lambda c: run(inputs, c),
        lambda c: run(inputs, c, need=False),
        lambda c: run(inputs, c, rows=8),
        lambda c: run(loss_inputs(pixel_weight=False), c),
        lambda c: run(loss_inputs(slot_mask=False), c),
        lambda c: run(replace(inputs, eps=1e-3), c),
        lambda c: run(replace(inputs, target=inputs.target.bfloat16()), c),
        lambda c: run(replace(inputs, decoder=twice), c),
    ]
    for _ in range(3):
        for call in calls:
            assert_equal(call(cache), call(None))
    assert capture.captures == len(calls)


def test_the_least_recently_used_graph_is_dropped():
    capture = StandIn()
    cache = Graphs(capture, capacity=2)

    def double(tensors):
        return [2 * t for t in tensors]

    for key in "aabbab":
        cache(key, double, [torch.ones(1)])
    assert capture.captures == 2
    cache("c", double, [torch.ones(1)])  # drops a
    cache("b", double, [torch.ones(1)])
    assert capture.captures == 2
    cache("a", double, [torch.ones(1)])  # seen for the first time again
    assert capture.captures == 2


def test_a_graph_of_inference_mode_serves_there_alone():
    """Its buffers are inference tensors, which nothing outside writes to."""
    capture = StandIn()
    cache = Graphs(capture)
    x = torch.ones(3)

    def double(tensors):
        return [2 * t for t in tensors]

    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad, torch.inference_mode):
        with mode():
            for _ in range(2):
                (found,) = cache("a", double, [x])
                assert torch.equal(found, 2 * x) and found.is_inference() == torch.is_inference_mode_enabled()
    assert capture.captures == 2


def test_only_cuda_is_captured_and_the_environment_turns_it_off(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert not graphs.wanted(torch.device("cpu"))
    assert graphs.wanted(torch.device("cuda", 0))
    monkeypatch.setenv("FASTSLOTS_CUDA_GRAPHS", "0")
    assert not graphs.wanted(torch.device("cuda", 0))
    monkeypatch.delenv("FASTSLOTS_CUDA_GRAPHS")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)  # the caller captures a whole step
    assert not graphs.wanted(torch.device("cuda", 0))


@pytest.mark.parametrize("need", [True, False], ids=["gradients", "forward-only"])
def test_nothing_waits_for_the_device(need):
    """On tensors without values every read of one raises: .item(), .cpu(), a branch on a tensor, a boolean index."""
    inputs = loss_inputs(device="meta")
    scale = torch.empty((), device="meta")
    with launch.record("sm_90") as launches:
        outputs = loss_module._run(
            inputs, list(inputs.tensors()) if need else [], scale, loss_module.Tiling(6, torch.bfloat16)
        )
    assert launches and all(t.is_meta for t in outputs)
    with pytest.raises((RuntimeError, NotImplementedError)):  # the test can fail
        float(scale)


def a_decoder(D, F, H, K, B=16, L=2**15, layers=2, head=(0, 0, 3)) -> LossInputs:
    """Without values; queries of all images. Maps of the head that are 0 wide are as wide as the rows."""

    def meta(*size):
        return torch.empty(size, device="meta")

    folded = FoldedProjections(meta(B, D, H, K), meta(B, H, K), meta(B, H, K, D), meta(D))
    ff = FeedForward(meta(D), meta(D), meta(F, D), meta(F), meta(D, F), meta(D))
    outs = [out or D for out in head]
    weights = [meta(out, into) for out, into in zip(outs, [D, *outs], strict=False)]
    of_head = OutputHead(meta(D), meta(D), weights, [meta(out) for out in outs])
    decoder = FoldedDecoder(meta(1, L, D), [FoldedLayer(folded, ff)] * layers, of_head)
    return LossInputs(decoder, meta(B, L, 3), None, None, 1.0, 1.0)


def shipped_decoder(name: str) -> LossInputs:
    from fastslots.kernels.tools import shipped

    shape = shipped.PRESETS[name]
    return a_decoder(shape.D, shape.F, shape.H, shape.K, shape.B, shape.L)


def test_tiles_take_their_share_of_the_memory_of_the_device(monkeypatch):
    """4 GiB, or an eighth of a smaller card; a batch of a preset in bf16 is one tile from 32 GB on."""
    from fastslots.kernels.tools import shipped

    clevr6 = shipped_decoder("clevr6").decoder
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    rows, fewest = {}, {}
    for size in (80, 32, 8):
        tiling.tile_bytes.cache_clear()
        properties = type("Properties", (), {"total_memory": size << 30})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, properties=properties: properties)
        rows[size] = tiling.tile_rows(clevr6, torch.bfloat16)
        assert rows[size] * tiling.row_bytes(clevr6, torch.bfloat16) <= min(4 << 30, (size << 30) // 8)
        decoders = {name: shipped_decoder(name) for name in shipped.PRESETS}
        fewest[size] = min(
            tiling.tile_rows(of.decoder, torch.bfloat16) / of.target[..., 0].numel() for of in decoders.values()
        )
    tiling.tile_bytes.cache_clear()
    assert rows[80] == rows[32] >= 32 * 128 * 128 > rows[8] * 3
    assert fewest[80] == fewest[32] >= 1 > fewest[8]


def most_memory(inputs: LossInputs, need, how: tiling.Tiling) -> int:
    """Bytes of the tensors that live at once."""
    alive: dict[int, tuple[StorageWeakRef, int]] = {}
    most = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal most
            out = func(*args, **(kwargs or {}))
            launches.clear()  # which hold their tensors
            for made in out if isinstance(out, tuple | list) else (out,):
                if isinstance(made, torch.Tensor):
                    storage = made.untyped_storage()
                    alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
            for key in [key for key, (of, _) in alive.items() if of.expired()]:
                del alive[key]
            most = max(most, sum(size for _, size in alive.values()))
            return out

    with launch.record("sm_90") as launches, Watch():
        loss_module._run(inputs, need, 1.0, how)
    return most


CLEVR6 = dict(D=180, F=360, H=12, K=7)


@pytest.mark.parametrize(
    "decoder",
    [
        *({**CLEVR6, "layers": layers} for layers in (1, 2, 4)),
        *({**CLEVR6, "head": head} for head in ((0, 3), (0, 0, 0, 3), (3,), (64, 360, 3))),
        *(dict(D=64, F=128, H=H, K=K) for H, K in ((4, 4), (8, 16), (8, 64), (1, 3))),
        dict(D=32, F=64, H=4, K=7),
        dict(D=32, F=64, H=8, K=64, layers=3),
        dict(D=360, F=720, H=12, K=11),
    ],
    ids=lambda decoder: "-".join(f"{name}{value}" for name, value in decoder.items()).replace(" ", ""),
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_a_tile_lives_in_its_memory(decoder, dtype):
    """What a tile keeps at once, in bytes, is what ``row_bytes`` reckons. Weights as kernels load them, and gradients
    that leave it, add a few hundredths."""
    inputs = a_decoder(**decoder)
    rows = inputs.target[..., 0].numel()
    reckoned = rows * tiling.row_bytes(inputs.decoder, dtype)
    most = most_memory(inputs, list(inputs.tensors()), tiling.Tiling(rows, dtype))
    assert 0.85 * reckoned < most <= 1.03 * reckoned, most / reckoned
    assert most_memory(inputs, [], tiling.Tiling(rows, dtype)) < reckoned


@pytest.fixture
def cuda(monkeypatch):
    """What captures ask of CUDA: into which pool, and on which stream. ``here`` is the caller's stream."""

    class Stream:
        def wait_stream(self, other):
            pass

    class Capturing(contextlib.nullcontext):
        def __init__(self, graph, pool, stream, capture_error_mode):
            super().__init__()
            seen.captures.append((pool, stream))

    seen = SimpleNamespace(captures=[], here="first")
    current = {name: Stream() for name in ("first", "second")}
    for name, stream in current.items():
        stream.cuda_stream = name
    pools = iter(range(9))
    monkeypatch.setattr(graphs, "_memory", {})
    for name, value in {
        "Stream": Stream, "CUDAGraph": lambda: SimpleNamespace(replay=None), "graph": Capturing,
        "current_stream": lambda *_: current[seen.here], "set_stream": lambda stream: None,
        "stream": contextlib.nullcontext, "device": contextlib.nullcontext, "graph_pool_handle": lambda: next(pools),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    return seen


def test_graphs_of_a_stream_share_their_memory(cuda):
    """Each would keep the memory of its largest moment: gigabytes, four times over. They run one after another. A
    block of a pool goes to the stream alone that it was of, and a pool ends with its last graph: an empty one is first.
    """
    for cuda.here in ("first", "first", "second"):
        graphs.capture_cuda(lambda inputs: inputs, [torch.zeros(1)])
    assert [pool for pool, _ in cuda.captures] == [0, 0, 0, 1, 1]  # another stream's may run at the same time
    streams = [{stream for of, stream in cuda.captures if of == pool} for pool in (0, 1)]
    assert [len(of) for of in streams] == [1, 1] and streams[0] != streams[1]
    assert len(graphs._memory) == 2 and all(shared.keeper for shared in graphs._memory.values())


def test_a_capture_that_breaks_off_leaves_its_memory_to_no_other(cuda):
    """Its stream may be one that still captures."""

    def refused(inputs):
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="FASTSLOTS_CUDA_GRAPHS=0"):
        graphs.capture_cuda(refused, [torch.zeros(1)])
    graphs.capture_cuda(lambda inputs: inputs, [torch.zeros(1)])
    assert [pool for pool, _ in cuda.captures] == [0, 1, 1]
    assert cuda.captures[0][1] != cuda.captures[1][1]
