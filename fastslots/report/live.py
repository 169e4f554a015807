"""A local page that decodes any latent of any slot at once, of held-out images or of a picture of one's own.

The server is the standard library's: one page and two requests. It listens on the loopback alone and answers only
requests that name it so, which keeps web pages of other origins out.

    POST /encode   a picture's bytes                                   -> {"input", "z"}
    POST /decode   {"z": [K][D], "shown": [K] of true or false}        -> {"recon", "byMap", "maps": [K]}
"""

from __future__ import annotations

import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastslots.models import SlotVAE
from fastslots.report.page import assemble
from fastslots.report.pictures import by_colour, data_uri, grey, rgb

LARGEST_UPLOAD = 32 << 20  # bytes
SPREAD = 3.0  # standard deviations to each side that a slider covers
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"


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
            with Image.open(io.BytesIO(data)) as picture:
                side = min(picture.size)
                left, top = ((length - side) // 2 for length in picture.size)
                square = picture.convert("RGB").crop((left, top, left + side, top + side))
                square = square.resize((R, R), Image.Resampling.BILINEAR)
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise BadRequestError(f"no picture that Pillow can read ({error})") from None
        return self._encoded(torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 255)

    @torch.inference_mode()
    def decode(self, request: Any) -> dict[str, Any]:
        """z with the slots that are shown -> pictures. Raises BadRequestError."""
        K, D = self.model.config.num_slots, self.model.config.slot_dim
        try:
            z = torch.tensor(request["z"], dtype=torch.float32)
            shown = [k for k in range(K) if request["shown"][k]]
        except (TypeError, KeyError, IndexError, ValueError) as error:
            raise BadRequestError(f"z and shown are needed ({error})") from None
        if z.shape != (K, D) or not torch.isfinite(z).all():
            raise BadRequestError(f"z must hold {K} x {D} finite numbers")
        R = self.model.config.resolution
        if not shown:
            return {"recon": data_uri(np.zeros((R, R, 3), np.uint8), 1 << 20), "byMap": "", "maps": [""] * K}
        with self._lock:
            recon, slot_map = self.model.decoder(z[None, shown].to(self._device))
        maps = torch.zeros(K, R, R)
        maps[shown] = slot_map[0].T.unflatten(-1, (R, R)).cpu().float() / self.model.config.decoder_heads
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


def serve(session: Session, port: int = 0) -> ThreadingHTTPServer:
    """A server bound to the loopback (port 0: a free one), ready for ``serve_forever``."""
    body = "<header></header><main></main>"
    page = assemble("explore - fastslots", body, session.facts(), ("dom.js", "live.js"), POLICY).encode()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self._is_ours():
                found = self.path.split("?")[0] == "/"
                self._answer(200 if found else 404, page if found else b"not found", "text/html; charset=utf-8")

        def do_POST(self) -> None:
            if not self._is_ours():
                return
            try:
                body = self._body()
                if self.path == "/encode":
                    result = session.encode(body)
                elif self.path == "/decode":
                    result = session.decode(_json(body))
                else:
                    raise BadRequestError(f"no such request: {self.path}")
            except BadRequestError as error:
                self._answer(400, json.dumps({"error": str(error)}).encode(), "application/json")
            else:
                self._answer(200, json.dumps(result).encode(), "application/json")

        def _is_ours(self) -> bool:
            """Whether the request names this server: a name of another site that leads here is none of ours."""
            names = {f"{host}:{server.server_port}" for host in ("127.0.0.1", "localhost")}
            origin = self.headers.get("Origin")
            if self.headers.get("Host") in names and (origin is None or origin.removeprefix("http://") in names):
                return True
            self._answer(403, b"only for this machine", "text/plain")
            return False

        def _body(self) -> bytes:
            length = self.headers.get("Content-Length", "")
            if not length.isdigit() or int(length) > LARGEST_UPLOAD:
                self.close_connection = True
                raise BadRequestError(f"at most {LARGEST_UPLOAD >> 20} MB")
            return self.rfile.read(int(length))

        def _answer(self, status: int, data: bytes, kind: str) -> None:
            self.send_response(status)
            headers = {"Content-Type": kind, "Content-Length": str(len(data)), "X-Content-Type-Options": "nosniff"}
            for name, value in (headers | {"Cache-Control": "no-store"}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass  # one line a slider's movement helps nobody

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    return server


def _json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError as error:
        raise BadRequestError(f"no JSON ({error})") from None
