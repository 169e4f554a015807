"""The server of ``fastslots explore``: one page and two requests, in Flask, for this machine alone.

It listens on the loopback, and answers only requests that name it so and come from its own page: a web page of another
origin, or a name that was made to lead here, gets nothing.

    GET  /         the page
    POST /encode   a picture's bytes                                   -> {"input", "z"}
    POST /decode   {"z": [K][D], "shown": [K] of true or false}        -> {"recon", "byMap", "maps": [K]}

Whatever cannot be used is answered with a status of 400 or more and {"error": why}.
"""

from __future__ import annotations

import socket
from typing import Any

from flask import Flask, Response, abort, request
from werkzeug.exceptions import HTTPException
from werkzeug.serving import BaseWSGIServer, WSGIRequestHandler, make_server

from fastslots.report.live import BadRequestError, Session
from fastslots.report.page import assemble

LARGEST_UPLOAD = 32 << 20  # bytes
HOST = "127.0.0.1"
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"


def build_app(session: Session) -> Flask:
    app = Flask(__name__, static_folder=None)
    app.config.update(TRUSTED_HOSTS=[HOST, "localhost"], MAX_CONTENT_LENGTH=LARGEST_UPLOAD)
    body = "<header></header><main></main>"
    facts = session.facts() | {"largest": LARGEST_UPLOAD}
    text = assemble("explore - fastslots", body, facts, ("dom.js", "live.js"), POLICY)

    @app.before_request
    def only_from_its_own_page() -> None:
        if request.origin not in (None, f"http://{request.host}"):
            abort(403, "only for this machine")

    @app.get("/")
    def page() -> str:
        return text

    @app.post("/encode")
    def encode() -> dict[str, Any]:
        return session.encode(request.get_data())

    @app.post("/decode")
    def decode() -> dict[str, Any]:
        return session.decode(request.get_json(force=True, silent=True))

    @app.errorhandler(BadRequestError)
    def unusable(error: BadRequestError) -> tuple[dict[str, Any], int]:
        return {"error": str(error)}, 400

    @app.errorhandler(HTTPException)
    def refused(error: HTTPException) -> tuple[dict[str, Any], int]:
        why = f"at most {LARGEST_UPLOAD >> 20} MB" if error.code == 413 else error.description
        return {"error": why}, error.code or 500

    @app.after_request
    def headers(response: Response) -> Response:
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Cache-Control"] = "no-store"
        return response

    return app


class Quiet(WSGIRequestHandler):
    def log_request(self, *_: Any) -> None:
        pass  # one line a slider's movement helps nobody


def serve(session: Session, port: int = 0) -> BaseWSGIServer:
    """A server bound to the loopback (port 0: a free one), ready for ``serve_forever``. OSError: the port is taken."""
    listening = socket.create_server((HOST, port))  # here, since Werkzeug would end the process where it cannot
    server = make_server(
        HOST, listening.getsockname()[1], build_app(session), True, request_handler=Quiet, fd=listening.fileno()
    )
    listening.close()  # the server has its own descriptor of the same socket
    return server
