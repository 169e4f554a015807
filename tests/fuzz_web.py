"""A web server that answers with whatever bytes it is told, and what reads a packed set from it."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from unittest import mock

import numpy as np

from fastslots.data import open_dataset
from fastslots.data.packed import ranges, web

BETWEEN = b"\0next answer\0"
ROW = 8 * 8 * 3  # bytes of an image


def answer(status: str, body: bytes, *headers: str, length: int | None = None) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body) if length is None else length}", *headers]
    return "\r\n".join([*lines, "Connection: close", "", ""]).encode() + body


class RawServer:
    """Sends the answers of ``told`` by what is asked: the listing, how long the images are, meta.json, a byte of the
    images, an image. The rest is answered soundly."""

    def __init__(self, files: dict[str, bytes]):
        self.files, self.told = files, list[bytes]()
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/p"
        threading.Thread(target=self._serve, daemon=True).start()

    def sound(self) -> list[bytes]:
        listing = "".join(f'<a href="{name}">{name}</a>' for name in self.files).encode()
        images = self.files["images.u8"]
        part = [f"Content-Range: bytes {a}-{b}/{len(images)}" for a, b in ((1, 1), (ROW, 2 * ROW - 1))]
        return [
            answer("200 OK", listing, "Content-Type: text/html"),
            answer("200 OK", b"", length=len(images)),
            answer("200 OK", self.files["meta.json"]),
            answer("206 Partial Content", images[1:2], part[0]),
            answer("206 Partial Content", images[ROW : 2 * ROW], part[1]),
        ]

    def _serve(self) -> None:
        while True:
            connection, _ = self._socket.accept()
            threading.Thread(target=self._one, args=(connection,), daemon=True).start()

    def _one(self, connection: socket.socket) -> None:
        with connection:
            try:
                asked = b""
                while b"\r\n\r\n" not in asked and (more := connection.recv(4096)):
                    asked += more
                connection.sendall(self._answer(asked.decode("latin-1")))
            except OSError:
                pass

    def _answer(self, asked: str) -> bytes:
        method, path, *_ = asked.split(" ")
        name = path.rpartition("/")[2]
        if "range: bytes=1-1\r\n" in asked.lower():
            return self.told[3]
        if "range: " in asked.lower():
            return self.told[4]
        if name not in self.files:
            return self.told[0]
        if method == "HEAD":
            return self.told[1] if name == "images.u8" else answer("200 OK", b"", length=len(self.files[name]))
        return self.told[2] if name == "meta.json" else answer("200 OK", self.files[name])


def web_target(
    packed_files: Callable[[], dict[str, bytes]],
) -> tuple[Callable[[], bytes], Callable[[bytes, Path], None]]:
    """The answers as one seed, and what reads a set from a mutated form of them."""

    @cache
    def server() -> RawServer:
        return RawServer(packed_files())

    def seed() -> bytes:
        json.loads(packed_files()["meta.json"])
        return BETWEEN.join(server().sound())

    def read(data: bytes, folder: Path) -> None:
        told = data.split(BETWEEN)
        server().told = told[:5] + server().sound()[len(told) :]
        cache_folder = {"FASTSLOTS_CACHE": str(folder / "cache"), "FASTSLOTS_CACHE_GB": "0"}
        with (
            mock.patch.dict(os.environ, cache_folder),
            mock.patch.object(ranges, "WAITS", ()),
            mock.patch.object(web, "SILENCE", 2.0),
        ):
            images, _ = open_dataset(server().url).batch(np.array([1]), masks=False)
            assert images.shape == (1, 8, 8, 3)

    return seed, read
