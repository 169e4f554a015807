# ruff: noqa: RUF005  (the Triton front end has no starred tuples)
"""Triton helpers that more than one kernel uses.

A tile of rows [BLOCK_L, D] is a tuple of chunks [BLOCK_L, BLOCK_D], the last one padded with zeros: widths such as 180
or 43 are no powers of two, and one block of 256 would waste a third of every product. Widths are constexpr, so that the
compiler sees how far rows are aligned (180 bf16 = 360 bytes: loads of 8 bytes; fp32: 16) and vectorises.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The interpreter's `tl.dot` multiplies the bit patterns of bf16 as integers (Triton 3.9): there, products are taken in
# fp32, which holds every product of two 16-bit numbers exactly.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b, accumulated in fp32."""
    if INTERPRETED:
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def dot_rows(rows, others, PRECISION: tl.constexpr, ROWS: tl.constexpr, OTHERS: tl.constexpr):
    """rows · othersᵀ, [ROWS, OTHERS] in fp32, of two tuples of chunks."""
    acc = tl.zeros([ROWS, OTHERS], tl.float32)
    for c in tl.static_range(len(rows)):
        acc = dot(rows[c], tl.trans(others[c]), acc, PRECISION)
    return acc


@triton.jit
def load_rows(ptr, stride, mask_l, D: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows ``ptr + l·stride`` as a tuple of chunks [BLOCK_L, BLOCK_D]; zeros in masked rows and past column D."""
    rows = ()
    for c in tl.static_range(triton.cdiv(D, BLOCK_D)):
        offs_d = c * BLOCK_D + tl.arange(0, BLOCK_D)
        offs = tl.arange(0, BLOCK_L)[:, None] * stride + offs_d[None, :]
        if (c + 1) * BLOCK_D <= D:
            rows = rows + (tl.load(ptr + offs, mask=mask_l[:, None], other=0.0),)
        else:
            rows = rows + (tl.load(ptr + offs, mask=mask_l[:, None] & (offs_d < D)[None, :], other=0.0),)
    return rows


@triton.jit
def store_rows(ptr, stride, rows, mask_l, D: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr):
    """The inverse of ``load_rows``, rounding to the element type of the pointer."""
    for c in tl.static_range(len(rows)):
        offs_d = c * BLOCK_D + tl.arange(0, BLOCK_D)
        offs = tl.arange(0, BLOCK_L)[:, None] * stride + offs_d[None, :]
        value = rows[c].to(ptr.dtype.element_ty)
        if (c + 1) * BLOCK_D <= D:
            tl.store(ptr + offs, value, mask=mask_l[:, None])
        else:
            tl.store(ptr + offs, value, mask=mask_l[:, None] & (offs_d < D)[None, :])


@triton.jit
def store_one(ptr, stride, mask_l, BLOCK_L: tl.constexpr):
    """A 1 and seven zeros in each row: a product over rows with such a column gives the other side's sums too."""
    offs_d = tl.arange(0, 8)
    value = tl.where(mask_l[:, None] & (offs_d == 0)[None, :], 1.0, 0.0).to(ptr.dtype.element_ty)
    tl.store(ptr + tl.arange(0, BLOCK_L)[:, None] * stride + offs_d[None, :], value, mask=mask_l[:, None])


@triton.jit
def store_rows_and_one(ptr, rows, mask_l, D: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows, then a 1 and zeros up to the next multiple of 8 above D, which is their pitch (``pitch(D + 1)``)."""
    PITCH: tl.constexpr = D // 8 * 8 + 8
    for c in tl.static_range(len(rows)):
        offs_d = c * BLOCK_D + tl.arange(0, BLOCK_D)
        offs = tl.arange(0, BLOCK_L)[:, None] * PITCH + offs_d[None, :]
        if (c + 1) * BLOCK_D <= D:
            tl.store(ptr + offs, rows[c], mask=mask_l[:, None])
        else:
            value = tl.where((offs_d == D)[None, :], 1.0, rows[c].to(tl.float32)).to(ptr.dtype.element_ty)
            tl.store(ptr + offs, value, mask=mask_l[:, None] & (offs_d < PITCH)[None, :])
    if D % BLOCK_D == 0:
        store_one(ptr + D, PITCH, mask_l, BLOCK_L)


@triton.jit
def store_column_sums(ptr, rows, BLOCK_D: tl.constexpr):
    """The sum of each column over the tile, fp32, padded columns included."""
    for c in tl.static_range(len(rows)):
        tl.store(ptr + c * BLOCK_D + tl.arange(0, BLOCK_D), tl.sum(rows[c].to(tl.float32), 0))


@triton.jit
def load_tile(ptr, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] of a packed matrix: padded by its launcher, so nothing is masked and loads are 16 bytes wide."""
    return tl.load(ptr + tl.arange(0, ROWS)[:, None] * stride + tl.arange(0, COLUMNS)[None, :])


@triton.jit
def zero_rows(ROWS: tl.constexpr, COLUMNS: tl.constexpr, COUNT: tl.constexpr):
    """A tuple of COUNT fp32 accumulators [ROWS, COLUMNS]."""
    rows = ()
    for _ in tl.static_range(COUNT):
        rows = rows + (tl.zeros([ROWS, COLUMNS], tl.float32),)
    return rows


@triton.jit
def bias_rows(rows, bias_ptr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """rows + bias, in fp32."""
    out = ()
    for c in tl.static_range(len(rows)):
        offs_d = c * BLOCK_D + tl.arange(0, BLOCK_D)
        out = out + (rows[c].to(tl.float32) + tl.load(bias_ptr + offs_d, mask=offs_d < D, other=0.0)[None, :],)
    return out


@triton.jit
def norm_rows(rows, eps, D: tl.constexpr, BLOCK_D: tl.constexpr, DTYPE: tl.constexpr):
    """Layer norm without affine part -> chunks in DTYPE, and 1/σ [BLOCK_L].

    The whole row is in registers, so the variance is the mean of squared deviations, which does not cancel.
    """
    total = tl.sum(rows[0].to(tl.float32), 1)
    for c in tl.static_range(1, len(rows)):
        total += tl.sum(rows[c].to(tl.float32), 1)
    mean = total / D
    square = tl.zeros_like(mean)
    for c in tl.static_range(len(rows)):
        inside = c * BLOCK_D + tl.arange(0, BLOCK_D) < D
        deviation = tl.where(inside[None, :], rows[c].to(tl.float32) - mean[:, None], 0.0)
        square += tl.sum(deviation * deviation, 1)
    rstd = tl.rsqrt(square / D + eps)
    out = ()
    for c in tl.static_range(len(rows)):
        inside = c * BLOCK_D + tl.arange(0, BLOCK_D) < D
        normed = (rows[c].to(tl.float32) - mean[:, None]) * rstd[:, None]
        out = out + (tl.where(inside[None, :], normed, 0.0).to(DTYPE),)
    return out, rstd


@triton.jit
def norm_rows_grad(drows, normed, rstd, D: tl.constexpr):
    """Gradient of ``norm_rows``: rstd · (dn − mean(dn) − n · mean(dn · n)). Columns past D hold zeros in both."""
    first = tl.sum(drows[0], 1)
    second = tl.sum(drows[0] * normed[0].to(tl.float32), 1)
    for c in tl.static_range(1, len(drows)):
        first += tl.sum(drows[c], 1)
        second += tl.sum(drows[c] * normed[c].to(tl.float32), 1)
    first, second = first / D, second / D
    out = ()
    for c in tl.static_range(len(drows)):
        out = out + (rstd[:, None] * (drows[c] - first[:, None] - normed[c].to(tl.float32) * second[:, None]),)
    return out


@triton.jit
def inside_rows(rows, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """rows, zeros past column D."""
    out = ()
    for c in tl.static_range(len(rows)):
        row = rows[c]
        if (c + 1) * BLOCK_D > D:
            row = tl.where((c * BLOCK_D + tl.arange(0, BLOCK_D) < D)[None, :], row, 0.0)
        out = out + (row,)
    return out


@triton.jit
def add_rows(rows, others, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """rows + others in fp32; zeros past column D, where a norm's gradient has none."""
    out = ()
    for c in tl.static_range(len(rows)):
        out = out + (rows[c] + others[c].to(tl.float32),)
    return inside_rows(out, D, BLOCK_D)


@triton.jit
def with_bias(scores, bias):
    """scores + bias by columns; -inf wherever the bias is, also in a row of NaN: a masked slot has no weight."""
    return tl.where(bias[None, :] == float("-inf"), float("-inf"), scores + bias[None, :])


@triton.jit
def slot_softmax(scores, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, KP: tl.constexpr):
    """Softmax over slots inside each head: scores [BLOCK_L, BLOCK_C] -> [BLOCK_L, BLOCK_C // KP, KP].

    Padded and masked slots carry -inf and get weight 0; a head without any slot gets zeros.
    """
    scores = tl.reshape(scores, [BLOCK_L, BLOCK_C // KP, KP])
    top = tl.max(scores, 2)
    top = tl.where(top == float("-inf"), 0.0, top)
    weights = tl.exp(scores - top[:, :, None])
    # The largest weight is exactly 1, so a sum below 1 is that of a head without slots, 0. A sum of NaN stays one.
    total = tl.maximum(tl.sum(weights, 2), 1.0, propagate_nan=tl.PropagateNan.ALL)
    return weights / total[:, :, None]


@triton.jit
def slot_softmax_grad(attn, dattn, dslot_map):
    """dS = A ∘ (dA + dw − Σ_k A (dA + dw)); attn, dattn [BLOCK_L, heads, KP], dslot_map [BLOCK_L, KP]."""
    dattn = dattn + dslot_map[:, None, :]
    return attn * (dattn - tl.sum(attn * dattn, 2)[:, :, None])


@triton.jit
def load_map(ptr, mask_l, K: tl.constexpr, KP: tl.constexpr, BLOCK_L: tl.constexpr):
    """[BLOCK_L, KP] of a slot map with rows of K; zeros in the padding."""
    offs_k = tl.arange(0, KP)
    offs = tl.arange(0, BLOCK_L)[:, None] * K + offs_k[None, :]
    return tl.load(ptr + offs, mask=mask_l[:, None] & (offs_k < K)[None, :], other=0.0)


@triton.jit
def store_map(ptr, slot_map, mask_l, K: tl.constexpr, KP: tl.constexpr, BLOCK_L: tl.constexpr):
    offs_k = tl.arange(0, KP)
    offs = tl.arange(0, BLOCK_L)[:, None] * K + offs_k[None, :]
    tl.store(ptr + offs, slot_map, mask=mask_l[:, None] & (offs_k < K)[None, :])


@triton.jit
def _cheap_normal(u):
    """exp(−u²/2) and, as its multiple, 1 − Φ(|u|); of fp32 u, for results in 16 bits, whose rounding is 4e-3 and 5e-4.

    Abramowitz and Stegun's 7.1.26 (|error| of erf at most 1.5e-7), a third of erf's instructions, with the exponential
    that the derivative needs as well::

        erf(x) = 1 − (a₁t + a₂t² + a₃t³ + a₄t⁴ + a₅t⁵) exp(−x²),  t = 1 / (1 + 0.3275911 x),  x >= 0

    ``exp2`` is one instruction, where ``exp`` is five: it flushes what is below 1e-38 to zero.
    """
    bell = tl.exp2(u * (u * -0.7213475204444817))  # log2(e) / 2
    root = tl.rsqrt(1.0 + 0.23164189 * tl.abs(u))  # 0.3275911 / √2; its square is t, without a division
    t = root * root
    tail = t * (-0.7265760135 + t * 0.5307027145)  # the coefficients halved
    return bell, t * (0.127414796 + t * (-0.142248368 + t * (0.7107068705 + tail)))


@triton.jit
def _with_sign(value, of):
    """value, its sign turned where ``of`` is negative: one instruction."""
    sign = of.to(tl.int32, bitcast=True) & -2147483648
    return (value.to(tl.int32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)


@triton.jit
def gelu(u, DTYPE: tl.constexpr):
    """GELU, u · Φ(u), of fp32 u to the precision of DTYPE; fp32 takes erf."""
    if DTYPE == tl.float32:
        return u * (0.5 * (1.0 + tl.erf(u * 0.7071067811865476)))
    bell, tail = _cheap_normal(u)
    return 0.5 * u + tl.abs(u) * (0.5 - tail * bell)


@triton.jit
def gelu_and_grad(u, DTYPE: tl.constexpr):
    """GELU and its derivative, Φ(u) + u · φ(u), of fp32 u to the precision of DTYPE; fp32 takes erf."""
    if DTYPE == tl.float32:
        cdf = 0.5 * (1.0 + tl.erf(u * 0.7071067811865476))
        return u * cdf, cdf + u * 0.3989422804014327 * tl.exp(-0.5 * u * u)
    bell, tail = _cheap_normal(u)
    away = tl.abs(u)
    slope = 0.5 + _with_sign(0.5 + bell * (0.3989422804014327 * away - tail), u)
    return 0.5 * u + away * (0.5 - tail * bell), slope


@triton.jit
def attend(
    normed, acc, w_in_ptr, b_in_ptr, w_out_ptr, image,
    D: tl.constexpr, KP: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """acc + A·U and the slot map [BLOCK_L, KP] of a tile of normed rows; one group of heads at a time."""
    WIDTH: tl.constexpr = triton.cdiv(D, BLOCK_D) * BLOCK_D
    w_in_ptr += image * (WIDTH * COLUMNS)
    w_out_ptr += image * (WIDTH * COLUMNS)
    b_in_ptr += image * COLUMNS
    slot_map = tl.zeros([BLOCK_L, KP], tl.float32)
    for group in range(COLUMNS // BLOCK_C):
        column = group * BLOCK_C
        scores = tl.zeros([BLOCK_L, BLOCK_C], tl.float32)
        for c in tl.static_range(len(normed)):
            w = load_tile(w_in_ptr + c * BLOCK_D * COLUMNS + column, COLUMNS, BLOCK_D, BLOCK_C)
            scores = dot(normed[c], w, scores, PRECISION)
        scores = with_bias(scores, tl.load(b_in_ptr + column + tl.arange(0, BLOCK_C)))
        attn = slot_softmax(scores, BLOCK_L, BLOCK_C, KP)
        slot_map += tl.sum(attn, 1)
        weights = tl.reshape(attn, [BLOCK_L, BLOCK_C]).to(normed[0].dtype)
        out = ()
        for c in tl.static_range(len(normed)):
            w = load_tile(w_out_ptr + column * WIDTH + c * BLOCK_D, WIDTH, BLOCK_C, BLOCK_D)
            out = out + (dot(weights, w, acc[c], PRECISION),)
        acc = out
    return acc, slot_map


@triton.jit
def attn_and_grad(
    normed, dy, dslot_map, w_in, b_in, w_out,
    KP: tl.constexpr, PRECISION: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A and dS [BLOCK_L, BLOCK_C] of one group of heads, in the compute dtype; dS also in fp32."""
    scores = tl.zeros([BLOCK_L, BLOCK_C], tl.float32)
    dattn = tl.zeros([BLOCK_L, BLOCK_C], tl.float32)
    for c in tl.static_range(len(normed)):
        scores = dot(normed[c], w_in[c], scores, PRECISION)
        dattn = dot(dy[c], tl.trans(w_out[c]), dattn, PRECISION)
    attn = slot_softmax(with_bias(scores, b_in), BLOCK_L, BLOCK_C, KP)
    dscores = slot_softmax_grad(attn, tl.reshape(dattn, [BLOCK_L, BLOCK_C // KP, KP]), dslot_map)
    dscores = tl.reshape(dscores, [BLOCK_L, BLOCK_C])
    return tl.reshape(attn, [BLOCK_L, BLOCK_C]).to(dy[0].dtype), dscores
