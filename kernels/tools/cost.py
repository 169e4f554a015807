"""A model of bytes and floating-point operations, per launch and per training step of a decoder or encoder layer.

Not a measurement. ``Cost.bytes`` is the least that must move between memory and the chip: every tensor of a launch,
once. ``Cost.requested`` is what its loads and stores ask for, most of it answered by L2, and ``Cost.issued`` the padded
products that run; a test counts these two in Triton's interpreter. ``Cost.flops`` leaves out padded rows, slots and row
widths (heads and units padded to a whole group count). Floors divide by published peaks: no kernel can be faster, and
how near one comes must be measured on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..gpu._pack import round_up
from ..gpu.launch import Launch
from .terms import Terms


@dataclass(frozen=True)
class Device:
    """Published peaks, dense: bytes/s and FLOP/s by kind of product."""

    name: str
    arch: str
    bandwidth: float
    peak: dict[str, float]

    def floor_us(self, bytes_: float, flops: float, precision: str) -> float:
        """The longer of the time to move the bytes and the time to do the products, in microseconds."""
        return 1e6 * max(bytes_ / self.bandwidth, flops / self.peak[precision])


DEVICES = (
    Device("A100 SXM 80GB", "sm_80", 2.039e12, {"bf16": 312e12, "fp16": 312e12, "tf32": 156e12, "fp32": 19.5e12}),
    Device("H100 SXM", "sm_90", 3.35e12, {"bf16": 989e12, "fp16": 989e12, "tf32": 494e12, "fp32": 67e12}),
    Device("B200", "sm_100", 8.0e12, {"bf16": 2250e12, "fp16": 2250e12, "tf32": 1120e12, "fp32": 75e12}),
)


@dataclass(frozen=True)
class Cost:
    """Bytes and operations of one launch."""

    bytes: int
    requested: int
    flops: int
    issued: int


def launch_cost(launch: Launch) -> Cost:
    """The model of one recorded launch, from its arguments, constexprs and grid alone."""
    requested, flops, issued = _MODELS[launch.name](Terms(launch))
    untouched = {name for flag, names in _OF_FLAGS.items() if not launch.constexprs.get(flag, True) for name in names}
    tensors = {id(t): t for name, t in launch.args.items() if isinstance(t, Tensor) and name not in untouched}
    moved = sum(t.numel() * t.element_size() for t in tensors.values())
    if launch.name == "output_head_loss":  # which writes where it has read
        moved += launch.args["u2_ptr"].numel() * launch.args["u2_ptr"].element_size()
    return Cost(moved, requested, flops, issued)


_OF_FLAGS = {
    "NORM": ("residual_ptr",), "MASKED": ("mask_ptr",), "MAP": ("map_ptr", "dmap_ptr"), "WEIGHTED": ("weights_ptr",),
    "ROWS": ("entropy_ptr", "lse_ptr", "dentropy_ptr", "dlse_ptr"), "DWEIGHTS": ("dweights_ptr",),
    "KEYS": ("dmap_ptr", "v_ptr", "dentropy_ptr", "dlse_ptr", "dq_ptr", "dk_ptr"), "VALUES": ("dv_ptr",),
}  # fmt: skip
"""Arguments that a kernel leaves alone where a flag of its is false."""


def _cross_attention_fwd(t: Terms) -> tuple[int, int, int]:
    B, H, L, d = t.of("q_ptr").shape
    K, KP, tiles = t.consts["K"], t.consts["KP"], t.grid[0]
    requested = t.size("q_ptr", "out_ptr", "map_ptr") + tiles * (t.size("k_ptr", "v_ptr") + H * t.size("bias_ptr"))
    requested += t.size("entropy_ptr", "lse_ptr") + (4 * t.programs * H if t.consts["WEIGHTED"] else 0)
    return requested, 4 * B * H * L * K * d, 4 * t.programs * H * t.BL * KP * t.W


def _cross_attention_bwd(t: Terms) -> tuple[int, int, int]:
    B, H, L, d = t.of("q_ptr").shape
    K, KP, visits = t.consts["K"], t.consts["KP"], t.grid[0] * t.number("blocks")
    requested = t.size("q_ptr", "dout_ptr") + visits * (t.size("k_ptr") + H * t.size("bias_ptr"))
    requested += 4 * t.programs if t.consts["WEIGHTED"] else 0
    products = 1  # scores
    if t.consts["VALUES"]:
        requested, products = requested + t.size("dv_ptr"), products + 1
    if t.consts["KEYS"]:  # k is loaded for the scores and again for dq
        requested += H * t.size("dmap_ptr") + visits * t.size("k_ptr", "v_ptr") + t.size("dq_ptr", "dk_ptr")
        requested += t.size("dentropy_ptr", "dlse_ptr") if t.consts["ROWS"] else 0
        requested += t.size("dweights_ptr") if t.consts["DWEIGHTS"] else 0
        products += 3
    return requested, 2 * products * B * H * L * K * d, 2 * products * visits * B * H * t.BL * KP * t.W


def _attention_columns(t: Terms) -> tuple[int, int, int, int, int]:
    """Images, pixels, columns without padded slots (padded heads count), all columns, bytes of an image's weights."""
    columns = t.consts["COLUMNS"]
    real = columns // t.consts["KP"] * t.consts["K"]
    B = t.of("w_in_ptr").shape[0]
    return B, t.number("L"), real, columns, t.size("w_in_ptr", "w_out_ptr", "b_in_ptr") // B


def _folded_attention_fwd(t: Terms) -> tuple[int, int, int]:
    B, L, real, columns, weights = _attention_columns(t)
    requested = B * L * t.D * t.element("x_ptr") + t.programs * (weights + t.size("bias_ptr"))
    requested += t.size("rstd_ptr") if t.consts.get("NORM_Y") else 0
    return requested + t.size("y_ptr", "map_ptr"), 4 * B * L * real * t.D, 4 * t.programs * t.BL * columns * t.W


def _folded_attention_dx(t: Terms) -> tuple[int, int, int]:
    B, L, real, columns, weights = _attention_columns(t)
    tiles = t.grid[0] * B
    requested = t.size("x_ptr", "dy_ptr", "dmap_ptr", "dx_ptr", "db_ptr") + tiles * weights
    requested += t.size("residual_ptr") if t.consts["NORM"] else 0
    requested += t.size("n_ptr", "attn_ptr", "dscores_ptr") if t.consts["KEEP"] else 0
    return requested, 6 * B * L * real * t.D, 6 * tiles * t.BL * columns * t.W


def _folded_attention_dw(t: Terms) -> tuple[int, int, int]:
    B, L, real, columns, weights = _attention_columns(t)
    groups, parts, _ = t.grid
    rows = B * L * t.D * t.element("x_ptr") + t.size("dy_ptr", "dmap_ptr")
    requested = groups * rows + parts * B * weights + t.size("dw_in_ptr", "dw_out_ptr", "db_in_ptr")
    tiles = parts * t.number("blocks") * B
    return requested, 8 * B * L * real * t.D, 8 * tiles * t.BL * columns * t.W


def _decoder_layer_fwd(t: Terms) -> tuple[int, int, int]:
    requested, flops, issued = _folded_attention_fwd(t)
    rows, units = t.grid[1] * t.number("L"), t.consts["UNITS"]
    requested += t.programs * t.size("w1_ptr", "w2_ptr", "b1_ptr", "b2_ptr")
    requested += t.size("n_ptr", "rstd_ptr", "slope_ptr", "h_ptr")  # without rows where they are not kept
    return requested, flops + 4 * rows * units * t.D, issued + 4 * t.programs * t.BL * units * t.W


def _feed_forward_dx(t: Terms) -> tuple[int, int, int]:
    rows, units = t.number("rows"), t.consts["UNITS"]
    # Of n not the seven columns behind its ones where they lie in a chunk of their own.
    unread = 8 if t.D == t.W else 0
    requested = t.size("dy_ptr", "dy_ptr", "rstd_ptr", "dz_ptr") + t.programs * t.size("w1_ptr", "w2_ptr", "b1_ptr")
    requested += t.size("n_ptr", "h_ptr", "du_ptr") - rows * unread * t.element("n_ptr")
    return requested, 6 * rows * units * t.D, 6 * t.programs * t.BL * units * t.W


def _feed_forward_dz(t: Terms) -> tuple[int, int, int]:
    rows, units = t.number("rows"), t.consts["UNITS"]
    unread = 8 if t.D == t.W else 0
    wide = round_up(t.consts["DY"], t.consts["BLOCK_D"])
    requested = t.size("dy_ptr", *(["dy_ptr"] if t.consts["RESIDUAL"] else []), "rstd_ptr", "dz_ptr", "slope_ptr")
    requested += t.programs * t.size("w1_ptr", "w2_ptr")
    requested += t.size("n_ptr", "du_ptr") - rows * unread * t.element("n_ptr")
    flops = 2 * rows * units * (t.D + t.consts["DY"])
    return requested, flops, 2 * t.programs * t.BL * units * (t.W + wide)


def _output_head_fwd(t: Terms) -> tuple[int, int, int]:
    rows, units, out = t.number("rows"), t.consts["UNITS"], t.consts["OUT"]
    wide = round_up(out, t.consts["BLOCK_D"])
    requested = t.size("x_ptr", "n_ptr", "rstd_ptr", "slope_ptr", "h_ptr", "u2_ptr")
    requested += t.programs * t.size("w1_ptr", "b1_ptr", "w2_ptr", "b2_ptr")
    return requested, 2 * rows * units * (t.D + out), 2 * t.programs * t.BL * units * (t.W + wide)


def _output_head_loss(t: Terms) -> tuple[int, int, int]:
    rows, channels = t.number("rows"), t.consts["C"]
    requested = 2 * t.size("u2_ptr") + t.size("sums_ptr") + t.programs * t.element("scale_ptr")
    requested += t.programs * t.number("blocks") * t.size("w3_ptr", "b3_ptr")
    weight = t.element("weight_ptr") if t.consts["WEIGHTED"] else 0
    return requested + rows * (channels * t.element("target_ptr") + weight), 0, 0


def _token_mlp(t: Terms) -> tuple[int, int, int]:
    """Rows once, the weights by every tile."""
    rows, units, out = t.number("rows"), t.consts["UNITS"], t.consts["OUT"]
    weights = [name for name in ("w1_ptr", "b1_ptr", "w2_ptr", "b2_ptr") if name in t.args]
    once = [name for name, value in t.args.items() if isinstance(value, Tensor) and name not in weights]
    wide = round_up(out, t.consts["BLOCK_D"])
    flops, issued = 2 * rows * units * (t.D + out), 2 * t.programs * t.BL * units * (t.W + wide)
    return t.size(*once) + t.programs * t.size(*weights), flops, issued


def _slot_map_loss(t: Terms) -> tuple[int, int, int]:
    weight = t.number("rows") * t.element("weight_ptr") if t.consts["WEIGHTED"] else 0
    reads = 2 if t.consts["KEEP"] else 1
    factor = t.programs * t.element("factor_ptr") if t.consts["KEEP"] else 0
    return reads * t.size("maps_ptr") + weight + factor + t.size("dmap_ptr", "sums_ptr"), 0, 0


def _joint_norm(t: Terms) -> tuple[int, int, int]:
    """Each tensor of pixels once; what every program reads of the others is small."""
    others = ("mean_ptr", "square_ptr", "first_ptr", "second_ptr")
    reads = 1 if t.launch.name in ("joint_norm_moments", "joint_norm_sums") else t.grid[0]
    partials = [name for name in others if name in t.launch.args]
    scalar = 0
    if t.launch.name == "joint_norm_fwd":
        scalar = t.size("rstd_ptr")
    if t.launch.name == "joint_norm_bwd":
        scalar = t.grid[0] * t.size("rstd_ptr")
    pixels = [name for name in ("x_ptr", "y_ptr", "dy_ptr", "dx_ptr") if name in t.launch.args]
    shared = t.grid[1] * t.size("shared_ptr") if t.consts.get("SHARED") else 0
    return t.size(*pixels) + shared + reads * t.size(*partials) + scalar, 0, 0


def _row_pass(t: Terms) -> tuple[int, int, int]:
    """Rows once; the vectors of a row by every tile that uses them."""
    name, vectors = t.launch.name, {"bias_ptr", "weight_ptr", "vector_ptr"} & t.args.keys()
    once = [arg for arg, value in t.args.items() if isinstance(value, Tensor) and arg not in vectors]
    if name == "bias_gelu_fwd":
        reads = t.grid[0] // (t.W // t.consts["BLOCK_D"])
    else:
        reads = t.grid[1] if name == "bias_gelu_bwd" else t.grid[0] * t.args.get("blocks", 1)
    if name == "row_norm_fwd" and not t.consts["AFFINE"]:
        vectors.remove("weight_ptr")
    return t.size(*once) + reads * t.size(*vectors), 0, 0


_PARTS = ("part_sum_ptr", "part_top_ptr", "part_total_ptr")


def _token_attention_fwd(t: Terms) -> tuple[int, int, int]:
    (B, M, S), T = t.of("rows_ptr").shape, t.number("T")
    requested = t.size("tokens_ptr", *_PARTS) + t.grid[0] * t.number("blocks") * t.size("rows_ptr")
    issued = 4 * t.programs * t.number("blocks") * t.BL * t.consts["BLOCK_M"] * t.W
    return requested, 4 * B * M * T * S, issued


def _token_attention_combine(t: Terms) -> tuple[int, int, int]:
    sums, *others = _PARTS
    return t.size("gathered_ptr", "lse_ptr", sums) + t.grid[0] * t.size(*others), 0, 0


def _token_attention_bwd(t: Terms) -> tuple[int, int, int]:
    (B, M, S), T = t.of("rows_ptr").shape, t.number("T")
    requested = t.size("tokens_ptr", "dtokens_ptr", "drows_ptr", *(["before_ptr"] if t.consts["ADD"] else []))
    requested += t.grid[0] * t.size("dgathered_ptr", "gathered_ptr", "lse_ptr")
    requested += t.grid[0] * t.number("blocks") * t.size("rows_ptr", "dgathered_ptr")
    issued = 10 * t.programs * t.number("blocks") * t.BL * t.consts["BLOCK_M"] * t.W
    return requested, 10 * B * M * T * S, issued


def _slot_attention_fwd(t: Terms) -> tuple[int, int, int]:
    B, H, L, d = t.of("k_ptr").shape
    visits = t.programs * t.number("heads") * t.number("blocks")  # tiles of a head
    requested = _keys_and_values(t) + t.size("part_sum_ptr", "part_total_ptr") + visits * _slots(t, "q_ptr")
    requested += t.size("map_ptr") if t.consts["MAP"] else 0
    requested += t.programs * t.consts["K"] if t.consts["MASKED"] else 0
    return requested, 4 * B * H * L * t.consts["K"] * d, 4 * visits * t.BL * t.consts["KP"] * t.W


def _slots(t: Terms, name: str) -> int:
    """Bytes of all slots of one head."""
    size: int = t.consts["K"] * t.D * t.element(name)
    return size


def _keys_and_values(t: Terms) -> int:
    """Bytes as they are loaded: expanded over heads they are fewer, and one tensor of both is loaded once."""
    k = t.of("k_ptr")
    return k.numel() * k.element_size() * (1 if t.consts["SAME"] else 2)


def _slot_attention_combine(t: Terms) -> tuple[int, int, int]:
    others = t.grid[0] * t.size("part_total_ptr") + t.size("totals_ptr")
    return t.size("part_sum_ptr", "updates_ptr") + others, 0, 0


def _slot_attention_bwd(t: Terms) -> tuple[int, int, int]:
    B, H, L, d = t.of("k_ptr").shape
    K, visits = t.consts["K"], t.programs * t.number("blocks")
    requested = _keys_and_values(t) + t.size("dk_ptr", "dv_ptr", "dq_ptr")
    requested += visits * (_slots(t, "q_ptr") + _slots(t, "du_ptr"))
    requested += t.programs * (_slots(t, "du_ptr") + _slots(t, "updates_ptr") + 4 * K)
    requested += H * t.size("dmap_ptr") if t.consts["MAP"] else 0
    requested += t.programs * K if t.consts["MASKED"] else 0
    return requested, 10 * B * H * L * K * d, 10 * visits * t.BL * t.consts["KP"] * t.W


_MODELS: dict[str, Callable[[Terms], tuple[int, int, int]]] = {
    "cross_attention_fwd": _cross_attention_fwd,
    "cross_attention_bwd": _cross_attention_bwd,
    "folded_attention_fwd": _folded_attention_fwd,
    "folded_attention_dx": _folded_attention_dx,
    "folded_attention_dw": _folded_attention_dw,
    "decoder_layer_fwd": _decoder_layer_fwd,
    "feed_forward_dx": _feed_forward_dx,
    "feed_forward_dz": _feed_forward_dz,
    "output_head_fwd": _output_head_fwd,
    "output_head_loss": _output_head_loss,
    "slot_map_loss": _slot_map_loss,
    "joint_norm_moments": _joint_norm,
    "joint_norm_fwd": _joint_norm,
    "joint_norm_sums": _joint_norm,
    "joint_norm_bwd": _joint_norm,
    "bias_gelu_fwd": _row_pass,
    "bias_gelu_bwd": _row_pass,
    "row_norm_fwd": _row_pass,
    "row_norm_bwd": _row_pass,
    "token_mlp_fwd": _token_mlp,
    "token_mlp_bwd": _token_mlp,
    "token_attention_fwd": _token_attention_fwd,
    "token_attention_combine": _token_attention_combine,
    "token_attention_bwd": _token_attention_bwd,
    "slot_attention_fwd": _slot_attention_fwd,
    "slot_attention_combine": _slot_attention_combine,
    "slot_attention_bwd": _slot_attention_bwd,
}
