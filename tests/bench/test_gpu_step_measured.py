"""The model of a training step on a GPU against what an H100 took (docs/results/h100-step.json)."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fastslots.bench.gpu_step import report
from fastslots.bench.gpu_step.walk import walk_published, works
from fastslots.kernels.tools import executed
from fastslots.train import TrainConfig

MEASURED = json.loads((Path(__file__).parents[2] / "docs/results/h100-step.json").read_text())["profiles"]
PROFILED = {
    "fp32 product": r"f32f32_f32f32|sgemm_|gemv|splitKreduce_kernel<32, 16, int, float, float|scal_kernel|Lt::epilogue",
    "norm": "layer_norm|GammaBeta",
    "reduction": "reduce_kernel<",
    "softmax": "softmax|SoftMax",
    "turn": "nchwToNhwc|nhwcToNchw",
    "convolution": "5x_cudnn|AddPadding",
    "lists": "multi_tensor|lpnorm",
    "odd product": "align1>?|magma",
    "unaligned product": "align2",
    "product": "nvjet|splitKreduce",
    "widening": "unrolled_elementwise_kernel<at::native::direct_copy",
    "indexed": " at::native::elementwise_kernel<|CatArrayBatchedCopy<",
    "elementwise": "elementwise|CatArray|DtoD|_scatter|with_index",
}
"""What kernels of a profile are called, by kind; the first that fits."""
COARSER = {
    "broadcast": "indexed", "permuted": "indexed", "tail": "reduction", "norm backward": "norm",
    **{f"convolution, {of}": "convolution" for of in ("input", "weight", "few channels")},
}  # fmt: skip
"""Kinds that a profile's names do not tell apart."""


def measured_ms(step, pattern):
    return sum(us for name, _, us in MEASURED[step] if re.search(pattern, name)) / 1e3


def test_the_model_tells_the_published_step_as_it_was_measured():
    """What is compared is the part of each kind, and their sum; the published step is none that we change."""
    config = TrainConfig.preset("clevr6", batch_size=32, precision="bf16")
    on, measured, modelled = executed.machine("sm_90"), {}, {}
    for name, _, us in MEASURED["published, fused Adam, bf16"]:
        kind = next((kind for kind, pattern in PROFILED.items() if re.search(pattern, name)), "none")
        measured[kind] = measured.get(kind, 0) + us / 1e3
    for kind, (ms, _) in report.kinds_of(report.parts_of(walk_published(config, "sm_90"), on, "bf16", None)).items():
        modelled[COARSER.get(kind, kind)] = modelled.get(COARSER.get(kind, kind), 0) + ms
    assert measured.pop("none") < 0.2 and set(modelled) == set(measured)
    for kind, ms in measured.items():
        assert ms / 1.15 < modelled[kind] < ms * 1.15, (kind, ms, modelled[kind])
    assert sum(modelled.values()) == pytest.approx(sum(measured.values()), rel=0.03)


def of_pixels(*shape, dtype=torch.bfloat16):
    return torch.empty(32 * 128 * 128, *shape, device="meta", dtype=dtype)


def images(channels):
    x = torch.empty(32, channels, 128, 128, device="meta", dtype=torch.bfloat16)
    return x.to(memory_format=torch.channels_last)


def fp32_product(a, b):
    return torch.mm(a, b, out_dtype=torch.float32)


def layer_norm(x):
    return F.layer_norm(x, x.shape[1:])


def layer_norm_backward(x):
    moments = x.new_empty(len(x), 1, dtype=torch.float32)
    return torch.ops.aten.native_layer_norm_backward(
        x, x, x.shape[1:], moments, moments, None, None, [True, False, False]
    )


def conv(x, weight):
    return F.conv2d(x, weight, padding=2)


OURS = [
    # calls (function, tensors), names of the kernels that they are in the profile, factor
    ([(layer_norm, of_pixels(128)), (layer_norm, of_pixels(180))], r"vectorized_layer_norm_kernel<c10", 1.2),
    ([(layer_norm_backward, of_pixels(128)), (layer_norm_backward, of_pixels(180))], r"grad_input_kernel_\w+<c10", 1.2),
    ([(torch.add, of_pixels(128), of_pixels(128))] * 4, r"vectorized_\w+<8, at::native::CUDAFunctor_add", 1.1),
    (
        [(fp32_product, of_pixels(180).t(), of_pixels(384)), (fp32_product, of_pixels(180).t(), of_pixels(180))] * 2,
        r"_s16816gemm\w+_nt_align2", 1.35,
    ),
    ([(fp32_product, of_pixels(384).t(), of_pixels(192))] * 2, r"nvjet_sm90_tss_96x128", 1.1),
    (
        [(lambda x: x.sum(0, dtype=torch.float32), of_pixels(180))] * 2
        + [(lambda x: x.unflatten(0, (32, -1)).sum(0, dtype=torch.float32), of_pixels(180))],
        r"reduce_kernel<128, 4, at::native::ReduceOp<c10::BFloat16, at::native::func_wrapper_t<float", 1.2,
    ),
    (
        [(conv, images(64), images(64)[:, :, :5, :5][:1].expand(n, -1, -1, -1)) for n in (64, 64, 128)],
        r"sm90_xmma_fprop", 1.2,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("calls", "pattern", "factor"), OURS, ids=[pattern for _, pattern, _ in OURS])
def test_the_model_tells_operators_of_our_step_as_they_were_measured(calls, pattern, factor):
    """On tensors of 16 bits as large as theirs were; only the published step was used to find the rates."""
    on = executed.machine("sm_90")
    rate = on.products["bf16"]
    modelled = measured = 0.0
    for function, *tensors in calls:
        for kernel in [kernel for work in works(function, *tensors) for kernel in work.kernels]:
            modelled += 1e3 * max(kernel.seconds(on.bandwidth, rate, on.processors).values())
    measured = measured_ms("fastslots, one graph, bf16", pattern)
    assert measured / factor < modelled < measured * factor, (measured, modelled)


COUNTED = {  # of all launches of a step, at the commit that was measured: instructions, tensor FLOPs, bytes; factor
    "decoder_layer_fwd": (6.870e8, 3.986e11, 9.84e8, 1.1),
    "feed_forward_dx": (8.577e8, 4.784e11, 3.184e9, 1.6),
    "folded_attention_dx": (2.819e8, 1.178e11, 8.25e8, 1.4),
    "folded_attention_dw": (4.769e8, 2.126e11, 7.09e8, 1.7),
    "token_attention_fwd": (1.293e8, 6.644e10, 7.15e8, 1.1),
    "token_attention_bwd": (1.071e8, 1.107e11, 1.389e9, 1.2),
    "joint_norm_fwd": (3.028e7, 0.0, 2.686e8, 1.1),
    "joint_norm_bwd": (3.460e7, 0.0, 4.028e8, 1.1),
}


@pytest.mark.parametrize("name", COUNTED)
def test_the_time_of_a_triton_kernel_is_as_measured_within_what_the_docs_say(name):
    instructions, flops, moved, factor = COUNTED[name]
    counted = executed.Executed(instructions, flops, moved, 0, 0, 1)
    modelled = 1e3 * executed.total_seconds(counted.seconds(executed.machine("sm_90"), "bf16"))
    measured = measured_ms("fastslots, one graph, bf16", f"^_{name}_kernel$")
    assert measured / factor < modelled < measured * factor, (measured, modelled)
