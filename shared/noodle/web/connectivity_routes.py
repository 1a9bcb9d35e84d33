"""The two routes by which `noodle doctor` learns of the way back: whom a service reaches, and how fast its bytes come.

A service tries only what is registered or configured, never an address that the question brings: it is no open proxy.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from flask import Flask, Response, request

from noodle import __version__
from noodle.errors import InvalidRequest, TooManyRequests
from noodle.web.connectivity import BANDWIDTH_BYTES, ConnectivityReport, Target, try_all, try_service, try_valkey
from noodle.web.service import json_response, require_token

MAXIMUM_QUESTIONS = 2  # about the way back, in progress at once; more get 429
PIECE_BYTES = 64 << 10


def install_connectivity_routes(
    app: Flask,
    token: str,
    valkey_password: str,
    name: str,
    machine: str,
    targets: Callable[[], tuple[str, Sequence[Target]]],
) -> None:
    """`targets` gives the digest of this service's model ("" until it is known), and whom it may try; may raise."""
    places = threading.BoundedSemaphore(MAXIMUM_QUESTIONS)
    measures = threading.Lock()

    @app.get("/doctor/reach")
    def reach() -> Response:
        require_token(token)
        with _Place(places):
            model_digest, tried = targets()
            tries = [
                partial(try_valkey, target, valkey_password)
                if target.name == "valkey"
                else partial(try_service, target, token, measures=measures)
                for target in tried
            ]
            return json_response(ConnectivityReport(name, machine, __version__, model_digest, try_all(tries, tried)))

    @app.get("/doctor/bytes")
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


class _Place:
    """One of the places for questions, or 429."""

    def __init__(self, places: threading.BoundedSemaphore) -> None:
        self._places = places

    def __enter__(self) -> None:
        if not self._places.acquire(blocking=False):
            raise TooManyRequests(
                "Another doctor is being answered.", cure="Ask again in some seconds.", retry_after_seconds=2
            )

    def __exit__(self, *_: object) -> None:
        self._places.release()
