"""A loss on one text token's attention map in a diffusion model, and what it costs in memory.

    pip install 'fastslots[diffusers]' && python examples/diffusion_maps.py

A tiny UNet without trained weights is enough to show the mechanics: the map of every cross-attention is taken in the
same pass as its output, and its gradient reaches the latents. For a real model, replace ``tiny_unet()``.
"""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel

from fastslots.integrations.diffusers import MapAttnProcessor

TOKEN, TOKENS = 5, 77


def tiny_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=32, layers_per_block=1, block_out_channels=(32, 64), cross_attention_dim=48, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=8,
    )  # fmt: skip


def main() -> None:
    unet = tiny_unet()
    maps = {name: MapAttnProcessor() for name in unet.attn_processors if "attn2" in name}
    unet.set_attn_processor({name: maps.get(name, own) for name, own in unet.attn_processors.items()})
    latents = torch.randn(1, 4, 32, 32, requires_grad=True)
    unet(latents, 10, torch.randn(1, TOKENS, 48))
    target = torch.zeros(32, 32)
    target[:, :16] = 1  # the token is to act on the left half
    loss = torch.zeros(())
    for processor in maps.values():
        slot_map = processor.slot_map
        assert slot_map is not None
        side = int(slot_map.shape[1] ** 0.5)
        share = (slot_map[0, :, TOKEN] / slot_map[0, :, TOKEN].sum()).view(side, side)
        wanted = torch.nn.functional.interpolate(target[None, None], (side, side))[0, 0]
        loss = loss + (share * (1 - wanted)).sum()
        stored = 8 * slot_map.shape[1] * TOKENS * 4
        sizes = f"{slot_map.nbytes / 1e6:.2f} MB; the attention of 8 heads would be {stored / 1e6:.2f} MB"
        print(f"map {side} x {side}: {sizes}")
    (direction,) = torch.autograd.grad(loss, latents)
    outside = loss.item() / len(maps)
    print(f"share of the token outside its half: {outside:.3f}; gradient of the latents {direction.norm():.2e}")


if __name__ == "__main__":
    main()
