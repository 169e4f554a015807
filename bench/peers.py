"""Attention of other libraries in the place of the published one, and why some of them cannot take it.

The penalty needs the weights summed over heads, which no attention library returns. Two ways around are tried:

    identity   the K columns of an identity appended to V: the output's last K columns are the weights, exactly
    two lse    Σ_k A² = exp(lse(2s) − 2·lse(s)): log-sum-exps alone, but of one head at a time. The penalty sums over
               heads first, and its cross terms A_h·A_h' would need H(H+1)/2 such calls on joined heads
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class CannotServeError(Exception):
    """Why a peer does not do this work; the text stands in its row."""


def with_identity(v: Tensor) -> Tensor:
    """v [B, H, K, d] -> [B, H, K, d + K], an identity in the last K columns."""
    K = v.shape[2]
    eye = torch.eye(K, dtype=v.dtype, device=v.device).expand(*v.shape[:2], K, K)
    return torch.cat([v, eye], -1)


def sdpa_identity(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """torch's scaled_dot_product_attention with an identity appended to V."""
    out = F.scaled_dot_product_attention(q, k, with_identity(v), scale=scale)
    return out[..., : v.shape[3]], out[..., v.shape[3] :]


def sdpa_padded(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The same with widths padded by zeros to a multiple of 8, without which a GPU takes SDPA's slow path."""
    wide = with_identity(v)
    width = -(-max(q.shape[3], wide.shape[3]) // 8) * 8
    out = F.scaled_dot_product_attention(_pad(q, width), _pad(k, width), _pad(wide, width), scale=scale)
    return out[..., : v.shape[3]], out[..., v.shape[3] : wide.shape[3]]


def sdpa_alone(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    raise CannotServeError("returns no weights, and the penalty needs them (see sdpa, identity in V)")


def _pad(t: Tensor, width: int) -> Tensor:
    return F.pad(t, (0, width - t.shape[-1]))


def _need_gpu(package: str, q: Tensor) -> None:
    if q.device.type != "cuda":
        raise CannotServeError(f"{package} runs on GPUs only, the tensors are on {q.device.type}")
    if importlib.util.find_spec(package) is None:
        raise CannotServeError(f"{package} is not installed")


def xformers_identity(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """xformers' memory-efficient attention, [B, n, H, d], widths padded to a multiple of 8."""
    _need_gpu("xformers", q)
    from xformers.ops import memory_efficient_attention

    wide = with_identity(v)
    width, columns = -(-q.shape[3] // 8) * 8, -(-wide.shape[3] // 8) * 8
    q, k, wide = (t.transpose(1, 2).contiguous() for t in (_pad(q, width), _pad(k, width), _pad(wide, columns)))
    out = memory_efficient_attention(q, k, wide, scale=scale).transpose(1, 2)
    d, K = v.shape[3], v.shape[2]
    return out[..., :d], out[..., d : d + K]


def flash_identity(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """flash-attention, [B, n, H, d], 16 bits alone; q, k and V share one width, so all are padded to that of V."""
    _need_gpu("flash_attn", q)
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise CannotServeError(f"flash_attn takes 16-bit tensors, these are {str(q.dtype).removeprefix('torch.')}")
    from flash_attn import flash_attn_func

    wide = with_identity(v)
    width = -(-wide.shape[3] // 8) * 8
    q, k, wide = (_pad(t, width).transpose(1, 2).contiguous() for t in (q, k, wide))
    out = flash_attn_func(q, k, wide, softmax_scale=scale).transpose(1, 2)
    d, K = v.shape[3], v.shape[2]
    return out[..., :d], out[..., d : d + K]


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex_two_lse(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """FlexAttention twice -> out, the penalty of the op (a scalar); for one head, where the two are the same thing."""
    if q.device.type == "cpu":
        raise CannotServeError("FlexAttention has no backward on CPUs")
    H = q.shape[1]
    if H > 1:
        calls = H * (H + 1) // 2
        raise CannotServeError(
            f"two log-sum-exps give Σ A² of one head; summed over {H} heads first, {calls} are needed"
        )
    flex = _compiled_flex()
    out, lse = flex(q, k, v, scale=scale, return_lse=True)
    _, lse_twice = flex(q, k, v, scale=2 * scale, return_lse=True)
    squares = torch.exp(lse_twice - 2 * lse)  # [B, 1, L]
    return out, 0.5 * (1 - squares).mean()


ATTENTIONS: dict[str, Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]] = {
    "sdpa": sdpa_alone,
    "sdpa, identity in V": sdpa_identity,
    "sdpa padded, identity in V": sdpa_padded,
    "xformers, identity in V": xformers_identity,
    "flash-attn, identity in V": flash_identity,
}
"""Provider -> attention that returns its weights, or raises CannotServeError."""
