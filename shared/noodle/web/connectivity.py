"""Tests connections from this process to services: whether they are reachable, how fast, and what answers."""

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

import msgspec
from msgspec import Struct, field

from noodle.http_client import HTTP_ERRORS, HttpConnection, connect, reason_of, send_request

CONNECT_SECONDS = 3.0  # longest wait for a connection; TCP repeats an unanswered packet twice in this time
ANSWER_SECONDS = 3.0  # longest wait for an answer
ROUND_TRIPS = 5  # handshakes of one measurement; the shortest counts
BANDWIDTH_BYTES = 8 << 20  # most bytes of one bandwidth measurement
BANDWIDTH_SECONDS = 1.0  # longest bandwidth measurement
SMALLEST_TIMED_BYTES = 256 << 10  # fewest bytes that give a bandwidth
TRY_ALL_SECONDS = 10.0  # longest test of all targets
READ_BYTES = 64 << 10  # bytes of one read
HEALTH_BYTES = 1 << 20  # largest answer of /health
FOREIGN_KEY = "no-key-of-the-cluster"
BYTES_PATH = "/doctor/bytes"
CONNECTIVITY_PATH = "/doctor/reach"

Outcome = Literal[
    "open",  # it answers and accepts our secret
    "refused",  # the machine answers, but nothing listens on the port
    "silent",  # packets are dropped, or the machine is off
    "no_such_name",
    "no_way",  # this machine has no route to the address
    "locked",  # it answers but rejects our secret
    "unlocked",  # it accepts everyone: Valkey without a password
    "foreign",  # another program, or a version of noodle without the route
]


class Target(Struct, frozen=True):
    """A service to test."""

    name: str  # "coordinator", "planner", "valkey" or "stage <id>"
    url: str
    machine: str = ""
    version: str = ""  # from its report, before it is tested
    model_digest: str = ""


class ConnectionResult(Target, frozen=True, kw_only=True):
    """The result of one test."""

    outcome: Outcome
    detail: str = ""  # in words, unless it is open as it should be
    round_trip_seconds: float | None = None
    bytes_per_second: float | None = None  # from there to here
    clock_ahead_seconds: float | None = None  # its clock minus ours, to a second
    status: str = ""  # of its /health


class ConnectivityReport(Struct, frozen=True):
    """A service's answer to CONNECTIVITY_PATH: its identity and the services that it reaches."""

    name: str
    machine: str
    version: str
    model_digest: str
    results: tuple[ConnectionResult, ...] = field(name="reached")


def try_targets(
    targets: Sequence[Target], token: str, valkey_password: str, measures: threading.Lock
) -> tuple[ConnectionResult, ...]:
    """Test services at the same time, and their bandwidth one after the other."""

    def try_one(target: Target) -> ConnectionResult:
        if target.name == "valkey":
            return try_valkey(target, valkey_password)
        return try_service(target, token, measures=measures)

    return try_all(targets, try_one)


def try_all(targets: Sequence[Target], try_one: Callable[[Target], ConnectionResult]) -> tuple[ConnectionResult, ...]:
    """Test all targets at the same time; one that takes longer than TRY_ALL_SECONDS counts as silent."""
    done: queue.SimpleQueue[tuple[int, ConnectionResult]] = queue.SimpleQueue()

    def run(index: int) -> None:
        done.put((index, try_one(targets[index])))

    for index in range(len(targets)):
        threading.Thread(target=run, args=(index,), daemon=True).start()
    found: dict[int, ConnectionResult] = {}
    end = time.monotonic() + TRY_ALL_SECONDS
    while len(found) < len(targets):
        try:
            index, result = done.get(timeout=max(0.0, end - time.monotonic()))
        except queue.Empty:
            break
        found[index] = result
    late = f"not finished after {TRY_ALL_SECONDS:.0f} s"
    return tuple(found.get(index) or _result(target, "silent", late) for index, target in enumerate(targets))


def try_service(target: Target, token: str, *, measures: threading.Lock | None = None) -> ConnectionResult:
    """Test an HTTP service of noodle; with `measures`, a lock, also time its bandwidth."""
    parts = urlsplit(target.url)
    host, port = parts.hostname or "", parts.port or 80
    try:
        opened = connect(target.url, connect_seconds=CONNECT_SECONDS, answer_seconds=ANSWER_SECONDS)
        with contextlib.closing(opened) as connection:
            health, clock_ahead_seconds = _health(connection, token)
            if health is None:
                return _result(target, "foreign", "another program answers there, not noodle")
            with measures or contextlib.nullcontext():  # one measurement at a time
                round_trip_seconds = _round_trip(host, port)
                outcome, bytes_per_second = _bandwidth(connection, token, BANDWIDTH_BYTES if measures else 1)
    except HTTP_ERRORS as error:
        return _result(target, *classify_error(error))
    details: dict[Outcome, str] = {
        "locked": "it rejects this cluster token",
        "foreign": "it is a version of noodle without this route",
    }
    named = msgspec.structs.replace(
        target,
        machine=str(health.get("machine") or target.machine),
        version=str(health.get("version") or target.version),
    )
    return _result(
        named,
        outcome,
        details.get(outcome, ""),
        round_trip_seconds=round_trip_seconds,
        bytes_per_second=bytes_per_second,
        clock_ahead_seconds=clock_ahead_seconds,
        status=str(health.get("status") or ""),
    )


def try_valkey(target: Target, password: str) -> ConnectionResult:
    """Test Valkey: whether it answers, requires a password, and accepts ours."""
    parts = urlsplit(target.url)
    address = (parts.hostname or "", parts.port or 6379)
    try:
        round_trip_seconds = _round_trip(*address)
        with contextlib.closing(socket.create_connection(address, CONNECT_SECONDS)) as connection:
            connection.settimeout(ANSWER_SECONDS)
            with connection.makefile("rb") as answers:
                outcome, detail = _valkey_lock(connection, answers, unquote(parts.username or ""), password)
    except OSError as error:
        return _result(target, *classify_error(error))
    return _result(target, outcome, detail, round_trip_seconds=round_trip_seconds)


def classify_error(error: Exception) -> tuple[Outcome, str]:
    if isinstance(error, socket.gaierror):
        return "no_such_name", "the name does not resolve here"
    if isinstance(error, ConnectionRefusedError):
        return "refused", "nothing listens on that port"
    if isinstance(error, TimeoutError):
        return "silent", f"no answer in {CONNECT_SECONDS:.0f} s"
    if isinstance(error, OSError) and error.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EACCES, errno.EPERM):
        return "no_way", f"{error.strerror}"
    return "foreign", f"the connection broke: {reason_of(error)}"


def _result(target: Target, outcome: Outcome, detail: str, **measured: Any) -> ConnectionResult:
    return ConnectionResult(outcome=outcome, detail=detail, **msgspec.structs.asdict(target), **measured)


def _round_trip(host: str, port: int) -> float:
    """Return the seconds of the shortest of ROUND_TRIPS handshakes."""
    seconds = []
    for _ in range(ROUND_TRIPS):
        began = time.monotonic()
        socket.create_connection((host, port), CONNECT_SECONDS).close()
        seconds.append(time.monotonic() - began)
    return min(seconds)


def _health(connection: HttpConnection, token: str) -> tuple[dict[str, Any] | None, float | None]:
    """Return the /health object, None unless it is noodle's, and how far that clock is ahead."""
    response = send_request(connection, "GET", "/health", token=token)
    content = response.read(HEALTH_BYTES)
    now = time.time()
    response.close()
    date = response.getheader("Date")
    ahead_seconds = None
    if date:
        with contextlib.suppress(ValueError, TypeError):  # then there is no clock to compare with
            ahead_seconds = parsedate_to_datetime(date).timestamp() + 0.5 - now  # Date has whole seconds
    try:
        answer = json.loads(content)
    except ValueError:
        return None, ahead_seconds
    is_ours = isinstance(answer, dict) and "service" in answer and "status" in answer
    return answer if is_ours else None, ahead_seconds


def _bandwidth(connection: HttpConnection, token: str, byte_count: int) -> tuple[Outcome, float | None]:
    """Whether the service accepts the token, and the bytes per second of its answer."""
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
    answer = _ask_valkey(connection, answers, "PING")
    if answer.startswith("+PONG"):
        return "unlocked", "it accepts commands from everyone, without a password"
    if not answer.startswith("-NOAUTH"):
        return "foreign", f"it answers {answer[:60]!r}, which is not Valkey's"
    if not password:
        return "locked", "it requires a password, and this machine has none"
    answer = _ask_valkey(connection, answers, "AUTH", *([user] if user else []), password)
    if not answer.startswith("+OK"):
        return "locked", f"it refuses this password{f' of user {user}' if user else ''}"
    if user and not _ask_valkey(connection, answers, "GET", FOREIGN_KEY).startswith("-NOPERM"):
        return "open", f"the user {user} may read keys that are not noodle's"
    return "open", ""


def _ask_valkey(connection: socket.socket, answers: Any, *words: str) -> str:
    """Send one command in Valkey's protocol; return the first line of the answer, empty when it closes."""
    encoded = [word.encode() for word in words]
    parts = [b"*%d\r\n" % len(encoded), *(b"$%d\r\n%s\r\n" % (len(word), word) for word in encoded)]
    connection.sendall(b"".join(parts))
    return bytes(answers.readline(4096)).decode(errors="replace").rstrip("\r\n")
