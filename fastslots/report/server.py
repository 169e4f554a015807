"""The server of ``fastslots explore``: one page and two requests, in Flask, for this machine alone.

It listens on the loopback, and answers only requests that know the token in its address, name it by that address and
come from its own page: a web page of another origin, a name that was made to lead here, or another user of this machine
gets nothing.

    GET  /TOKEN/         the page
    POST /TOKEN/encode   a picture's bytes                                   -> {"input", "z"}
    POST /TOKEN/decode   {"z": [K][D], "shown": [K] of true or false}        -> {"recon", "byMap", "maps": [K]}

Whatever cannot be used is answered with a status of 400 or more and {"error": why}. A connection has ``SECONDS`` for
its request and answer; where there are more than ``MOST_CONNECTIONS``, the oldest gives way.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import secrets
import socket
import threading
import time
from typing import Any

from flask import Flask, Response, abort, request
from werkzeug.exceptions import HTTPException
from werkzeug.serving import ThreadedWSGIServer, WSGIRequestHandler

from fastslots.report.live import BadRequestError, Session
from fastslots.report.page import assemble

LARGEST_UPLOAD = 32 << 20  # bytes
LARGEST_LATENTS = 1 << 20  # bytes of a request to decode
SECONDS = 60.0  # that a connection may last
MOST_CONNECTIONS = 256
HOST = "127.0.0.1"
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "frame-ancestors 'none'",  # which a page cannot say of itself
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",  # the address holds the token
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


def build_app(session: Session, token: str) -> Flask:
    """token: the first part of every path that is answered."""
    app = Flask(__name__, static_folder=None)
    app.config.update(TRUSTED_HOSTS=[HOST, "localhost"], MAX_CONTENT_LENGTH=LARGEST_UPLOAD)
    body = "<header></header><main></main>"
    facts = session.facts() | {"largest": LARGEST_UPLOAD}
    text = assemble("explore - fastslots", body, facts, ("dom.js", "live.js"), POLICY)

    @app.before_request
    def only_from_its_own_page() -> None:
        if request.origin not in (None, f"http://{request.host}"):
            abort(403, "only for this machine")
        given = (request.view_args or {}).get("token", "")
        if request.url_rule is not None and not hmac.compare_digest(given.encode(), token.encode()):
            abort(403, "open the address that `fastslots explore` has printed")

    @app.get("/", defaults={"token": ""})
    @app.get("/<token>/")
    def page(token: str) -> str:
        return text

    @app.post("/<token>/encode")
    def encode(token: str) -> dict[str, Any]:
        return session.encode(request.get_data())

    @app.post("/<token>/decode")
    def decode(token: str) -> dict[str, Any]:
        request.max_content_length = LARGEST_LATENTS
        try:
            asked = json.loads(request.get_data())
        except (ValueError, RecursionError):
            asked = None
        return session.decode(asked)

    @app.errorhandler(BadRequestError)
    def unusable(error: BadRequestError) -> tuple[dict[str, Any], int]:
        return {"error": str(error)}, 400

    @app.errorhandler(HTTPException)
    def refused(error: HTTPException) -> tuple[dict[str, Any], int]:
        largest = LARGEST_LATENTS if request.path.endswith("/decode") else LARGEST_UPLOAD
        why = f"at most {largest >> 20} MB" if error.code == 413 else error.description
        return {"error": why}, error.code or 500

    @app.after_request
    def headers(response: Response) -> Response:
        response.headers.update(HEADERS)
        return response

    return app


class Connection(WSGIRequestHandler):
    """Says nothing, and is gone when its time is over, however slowly it goes on."""

    timeout = SECONDS  # of a single read

    def log_request(self, *_: Any) -> None:
        pass  # one line a slider's movement helps nobody

    def log_error(self, *_: Any) -> None:
        pass  # nor does one of a client that has gone


class Server(ThreadedWSGIServer):
    """A thread a connection; those that take longer than ``SECONDS``, or are the oldest of too many, are cut off."""

    token = ""

    def __init__(self, *args: Any, **more: Any):
        self._lock = threading.Lock()
        self._open: dict[socket.socket, float] = {}  # connection -> when it began, the oldest first
        super().__init__(*args, **more)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._open[request] = time.monotonic()
            oldest = next(iter(self._open)) if len(self._open) > MOST_CONNECTIONS else None
        if oldest is not None:
            self._cut(oldest)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Twice a second, by ``serve_forever``."""
        super().service_actions()
        with self._lock:
            late = [connection for connection, began in self._open.items() if time.monotonic() - began > SECONDS]
        for connection in late:
            self._cut(connection)

    def _cut(self, request: socket.socket) -> None:
        with self._lock:
            self._open.pop(request, None)
        with contextlib.suppress(OSError):  # its thread has closed it meanwhile
            request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that has gone, or was cut off

    @property
    def address(self) -> str:
        """What opens the page; whoever knows it may ask."""
        return f"http://{HOST}:{self.port}/{self.token}/"


def serve(session: Session, port: int = 0) -> Server:
    """A server bound to the loopback (port 0: a free one), ready for ``serve_forever``. OSError: the port is taken."""
    listening = socket.create_server((HOST, port), backlog=128)  # here: Werkzeug would end the process where it cannot
    token = secrets.token_urlsafe(16)
    app = build_app(session, token)
    server = Server(HOST, listening.getsockname()[1], app, handler=Connection, fd=listening.fileno())
    server.token = token
    listening.close()  # the server has its own descriptor of the same socket
    return server
