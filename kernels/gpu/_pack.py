"""Small operands in the layout that kernels load: padded to whole tiles, so that their loads are wide and unmasked.

Both halves of a decoder layer have one shape of computation, ``f(n · W_in + b_in) · W_out``: in attention the hidden
columns are heads x slots and f is the softmax inside each head; in the feed-forward they are its units and f is GELU.
Everything here is O(D · columns) an image at most, thousands of times below the pixels.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import NamedTuple, cast

import torch
from torch import Tensor

from fastslots.records import FeedForward, FoldedProjections

from .launch import LaunchConfig, precision

MAX_SLOTS, MAX_COLUMNS = 64, 512


class Packed(NamedTuple):
    """Hidden columns in groups of ``block``; slots of a head padded to ``slots`` (1 for a feed-forward)."""

    w_in: Tensor  # [N, DP, C] in the compute dtype
    b_in: Tensor  # [N, C] fp32; -inf for padded and masked slots
    w_out: Tensor  # [N, C, DP] in the compute dtype
    block: int
    slots: int

    @property
    def groups(self) -> int:
        return self.w_in.shape[2] // self.block

    @property
    def columns(self) -> int:
        return self.w_in.shape[2]


def next_power(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def round_up(n: int, block: int) -> int:
    return -(-n // block) * block


def pitch(D: int) -> int:
    """Columns of a row of D elements in a tensor that only kernels and cuBLAS see: whole 16 bytes, the rest zeros."""
    return round_up(D, 8)


MAX_TILE_ROWS = 1024
"""Above every BLOCK_L of the launch table."""


def unit_rows(t: Tensor) -> Tensor:
    """The tensor itself where rows are contiguous and a tile's offsets fit 32 bits, whatever the other strides; else a
    copy."""
    return t if t.stride(-1) == 1 and t.stride(-2) < 2**31 // MAX_TILE_ROWS else t.contiguous()


def stride_unit(*tensors: Tensor) -> int:
    """The most elements, a power of two of at most 16 bytes, of which all strides but the last are multiples.

    Kernels take strides in this unit, a constant of theirs: so the compiler sees how far rows are aligned. It looks at
    an argument for multiples of 16 alone, and a head of 40 would be loaded one element at a time.
    """
    return math.gcd(16 // tensors[0].element_size(), *(stride for t in tensors for stride in t.stride()[:-1]))


def pad_rows(t: Tensor, rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """[..., n, w] -> [..., rows, width] in ``dtype``, zeros in the padding."""
    padded = t.new_zeros(*t.shape[:-2], rows, width, dtype=dtype)
    padded[..., : t.shape[-2], : t.shape[-1]] = t
    return padded


def fitted(t: Tensor, rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """t [n, w], however it lies -> [rows, width] in ``dtype``, zeros in the padding; one copy where there is none."""
    if t.shape != (rows, width):
        return pad_rows(t, rows, width, dtype)
    return t.new_empty(rows, width, dtype=dtype).copy_(t)


def padded_slots(K: int) -> int:
    return max(8, next_power(K))  # 4 breaks the layout pass for TF32 on sm_90 (Triton 3.9)


def fit_slots(config: LaunchConfig, K: int) -> LaunchConfig:
    """A group of columns holds at least one head: where that is more than the table's columns, rows give way.

    (In ``cross_attention``, which takes a head at a time, the table's columns serve for this alone.)
    """
    over = padded_slots(K) // config.block_c
    return config if over < 2 else replace(config, block_l=max(16, config.block_l // over))


def attention_block(config: LaunchConfig, heads: int, slots: int) -> int:
    """Columns of a group: whole heads of padded slots."""
    return max(16, slots, min(config.block_c, next_power(heads * slots)))


def pack_attention(
    folded: FoldedProjections, slot_mask: Tensor | None, dtype: torch.dtype, config: LaunchConfig
) -> Packed:
    """G, g and U -> heads padded to whole groups, slots to a power of two."""
    G, g, U, _ = folded
    B, D, H, K = G.shape
    slots = padded_slots(K)
    block = attention_block(config, H, slots)
    heads, width = round_up(H * slots, block) // slots, round_up(D, config.block_d)
    w_in = G.new_zeros(B, width, heads, slots, dtype=dtype)
    w_in[:, :D, :H, :K] = G
    w_out = U.new_zeros(B, heads, slots, width, dtype=dtype)
    w_out[:, :H, :K, :D] = U
    b_in = g.new_full((B, heads, slots), float("-inf"), dtype=torch.float32)
    b_in[:, :H, :K] = g if slot_mask is None else g.float().masked_fill(~slot_mask[:, None], float("-inf"))
    return Packed(w_in.flatten(2), b_in.flatten(1), w_out.flatten(1, 2), block, slots)


def constexprs(packed: Packed, K: int, config: LaunchConfig, dtype: torch.dtype, D: int) -> dict[str, object]:
    """What every kernel with an attention half needs to know when it is compiled."""
    return {
        "D": D, "K": K, "KP": packed.slots, "COLUMNS": packed.columns, "PRECISION": precision(dtype),
        "BLOCK_L": config.block_l, "BLOCK_C": packed.block, "BLOCK_D": config.block_d,
    }  # fmt: skip


def unpack_attention(
    dw_in: Tensor, db_in: Tensor, dw_out: Tensor, G: Tensor, slots: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Reduced gradients (both weights as [B, DP, C]) -> dG [B,D,H,K], dg [B,H,K], dU [B,H,K,D]."""
    _, D, H, K = G.shape
    dG = dw_in.unflatten(2, (-1, slots))[:, :D, :H, :K]
    dg = db_in.unflatten(1, (-1, slots))[:, :H, :K]
    dU = dw_out.unflatten(2, (-1, slots))[:, :D, :H, :K].permute(0, 2, 3, 1)
    dG, dg, dU = (t.to(G.dtype).contiguous() for t in (dG, dg, dU))
    return dG, dg, dU


class MergedLinear(NamedTuple):
    """A feed-forward's first linear layer with its norm's affine part in it: ``w1 (nw ∘ n + nb) + b1 = w n + b``."""

    w: Tensor  # [F, D] fp32
    b: Tensor  # [F] fp32


# Products with a vector are written as sums below: autocast and TF32 would run ``mv`` and ``addr`` with fewer bits.


def merge_norm(ff: FeedForward) -> MergedLinear:
    w1 = ff.w1.float()
    return MergedLinear(w1 * ff.norm_weight.float(), ff.b1.float() + (w1 * ff.norm_bias.float()).sum(1))


def split_norm_grads(dw: Tensor, db: Tensor, ff: FeedForward) -> tuple[Tensor, Tensor, Tensor]:
    """dw [F,D], db [F] of ``merge_norm`` -> gradients of norm_weight, norm_bias and w1 (that of b1 is db)."""
    w1 = ff.w1.float()
    db = db[:, None]
    return (dw * w1).sum(0), (w1 * db).sum(0), dw * ff.norm_weight.float() + db * ff.norm_bias.float()


def unit_columns(F: int, config: LaunchConfig) -> int:
    """Units with their padding: as many for every kernel, since what the forward stores of them the backward reads."""
    return round_up(F, max(64, config.block_f or config.block_c))


def pack_feed_forward(first: MergedLinear, w2: Tensor, dtype: torch.dtype, config: LaunchConfig) -> Packed:
    """w [F,D], b [F], w2 [OUT,F] -> one image's worth of padded weights, units in groups of block_f or else block_c."""
    (F, D), out = first.w.shape, w2.shape[0]
    block, columns = config.block_f or config.block_c, unit_columns(F, config)
    w_in = fitted(first.w.t(), round_up(D, config.block_d), columns, dtype)
    w_out = fitted(w2.t(), columns, round_up(out, config.block_d), dtype)
    b_in = first.b.float().contiguous() if columns == F else pad_rows(first.b[None], 1, columns, torch.float32)[0]
    return Packed(w_in[None], b_in[None], w_out[None], block, 1)


class FeedForwardPacks:
    """The weights of two linear maps behind a norm as kernels load them: packed once for each layout.

    ff: of a layer, or the first two maps of the output head. dtype: of the products.
    """

    def __init__(self, ff: FeedForward, dtype: torch.dtype) -> None:
        self.ff, self._dtype = ff, dtype
        self._known: dict[tuple[str, int, int], Packed] = {}

    def feed_forward(self, config: LaunchConfig) -> Packed:
        columns = unit_columns(len(self.ff.w1), config)
        key = ("feed-forward", columns, config.block_d)
        if key not in self._known:
            self._known[key] = pack_feed_forward(merge_norm(self.ff), self.ff.w2, self._dtype, config)
        return self._known[key]._replace(block=config.block_f or config.block_c)


class LayerPacks(FeedForwardPacks):
    """The weights of a layer as its kernels load them: packed once for each layout, however many kernels and tiles.

    Args:
        folded, slot_mask: of all images. ff: None where there is an attention alone. dtype: of the products.
    """

    def __init__(
        self, folded: FoldedProjections, ff: FeedForward | None, slot_mask: Tensor | None, dtype: torch.dtype
    ) -> None:
        super().__init__(cast(FeedForward, ff), dtype)  # asked for by kernels of a feed-forward alone
        self.folded = self._whole = folded
        self._slot_mask = slot_mask
        self.bias = folded.b.float().contiguous()
        self._images: slice | None = None

    def of_images(self, images: slice) -> LayerPacks:
        """Those of some images, cut out of what is packed for all."""
        part = copy.copy(self)
        part.folded, part._images = self._whole.of_images(images), images
        return part

    def attention(self, config: LaunchConfig) -> Packed:
        _, D, H, K = self.folded.G.shape
        block = attention_block(config, H, padded_slots(K))
        key = ("attention", round_up(H * padded_slots(K), block), round_up(D, config.block_d))
        if key not in self._known:
            self._known[key] = pack_attention(self._whole, self._slot_mask, self._dtype, config)
        packed = self._known[key]._replace(block=block)
        if self._images is None:
            return packed
        w_in, b_in, w_out, *_ = packed
        return packed._replace(w_in=w_in[self._images], b_in=b_in[self._images], w_out=w_out[self._images])


def matmul_fp32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, of matrices or of batches of them, in the compute dtype -> fp32, summed up in fp32."""
    if a.dtype == torch.float32:
        return a @ b
    product = torch.mm if a.ndim == 2 else torch.bmm
    wide = a.is_cuda or a.is_meta  # a CPU has no such product, and would need copies in fp32
    return product(a, b, out_dtype=torch.float32) if wide else a.float() @ b.float()


class KeptAttention(NamedTuple):
    """What the products of an attention's gradients take beside dy, in the compute dtype, and the slots of a head."""

    n: Tensor  # [B or 1, L, above D], with a column of ones at D
    attn: Tensor  # [B, L, COLUMNS + 8], with a column of ones at COLUMNS
    dscores: Tensor  # [B or 1, L, 1 or B, COLUMNS]
    slots: int


PRODUCTS = 256
"""Products into which a sum over all pixels of all images is cut, or fewer: a product of an image alone has so few
tiles of the result that it would leave most of a GPU idle."""


def attention_products(dy: Tensor, kept: KeptAttention, G: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> dG, dg, dU, db, by cuBLAS; sums of columns are products with columns of ones."""
    (B, L, _), columns = dy.shape, kept.dscores.shape[3]
    most = max(1, min(PRODUCTS // max(B, 1), L // 128))
    parts = max(n for n in range(1, most + 1) if L % n == 0)

    def product(a: Tensor, b: Tensor) -> Tensor:
        """Σ over rows of a [N,L,·] and b [N,L,·] -> [N,·,·]."""
        a, b = (t.reshape(len(t) * parts, L // parts, t.shape[2]) for t in (a, b))
        summed: Tensor = matmul_fp32(a.transpose(1, 2), b).unflatten(0, (-1, parts)).sum(1)
        return summed

    dw_in = product(kept.n, kept.dscores.flatten(2))  # [B or 1, above D, COLUMNS of one or all images]
    dw_in = dw_in.unflatten(2, (-1, columns)).transpose(1, 2).flatten(0, 1)
    dw_out, D = product(dy, kept.attn), G.shape[1]
    grads = unpack_attention(dw_in, dw_in[:, D], dw_out[..., :columns], G, kept.slots)
    return *grads, dw_out[:, :D, columns].sum(0)
