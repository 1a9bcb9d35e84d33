"""HTTP requests from one process of noodle to another, with named timeouts and bounded answers.

Failures are HTTP_ERRORS, which each caller turns into its own error. No proxy is used: the addresses are on the home
network.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TypedDict, Unpack
from urllib.parse import urlsplit

HttpConnection = http.client.HTTPConnection
HttpResponse = http.client.HTTPResponse
HTTP_ERRORS = (OSError, http.client.HTTPException)  # unreachable, cut, silent, or not HTTP

NO_HEADERS: Mapping[str, str] = {}
SHOWN_CHARACTERS = 200  # of an answer that is not an error object


class AnswerTooLarge(http.client.HTTPException):
    """An answer exceeds the size that its caller accepts."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer."""

    status: int
    headers: Mapping[str, str]
    body: bytes


def connect(url: str, *, connect_seconds: float, answer_seconds: float) -> HttpConnection:
    """Connect to the host of a URL; each later wait for bytes takes at most `answer_seconds`."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port or 80, timeout=connect_seconds)
    connection.connect()
    connection.sock.settimeout(answer_seconds)
    return connection


def send_request(
    connection: HttpConnection,
    method: str,
    path: str,
    *,
    token: str = "",
    body: bytes | None = None,
    headers: Mapping[str, str] = NO_HEADERS,
) -> HttpResponse:
    """Send one request, with `token` as its credential, and read the head of the answer."""
    credential = {"Authorization": f"Bearer {token}"} if token else {}
    connection.request(method, path, body, {**headers, **credential})
    return connection.getresponse()


class Carried(TypedDict, total=False):
    """What a request carries; see `send_request`."""

    token: str
    body: bytes | None
    headers: Mapping[str, str]


@contextmanager
def open_request(
    method: str, url: str, *, connect_seconds: float, answer_seconds: float, **carried: Unpack[Carried]
) -> Iterator[HttpResponse]:
    """Send a request on a connection of its own; the caller reads the body of the response."""
    parts = urlsplit(url)
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    with (
        closing(connect(url, connect_seconds=connect_seconds, answer_seconds=answer_seconds)) as connection,
        closing(send_request(connection, method, path, **carried)) as response,
    ):
        yield response


def request(
    method: str,
    url: str,
    *,
    connect_seconds: float,
    answer_seconds: float,
    maximum_bytes: int,
    **carried: Unpack[Carried],
) -> Answer:
    """Send a request and read its whole answer; raises AnswerTooLarge beyond `maximum_bytes`."""
    with open_request(
        method, url, connect_seconds=connect_seconds, answer_seconds=answer_seconds, **carried
    ) as response:
        return Answer(response.status, dict(response.headers.items()), read_bounded(response, maximum_bytes))


def read_bounded(response: HttpResponse, maximum_bytes: int) -> bytes:
    """Read the body of a response; raises AnswerTooLarge."""
    body = response.read(maximum_bytes + 1)
    if len(body) > maximum_bytes:
        raise AnswerTooLarge(f"more than {maximum_bytes} bytes")
    return body


def reason_of(error: BaseException) -> str:
    """Return what a failed request's error says, in words."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def message_of(body: bytes) -> str:
    """Return the message of an error object, or the beginning of another body."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body.decode("utf-8", "replace")[:SHOWN_CHARACTERS]
