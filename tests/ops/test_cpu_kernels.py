"""The C++ kernels: values and every gradient against the reference in float64, on each instruction set of this machine.

A value may be off by four times what eager PyTorch in the same dtype is off, plus a floor; both are relative to the RMS
of what is expected.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch

from fastslots import ops
from fastslots.ops import reference
from fastslots.ops.decoder_loss import reference_decoder_loss
from fastslots.records import FeedForward, FoldedDecoder, FoldedLayer, FoldedProjections, LossInputs, OutputHead
from fastslots.testing import SHAPES, assert_close, errors, random_layer, random_qkv

cpu_backend = pytest.importorskip("fastslots.kernels.cpu_backend", reason="this installation has no C++ module")
_cpu = pytest.importorskip("fastslots._cpu")
unit_rows = pytest.importorskip("fastslots.kernels.cpu_calls").unit_rows

FLOOR = {torch.float32: 1e-5, torch.float64: 1e-13}
SETS = [*((isa, torch.float32) for isa in cpu_backend.ISAS), ("portable", torch.float64)]


@pytest.fixture(autouse=True)
def best_isa_and_two_threads():
    threads = torch.get_num_threads()
    yield
    cpu_backend.set_isa(None)
    torch.set_num_threads(threads)


def cast(values, dtype):
    return [v.to(dtype).requires_grad_() for v in values]


def values_and_gradients(call, inputs, seed=3):
    """Outputs of ``call`` and the gradients of all inputs under fixed random cotangents."""
    g = torch.Generator().manual_seed(seed)
    outputs = call(*inputs)
    cotangents = [torch.randn(o.shape, generator=g, dtype=torch.float64).to(o.dtype) for o in outputs]
    return [o.detach() for o in outputs] + list(torch.autograd.grad(outputs, inputs, cotangents))


def assert_as_good(found, eager, exact, dtype, name):
    """Each tensor of ``found`` about as near to ``exact`` as ``eager`` is, which ran in the same dtype."""
    sizes = [b.square().mean().sqrt().item() if b.numel() else 0.0 for b in exact]
    for i, (a, e, b, size) in enumerate(zip(found, eager, exact, sizes, strict=True)):
        # What is far below the others is left over when larger terms cancel (norms 2 wide, one slot): their rounding.
        floor = FLOOR[dtype] * max(1.0, 1e-2 * max(sizes) / max(size, 1e-30))
        assert_close(a, b, 4 * max(errors(e, b)[0], 4 * errors(e, b)[1]) + floor, f"{name} {i}")


def compare_sets(run, cast_inputs, inputs):
    """``run(backend, inputs in a dtype)`` on every instruction set, as good as eager in its dtype."""
    exact = run("reference", cast_inputs(inputs, torch.float64))
    eager = {dtype: run("reference", cast_inputs(inputs, dtype)) for dtype in FLOOR}
    for isa, dtype in SETS:
        cpu_backend.set_isa(isa)
        found = run("cpu", cast_inputs(inputs, dtype))
        assert_as_good(found, eager[dtype], exact, dtype, f"{isa} {dtype}")


def compare(call, inputs):
    """``call(backend, *inputs)``: values and gradients of all inputs."""
    compare_sets(lambda backend, a: values_and_gradients(lambda *t: call(backend, *t), a), cast, inputs)


def mask_for(shape, masked):
    if not masked:
        return None
    mask = torch.rand(shape.B, shape.K, generator=torch.Generator().manual_seed(1)) > 0.4
    mask[:1] = False  # an image without any slot
    return mask


CASES = [
    *(pytest.param(name, False, id=name) for name in SHAPES),
    *(pytest.param(name, True, id=f"{name}-masked") for name in ("sprites-mini", "one-pixel", "sixteen-slots")),
]


# ---- the three ops ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, masked", CASES)
def test_cross_attention(name, masked):
    shape = SHAPES[name]
    mask = mask_for(shape, masked)
    compare(lambda b, *qkv: ops.cross_attention(*qkv, backend=b, slot_mask=mask), random_qkv(shape))


@pytest.mark.parametrize("name, masked", CASES)
def test_layers(name, masked):
    shape = SHAPES[name]
    mask = mask_for(shape, masked)
    x, folded, ff = random_layer(shape, shared_queries=masked)

    def attention(backend, x, *f):
        return ops.folded_cross_attention(x, FoldedProjections(*f), backend, slot_mask=mask)

    def layer(backend, x, *w):
        return ops.decoder_layer(x, FoldedProjections(*w[:4]), FeedForward(*w[4:]), backend, slot_mask=mask)

    compare(attention, [x, *folded])
    compare(layer, [x, *folded, *ff])


def test_heads_split_from_a_projection_are_not_copied():
    B, H, L, K, d = 2, 3, 21, 4, 5
    q, k, v = (torch.randn(B, n, H, d, dtype=torch.float64) for n in (L, K, K))

    def call(backend, q, k, v):
        return ops.cross_attention(*(t.transpose(1, 2) for t in (q, k, v)), backend=backend)

    compare(call, [q, k, v])
    assert unit_rows(q.transpose(1, 2), q.dtype).data_ptr() == q.data_ptr()
    strided = [torch.randn(2, 3, 5, n, dtype=torch.float64) for n in (9, 4, 4)]  # the last axis strided: copied
    compare(lambda b, q, k, v: ops.cross_attention(q.mT, k.mT, v.mT, backend=b), strided)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_tensors_are_rounded_once(dtype):
    shape = SHAPES["sprites-mini"]
    unit = torch.finfo(dtype).eps

    def attention(q, k, v, backend="cpu"):
        return ops.cross_attention(q, k, v, backend=backend)

    def layer(x, *w, backend="cpu"):
        return ops.decoder_layer(x, FoldedProjections(*w[:4]), FeedForward(*w[4:]), backend)

    x, folded, ff = random_layer(shape)
    for call, inputs in ((attention, random_qkv(shape)), (layer, [x, *folded, *ff])):
        narrow = cast(inputs, dtype)
        found = values_and_gradients(call, narrow)
        wide = cast([t.detach() for t in narrow], torch.float64)
        expected = values_and_gradients(partial(call, backend="reference"), wide)  # the same cotangents, not rounded
        for a, b in zip(found, expected, strict=True):
            assert_close(a, b, 8 * unit)
        assert found[0].dtype == dtype and found[1].dtype == torch.float32
        assert all(a.dtype == dtype for a in found[2:])


# ---- decoder_loss ----------------------------------------------------------------------------------------------------


def loss_inputs(shape, layers=2, head=(20, 3), shared=True, weighted=False, masked=False, seed=0):
    g = torch.Generator().manual_seed(seed)

    def draw(*size, scale=1.0):
        return scale * torch.randn(*size, generator=g, dtype=torch.float64)

    stack = [random_layer(shape, seed=seed + i, shared_queries=shared) for i in range(layers)]
    widths = [shape.D, *head]
    weights = [draw(o, i, scale=i**-0.5) for i, o in pairwise(widths)]
    head_arrays = OutputHead(1 + draw(shape.D, scale=0.2), draw(shape.D), weights, [draw(o) for o in head])
    return LossInputs(
        FoldedDecoder(stack[0][0], [FoldedLayer(folded, ff) for _, folded, ff in stack], head_arrays),
        draw(shape.B, shape.L, head[-1]),
        0.5 + torch.rand(shape.B, shape.L, generator=g, dtype=torch.float64) if weighted else None,
        mask_for(shape, masked),
        recon_weight=0.7,
        interaction_weight=1.3,
    )


def in_dtype(inputs, dtype):
    weight = None if inputs.pixel_weight is None else inputs.pixel_weight.to(dtype)
    cast_inputs = inputs.with_tensors({name: t.to(dtype) for name, t in inputs.tensors().items()})
    return replace(cast_inputs, target=inputs.target.to(dtype), pixel_weight=weight)


def loss_and_gradients(inputs):
    recon, interaction, grads = cpu_backend.decoder_loss(inputs, list(inputs.tensors()))
    return [recon, interaction, *grads.values()]


@pytest.mark.parametrize(
    "name, options",
    [
        *(pytest.param(name, {}, id=name) for name in SHAPES),
        pytest.param("sprites-mini", dict(shared=False, weighted=True), id="sprites-mini-weighted"),
        pytest.param("one-pixel", dict(shared=False, weighted=True), id="one-pixel-weighted"),
        pytest.param("sixteen-slots", dict(masked=True, layers=1), id="sixteen-slots-masked"),
        pytest.param("many-slots", dict(weighted=True, masked=True, layers=3), id="many-slots-masked"),
    ],
)
def test_decoder_loss(name, options):
    inputs = loss_inputs(SHAPES[name], **options)
    need = list(inputs.tensors())

    def run(backend, inputs):
        loss = reference_decoder_loss if backend == "reference" else cpu_backend.decoder_loss
        recon, interaction, grads = loss(inputs, need, 3.0)
        return [recon, interaction, *(grads[name] for name in need)]

    compare_sets(run, in_dtype, inputs)


def test_gradients_of_the_double_build_are_the_slopes_of_its_values():
    shape = SHAPES["one-slot"]._replace(L=3, K=2)
    q, k, v = cast(random_qkv(shape), torch.float64)
    assert torch.autograd.gradcheck(lambda *a: ops.cross_attention(*a, backend="cpu"), (q, k, v), fast_mode=True)
    x, folded, ff = random_layer(shape)
    weights = cast([x, *folded, *ff], torch.float64)

    def layer(x, *w):
        return ops.decoder_layer(x, FoldedProjections(*w[:4]), FeedForward(*w[4:]), "cpu")

    assert torch.autograd.gradcheck(layer, weights, fast_mode=True)

    inputs = loss_inputs(shape, layers=1, head=(4, 2), weighted=True)  # hands its gradients out once: not for gradcheck
    tensors = inputs.tensors()
    grads = cpu_backend.decoder_loss(inputs, list(tensors)).grads

    def total(tensors):
        recon, interaction, _ = cpu_backend.decoder_loss(inputs.with_tensors(tensors), [])
        return inputs.recon_weight * recon + inputs.interaction_weight * interaction

    assert list(grads) == list(tensors)
    for i, (name, grad) in enumerate(grads.items()):
        step = 1e-6 * torch.randn(grad.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
        up, down = (tensors | {name: tensors[name] + sign * step} for sign in (1, -1))
        torch.testing.assert_close((total(up) - total(down)) / 2, (grad * step).sum(), rtol=1e-5, atol=1e-13)


def test_only_the_gradients_asked_for():
    inputs = in_dtype(loss_inputs(SHAPES["sprites-mini"]), torch.float32)
    recon, interaction, every = cpu_backend.decoder_loss(inputs, list(inputs.tensors()))
    for name, expected in every.items():
        *_, grads = cpu_backend.decoder_loss(inputs, [name])
        assert list(grads) == [name] and torch.equal(grads[name], expected)
    assert cpu_backend.decoder_loss(inputs, []) == (recon, interaction, {})


@pytest.mark.parametrize(
    "name", ["queries", "layers.0.G", "layers.0.U", "layers.0.norm_weight", "layers.0.b1", "head.biases.1"]
)
def test_nan_comes_through(name):
    for isa in cpu_backend.ISAS:
        cpu_backend.set_isa(isa)
        inputs = in_dtype(loss_inputs(SHAPES["one-slot"]), torch.float32)
        tensors = {name: t.clone() for name, t in inputs.tensors().items()}
        tensors[name].view(-1)[-1] = float("nan")
        assert cpu_backend.decoder_loss(inputs.with_tensors(tensors), list(tensors)).recon.isnan()


# ---- threads, bits, memory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("isa", cpu_backend.ISAS)
def test_same_bits_every_time_for_any_number_of_threads(isa, shared):
    cpu_backend.set_isa(isa)
    shape = SHAPES["sprites-mini"]._replace(B=8, L=200)
    inputs = in_dtype(loss_inputs(shape, shared=shared, weighted=True), torch.float32)
    torch.set_num_threads(1)
    once = loss_and_gradients(inputs)
    for threads in (1, 2, 3, 8) * 3:
        torch.set_num_threads(threads)
        for a, b in zip(loss_and_gradients(inputs), once, strict=True):
            assert torch.equal(a, b)


def test_one_pool_of_threads():
    """The kernels run on torch's OpenMP threads: a process counts no more of them after a call than before."""
    program = """
import os, torch
torch.set_num_threads(2)
a = torch.randn(600, 600)
a @ a; torch.relu(torch.randn(2_000_000))
before = len(os.listdir("/proc/self/task"))
from fastslots import ops
q, k = torch.randn(2, 2, 500, 8), torch.randn(2, 2, 3, 8)
for _ in range(3):
    ops.cross_attention(q, k, k, backend="cpu")
with open("/proc/self/maps") as maps:
    pools = {line.split()[-1] for line in maps if "gomp" in line or "libomp" in line}
print(before, len(os.listdir("/proc/self/task")), len(pools))
"""
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    before, after, pools = map(int, done.stdout.split())
    assert before == after and pools == 1


def peaks(program: str, *arguments: int) -> list[int]:
    """What a call adds to the peak of a process, KiB, for each argument; the program prints it."""
    found = []
    for argument in arguments:
        command = [sys.executable, "-c", program, os.path.dirname(__file__), str(argument)]
        found.append(int(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    return found


def test_memory_of_given_queries_grows_by_their_gradients():
    program = """
import resource, sys, torch
from fastslots import ops
from fastslots.kernels import cpu_backend
sys.path.insert(0, sys.argv[1])
from test_cpu_kernels import SHAPES, in_dtype, loss_inputs
inputs = in_dtype(loss_inputs(SHAPES["clevr6"]._replace(L=int(sys.argv[2]))), torch.float32)
torch.set_num_threads(1)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
cpu_backend.decoder_loss(inputs, list(inputs.tensors()))
print(peak() - before)
"""
    few, many = peaks(program, 1024, 8192)
    per_head = 2 * 12 * 7 * (8192 - 1024) * 4 // 1024  # KiB of one layer's weights over all pixels: 4.7 MiB
    queries = 180 * (8192 - 1024) * 4 // 1024
    assert many - few < queries + per_head // 2


def test_memory_of_the_decoders_step_is_flat_in_the_number_of_pixels():
    """Not even the queries exist for all pixels: nothing 180 wide, though their inputs and targets do."""
    program = """
import resource, sys, torch
from fastslots.models import SlotVAEConfig
from fastslots.models.decoder import Decoder
torch.set_num_threads(1)
decoder = lambda side: Decoder(SlotVAEConfig.preset("clevr6", resolution=side))
def step(decoder):
    images = torch.zeros(1, 3, decoder.resolution, decoder.resolution)
    decoder.loss(torch.randn(1, 7, 64), images, 1.0, 0.1).total.backward()
step(decoder(16))
ours = decoder(int(sys.argv[2]))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
step(ours)
print(peak() - before)
"""
    few, many = peaks(program, 32, 112)
    print(few, many)
    assert many - few < 180 * (112**2 - 32**2) * 4 // 1024 // 2  # half of the queries alone


# ---- the contract ----------------------------------------------------------------------------------------------------


def test_arrays_are_never_converted():
    x, folded, _ = random_layer(SHAPES["one-slot"], torch.float32)
    B, L, D = x.shape
    named = folded._asdict()
    good = [torch.empty(B, L, D), torch.empty(B, L, 1)]

    def call(x=x, weights=named, outputs=good, isa="portable"):
        y, slot_map = outputs
        rest = dict(slot_mask=None, eps=0.0, isa=isa, threads=1)
        _cpu.layer_fwd_float32(x=x, weights=weights, y=y, slot_map=slot_map, **rest)

    call()
    with pytest.raises(TypeError, match="y must be a C-contiguous float32 array"):
        call(outputs=[good[0].double(), good[1]])
    with pytest.raises(TypeError, match="y must be a C-contiguous float32 array"):
        call(outputs=[torch.empty(B, D, L).mT, good[1]])
    with pytest.raises(TypeError, match="x must be a C-contiguous float32 array"):
        call(x=x.double())
    with pytest.raises(ValueError, match=r"slot_map has shape \[2, 9, 2\], expected \[2, 9, 1\]"):
        call(outputs=[good[0], torch.empty(B, L, 2)])
    with pytest.raises(ValueError, match="no array is named b"):
        call(weights={name: getattr(folded, name) for name in "GgU"})
    with pytest.raises(ValueError, match="unknown instruction set"):
        call(isa="sse9")
    with pytest.raises(TypeError, match="incompatible function arguments"):
        _cpu.layer_fwd_float32(x, folded._asdict(), None, 0.0, *good, cpu_backend.isa(), 1)


def test_what_the_kernels_refuse_is_said():
    q, k, v = random_qkv(SHAPES["one-slot"], torch.float32)
    assert ops.explain(q, k, v).backend == "cpu"
    assert "float32, float64" in ops.explain(q, k.double(), v).reasons["cpu"]
    many = torch.randn(1, 2, 129, 4)
    assert "129 slots" in ops.explain(q, many, many).reasons["cpu"]
    with pytest.raises(ValueError, match="on meta, not on the CPU"):
        ops.explain(q.to("meta"), k, v, backend="cpu")
    with pytest.raises(ValueError, match="'neon9' is not one that this processor serves"):
        cpu_backend.set_isa("neon9")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "autocast" in ops.explain(q, k, v).reasons["cpu"]


def test_opcheck_and_transforms():
    shape = SHAPES["one-slot"]._replace(K=3)
    q, k, v = cast(random_qkv(shape), torch.float32)
    torch.library.opcheck(torch.ops.fastslots.cross_attention.default, (q, k, v, 0.5, None, "cpu"))
    x, folded, ff = random_layer(shape, torch.float32)
    weights = [t.requires_grad_() for t in (x, *folded)]
    torch.library.opcheck(torch.ops.fastslots.folded_cross_attention.default, (weights[0], weights[1:], None, "cpu"))
    arguments = (x, list(folded), list(ff), None, 1e-5, "cpu")
    torch.library.opcheck(torch.ops.fastslots.decoder_layer.default, arguments)
    # Forward mode goes to the reference, which has a rule; naming the kernels outright is refused, not silently zero.
    _, tangent = torch.func.jvp(lambda q: ops.cross_attention(q, k, v)[0], (q,), (torch.ones_like(q),))
    assert tangent.abs().max() > 0
    with pytest.raises(ValueError, match="no rule for forward-mode"):
        torch.func.jvp(lambda q: ops.cross_attention(q, k, v, backend="cpu")[0], (q,), (torch.ones_like(q),))


def test_the_reference_agrees_through_the_whole_public_loss():
    inputs = in_dtype(loss_inputs(SHAPES["sprites"]), torch.float32)
    tensors = {name: t.detach().requires_grad_() for name, t in inputs.tensors().items()}
    flat = list(tensors.values())
    auto = ops.decoder_loss(inputs.with_tensors(tensors))
    plain = ops.decoder_loss(inputs.with_tensors(tensors), backend="reference")
    torch.testing.assert_close(auto.total, plain.total, rtol=1e-5, atol=1e-5)
    for a, b in zip(torch.autograd.grad(auto.total, flat), torch.autograd.grad(plain.total, flat), strict=True):
        assert_close(a, b, 1e-4)
    slot_map = reference.decode(inputs.decoder)[1]
    torch.testing.assert_close(auto.interaction, reference.interaction_penalty(slot_map), rtol=1e-5, atol=1e-6)
