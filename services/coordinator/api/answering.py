"""How a request's answer leaves by HTTP: whole or as a stream of events; knows Flask, no shape of an answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from flask import Response

from noodle.web.service import client_has_gone, json_response
from services.coordinator.text.answer import Answer

CLIENT_CLOSED_STATUS = 499  # nobody reads it; it is for the log


def whole(answer: Answer, format_answer: Callable[[], Any]) -> Response:
    """Wait for the whole answer; a client that leaves meanwhile is not computed for."""
    if not answer.complete(client_has_gone):
        return Response(status=CLIENT_CLOSED_STATUS)
    return json_response(format_answer())


def event_stream(events: Iterator[bytes]) -> Response:
    """Server-sent events that nothing between here and the client may hold back."""
    response = Response(events, mimetype="text/event-stream")
    response.headers["Cache-Control"] = "no-store"
    response.headers["X-Accel-Buffering"] = "no"
    return response
