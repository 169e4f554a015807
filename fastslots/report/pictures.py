"""Arrays as pictures: colours of slots, grey maps, data URIs."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image, features
from torch import Tensor

# Okabe and Ito's colours, told apart by colour-blind readers too; then lighter ones for sets with many slots
COLOURS = np.array(
    [
        (0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233), (213, 94, 0), (240, 228, 66),
        (150, 150, 150), (120, 94, 240), (100, 143, 40), (254, 97, 0), (0, 200, 200),
    ],
    dtype=np.uint8,
)  # fmt: skip
QUALITIES = (85, 70, 50, 30)  # of lossy pictures: the first that fits


def rgb(image: Tensor) -> np.ndarray:
    """float [3, R, R] in [0, 1] -> uint8 [R, R, 3]; values outside are clipped."""
    return (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()


def grey(values: Tensor) -> np.ndarray:
    """float [R, R] in [0, 1] -> uint8 [R, R, 3]"""
    return np.repeat((values.clamp(0, 1) * 255).round().byte().cpu().numpy()[..., None], 3, -1)


def by_colour(shares: Tensor) -> np.ndarray:
    """The colour of the strongest slot at each pixel, dimmed by its share: [K, R, R] -> uint8 [R, R, 3]."""
    strongest, owner = shares.cpu().max(0)
    colours = COLOURS[owner.numpy() % len(COLOURS)]
    dimmed: np.ndarray = colours * strongest.clamp(0, 1).numpy()[..., None]
    return dimmed.astype(np.uint8)


def labels(mask: np.ndarray) -> np.ndarray:
    """Integer labels [R, R] -> uint8 [R, R, 3]: the background (0) dark, each object a colour."""
    return np.where((mask == 0)[..., None], np.uint8(24), COLOURS[(mask.astype(int) - 1) % len(COLOURS)])


def data_uri(picture: np.ndarray | Image.Image, limit: int = 0) -> str:
    """A picture inside a page. Over ``limit`` bytes (0: always) it is stored lossily, where Pillow has WebP."""
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    lossless = encoded(image, "PNG", optimize=True) if limit else b""
    if (lossless and len(lossless) <= limit) or not features.check("webp"):
        return uri("png", lossless or encoded(image, "PNG", optimize=True))
    for quality in QUALITIES:
        lossy = encoded(image.convert("RGB"), "WEBP", quality=quality)
        if not limit or len(lossy) <= limit:
            break
    return uri("webp", lossy)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
