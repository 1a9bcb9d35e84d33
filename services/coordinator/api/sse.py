"""Sends the answer to a request by HTTP: whole, or as server-sent events.

An error after the first byte travels in the stream, as an `error` event with OpenAI's error object.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
from flask import Response

from noodle.errors import NoodleError
from noodle.web.service import client_has_gone, error_object, json_response
from services.coordinator.text.answer import Answer, Part
from services.coordinator.text.tokenizer import Tokenizer

STREAM_END = "[DONE]"
COMMENT = b": waiting\n\n"
COMMENT_SECONDS = 1.0
CLIENT_CLOSED_STATUS = 499  # nobody reads it; it is for the log


def whole(answer: Answer, format_answer: Callable[[], Any]) -> Response:
    """Wait for the whole answer; it is cancelled when its client leaves."""
    if not answer.complete(client_has_gone):
        return Response(status=CLIENT_CLOSED_STATUS)
    return json_response(format_answer())


def event_stream(events: Iterator[bytes]) -> Response:
    """Send server-sent events that no proxy may hold back."""
    response = Response(events, mimetype="text/event-stream")
    response.headers["Cache-Control"] = "no-store"
    response.headers["X-Accel-Buffering"] = "no"
    return response


def kept_alive(answer: Answer, events: Callable[[Part], Sequence[bytes]]) -> Iterator[bytes]:
    """Yield the events of each part, and a comment line at intervals while none comes.

    The comment tells the client that all is well. Writing it shows whether the client is still there.
    """
    written_at = time.monotonic()
    for part in answer:
        if part is not None:
            for event in events(part):
                yield event
                written_at = time.monotonic()
        elif time.monotonic() - written_at >= COMMENT_SECONDS:
            yield COMMENT
            written_at = time.monotonic()


def with_errors(answer: Answer, events: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the events, then an error that ended them early; in any case the request is cancelled."""
    try:
        yield from events
    except NoodleError as error:
        yield server_sent_event({"error": error_object(error)}, "error")
    finally:
        answer.cancel()


def server_sent_event(value: Any, event: str = "", event_id: str = "") -> bytes:
    """One event; `value` becomes JSON unless it is text already."""
    data = value.encode() if isinstance(value, str) else msgspec.json.encode(value)
    head = (f"id: {event_id}\n" if event_id else "") + (f"event: {event}\n" if event else "")
    return head.encode() + b"data: " + data + b"\n\n"


def prompt_text(prompt: str | tuple[int, ...], tokenizer: Tokenizer) -> str:
    """The text of a prompt; that of token ids has special tokens in it."""
    return prompt if isinstance(prompt, str) else tokenizer.decode(prompt, skip_special_tokens=False)
