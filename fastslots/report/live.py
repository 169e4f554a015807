"""What ``fastslots explore`` does with a model for ``server.py``: encode a picture, decode any latent of any slot."""

from __future__ import annotations

import io
import threading
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastslots.data.readers.pictures import FORMATS
from fastslots.models import SlotVAE
from fastslots.report.pictures import by_colour, data_uri, grey, rgb

SPREAD = 3.0  # standard deviations to each side that a slider covers

MOST_PIXELS = 1 << 25  # of an upload: 33 million, as 100 MB of RGB


class BadRequestError(ValueError):
    """What the browser sent cannot be used; the message says why."""


class Session:
    """A model and what it says of pictures. Requests of several threads are served one after another.

    images: float [n, 3, R, R] in [0, 1], to choose from.
    """

    def __init__(self, model: SlotVAE, images: Tensor, name: str):
        self.model, self.name = model.eval(), name
        self._device = next(model.parameters()).device
        self._lock = threading.Lock()
        self._pictures = threading.Lock()  # one upload is unpacked at a time: MOST_PIXELS bounds them all
        self.images = [self._encoded(image) for image in images]

    def facts(self) -> dict[str, Any]:
        z = np.array([entry["z"] for entry in self.images]).reshape(-1, self.model.config.slot_dim)
        center, spread = (z.mean(0), z.std(0).clip(0.1)) if len(z) else (np.zeros(z.shape[1]), np.ones(z.shape[1]))
        low, high = center - SPREAD * spread, center + SPREAD * spread
        names = {"name": self.name, "slots": self.model.config.num_slots, "images": self.images}
        return names | {"low": low.round(3).tolist(), "high": high.round(3).tolist()}

    def encode(self, data: bytes) -> dict[str, Any]:
        """A picture file, cropped to a centred square and resized. Raises BadRequestError for anything else."""
        R = self.model.config.resolution
        try:
            with self._pictures, Image.open(io.BytesIO(data), formats=FORMATS) as picture:
                if picture.width * picture.height > MOST_PIXELS:
                    raise ValueError(f"{picture.width} x {picture.height} pixels are over {MOST_PIXELS:,}")
                side = min(picture.size)
                left, top = ((length - side) // 2 for length in picture.size)
                square = picture.convert("RGB").crop((left, top, left + side, top + side))
                square = square.resize((R, R), Image.Resampling.BILINEAR)
        except Exception as error:
            # Pillow's plugins raise many types on bad bytes
            raise BadRequestError(f"no picture that Pillow can read ({error})") from None
        return self._encoded(torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 255)

    @torch.inference_mode()
    def decode(self, request: Any) -> dict[str, Any]:
        """z with the slots that are shown -> pictures. Raises BadRequestError."""
        K, D = self.model.config.num_slots, self.model.config.slot_dim
        try:
            z = torch.tensor(request["z"], dtype=torch.float32)
            shown = [k for k in range(K) if request["shown"][k]]
        except (TypeError, KeyError, IndexError, ValueError, OverflowError, RuntimeError) as error:
            raise BadRequestError(f"z and shown are needed ({error})") from None
        if z.shape != (K, D) or not torch.isfinite(z).all():
            raise BadRequestError(f"z must hold {K} x {D} finite numbers")
        R = self.model.config.resolution
        if not shown:
            return {"recon": data_uri(np.zeros((R, R, 3), np.uint8), 1 << 20), "byMap": "", "maps": [""] * K}
        decoder = self.model.slot_decoder
        if not decoder.any_slots:  # a slot that is not shown is zero, the prior's mean
            z[[k for k in range(K) if k not in shown]] = 0
            shown = list(range(K))
        with self._lock:
            recon, slot_map = decoder.decode(z[None, shown].to(self._device))
        if slot_map is None:
            return {"recon": _uri(rgb(recon[0])), "byMap": "", "maps": [""] * K}
        maps = torch.zeros(K, R, R)
        maps[shown] = slot_map[0].T.unflatten(-1, (R, R)).cpu().float() / decoder.heads
        pictures = {"recon": _uri(rgb(recon[0])), "byMap": _uri(by_colour(maps))}
        return pictures | {"maps": [_uri(grey(values)) for values in maps]}

    @torch.inference_mode()
    def _encoded(self, image: Tensor) -> dict[str, Any]:
        noise = torch.zeros(1, self.model.config.num_slots, self.model.config.slot_dim, device=self._device)
        with self._lock:
            z = self.model.encode(image[None].to(self._device), noise).slots[0]
        return {"input": _uri(rgb(image)), "z": [[round(value, 4) for value in row] for row in z.tolist()]}


def _uri(picture: np.ndarray) -> str:
    return data_uri(picture, 1 << 20)
