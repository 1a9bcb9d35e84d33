"""The routes by which `noodle doctor` learns which services another service reaches, and how fast its bytes arrive.

A service tests only registered or configured addresses, never one that the question brings: it is no open proxy.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Sequence

from flask import Flask, Response, request

from noodle import __version__
from noodle.errors import InvalidRequest, TooManyRequests
from noodle.web.connectivity import (
    BANDWIDTH_BYTES,
    BYTES_PATH,
    CONNECTIVITY_PATH,
    ConnectivityReport,
    Target,
    try_targets,
)
from noodle.web.service import json_response, require_token

MAXIMUM_QUESTIONS = 2  # connectivity tests in progress at once; more get 429
PIECE_BYTES = 64 << 10  # bytes of one piece of the answer


def install_connectivity_routes(
    app: Flask,
    *,
    token: str,
    valkey_password: str,
    name: str,
    machine: str,
    targets: Callable[[], tuple[str, Sequence[Target]]],
) -> None:
    """Add both routes; `targets` returns the model digest ("" until it is known) and the services to test."""
    places = threading.BoundedSemaphore(MAXIMUM_QUESTIONS)
    measures = threading.Lock()

    @app.get(CONNECTIVITY_PATH)
    def connectivity() -> Response:
        require_token(token)
        if not places.acquire(blocking=False):
            raise TooManyRequests(
                "Another `noodle doctor` is being answered.", cure="Try again in a few seconds.", retry_after_seconds=2
            )
        try:
            model_digest, tested = targets()
            results = try_targets(tested, token, valkey_password, measures)
            return json_response(ConnectivityReport(name, machine, __version__, model_digest, results))
        finally:
            places.release()

    @app.get(BYTES_PATH)
    def some_bytes() -> Response:
        require_token(token)
        asked = request.args.get("count", "1")
        if not re.fullmatch(r"[0-9]{1,9}", asked) or not 1 <= int(asked) <= BANDWIDTH_BYTES:
            raise InvalidRequest(f"count is {asked[:40]!r}, not a number from 1 to {BANDWIDTH_BYTES}.", param="count")
        response = Response(_zeros(int(asked)), mimetype="application/octet-stream")
        response.content_length = int(asked)
        return response


def _zeros(byte_count: int) -> Iterator[bytes]:
    piece = bytes(PIECE_BYTES)
    while byte_count > 0:
        yield piece[:byte_count]
        byte_count -= PIECE_BYTES
