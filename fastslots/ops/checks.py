"""Argument checks of the public ops: each message names the argument, its shape or dtype, and what was expected."""

from __future__ import annotations

import torch
from torch import Tensor

from fastslots.records import FeedForward, FoldedProjections, LossInputs, QueryMlp

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def tensor(name: str, value: object, ndim: int, layout: str) -> Tensor:
    """A float tensor with ``ndim`` axes, or TypeError/ValueError."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor {layout}, got {type(value).__name__}")
    if value.dtype not in FLOATS:
        raise TypeError(f"{name} must be fp16, bf16, fp32 or fp64, got {value.dtype} (shape {list(value.shape)})")
    if value.ndim != ndim:
        raise ValueError(f"{name} must be {layout}, got shape {list(value.shape)}")
    return value


def rows(width: int, **values: object) -> None:
    """Float tensors [B, n, width], by name."""
    for name, value in values.items():
        layout = f"[B, n, {width}]"
        got = list(tensor(name, value, 3, layout).shape)
        if got[-1] != width:
            raise ValueError(f"{name} must be {layout}, got shape {got}")


def shape(name: str, value: Tensor, expected: tuple[int, ...], why: str) -> None:
    if tuple(value.shape) != expected:
        raise ValueError(f"{name} has shape {list(value.shape)}, expected {list(expected)} {why}")


def same_place(**tensors: Tensor | None) -> None:
    """All on one device."""
    present = {name: t for name, t in tensors.items() if t is not None}
    first, reference = next(iter(present.items()))
    for name, t in present.items():
        if t.device != reference.device:
            raise ValueError(f"{name} is on {t.device}, but {first} is on {reference.device}: move one of them")


def same_dtype(**tensors: Tensor) -> None:
    first, reference = next(iter(tensors.items()))
    for name, t in tensors.items():
        if t.dtype != reference.dtype:
            raise TypeError(f"{name} is {t.dtype}, but {first} is {reference.dtype}: cast one of them")


def slot_mask(mask: Tensor | None, like: Tensor, batch: int, slots: int) -> None:
    """``like``: a tensor of the call, whose device the mask shares."""
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"slot_mask must be a bool tensor [B, K] (True = a real slot), got {got}")
    shape("slot_mask", mask, (batch, slots), "(B, K: True = a real slot)")
    if mask.device != like.device:
        raise ValueError(f"slot_mask is on {mask.device}, but the others are on {like.device}: move one of them")


def head_weights(weights: Tensor | None, q: Tensor) -> None:
    """``q`` [B, H, L, d] of the call."""
    if weights is None:
        return
    tensor("head_weights", weights, 1, "[H]")
    shape("head_weights", weights, (q.shape[1],), f"(H, of q {list(q.shape)})")
    same_place(q=q, head_weights=weights)


def qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    tensor("q", q, 4, "[B, H, L, d]")
    tensor("k", k, 4, "[B, H, K, d]")
    tensor("v", v, 4, "[B, H, K, d]")
    B, H, _, d = q.shape
    K = k.shape[2]
    shape("k", k, (B, H, K, d), f"(B, H, K, d: B, H and d as in q {list(q.shape)})")
    shape("v", v, (B, H, K, d), f"(the shape of k; q is {list(q.shape)})")
    if K == 0 or H == 0 or d == 0:
        raise ValueError(f"k has shape {list(k.shape)}: there must be at least one head, slot and channel")
    same_dtype(q=q, k=k, v=v)
    same_place(q=q, k=k, v=v)


def folded(x: Tensor, f: FoldedProjections) -> None:
    tensor("x", x, 3, "[B or 1, L, D]")
    if not isinstance(f, FoldedProjections):
        raise TypeError(f"folded must be what fold_projections returns, got {type(f).__name__}")
    G = tensor("folded.G", f.G, 4, "[B, D, H, K]")
    B, D, H, K = G.shape
    shape("folded.g", f.g, (B, H, K), f"(B, H, K of folded.G {list(G.shape)})")
    shape("folded.U", f.U, (B, H, K, D), f"(B, H, K, D of folded.G {list(G.shape)})")
    shape("folded.b", f.b, (D,), f"(D of folded.G {list(G.shape)})")
    if x.shape[2] != D or x.shape[0] not in (1, B):
        raise ValueError(f"x has shape {list(x.shape)}, expected [{B} or 1, L, {D}] for folded.G {list(G.shape)}")
    same_place(x=x, G=G, g=f.g, U=f.U, b=f.b)


def feed_forward(ff: FeedForward, width: int, device: torch.device) -> None:
    """Of rows of ``width`` elements."""
    if not isinstance(ff, FeedForward):
        raise TypeError(f"ff must be a FeedForward, got {type(ff).__name__}")
    units = tensor("ff.w1", ff.w1, 2, "[F, D]").shape[0]
    if units == 0:
        raise ValueError(f"ff.w1 has shape {list(ff.w1.shape)}: there must be at least one unit")
    shapes = {"w1": (units, width), "w2": (width, units), "norm_weight": (width,), "norm_bias": (width,),
              "b1": (units,), "b2": (width,)}  # fmt: skip
    for name, expected in shapes.items():
        value = tensor(f"ff.{name}", getattr(ff, name), len(expected), "[F, D]" if len(expected) == 2 else "[D] or [F]")
        shape(f"ff.{name}", value, expected, f"for rows of {width} and {units} units")
        if value.device != device:
            raise ValueError(f"ff.{name} is on {value.device}, but x is on {device}: move one of them")


def linear_maps(name: str, weights: list[Tensor], biases: list[Tensor], columns: int) -> int:
    """Linear layers one after the other, of rows of ``columns`` numbers -> the width of what comes out."""
    if len(weights) != len(biases) or not weights:
        raise ValueError(f"{name} has {len(weights)} weights and {len(biases)} biases: give one of each a layer")
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        rows = tensor(f"{name}.weights[{i}]", weight, 2, "[out, in]").shape[0]
        shape(f"{name}.weights[{i}]", weight, (rows, columns), f"(out, in: rows of {columns} numbers come in)")
        shape(f"{name}.biases[{i}]", tensor(f"{name}.biases[{i}]", bias, 1, "[out]"), (rows,), "(out)")
        columns = rows
    return columns


def loss_inputs(inputs: LossInputs) -> None:
    if not isinstance(inputs, LossInputs):
        raise TypeError(f"inputs must be a fastslots.ops.LossInputs, got {type(inputs).__name__}")
    queries, layers, head = inputs.decoder
    if not layers:
        raise ValueError("decoder.layers is empty: there must be at least one layer")
    target = tensor("target", inputs.target, 3, "[B, L, C]")
    if isinstance(queries, QueryMlp):
        L, width = tensor("queries.code", queries.code, 2, "[L, E]").shape
        row = queries.weights[-1].new_empty(1, 0, linear_maps("queries", queries.weights, queries.biases, width))
    else:
        row = tensor("queries", queries, 3, "[B or 1, L, D]")
        L = row.shape[1]
    B, D, _, K = layers[0].folded.G.shape
    for layer_folded, ff in layers:
        folded(row, layer_folded)
        shape("folded.G", layer_folded.G, tuple(layers[0].folded.G.shape), "(that of the first layer)")
        feed_forward(ff, D, row.device)
    shape("head.norm_weight", tensor("head.norm_weight", head.norm_weight, 1, "[D]"), (D,), "(D of folded.G)")
    shape("head.norm_bias", tensor("head.norm_bias", head.norm_bias, 1, "[D]"), (D,), "(D of folded.G)")
    channels = linear_maps("head", head.weights, head.biases, D)
    shape("target", target, (B, L, channels), "(B, L of the queries, C of the head)")
    slot_mask(inputs.slot_mask, row, B, K)
    if inputs.pixel_weight is not None:
        shape("pixel_weight", tensor("pixel_weight", inputs.pixel_weight, 2, "[B, L]"), (B, L), "(B, L of target)")


def rows_and_tokens(rows: Tensor, tokens: Tensor) -> None:
    tensor("rows", rows, 3, "[B, M, S]")
    tensor("tokens", tokens, 3, "[B, T, S]")
    B, M, S = rows.shape
    T = tokens.shape[1]
    shape("tokens", tokens, (B, T, S), f"(B and S as in rows {list(rows.shape)})")
    if T == 0 or M == 0 or S == 0:
        got = f"rows {list(rows.shape)} and tokens {list(tokens.shape)}"
        raise ValueError(f"there must be at least one row, token and channel, got {got}")
    same_dtype(rows=rows, tokens=tokens)
    same_place(rows=rows, tokens=tokens)


def slots_and_tokens(q: Tensor, k: Tensor, v: Tensor) -> None:
    tensor("q", q, 4, "[B, H, K, d]")
    tensor("k", k, 4, "[B, H, L, d]")
    tensor("v", v, 4, "[B, H, L, d]")
    B, H, K, d = q.shape
    shape("k", k, (B, H, k.shape[2], d), f"(B, H, L, d: B, H and d as in q {list(q.shape)})")
    shape("v", v, tuple(k.shape), "(the shape of k)")
    if K == 0 or H == 0 or d == 0:
        raise ValueError(f"q has shape {list(q.shape)}: there must be at least one head, slot and channel")
    same_dtype(q=q, k=k, v=v)
    same_place(q=q, k=k, v=v)


def projections(wq: Tensor, bq: Tensor | None, k: Tensor, v: Tensor, wo: Tensor, bo: Tensor | None) -> None:
    tensor("k", k, 4, "[B, H, K, d]")
    tensor("v", v, 4, "[B, H, K, d]")
    shape("v", v, tuple(k.shape), "(the shape of k)")
    _, H, K, d = k.shape
    if H == 0 or K == 0 or d == 0:
        raise ValueError(f"k has shape {list(k.shape)}: there must be at least one head, slot and channel")
    tensor("wq", wq, 2, "[H·d, D]")
    D = wq.shape[1]
    shape("wq", wq, (H * d, D), f"(H·d, D for k {list(k.shape)})")
    tensor("wo", wo, 2, "[D, H·d]")
    shape("wo", wo, (D, H * d), f"(D, H·d for wq {list(wq.shape)} and k {list(k.shape)})")
    if bq is not None:
        shape("bq", tensor("bq", bq, 1, "[H·d]"), (H * d,), f"(H·d for k {list(k.shape)})")
    if bo is not None:
        shape("bo", tensor("bo", bo, 1, "[D]"), (D,), f"(D for wo {list(wo.shape)})")
    same_place(k=k, v=v, wq=wq, bq=bq, wo=wo, bo=bo)
