"""Whether one process reaches another, how fast, and what answers there; tries only what it is given, decides nothing.

Used by `noodle doctor` from the command line, and by the services for the way back (reach_routes.py).
"""

from __future__ import annotations

import contextlib
import errno
import json
import queue
import socket
import threading
import time
from collections.abc import Callable, Sequence
from email.utils import parsedate_to_datetime
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

from msgspec import Struct, field

from noodle.http_client import HTTP_ERRORS, HttpConnection, connect, reason_of, send_request

CONNECT_SECONDS = 3.0  # a packet that nobody answers is sent again twice in this time
ANSWER_SECONDS = 3.0
ROUND_TRIPS = 5  # the shortest counts: the others waited for something beside the way
BANDWIDTH_BYTES = 8 << 20  # at most, of one measurement
BANDWIDTH_SECONDS = 1.0  # at most
SMALLEST_TIMED_BYTES = 256 << 10  # fewer say nothing of a link
TRY_ALL_SECONDS = 10.0
READ_BYTES = 64 << 10
HEALTH_BYTES = 1 << 20
STRANGE_KEY = "no-key-of-the-cluster"
BYTES_PATH = "/doctor/bytes"
CONNECTIVITY_PATH = "/doctor/reach"

Outcome = Literal[
    "open",  # it answers, and takes our secret
    "refused",  # the machine is there, and nothing listens on the port
    "silent",  # packets are dropped, or the machine is off
    "no_such_name",
    "no_way",  # this machine knows no way to the address
    "locked",  # it answers, and does not take our secret
    "unlocked",  # it answers everyone: Valkey without a password
    "foreign",  # another program, or a noodle of a version that does not know the question
]


class Target(Struct, frozen=True):
    """A service that may be tried."""

    name: str  # "coordinator", "planner", "valkey" or "stage <id>"
    url: str
    machine: str = ""
    version: str = ""  # what is known of it before it is tried, from its report
    model_digest: str = ""


class ConnectionResult(Struct, frozen=True):
    """What became of one try."""

    name: str
    url: str
    outcome: Outcome
    detail: str = ""  # in words, for what is not open, or is open too far
    machine: str = ""
    version: str = ""
    model_digest: str = ""
    round_trip_seconds: float | None = None
    bytes_per_second: float | None = None  # from there to here
    clock_ahead_seconds: float | None = None  # of that machine's clock before ours, to a second
    status: str = ""  # what its /health says


class ConnectivityReport(Struct, frozen=True):
    """A service's answer to CONNECTIVITY_PATH: who it is, and whom it reaches."""

    name: str
    machine: str
    version: str
    model_digest: str
    results: tuple[ConnectionResult, ...] = field(name="reached")


def try_all(tries: Sequence[Callable[[], ConnectionResult]], targets: Sequence[Target]) -> tuple[ConnectionResult, ...]:
    """Run one try for each target at the same time; one that is not over in TRY_ALL_SECONDS counts as silent."""
    done: queue.SimpleQueue[tuple[int, ConnectionResult]] = queue.SimpleQueue()

    def run(index: int) -> None:
        done.put((index, tries[index]()))

    for index in range(len(tries)):
        threading.Thread(target=run, args=(index,), daemon=True).start()
    found: dict[int, ConnectionResult] = {}
    end = time.monotonic() + TRY_ALL_SECONDS
    while len(found) < len(tries):
        try:
            index, reached = done.get(timeout=max(0.0, end - time.monotonic()))
        except queue.Empty:
            break
        found[index] = reached
    late = f"no end of it in {TRY_ALL_SECONDS:.0f} s"
    return tuple(found.get(index) or _failed(target, "silent", late) for index, target in enumerate(targets))


def try_service(target: Target, token: str, *, measures: threading.Lock | None = None) -> ConnectionResult:
    """Try one of noodle's HTTP services; with `measures` its bandwidth as well, timed while no other one is."""
    parts = urlsplit(target.url)
    host, port = parts.hostname or "", parts.port or 80
    try:
        opened = connect(target.url, connect_seconds=CONNECT_SECONDS, answer_seconds=ANSWER_SECONDS)
        with contextlib.closing(opened) as connection:
            health, clock_ahead_seconds = _health(connection, token)
            if health is None:
                return _failed(target, "foreign", "what answers there is no noodle")
            with measures or contextlib.nullcontext():  # what is timed has the way for itself
                round_trip_seconds = _round_trip(host, port)
                outcome, bytes_per_second = _bandwidth(connection, token, BANDWIDTH_BYTES if measures else 1)
    except HTTP_ERRORS as error:
        return _failed(target, *trouble(error))
    details: dict[Outcome, str] = {
        "locked": "it does not take this cluster token",
        "foreign": "it is noodle, but does not know the question: another version",
    }
    return ConnectionResult(
        target.name,
        target.url,
        outcome,
        details.get(outcome, ""),
        str(health.get("machine") or target.machine),
        str(health.get("version") or target.version),
        target.model_digest,
        round_trip_seconds,
        bytes_per_second,
        clock_ahead_seconds,
        str(health.get("status") or ""),
    )


def try_valkey(target: Target, password: str) -> ConnectionResult:
    """Try Valkey: whether it answers, wants a password, and takes ours."""
    parts = urlsplit(target.url)
    try:
        round_trip_seconds = _round_trip(parts.hostname or "", parts.port or 6379)
        with contextlib.closing(
            socket.create_connection((parts.hostname or "", parts.port or 6379), CONNECT_SECONDS)
        ) as connection:
            connection.settimeout(ANSWER_SECONDS)
            with connection.makefile("rb") as answers:
                outcome, detail = _valkey_lock(connection, answers, unquote(parts.username or ""), password)
    except OSError as error:
        return _failed(target, *trouble(error))
    return ConnectionResult(
        target.name, target.url, outcome, detail, machine=target.machine, round_trip_seconds=round_trip_seconds
    )


def trouble(error: Exception) -> tuple[Outcome, str]:
    """What an error of a connection means."""
    if isinstance(error, socket.gaierror):
        return "no_such_name", "the name does not resolve here"
    if isinstance(error, ConnectionRefusedError):
        return "refused", "nothing listens on that port"
    if isinstance(error, TimeoutError):
        return "silent", f"no answer in {CONNECT_SECONDS:.0f} s"
    if isinstance(error, OSError) and error.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EACCES, errno.EPERM):
        return "no_way", f"{error.strerror}"
    return "foreign", f"the connection broke: {reason_of(error)}"


def _failed(target: Target, outcome: Outcome, detail: str) -> ConnectionResult:
    return ConnectionResult(
        target.name,
        target.url,
        outcome,
        detail,
        target.machine,
        target.version,
        target.model_digest,
    )


def _round_trip(host: str, port: int) -> float:
    """Seconds of the shortest of some handshakes: one trip there and back each."""
    seconds = []
    for _ in range(ROUND_TRIPS):
        began = time.monotonic()
        socket.create_connection((host, port), CONNECT_SECONDS).close()
        seconds.append(time.monotonic() - began)
    return min(seconds)


def _health(connection: HttpConnection, token: str) -> tuple[dict[str, Any] | None, float | None]:
    """What /health says, None when it is not noodle's; and how far that clock is ahead."""
    response = send_request(connection, "GET", "/health", token=token)
    content = response.read(HEALTH_BYTES)
    now = time.time()
    response.close()
    date = response.getheader("Date")
    ahead_seconds = None
    if date:
        with contextlib.suppress(ValueError, TypeError):  # then there is no clock to compare
            ahead_seconds = parsedate_to_datetime(date).timestamp() + 0.5 - now  # whole seconds, the middle of one
    try:
        answer = json.loads(content)
    except ValueError:
        return None, ahead_seconds
    is_ours = isinstance(answer, dict) and "service" in answer and "status" in answer
    return answer if is_ours else None, ahead_seconds


def _bandwidth(connection: HttpConnection, token: str, byte_count: int) -> tuple[Outcome, float | None]:
    """Whether the token opens the locked route, and how fast its bytes come."""
    response = send_request(connection, "GET", f"{BYTES_PATH}?count={byte_count}", token=token)
    if response.status != 200:
        return ("locked" if response.status == 401 else "foreign"), None
    first = response.read1(READ_BYTES)
    began = time.monotonic()
    taken_bytes = 0
    end = began + BANDWIDTH_SECONDS
    while first and time.monotonic() < end and (piece := response.read1(READ_BYTES)):
        taken_bytes += len(piece)
    seconds = time.monotonic() - began
    return "open", taken_bytes / seconds if taken_bytes >= SMALLEST_TIMED_BYTES and seconds > 0 else None


def _valkey_lock(connection: socket.socket, answers: Any, user: str, password: str) -> tuple[Outcome, str]:
    said = _ask_valkey(connection, answers, "PING")
    if said.startswith("+PONG"):
        return "unlocked", "it takes commands from everyone, without a password"
    if not said.startswith("-NOAUTH"):
        return "foreign", f"it answers {said[:60]!r}, which is not Valkey's"
    if not password:
        return "locked", "it wants a password, and none is known here"
    said = _ask_valkey(connection, answers, "AUTH", *([user] if user else []), password)
    if not said.startswith("+OK"):
        return "locked", f"it refuses this password{f' of user {user}' if user else ''}"
    if user and not _ask_valkey(connection, answers, "GET", STRANGE_KEY).startswith("-NOPERM"):
        return "open", f"the user {user} may read keys that are not noodle's"
    return "open", ""


def _ask_valkey(connection: socket.socket, answers: Any, *words: str) -> str:
    """One command as Valkey's protocol has it; the first line of the answer, empty when it closes."""
    encoded = [word.encode() for word in words]
    parts = [b"*%d\r\n" % len(encoded), *(b"$%d\r\n%s\r\n" % (len(word), word) for word in encoded)]
    connection.sendall(b"".join(parts))
    return bytes(answers.readline(4096)).decode(errors="replace").rstrip("\r\n")
