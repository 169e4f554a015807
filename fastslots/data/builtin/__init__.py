"""Data that need no download: scenes drawn from a seed, with exact masks and generating factors."""

from fastslots.data.builtin.base import BuiltinScenes
from fastslots.data.builtin.scenes import ScenesDataset
from fastslots.data.builtin.sprites import SpritesDataset
from fastslots.data.builtin.textured import TexturedSpritesDataset

BUILTIN: dict[str, type[SpritesDataset | TexturedSpritesDataset | ScenesDataset]] = {
    "sprites": SpritesDataset,
    "sprites-textured": TexturedSpritesDataset,
    "scenes": ScenesDataset,
}
"""Name, as in ``--data NAME`` -> class."""

__all__ = ["BUILTIN", "BuiltinScenes", "ScenesDataset", "SpritesDataset", "TexturedSpritesDataset"]
