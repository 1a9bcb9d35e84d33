"""HTTP for commands: JSON requests and answers, and streams of server-sent events; uses no proxy."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Generator, Iterator
from typing import Any
from urllib.parse import urlsplit

from noodle.errors import LinkLost, NoodleError, NotAuthenticated, NotReady, RequestTimedOut
from noodle.http_client import HTTP_ERRORS, AnswerTooLarge, HttpResponse, open_request, read_bounded, reason_of

HEALTH_SECONDS = 2.0  # one answer of /health
ANSWER_SECONDS = 600.0  # an answer that is sent whole, after everything was computed
STREAM_SILENCE_SECONDS = 60.0  # without data from a stream, which sends at least a comment each second
MAXIMUM_ANSWER_BYTES = 64 << 20  # one answer
MAXIMUM_LINE_BYTES = 8 << 20  # one line of a stream
LOGS_CURE = "See `noodle status` and the logs."


def get_json(url: str, credential: str = "", timeout_seconds: float = HEALTH_SECONDS) -> tuple[int, dict[str, Any]]:
    """Return status and JSON object of a GET, for any status; raises NoodleError if there is no such answer."""
    with _request("GET", url, None, credential, timeout_seconds) as response:
        return response.status, _json_object(url, read_bounded(response, MAXIMUM_ANSWER_BYTES))


def post_json(url: str, body: object, credential: str = "", timeout_seconds: float = ANSWER_SECONDS) -> dict[str, Any]:
    """Return the JSON object that answers a POST; raises NoodleError in the server's words if it refuses."""
    with _request("POST", url, body, credential, timeout_seconds) as response:
        _raise_if_refused(url, response)
        return _json_object(url, read_bounded(response, MAXIMUM_ANSWER_BYTES))


def post_for_answer(
    url: str, body: object, credential: str = "", timeout_seconds: float = ANSWER_SECONDS
) -> tuple[int, dict[str, Any]]:
    """Like post_json, but return a 422 too: it has more than a message."""
    with _request("POST", url, body, credential, timeout_seconds) as response:
        if response.status != 422:
            _raise_if_refused(url, response)
        return response.status, _json_object(url, read_bounded(response, MAXIMUM_ANSWER_BYTES))


def post_for_events(url: str, body: object, credential: str = "") -> Generator[str, None, None]:
    """Yield the data of each server-sent event that answers a POST; closing the generator closes the connection.

    Raises NoodleError if the server refuses, is silent for too long, or stops in the middle of an event.
    """
    with _request("POST", url, body, credential, STREAM_SILENCE_SECONDS) as response:
        _raise_if_refused(url, response)
        data: list[str] = []
        while line := response.readline(MAXIMUM_LINE_BYTES + 1):
            if len(line) > MAXIMUM_LINE_BYTES:
                raise NoodleError(f"{url} sent a line of more than {MAXIMUM_LINE_BYTES} bytes.")
            text = line.decode("utf-8", errors="replace").rstrip("\r\n")
            if text.startswith("data:"):
                data.append(text.removeprefix("data:").removeprefix(" "))
            elif not text and data:
                yield "\n".join(data)
                data = []
        if data:
            raise LinkLost(f"{url} stopped in the middle of an event.", cure=LOGS_CURE)


@contextlib.contextmanager
def _request(method: str, url: str, body: object, credential: str, timeout_seconds: float) -> Iterator[HttpResponse]:
    """Send a request; turn a failure of the connection, also while the body is read, into a NoodleError."""
    parts = urlsplit(url)
    where = f"{parts.scheme}://{parts.netloc}"
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
    except ConnectionRefusedError as error:
        raise NotReady(f"Nothing answers at {where}.", cure="Start noodle with `noodle up`.") from error
    except TimeoutError as error:
        raise RequestTimedOut(f"{where} did not answer for {timeout_seconds:.0f} seconds.", cure=LOGS_CURE) from error
    except socket.gaierror as error:
        raise NoodleError(
            f"The name {parts.hostname!r} does not resolve here.", cure="Use the machine's IP address."
        ) from error
    except HTTP_ERRORS as error:
        raise LinkLost(f"The connection to {where} was lost: {reason_of(error)}.", cure=LOGS_CURE) from error


def _json_object(url: str, content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise NoodleError(
            f"{url} answered, but not with a JSON object: another program listens there.",
            cure="Check NOODLE_COORDINATOR_URL, or choose another port with NOODLE_COORDINATOR_PORT.",
        )
    return value


def _raise_if_refused(url: str, response: HttpResponse) -> None:
    """Raise the message of the server's error object."""
    if response.status < 400:
        return
    try:
        message = str(json.loads(read_bounded(response, MAXIMUM_ANSWER_BYTES))["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = f"{url} answered {response.status} {response.reason}."
    if response.status == 401:
        raise NotAuthenticated(message, cure="Give the key with --key or NOODLE_API_KEY.")
    if response.status == 503:
        seconds = response.headers.get("Retry-After", "")
        cure = f"Try again in {seconds} s; `noodle status` shows what is missing." if seconds else ""
        raise NotReady(message, cure=cure)
    raise NoodleError(message)


def error_in(event: dict[str, Any]) -> NoodleError | None:
    """Return the error of an event or answer, None if it has none."""
    error = event.get("error")
    if error is None:
        return None
    return NoodleError(str(error.get("message", error)) if isinstance(error, dict) else str(error))
