"""The command line's HTTP: JSON there and back, and streams of server-sent events; errors become plain words.

Knows HTTP and OpenAI's error object, not what is asked for. No proxy is used: the addresses are of the home network.
"""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Generator, Iterator
from typing import Any, NoReturn
from urllib.parse import urlsplit

from noodle.errors import LinkLost, NoodleError, NotAuthenticated, NotReady, RequestTimedOut
from noodle.http_client import HTTP_ERRORS, AnswerTooLarge, HttpResponse, open_request, read_bounded, reason_of

HEALTH_SECONDS = 2.0  # /health answers at once, or its process is in trouble
ANSWER_SECONDS = 600.0  # for an answer that comes whole, after everything was computed
STREAM_SILENCE_SECONDS = 60.0  # a stream says something each second, if only a comment
MAXIMUM_ANSWER_BYTES = 64 << 20
MAXIMUM_LINE_BYTES = 8 << 20


def get_json(url: str, credential: str = "", timeout_seconds: float = HEALTH_SECONDS) -> tuple[int, dict[str, Any]]:
    """Status and JSON object of a GET, whatever the status; raises NoodleError when nothing (sensible) answers."""
    with _request("GET", url, None, credential, timeout_seconds) as response:
        return response.status, _json_object(url, _read(response))


def post_json(url: str, body: object, credential: str = "", timeout_seconds: float = ANSWER_SECONDS) -> dict[str, Any]:
    """JSON object that answers a POST; raises NoodleError in the server's own words when it refuses."""
    with _request("POST", url, body, credential, timeout_seconds) as response:
        content = _read(response)
        if response.status >= 400:
            _raise_refusal(url, response, content)
        return _json_object(url, content)


def post_for_answer(
    url: str, body: object, credential: str = "", timeout_seconds: float = ANSWER_SECONDS
) -> tuple[int, dict[str, Any]]:
    """As post_json, but a refusal as 422 comes back too: it carries more than its message."""
    with _request("POST", url, body, credential, timeout_seconds) as response:
        content = _read(response)
        if response.status >= 400 and response.status != 422:
            _raise_refusal(url, response, content)
        return response.status, _json_object(url, content)


def post_for_events(url: str, body: object, credential: str = "") -> Generator[str, None, None]:
    """The data of each server-sent event that answers a POST; closing the iterator closes the connection.

    Raises NoodleError when the server refuses, falls silent or breaks off in the middle of an event.
    """
    with _request("POST", url, body, credential, STREAM_SILENCE_SECONDS) as response:
        if response.status >= 400:
            _raise_refusal(url, response, _read(response))
        data: list[str] = []
        while line := _read_line(url, response):
            text = line.decode("utf-8", errors="replace").rstrip("\r\n")
            if text.startswith("data:"):
                data.append(text.removeprefix("data:").removeprefix(" "))
            elif not text and data:
                yield "\n".join(data)
                data = []
        if data:
            raise LinkLost(f"{url} broke off in the middle of an event.", cure="See `noodle status` and the logs.")


@contextlib.contextmanager
def _request(method: str, url: str, body: object, credential: str, timeout_seconds: float) -> Iterator[HttpResponse]:
    """Send a request; a failure of the connection, also while the body is read, becomes an error in plain words."""
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname:
        raise NoodleError(f"{url!r} is not an http:// URL.", cure="Write it as http://192.168.1.101:8080.")
    headers = {"Accept": "application/json, text/event-stream"}
    content = None
    if body is not None:
        content = json.dumps(body).encode()
        headers["Content-Type"] = "application/json"
    try:
        with open_request(
            method,
            url,
            token=credential,
            body=content,
            headers=headers,
            connect_seconds=timeout_seconds,
            answer_seconds=timeout_seconds,
        ) as response:
            yield response
    except AnswerTooLarge as error:
        raise NoodleError(f"{url} answered with {error}.") from error
    except HTTP_ERRORS as error:
        _raise_trouble(url, error, timeout_seconds)


def _read(response: HttpResponse) -> bytes:
    return read_bounded(response, MAXIMUM_ANSWER_BYTES)


def _read_line(url: str, response: HttpResponse) -> bytes:
    line = response.readline(MAXIMUM_LINE_BYTES + 1)
    if len(line) > MAXIMUM_LINE_BYTES:
        raise NoodleError(f"{url} sent a line of more than {MAXIMUM_LINE_BYTES} bytes.")
    return line


def _json_object(url: str, content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise NoodleError(
            f"{url} answered, but not with a JSON object: another program listens there.",
            cure="Look at NOODLE_COORDINATOR_URL, or choose another port with NOODLE_COORDINATOR_PORT.",
        )
    return value


def _raise_trouble(url: str, error: Exception, timeout_seconds: float) -> NoReturn:
    parts = urlsplit(url)
    where = f"{parts.scheme}://{parts.netloc}"
    if isinstance(error, ConnectionRefusedError):
        raise NotReady(f"Nothing answers at {where}.", cure="Start noodle with `noodle up`.") from error
    if isinstance(error, TimeoutError):
        raise RequestTimedOut(
            f"{where} gave no answer for {timeout_seconds:.0f} seconds.", cure="See `noodle status` and the logs."
        ) from error
    if isinstance(error, socket.gaierror):
        raise NoodleError(
            f"The name {parts.hostname!r} is not known here.", cure="Use the machine's IP address."
        ) from error
    raise LinkLost(
        f"The connection to {where} broke: {reason_of(error)}.", cure="See `noodle status` and the logs."
    ) from error


def _raise_refusal(url: str, response: HttpResponse, content: bytes) -> NoReturn:
    """Raise what the server's error object says."""
    try:
        message = str(json.loads(content)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = f"{url} answered {response.status} {response.reason}."
    if response.status == 401:
        raise NotAuthenticated(message, cure="Give the key with --key or NOODLE_API_KEY.")
    if response.status == 503:
        seconds = response.headers.get("Retry-After", "")
        raise NotReady(
            message, cure=f"Try again in {seconds} s; `noodle status` says what is missing." if seconds else ""
        )
    raise NoodleError(message)


def error_in(event: dict[str, Any]) -> NoodleError | None:
    """The error that an event of a stream carries, if it does."""
    error = event.get("error")
    if error is None:
        return None
    return NoodleError(str(error.get("message", error)) if isinstance(error, dict) else str(error))
