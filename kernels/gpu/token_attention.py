# ruff: noqa: RUF005  (the Triton front end has no starred tuples)
"""Attention of few rows to many tokens: the encoder's cross-attention, folded from the tokens' side.

    S = rows · tokensᵀ      A = softmax over tokens      gathered = A · tokens      lse = log Σ_t exp S

Rows are heads x queries with scale, key projection and norm folded in (28 at the clevr6 preset), tokens are normed once
for all layers, so no projection touches a token. Backward, from dgathered, A recomputed from lse::

    dA = dgathered · tokensᵀ      dS = A ∘ (dA − δ),  δ = dgathered · gathered
    drows = dS · tokens           dtokens = Aᵀ · dgathered + dSᵀ · rows

Saved: the inputs, gathered and lse. Tokens are read once each way and dtokens written once: tokens are cut into fixed
parts, a program takes one part of one image with an online softmax, and a second kernel combines the parts in order, so
the same call gives the same bits. Scores are laid out [tokens, rows]: tokens take the long side of a tensor-core
product (64 or 128), the few rows the narrow one. All rows of an image are in one tile; products accumulate in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from ._pack import next_power
from ._tiles import add_rows, dot, load_rows, store_rows, zero_rows

MAX_ROWS, MAX_CELLS = 128, 128 * 128
"""Rows, and rows x width, padded: of the latter the backward holds an fp32 accumulator and two operands."""
COMBINE_D = 16
COMBINE = launch.LaunchConfig(block_l=COMBINE_D, block_c=16, num_warps=4, num_stages=1)
"""Narrow chunks of columns: a program's loop over the parts is a chain of small loads, so many run side by side."""


@triton.jit
def _scores(tokens, rows, PRECISION: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_M: tl.constexpr):
    """tokens · rowsᵀ: [BLOCK_L, BLOCK_M]."""
    scores = tl.zeros([BLOCK_L, BLOCK_M], tl.float32)
    for c in tl.static_range(len(tokens)):
        scores = dot(tokens[c], tl.trans(rows[c]), scores, PRECISION)
    return scores


@triton.jit
def _store_transposed(ptr, chunks, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """Chunks [BLOCK_D, BLOCK_M] into a dense [D, BLOCK_M]."""
    for c in tl.static_range(len(chunks)):
        offs_d = c * BLOCK_D + tl.arange(0, BLOCK_D)
        offs = offs_d[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        if (c + 1) * BLOCK_D <= D:
            tl.store(ptr + offs, chunks[c])
        else:
            tl.store(ptr + offs, chunks[c], mask=(offs_d < D)[:, None])


@triton.jit
def _token_attention_fwd_kernel(
    rows_ptr, tokens_ptr, part_sum_ptr, part_top_ptr, part_total_ptr, M, T, blocks,
    D: tl.constexpr, PRECISION: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # Program (part, image): ``blocks`` tiles of tokens -> Σ exp(S − top) · token, transposed [D, rows], top and Σ exp.
    CHUNKS: tl.constexpr = triton.cdiv(D, BLOCK_D)
    part = tl.program_id(0).to(tl.int64)
    image = tl.program_id(1).to(tl.int64)
    rows_ptr += image * M * D
    offs_m = tl.arange(0, BLOCK_M)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sums = zero_rows(BLOCK_D, BLOCK_M, CHUNKS)
    for block in range(blocks):
        start = (part * blocks + block) * BLOCK_L
        mask_l = start + tl.arange(0, BLOCK_L) < T
        tokens = load_rows(tokens_ptr + (image * T + start) * D, D, mask_l, D, BLOCK_L, BLOCK_D)
        # Read again for every tile, from L2: kept across the loop, operands of sm_80 would fill the registers.
        rows = load_rows(rows_ptr, D, offs_m < M, D, BLOCK_M, BLOCK_D)
        scores = _scores(tokens, rows, PRECISION, BLOCK_L, BLOCK_M)
        scores = tl.where(mask_l[:, None], scores, float("-inf"))
        # The first tile of a part holds a token (the launcher sees to it), so new_top is finite.
        new_top = tl.maximum(top, tl.max(scores, 0))
        shrink = tl.exp(top - new_top)
        # The sum is of what is multiplied. Over the sum of unrounded weights gathered would be off by their roundings'
        # sum times the tokens' mean, and dgathered · gathered with it, which the backward takes from dA.
        weights = tl.exp(scores - new_top[None, :]).to(tokens_ptr.dtype.element_ty)
        total = total * shrink + tl.sum(weights.to(tl.float32), 0)
        out = ()
        for c in tl.static_range(CHUNKS):
            out = out + (dot(tl.trans(tokens[c]), weights, sums[c] * shrink[None, :], PRECISION),)
        sums = out
        top = new_top
    partial = image * tl.num_programs(0) + part
    tl.store(part_top_ptr + partial * BLOCK_M + offs_m, top)
    tl.store(part_total_ptr + partial * BLOCK_M + offs_m, total)
    _store_transposed(part_sum_ptr + partial * D * BLOCK_M, sums, D, BLOCK_M, BLOCK_D)


@triton.jit
def _token_attention_combine_kernel(
    part_sum_ptr, part_top_ptr, part_total_ptr, gathered_ptr, lse_ptr, M, parts,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # Program (chunk of columns, image): all parts, in order; their loads run ahead of the chain of sums.
    column = tl.program_id(0) * BLOCK_D
    image = tl.program_id(1).to(tl.int64)
    offs_m = tl.arange(0, BLOCK_M)
    offs_d = column + tl.arange(0, BLOCK_D)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    gathered = tl.zeros([BLOCK_D, BLOCK_M], tl.float32)
    for part in tl.range(0, parts, num_stages=4):
        partial = image * parts + part
        part_top = tl.load(part_top_ptr + partial * BLOCK_M + offs_m)
        new_top = tl.maximum(top, part_top)
        shrink = tl.exp(top - new_top)
        grow = tl.exp(part_top - new_top)
        total = total * shrink + tl.load(part_total_ptr + partial * BLOCK_M + offs_m) * grow
        offs = offs_d[:, None] * BLOCK_M + offs_m[None, :]
        part_sum = tl.load(part_sum_ptr + partial * D * BLOCK_M + offs, mask=(offs_d < D)[:, None], other=0.0)
        gathered = gathered * shrink[None, :] + part_sum * grow[None, :]
        top = new_top
    mask_m = offs_m < M
    offs = offs_d[:, None] + offs_m[None, :] * D
    value = (gathered / total[None, :]).to(gathered_ptr.dtype.element_ty)
    tl.store(gathered_ptr + image * M * D + offs, value, mask=mask_m[None, :] & (offs_d < D)[:, None])
    if column == 0:
        tl.store(lse_ptr + image * M + offs_m, top + tl.log(total), mask=mask_m)


@triton.jit
def _token_attention_bwd_kernel(
    dgathered_ptr, rows_ptr, tokens_ptr, gathered_ptr, lse_ptr, before_ptr, dtokens_ptr, drows_ptr, M, T, blocks,
    D: tl.constexpr, PRECISION: tl.constexpr, ADD: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # Program (part, image): dtokens of its tokens, with those before them where it is to ADD, and its share of drows,
    # transposed [D, rows]. Padded rows carry rows = dgathered = lse = δ = 0: dS is 0, and A = 1 meets dgathered = 0.
    CHUNKS: tl.constexpr = triton.cdiv(D, BLOCK_D)
    part = tl.program_id(0).to(tl.int64)
    image = tl.program_id(1).to(tl.int64)
    rows_ptr += image * M * D
    dgathered_ptr += image * M * D
    offs_m = tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    lse = tl.load(lse_ptr + image * M + offs_m, mask=mask_m, other=0.0)
    dgathered = load_rows(dgathered_ptr, D, mask_m, D, BLOCK_M, BLOCK_D)
    gathered = load_rows(gathered_ptr + image * M * D, D, mask_m, D, BLOCK_M, BLOCK_D)
    delta = tl.zeros([BLOCK_M], tl.float32)
    for c in tl.static_range(CHUNKS):
        delta += tl.sum(dgathered[c].to(tl.float32) * gathered[c].to(tl.float32), 1)
    drows = zero_rows(BLOCK_D, BLOCK_M, CHUNKS)
    for block in range(blocks):
        start = (part * blocks + block) * BLOCK_L
        mask_l = start + tl.arange(0, BLOCK_L) < T
        row = image * T + start
        tokens = load_rows(tokens_ptr + row * D, D, mask_l, D, BLOCK_L, BLOCK_D)
        rows = load_rows(rows_ptr, D, mask_m, D, BLOCK_M, BLOCK_D)
        dgathered = load_rows(dgathered_ptr, D, mask_m, D, BLOCK_M, BLOCK_D)
        scores = _scores(tokens, rows, PRECISION, BLOCK_L, BLOCK_M)
        dattn = _scores(tokens, dgathered, PRECISION, BLOCK_L, BLOCK_M)
        # Past the end tokens are zeros, not -inf: without the mask exp(0 − lse) may be infinite, and 0 · inf is NaN.
        attn = tl.where(mask_l[:, None], tl.exp(scores - lse[None, :]), 0.0)
        dscores = (attn * (dattn - delta[None, :])).to(tokens_ptr.dtype.element_ty)
        weights = attn.to(tokens_ptr.dtype.element_ty)
        dtokens = ()
        new_drows = ()
        for c in tl.static_range(CHUNKS):
            acc = dot(weights, dgathered[c], tl.zeros([BLOCK_L, BLOCK_D], tl.float32), PRECISION)
            dtokens = dtokens + (dot(dscores, rows[c], acc, PRECISION),)
            new_drows = new_drows + (dot(tl.trans(tokens[c]), dscores, drows[c], PRECISION),)
        drows = new_drows
        if ADD:
            before = load_rows(before_ptr + row * D, D, mask_l, D, BLOCK_L, BLOCK_D)
            dtokens = add_rows(dtokens, before, D, BLOCK_D)
        store_rows(dtokens_ptr + row * D, D, dtokens, mask_l, D, BLOCK_L, BLOCK_D)
    partial = image * tl.num_programs(0) + part
    _store_transposed(drows_ptr + partial * D * BLOCK_M, drows, D, BLOCK_M, BLOCK_D)


def padded_rows(M: int) -> int:
    return max(16, next_power(M))


def table_width(M: int, D: int) -> int:
    """The width by which block sizes are looked up: more than 32 rows count as that much wider."""
    return max(D, min(D * padded_rows(M) // 32, launch.WIDTH_CLASSES[-1]))


def _values(tokens: Tensor, M: int, config: launch.LaunchConfig, tf32_rows: int = 16) -> dict[str, Any]:
    """More rows take shorter tiles of tokens, so that the table's entries hold their registers for any of them."""
    precision = launch.precision(tokens.dtype)
    block_m = max(padded_rows(M), tf32_rows if precision == "tf32" else 16)
    return {
        "D": tokens.shape[2], "PRECISION": precision,
        "BLOCK_L": max(16, min(config.block_l, config.block_l * config.block_c // block_m)), "BLOCK_M": block_m,
        "BLOCK_D": config.block_d,
    }  # fmt: skip


def token_attention_fwd(rows: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """rows [B,M,S], tokens [B,T,S] (their dtype is that of the products) -> gathered [B,M,S] and lse [B,M] in fp32.

    Without tokens gathered is 0 and lse -inf.
    """
    B, M, D = rows.shape
    T = tokens.shape[1]
    tokens = tokens.contiguous()
    gathered, lse = (rows.new_empty(*shape, dtype=torch.float32) for shape in ((B, M, D), (B, M)))
    if T == 0:
        return gathered.zero_(), lse.fill_(float("-inf"))
    config = launch.select(_token_attention_fwd_kernel, tokens, table_width(M, D))
    values = _values(tokens, M, config)
    block_m = values["BLOCK_M"]
    parts, blocks = launch.split(T, values["BLOCK_L"], B)
    part_sum = rows.new_empty(B, parts, D, block_m, dtype=torch.float32)
    part_top, part_total = (rows.new_empty(B, parts, block_m, dtype=torch.float32) for _ in range(2))
    partial = {"part_sum_ptr": part_sum, "part_top_ptr": part_top, "part_total_ptr": part_total}
    args = {"rows_ptr": rows.to(tokens.dtype).contiguous(), "tokens_ptr": tokens, "M": M, "T": T, "blocks": blocks}
    launch.run(_token_attention_fwd_kernel, (parts, B), args | partial, values, config)
    args = {"gathered_ptr": gathered, "lse_ptr": lse, "M": M, "parts": parts}
    values = {"D": D, "BLOCK_M": block_m, "BLOCK_D": COMBINE_D}
    launch.run(_token_attention_combine_kernel, (triton.cdiv(D, COMBINE_D), B), args | partial, values, COMBINE)
    return gathered, lse


def token_attention_bwd(
    dgathered: Tensor, rows: Tensor, tokens: Tensor, gathered: Tensor, lse: Tensor, before: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """-> drows like rows, dtokens like tokens (contiguous), with what their gradient was before added to it."""
    B, M, D = rows.shape
    T = tokens.shape[1]
    tokens = tokens.contiguous()
    config = launch.select(_token_attention_bwd_kernel, tokens, table_width(M, D))
    # 16 or 32 rows spill registers in TF32, 64 do not (Triton 3.9).
    values = {"ADD": before is not None} | _values(tokens, M, config, tf32_rows=64)
    block_m = values["BLOCK_M"]
    parts, blocks = launch.split(T, values["BLOCK_L"], B)
    dtokens = torch.empty_like(tokens)
    drows = rows.new_empty(B, parts, D, block_m, dtype=torch.float32)
    args = {
        "dgathered_ptr": dgathered.to(tokens.dtype).contiguous(), "rows_ptr": rows.to(tokens.dtype).contiguous(),
        "tokens_ptr": tokens, "gathered_ptr": gathered.contiguous(), "lse_ptr": lse.contiguous(),
        "before_ptr": dtokens if before is None else before.to(tokens.dtype).contiguous(),
        "dtokens_ptr": dtokens, "drows_ptr": drows, "M": M, "T": T, "blocks": blocks,
    }  # fmt: skip
    launch.run(_token_attention_bwd_kernel, (parts, B), args, values, config)
    return drows.sum(1)[:, :, :M].transpose(1, 2).to(rows.dtype).contiguous(), dtokens
