"""The map of a diffusers model's cross-attention: the same output as diffusers' own processor, and a gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastslots.integrations.diffusers import MapAttnProcessor

TOKENS = 77


class Attention(nn.Module):
    """What a processor reads of diffusers' ``Attention``, for machines that do not have the package."""

    spatial_norm = group_norm = norm_q = norm_k = None
    norm_cross, residual_connection, rescale_output_factor = False, True, 2.0

    def __init__(self, width: int = 32, text: int = 48, heads: int = 4):
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.to_q, self.to_k, self.to_v = (nn.Linear(n, width, bias=False) for n in (width, text, text))
        self.to_out = nn.ModuleList([nn.Linear(width, width), nn.Dropout(0.0)])

    def plain(self, x: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:
        """The same in stored matrices."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.to_q(x), self.to_k(text), self.to_v(text))
        )
        scores = self.scale * q @ k.transpose(-1, -2)
        attn = (scores if mask is None else scores + mask[:, None]).softmax(-1)
        return (self.to_out[0]((attn @ v).transpose(1, 2).flatten(2)) + x) / self.rescale_output_factor


@pytest.mark.parametrize("masked", [False, True])
def test_output_is_that_of_stored_attention(masked):
    torch.manual_seed(0)
    attn, processor = Attention(), MapAttnProcessor()
    x, text = torch.randn(2, 64, 32), torch.randn(2, TOKENS, 48)
    mask = None
    if masked:
        mask = torch.zeros(2, 1, TOKENS)
        mask[1, :, 20:] = -10_000.0
    out = processor(attn, x, text, mask)
    assert torch.allclose(out, attn.plain(x, text, mask), atol=1e-6)
    assert processor.slot_map.shape == (2, 64, TOKENS)
    assert torch.allclose(processor.slot_map.sum(-1), torch.full((2, 64), 4.0), atol=1e-5)
    assert not masked or not processor.slot_map[1, :, 20:].any()
    grad = torch.autograd.grad(processor.slot_map[..., 5].square().mean(), attn.to_q.weight)[0]
    assert grad.abs().max() > 0


def test_a_bias_of_the_scores_is_refused():
    attn = Attention()
    with pytest.raises(ValueError, match="no place in the map"):
        MapAttnProcessor()(attn, torch.randn(1, 8, 32), torch.randn(1, 5, 48), torch.full((1, 1, 5), -0.5))


def test_a_unet_gives_the_same_with_it_and_maps_with_gradients():
    diffusers = pytest.importorskip("diffusers", reason="needs the package diffusers (extra diffusers)")
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=16, layers_per_block=1, block_out_channels=(32, 64), cross_attention_dim=48, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=8,
    )  # fmt: skip
    latents, text = torch.randn(2, 4, 16, 16), torch.randn(2, TOKENS, 48)
    there = torch.ones(2, TOKENS, dtype=torch.bool)
    there[1, 20:] = False
    before = unet(latents, 3, text, encoder_attention_mask=there).sample
    own = unet.attn_processors
    maps = {name: MapAttnProcessor() for name in own if "attn2" in name}
    unet.set_attn_processor({name: maps.get(name, processor) for name, processor in own.items()})
    after = unet(latents, 3, text, encoder_attention_mask=there).sample
    assert torch.allclose(before, after, atol=1e-5) and len(maps) == 4
    loss = sum(processor.slot_map[..., 5].mean() for processor in maps.values())
    loss.backward()
    assert all(processor.slot_map.shape[2] == TOKENS for processor in maps.values())
    assert unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_k.weight.grad.abs().max() > 0
