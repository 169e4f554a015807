"""Plain vision transformers, which come with weights and are not trained here."""

from fastslots.models.vit.transformer import VisionTransformer, load_vit

__all__ = ["VisionTransformer", "load_vit"]
