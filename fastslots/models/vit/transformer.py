"""A frozen Vision Transformer, from a local file: images to a grid of features, for models with ``input="features"``.

The plain ViT (arXiv 2010.11929) with a class token: timm's ``vit_*_patch*`` (DINO, DINOv2, AugReg, DeiT) and the files
of DINO and DINOv2. Everything but the number of heads follows from the shapes in the file. The blocks are torch's own
``nn.TransformerEncoderLayer``; this file only says which weight goes where.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fastslots.errors import UserError
from fastslots.models.weights import read_state, without_prefixes

HEAD_WIDTH = 64  # of every ViT in use, from Ti to H
EPSILON = 1e-6
PIXEL_SCALES = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # DINO, DINOv2, DeiT
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),  # AugReg, CLIP's successors
}
"""Mean and deviation of red, green and blue that a network was trained with."""

# a weight's name in the file -> ours
_NAMES = [
    (r"patch_embed\.proj\.", "patches."),
    (r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)", r"blocks.\1.self_attn.in_proj_\2"),
    (r"blocks\.(\d+)\.attn\.proj\.", r"blocks.\1.self_attn.out_proj."),
    (r"blocks\.(\d+)\.mlp\.fc([12])\.", r"blocks.\1.linear\2."),
]
_NOT_READ = re.compile(r"(head\.|head_dist\.|fc_norm\.|mask_token)")  # classifier, and what DINOv2 trained with


class VisionTransformer(nn.Module):
    """images [B, 3, S, S] in [0, 1] -> features [B, (S / patch)², width]: the last block's patch tokens, normed."""

    mean: Tensor
    std: Tensor

    def __init__(self, patch: int, width: int, hidden: int, depth: int, heads: int, positions: int, scale: str):
        super().__init__()
        self.patch, self.width, self.heads = patch, width, heads
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, positions, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, hidden, 0.0, "gelu", layer_norm_eps=EPSILON, batch_first=True, norm_first=True
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=EPSILON)
        mean, std = torch.tensor(PIXEL_SCALES[scale])[..., None, None].unbind()
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches((images - self.mean) / self.std)
        positions = self._positions(x.shape[-1])
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x.flatten(2).mT], 1) + positions
        for block in self.blocks:
            x = block(x)
        tokens: Tensor = self.norm(x)
        return tokens[:, 1:]

    def _positions(self, side: int) -> Tensor:
        """[1, 1 + side², width]: those of the file, resized bicubically (antialiased) where its grid is another."""
        first, grid = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        own = round(grid.shape[1] ** 0.5)
        if side != own:
            grid = grid.mT.unflatten(2, (own, own))
            grid = F.interpolate(grid, (side, side), mode="bicubic", antialias=True, align_corners=False)
            grid = grid.flatten(2).mT
        return torch.cat([first, grid], 1)


def load_vit(path: Path, heads: int = 0, scale: str = "imagenet") -> VisionTransformer:
    """The network of a file (safetensors, or a .pth that is read with ``weights_only``), frozen, on the CPU, in fp32.

    heads: of its attentions; 0: its width over 64. scale: of ``PIXEL_SCALES``.

    Raises UserError: a file that cannot be read, or that holds another network than a plain ViT.
    """
    backbone = {name: value for name, value in read_state(path).items() if not _NOT_READ.match(name)}
    state = {name: value.float() for name, value in without_prefixes(backbone).items() if not _NOT_READ.match(name)}
    kernel, positions = state.get("patch_embed.proj.weight"), state.get("pos_embed")
    hidden = state.get("blocks.0.mlp.fc1.weight")
    if kernel is None or positions is None or hidden is None or kernel.ndim != 4:
        raise UserError(f"{path} holds no plain ViT (patch_embed.proj, pos_embed, blocks.0.mlp.fc1): name another file")
    width, heads = len(kernel), heads or max(1, len(kernel) // HEAD_WIDTH)
    if positions.ndim != 3 or round((positions.shape[1] - 1) ** 0.5) ** 2 != positions.shape[1] - 1:
        raise UserError(f"{path}: pos_embed {list(positions.shape)} is no class token and a square: name another file")
    if width % heads:
        raise UserError(f"{path}: its width {width} is no multiple of {heads} heads: set --heads")
    depth = 1 + max(int(found[1]) for name in state if (found := re.match(r"blocks\.(\d+)\.", name)))
    vit = VisionTransformer(kernel.shape[-1], width, len(hidden), depth, heads, positions.shape[1], scale)
    try:
        vit.load_state_dict(_renamed(state))
    except RuntimeError as error:
        reason = "; ".join(line.strip() for line in str(error).splitlines()[1:3])
        raise UserError(f"{path} is no plain ViT with a class token ({reason}): name another file") from None
    return vit.eval().requires_grad_(False)


def _renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The file's weights under our names; LayerScale, a factor on what a block adds, goes into its last matrices."""
    scales = {name: state[name] for name in state if re.fullmatch(r"blocks\.\d+\.ls[12]\.gamma", name)}
    out = {}
    for name in state.keys() - scales.keys():
        ours = name
        for pattern, replacement in _NAMES:
            ours = re.sub(pattern, replacement, ours)
        out[ours] = state[name]
    for name, gamma in scales.items():
        block, layer = name.split(".ls")
        last = f"{block}.self_attn.out_proj" if layer[0] == "1" else f"{block}.linear2"
        for part, factor in (("weight", gamma[:, None]), ("bias", gamma)):
            if f"{last}.{part}" in out:
                out[f"{last}.{part}"] = out[f"{last}.{part}"] * factor
    return out
