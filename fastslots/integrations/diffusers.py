"""An attention processor for diffusers whose cross-attention also gives its map: which text token acts on which pixel.

>>> processor = MapAttnProcessor()
>>> block.attn2.set_processor(processor)                      # of any UNet or transformer of diffusers
>>> unet(latents, timestep, text)
>>> processor.slot_map                                         # [B, L, K] of the last call, with its gradient

The output is that of diffusers' own processor (``AttnProcessor2_0``), within rounding; no attention is stored.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fastslots.ops import cross_attention

MASKED = -1000.0
"""Below this an additive mask says that a token is not there; diffusers writes -10,000 for one."""


class MapAttnProcessor:
    """Set it on a cross-attention (``attn2``); where it is called without a text it attends as diffusers does.

    Args:
        head_weights: [H] float, the weights of the heads in the map; None means ones.
        backend: see ``fastslots.ops.cross_attention``.

    Attributes:
        slot_map: [B, L, K] of the last cross-attention, fp32 or wider, None before it. It holds that call's graph.
    """

    def __init__(self, head_weights: Tensor | None = None, backend: str = "auto"):
        self.head_weights, self.backend = head_weights, backend
        self.slot_map: Tensor | None = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """As diffusers calls it: hidden_states [B, L, D] or [B, D, height, width], encoder_hidden_states [B, K, E],
        attention_mask [B, 1, K], 0 for a token that is there and a large negative number for one that is not.

        Raises ValueError for a mask that is anything else.
        """
        residual, x = hidden_states, hidden_states
        if attn.spatial_norm is not None:
            x = attn.spatial_norm(x, temb)
        height_width = x.shape[2:] if x.ndim == 4 else None
        if height_width:
            x = x.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
        source = x if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attn.norm_cross:
            source = attn.norm_encoder_hidden_states(source)
        q, k, v = (_heads(part, attn.heads) for part in (attn.to_q(x), attn.to_k(source), attn.to_v(source)))
        q, k = (norm(part) if norm is not None else part for norm, part in ((attn.norm_q, q), (attn.norm_k, k)))
        if encoder_hidden_states is None:
            mask = attn.prepare_attention_mask(attention_mask, k.shape[2], len(k))
            mask = None if mask is None else mask.view(len(k), attn.heads, -1, mask.shape[-1])
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=attn.scale)
        else:
            there = _tokens_there(attention_mask)
            out, self.slot_map = cross_attention(
                q, k, v, attn.scale, self.backend, slot_mask=there, head_weights=self.head_weights
            )
        out = attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))
        if height_width:
            out = out.transpose(1, 2).unflatten(2, height_width)
        scaled: Tensor = (out + residual if attn.residual_connection else out) / attn.rescale_output_factor
        return scaled


def _heads(x: Tensor, heads: int) -> Tensor:
    """[B, n, H·d] -> [B, H, n, d], a view"""
    parts: Tensor = x.unflatten(-1, (heads, -1))
    return parts.transpose(1, 2)


def _tokens_there(mask: Tensor | None) -> Tensor | None:
    """bool [B, K] of an additive mask [B, 1, K]."""
    if mask is None:
        return None
    there = mask == 0
    if mask.ndim != 3 or mask.shape[1] != 1 or not bool((there | (mask < MASKED)).all()):
        raise ValueError(
            f"attention_mask must be [B, 1, K], 0 for a token and below {MASKED:.0f} for none, got {list(mask.shape)}: "
            "a bias of the scores has no place in the map"
        )
    return there[:, 0]
