"""The ``triton`` backend: the raw functions that ``fastslots.ops`` calls on CUDA tensors.

With ``TRITON_INTERPRET=1`` set before the first import of triton, the same kernels take CPU tensors (for tests).
"""

from __future__ import annotations

import torch

from fastslots.records import Call

from . import compiling
from .gpu import assembler, launch
from .gpu._pack import MAX_COLUMNS, MAX_SLOTS, padded_slots, round_up
from .gpu._tiles import INTERPRETED
from .gpu.cross_attention import MAX_SLOTS as MAX_KEYS
from .gpu.cross_attention import (
    MAX_WIDTH_OF_MANY,
    attention_statistics_bwd,
    attention_statistics_fwd,
    cross_attention_bwd,
    cross_attention_fwd,
)
from .gpu.decoder_layer import decoder_layer_bwd, decoder_layer_fwd
from .gpu.decoder_loss import decoder_loss
from .gpu.folded_cross_attention import folded_cross_attention_bwd, folded_cross_attention_fwd
from .gpu.passes.bias_gelu import bias_gelu_bwd, bias_gelu_fwd
from .gpu.passes.joint_norm import joint_norm_bwd, joint_norm_fwd
from .gpu.passes.row_norm import bias_norm_bwd, bias_norm_fwd
from .gpu.passes.token_mlp import token_mlp_bwd, token_mlp_fwd
from .gpu.slot_attention import MAX_SLOTS as MAX_COMPETING
from .gpu.slot_attention import slot_attention_bwd, slot_attention_fwd
from .gpu.token_attention import MAX_CELLS, MAX_ROWS, padded_rows, token_attention_bwd, token_attention_fwd

MAX_IMAGES = 65535
"""Programs along the second and third axis of a CUDA grid."""
SCRATCH_BYTES = 40960
"""Shared memory of a kernel beside the weights of a head, when tiles are short and one is in flight: 36 KiB seen."""
_LAYER = ("decoder_layer_", "folded_attention_", "feed_forward_")
KERNELS = {
    "cross_attention": ("cross_attention_",), "attention_statistics": ("cross_attention_",),
    "folded_cross_attention": _LAYER[1:2], "decoder_layer": _LAYER, "decoder_loss": (*_LAYER, "output_head_"),
    "token_attention": ("token_attention_",), "token_mlp": ("token_mlp_",), "slot_attention": ("slot_attention_",),
}  # fmt: skip
"""What the names of an op's kernels start with, in ``launches.json`` and wherever kernels are listed. The backward of a
layer runs the kernels of its two halves, which bear their names: ``folded_attention_*`` and ``feed_forward_*``."""

__all__ = [
    "attention_statistics_bwd", "attention_statistics_fwd", "bias_gelu_bwd", "bias_gelu_fwd", "bias_norm_bwd",
    "bias_norm_fwd", "cross_attention_bwd", "cross_attention_fwd", "decoder_layer_bwd", "decoder_layer_fwd",
    "decoder_loss", "folded_cross_attention_bwd", "folded_cross_attention_fwd", "joint_norm_bwd", "joint_norm_fwd",
    "slot_attention_bwd", "slot_attention_fwd", "token_attention_bwd", "token_attention_fwd", "token_mlp_bwd",
    "token_mlp_fwd", "why_not",
]  # fmt: skip


compiles_told = compiling.told


def why_not(call: Call) -> str | None:
    """None when these kernels serve this call, else the reason in words."""
    return _unserved(call.device, call.dtypes[0]) or _too_large(call)


def _unserved(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda" and not INTERPRETED.value:
        return f"the tensors are on {device}, not on a CUDA device (TRITON_INTERPRET=1 runs the kernels on the CPU)"
    if device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than sm_80"
    if dtype not in launch.DTYPES:
        return f"{str(dtype).removeprefix('torch.')} is not one of fp16, bf16, fp32"
    if device.type == "cuda" and (dtype != torch.float32 or launch.allows_tf32()):
        return assembler.why_not(launch.device_arch(device.index or 0))
    return None


def _fits_memory(op: str, device: torch.device, dtype: torch.dtype, width_class: int, slots: int) -> bool:
    return launch.has_entries(torch.empty(0, device=device, dtype=dtype), width_class, KERNELS[op], slots)


def _shared_memory(device: torch.device) -> int | None:
    """Bytes of shared memory that a block may have; None where no GPU is asked."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)


# Dynamo calls these, on constants, and traces the rest, on shapes that may be dynamic (ops.backends.under_transform).
for _answer in (_unserved, _fits_memory, _shared_memory):
    _answer._dynamo_marked_constant = True  # type: ignore[union-attr]


def _too_large(call: Call) -> str | None:
    """Limits of the shapes: a tile holds whole rows and all slots of a head, and images are an axis of the grid."""
    dtype, width, slots = call.dtypes[0], call.width, call.slots
    if call.images > MAX_IMAGES:
        return f"{call.images} images are more than {MAX_IMAGES}, the most of one launch"
    if call.op in ("joint_norm", "bias_gelu"):
        return None
    if width > launch.WIDTH_CLASSES[-1]:
        return f"rows of {width} elements are wider than {launch.WIDTH_CLASSES[-1]}"
    if call.op in ("bias_norm", "token_mlp"):
        return None
    if call.op == "token_attention":
        rows = padded_rows(call.rows)
        fits = rows <= MAX_ROWS and rows * round_up(width, 64) <= MAX_CELLS
        return None if fits else f"{call.rows} rows of {width} elements are more than one tile holds"
    if call.one_head_at_a_time and call.heads > MAX_IMAGES:
        return f"{call.heads} heads are more than {MAX_IMAGES}, the most of one launch"
    if call.op == "slot_attention":
        return f"{slots} slots are more than {MAX_COMPETING}" if slots > MAX_COMPETING else None
    most = MAX_KEYS if call.op in ("cross_attention", "attention_statistics") else MAX_SLOTS
    if slots > most:
        return f"{slots} slots are more than {most}, the most that one tile holds"
    class_of_slots = launch.MANY_SLOTS + 1 if slots > launch.MANY_SLOTS else 1  # a constant, as Dynamo needs it
    if class_of_slots > 1 and width > MAX_WIDTH_OF_MANY:
        return f"{slots} slots take rows of at most {MAX_WIDTH_OF_MANY} elements, not {width} (64 slots: 384)"
    width_class = min(limit for limit in launch.WIDTH_CLASSES if width <= limit)
    if not _fits_memory(call.op, call.device, dtype, width_class, class_of_slots):
        return f"rows of {width} elements in TF32 do not fit the shared memory of this GPU (bf16 or IEEE fp32 do)"
    if call.columns > MAX_COLUMNS:
        return f"{call.heads} heads x {slots} slots are more than {MAX_COLUMNS} columns"
    # The weights of one head, in and out, lie in shared memory whole; block sizes of the table hold up to 16 slots.
    needs = 2 * padded_slots(slots) * round_up(width, 64) * dtype.itemsize + SCRATCH_BYTES
    has = _shared_memory(call.device)
    if slots > 16 and has is not None and needs > has:
        return f"{slots} slots of rows {width} wide need {needs >> 10} KiB of shared memory, this GPU has {has >> 10}"
    return None
