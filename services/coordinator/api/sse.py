"""What both forms of event streams share: comment lines, and errors after the first byte; knows no routes.

An error after the first byte travels in the stream, as an `error` event with OpenAI's error object. The streams
themselves are in openai_stream.py and generate_stream.py.
"""

from __future__ import annotations

from collections.abc import Iterator

from noodle.errors import NoodleError
from noodle.web.service import error_object, server_sent_event
from services.coordinator.text.answer import Answer

COMMENT = b": waiting\n\n"
COMMENT_SECONDS = 1.0


def with_errors(answer: Answer, events: Iterator[bytes]) -> Iterator[bytes]:
    """The events, or what ended them early as one more event; the request is cancelled whatever happens."""
    try:
        yield from events
    except NoodleError as error:
        yield server_sent_event({"error": error_object(error)}, "error")
    finally:
        answer.cancel()
