"""The launches that ship: every op, forward and backward, at the shapes of the presets, recorded without a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastslots.records import FeedForward, FoldedProjections, OutputHead, Statistics, StatisticsInputs

from ..gpu._pack import LayerPacks
from ..gpu.cross_attention import (
    attention_statistics_bwd,
    attention_statistics_fwd,
    cross_attention_bwd,
    cross_attention_fwd,
)
from ..gpu.decoder_layer import decoder_layer_bwd, decoder_layer_fwd, layer_backward, layer_forward
from ..gpu.folded_cross_attention import folded_cross_attention_bwd, folded_cross_attention_fwd
from ..gpu.launch import Launch, allows_tf32, has_entries, record
from ..gpu.loss.head import HeadPacks, head_loss
from ..gpu.loss.slot_map import slot_map_loss
from ..gpu.passes.token_mlp import token_mlp_bwd, token_mlp_fwd
from ..gpu.slot_attention import slot_attention_bwd, slot_attention_fwd
from ..gpu.token_attention import table_width, token_attention_bwd, token_attention_fwd
from ..gpu_backend import KERNELS


@dataclass(frozen=True)
class Shape:
    """One decoder layer: B images of L pixels, K slots, H heads of d, query width D, feed-forward width F; and one
    encoder layer: M rows (heads x queries) against T tokens of width S, or K slots that compete for these."""

    name: str
    B: int
    L: int
    K: int
    H: int
    d: int
    D: int
    F: int
    M: int
    T: int
    S: int
    ops: tuple[str, ...] = ()  # of others' models: those that are called at this shape alone; () is all of them

    def row_width(self, kernel: str) -> int:
        """Width of the rows that a kernel takes: what its block sizes are chosen by."""
        if kernel.startswith("token_mlp_"):
            return self.S
        if kernel.startswith("token_"):
            return table_width(self.M, self.S)
        if kernel.startswith("slot_"):
            return self.S
        return self.d if kernel.startswith("cross_") else self.D

    def slots_of_table(self, kernel: str) -> int:
        """Slots of a head, where block sizes are chosen by them too."""
        return self.K if kernel.startswith("cross_") else 1


TEXT = ((40, 64 * 64), (64, 96 * 96), (80, 32 * 32), (160, 16 * 16))
"""Width of a head, and pixels."""
# As fastslots.config.presets has them: kernels import no models, a test compares.
PRESETS = {
    shape.name: shape
    for shape in (
        Shape("sprites", 64, 64 * 64, 5, 12, 43, 180, 360, 20, 64 * 64, 64),
        Shape("clevr6", 32, 128 * 128, 7, 12, 43, 180, 360, 28, 128 * 128, 128),
        Shape("clevrtex", 32, 16 * 16, 11, 12, 43, 360, 720, 44, 16 * 16, 128),
        Shape("sprites-mini", 32, 32 * 32, 4, 4, 16, 64, 128, 16, 16 * 16, 64),
        Shape("clevr6-mini", 32, 64 * 64, 7, 4, 24, 96, 192, 28, 16 * 16, 64),
    )
}
_MAP = ("cross_attention", "attention_statistics")
OTHERS = {
    shape.name: shape
    for shape in (
        *(Shape(f"text-{d}", 2, L, 77, 8, d, 8 * d, 8, 16, 16, 16, _MAP) for d, L in TEXT),
        *(Shape(f"slots-{K}", 32, 16, K, 1, 16, 16, 8, K, 128 * 128, 64, ("slot_attention",)) for K in (7, 11)),
    )
}
"""Attention to the 77 tokens of a text in diffusion models, and slot attention over the pixels of an image."""
SHAPES = PRESETS | OTHERS
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}
"""Name in tables -> element type; fp32 products are TF32 or IEEE (``launch.precision``)."""


@contextlib.contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """torch's own switch between TF32 and IEEE products, which the kernels follow."""
    before = "high" if allows_tf32() else "highest"
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def inputs(shape: Shape, dtype: torch.dtype, device: str = "meta", shared: bool = False) -> dict[str, Tensor]:
    """Random inputs (uninitialised on ``meta``) of every op at this shape, by the names of the launchers."""
    B, L, K, H, d, D, F = shape.B, shape.L, shape.K, shape.H, shape.d, shape.D, shape.F

    def make(*size: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, device=device) * scale).to(dtype)

    return {
        "q": make(B, H, L, d, dtype=dtype), "k": make(B, H, K, d, dtype=dtype), "v": make(B, H, K, d, dtype=dtype),
        "dout": make(B, H, L, d, dtype=dtype), "dmap": make(B, L, K), "head_weights": make(H),
        "x": make(1 if shared else B, L, D, dtype=dtype), "dy": make(B, L, D, dtype=dtype),
        "G": make(B, D, H, K, scale=2 * D**-0.5), "g": make(B, H, K), "U": make(B, H, K, D), "b": make(D),
        "norm_weight": make(D), "norm_bias": make(D), "w1": make(F, D, scale=D**-0.5), "b1": make(F),
        "w2": make(D, F, scale=F**-0.5), "b2": make(D),
        "rows": make(B, shape.M, shape.S, scale=2 * shape.S**-0.5), "tokens": make(B, shape.T, shape.S, dtype=dtype),
        "dgathered": make(B, shape.M, shape.S),
        "slots": make(B, 1, K, shape.S, dtype=dtype), "values": make(B, shape.T, shape.S, dtype=dtype),
        "dupdates": make(B, 1, K, shape.S), "dtoken_map": make(B, shape.T, K),
        "head1": make(D, D, scale=D**-0.5), "head2": make(D, D, scale=D**-0.5),
        "mlp1": make(shape.S, shape.S), "mlp2": make(shape.S, shape.S), "mlp_bias": make(shape.S),
        "head3": make(3, D, scale=D**-0.5), "b3": make(3), "target": make(B, 3, L).transpose(1, 2),
    }  # fmt: skip


def run_op(op: str, t: dict[str, Tensor]) -> None:
    """Forward and backward of one of ``OPS``."""
    if op == "token_attention":
        gathered, lse = token_attention_fwd(t["rows"], t["tokens"])
        token_attention_bwd(t["dgathered"], t["rows"], t["tokens"], gathered, lse)
        return
    if op == "slot_attention":
        of_tokens, values = t["tokens"][:, None], t["values"][:, None]
        _iteration(t, of_tokens, values, t["dtoken_map"])
        _iteration(t, of_tokens, of_tokens, None)  # folded
        return
    if op == "attention_statistics":
        inputs = StatisticsInputs(t["q"], t["k"], t["v"], None, t["head_weights"], 1.0, rows=True)
        rows = attention_statistics_fwd(inputs)
        attention_statistics_bwd(Statistics(t["dout"], t["dmap"], rows.entropy, rows.lse), inputs, True)
        return
    if op == "token_mlp":
        weights = t["mlp1"], t["mlp_bias"], t["mlp2"]
        y, *saved = token_mlp_fwd(t["tokens"], *weights, t["mlp_bias"].clone(), 1e-5, True)
        token_mlp_bwd(t["tokens"].clone(), t["tokens"], *weights, y, *saved)
        return
    if op == "cross_attention":
        scale = t["x"].shape[2] ** -0.5
        cross_attention_fwd(t["q"], t["k"], t["v"], scale)
        cross_attention_bwd(t["dout"], t["dmap"], t["q"], t["k"], t["v"], scale)
        return
    folded = FoldedProjections(*(t[name] for name in FoldedProjections._fields))
    if op == "folded_cross_attention":
        folded_cross_attention_fwd(t["x"], folded)
        folded_cross_attention_bwd(t["dy"], t["dmap"], t["x"], folded)
        return
    ff = FeedForward(*(t[name] for name in FeedForward._fields))
    if op == "decoder_loss":
        packs, x = LayerPacks(folded, ff, None, t["x"].dtype), t["x"]
        _, kept = layer_forward(x, packs, 1e-5, t["dmap"].clone(), keep=True, keep_h=True)
        layer_backward(t["dy"], t["dmap"], x, kept, packs, 1e-5)
        head = OutputHead(
            t["norm_weight"], t["norm_bias"], [t["head1"], t["head2"], t["head3"]], [t["b"], t["b"], t["b3"]]
        )
        scale = x.new_ones((), dtype=torch.float32)
        head_loss(t["dy"].flatten(0, 1), HeadPacks(head, x.dtype), t["target"], None, scale, True, 1e-5)
        slot_map_loss(t["dmap"][None], None, scale)
        return
    decoder_layer_fwd(t["x"], folded, ff)
    decoder_layer_bwd(t["dy"], t["dmap"], t["x"], folded, ff)


def _iteration(t: dict[str, Tensor], k: Tensor, v: Tensor, dmap: Tensor | None) -> None:
    """Of slot attention, both ways, with the map where it has a gradient."""
    inputs, eps = (t["slots"], k, v), 1e-8
    *saved, _ = slot_attention_fwd(*inputs, 1.0, eps, None, dmap is not None)
    slot_attention_bwd(t["dupdates"], dmap, inputs, (saved[0], saved[1]), 1.0, eps, None)


OPS = (
    "cross_attention", "attention_statistics", "folded_cross_attention", "decoder_layer", "decoder_loss",
    "token_attention", "token_mlp", "slot_attention",
)  # fmt: skip
"""Of the decoder's loss one layer, the output head and the penalty of one tile."""


def serves(op: str, shape: Shape, t: dict[str, Tensor]) -> bool:
    """Whether the launch table has block sizes for all kernels of ``op`` (on the architecture of ``record``)."""
    kernels = KERNELS[op]
    if op == "token_mlp" and t["q"].dtype == torch.float32:  # whose products are a library's
        return False
    return has_entries(t["q"], shape.row_width(kernels[0]), kernels, shape.slots_of_table(kernels[0]))


def record_shipped(arch: str, shape: Shape, precision: str) -> list[tuple[str, Launch]]:
    """Every distinct launch of every op that ``arch`` serves at this shape, each under a name that says its variant.

    The first layer of a decoder has the same queries for every image: ``shared`` launches.
    """
    distinct: dict[Hashable, tuple[str, Launch]] = {}
    for op in shape.ops or OPS:
        for shared in (False, True) if op.startswith("decoder_") else (False,):
            tensors = inputs(shape, PRECISIONS[precision], shared=shared)
            with matmul_precision(precision), record(arch) as launches:
                if serves(op, shape, tensors):
                    run_op(op, tensors)
            for launch in launches:
                norm = launch.constexprs.get("NORM", True)
                kept = op == "decoder_loss" and launch.constexprs.get("KEEP", False)
                variant = ("" if norm else "_plain") + ("_kept" if kept else "") + ("_shared" if shared else "")
                variant += "_folded" if launch.constexprs.get("SAME") else ""
                variant += "_statistics" if launch.constexprs.get("ROWS") else ""
                variant += {(True, False): "_keys", (False, True): "_values"}.get(
                    (launch.constexprs.get("KEYS", True), launch.constexprs.get("VALUES", True)), ""
                )
                scalars = tuple(v == 1 for v in launch.args.values() if not isinstance(v, Tensor))
                types = tuple(v.dtype for v in launch.args.values() if isinstance(v, Tensor))
                key = (launch.name, tuple(launch.constexprs.items()), launch.config, scalars, types)
                distinct.setdefault(key, (launch.name + variant, launch))
    return list(distinct.values())
