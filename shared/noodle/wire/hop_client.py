"""The client side of a direct hop: a streamed POST with its answer, and a streamed GET of results.

The server side is `services/stage/transport/hop_server.py`.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

from noodle.errors import LinkLost, WireError
from noodle.http_client import HTTP_ERRORS, HttpConnection, connect, message_of, reason_of
from noodle.threads import start_loop
from noodle.wire.chunked import ChunkStream
from noodle.wire.frames import encode_frame, read_frame
from noodle.wire.messages import HopMessage, KeepAlive

log = logging.getLogger(__name__)

KEEP_ALIVE_SECONDS = 1.0  # longest time without a frame, in both directions
SILENCE_SECONDS = 3.0  # silence after which the connection is lost: three missed keep-alives
CONNECT_TIMEOUT_SECONDS = 3.0  # longest wait for a connection and the head of its answer
RECONNECT_FIRST_SECONDS = 0.1  # first wait between two attempts to connect
RECONNECT_LAST_SECONDS = 1.0  # longest wait between two attempts to connect
SEND_TIMEOUT_SECONDS = 15.0  # back-pressure after which the connection is lost
MAXIMUM_ANSWER_BYTES = 32 << 20  # largest frame from a stage to its caller; it holds no activations
MAXIMUM_REFUSAL_BYTES = 64 << 10  # largest body of a refusal
SMALL_FRAME_BYTES = 64 << 10  # up to this size, one copy and one system call are cheaper than three calls

PLAN_VERSION_HEADER = "X-Noodle-Plan-Version"
COORDINATOR_EPOCH_HEADER = "X-Noodle-Coordinator-Epoch"


class _FrameStream:
    """A connection whose answer is a stream of frames, read in a thread of its own until it ends or is lost."""

    def __init__(
        self, url: str, cluster_token: str, on_message: Callable[[HopMessage], None], on_lost: Callable[[str], None]
    ) -> None:
        self.url = url
        self._token = cluster_token
        self._on_message = on_message
        self._on_lost = on_lost
        self._lost = threading.Event()
        self._losing = threading.Lock()
        self._socket: socket.socket | None = None  # a duplicate with its own timeout, for writing
        self._connection: HttpConnection | None = None

    def _open(self, method: str, path: str, headers: Mapping[str, str]) -> None:
        """Connect and read the head of the answer; raises LinkLost with the reason."""
        try:
            connection = self._connection = connect(
                self.url, connect_seconds=CONNECT_TIMEOUT_SECONDS, answer_seconds=CONNECT_TIMEOUT_SECONDS
            )
            self._socket = connection.sock.dup()
            self._socket.settimeout(SEND_TIMEOUT_SECONDS)
            connection.putrequest(method, path, skip_accept_encoding=True)
            connection.putheader("Authorization", f"Bearer {self._token}")
            for name, value in headers.items():
                connection.putheader(name, value)
            connection.endheaders()
            answer = connection.getresponse()
            if answer.status != 200:
                refusal = message_of(answer.read(MAXIMUM_REFUSAL_BYTES))
                raise LinkLost(f"{self.url} refused {path} with {answer.status}: {refusal}")
            connection.sock.settimeout(SILENCE_SECONDS)
        except HTTP_ERRORS as error:
            self.close()
            raise LinkLost(f"{self.url} cannot be reached: {_reason(error)}.") from error
        except LinkLost:
            self.close()
            raise
        self._answer = answer
        threading.Thread(target=self._read, name=f"read {path}", daemon=True).start()

    def _read(self) -> None:
        try:
            chunks = ChunkStream(self._answer.fp.read1)  # its buffer holds what arrived with the head
            while (frame := read_frame(chunks.read, MAXIMUM_ANSWER_BYTES)) is not None:
                self._on_message(frame[0])
            self._lose("the other end closed it")
        except (*HTTP_ERRORS, WireError, ValueError, AttributeError) as error:
            # ValueError and AttributeError: close() closed http.client's file during the read
            self._lose(_reason(error))
        except Exception as error:  # on_message failed: its owner learns of it by on_lost, and reconnects
            log.exception("a message from %s could not be handled", self.url)
            self._lose(f"a message could not be handled: {type(error).__name__}")

    def _lose(self, reason: str) -> None:
        """Call `on_lost` once, and only if `close` was not called."""
        with self._losing:
            if self._lost.is_set():
                return
            self._lost.set()
        self._shut()
        self._on_lost(f"{self.url}: {reason}")

    def close(self) -> None:
        """Close the connection; `on_lost` is not called."""
        self._lost.set()
        self._shut()

    def _shut(self) -> None:
        if self._socket is not None:
            try:
                self._socket.shutdown(socket.SHUT_RDWR)
            except OSError:
                log.debug("%s was already closed", self.url)
            self._socket.close()
        if self._connection is not None:
            self._connection.close()


class HopConnection(_FrameStream):
    """Frames to the next stage; `on_message` receives its state and that of the stages after it.

    `on_round_trip` receives the seconds between a keep-alive and its echo, by this process's clock.
    """

    def __init__(
        self,
        url: str,
        cluster_token: str,
        on_message: Callable[[HopMessage], None],
        on_lost: Callable[[str], None],
        on_round_trip: Callable[[float], None] = lambda _: None,
    ) -> None:
        super().__init__(url, cluster_token, self._receive, on_lost)
        self._forward, self._on_round_trip = on_message, on_round_trip
        self._asked = self._answered = 0
        self._asked_at = 0.0

    def open(self, plan_version: int) -> None:
        """Open the hop for one plan version; raises LinkLost when the stage is unreachable or not ready for it."""
        self._writing = threading.Lock()
        self._last_sent = time.monotonic()
        headers = {
            "Transfer-Encoding": "chunked",
            "Content-Type": "application/octet-stream",
            PLAN_VERSION_HEADER: str(plan_version),
        }
        self._open("POST", "/hop", headers)
        threading.Thread(target=self._beat, name="keep alive", daemon=True).start()

    def send(self, header: HopMessage, body: bytes | memoryview = b"") -> None:
        """Write one frame; blocks under back-pressure; raises LinkLost."""
        head, body = encode_frame(header, body)
        body_bytes = body.nbytes if isinstance(body, memoryview) else len(body)
        start = b"%x\r\n" % (len(head) + body_bytes) + head
        connection = self._socket
        if connection is None:
            raise LinkLost(f"{self.url} is not open.")
        try:
            with self._writing:
                if body_bytes < SMALL_FRAME_BYTES:
                    connection.sendall(b"".join((start, body, b"\r\n")))
                else:
                    connection.sendall(start)
                    connection.sendall(body)
                    connection.sendall(b"\r\n")
                self._last_sent = time.monotonic()
        except OSError as error:
            self._lose(_reason(error))
            raise LinkLost(f"{self.url}: {_reason(error)}") from error

    def _receive(self, message: HopMessage) -> None:
        if isinstance(message, KeepAlive) and message.echo == self._asked > self._answered:
            self._answered = self._asked
            self._on_round_trip(time.monotonic() - self._asked_at)
        self._forward(message)

    def _beat(self) -> None:
        """Keep the connection alive, and ask for one echo a second, also under load."""
        while not self._lost.wait(KEEP_ALIVE_SECONDS / 2):
            now = time.monotonic()
            asks = self._answered == self._asked and now - self._asked_at >= KEEP_ALIVE_SECONDS
            if asks or now - self._last_sent >= KEEP_ALIVE_SECONDS / 2:
                if asks:
                    self._asked_at = now
                    self._asked += 1
                try:
                    self.send(KeepAlive(echo=self._asked if asks else 0))
                except LinkLost as error:
                    log.debug("keep-alive not sent: %s", error)
                    return


class ResultsConnection(_FrameStream):
    """Results of the last stage, received by `on_message`."""

    def open(self, plan_version: int, coordinator_epoch: int) -> None:
        """Receive the results of one plan; raises LinkLost when the stage is unreachable, not the last or not ready."""
        headers = {PLAN_VERSION_HEADER: str(plan_version), COORDINATOR_EPOCH_HEADER: str(coordinator_epoch)}
        self._open("GET", "/results", headers)


Connection = TypeVar("Connection", bound=_FrameStream)


class KeptOpen(Generic[Connection]):
    """Keeps one connection open, and reconnects with back-off until it is closed.

    `open_one` receives the function to call when the connection is lost, and raises LinkLost when it cannot connect.
    `changed(reason)` is called at each success (with an empty reason), loss and failure.
    """

    def __init__(
        self,
        name: str,
        service_name: str,
        open_one: Callable[[Callable[[str], None]], Connection],
        changed: Callable[[str], None],
    ) -> None:
        self._open_one, self._changed = open_one, changed
        self.connection: Connection | None = None  # while it is open
        self._changing = threading.Lock()
        self._lost = threading.Event()
        self._closed = threading.Event()
        self.losses = 0  # of open connections
        start_loop(name, self._keep_open, service_name)

    def close(self) -> None:
        """Close the connection and stop reconnecting; `changed` is not called again."""
        self._closed.set()
        self._lost.set()
        if (connection := self.connection) is not None:
            connection.close()

    def _keep_open(self) -> None:
        wait_seconds = RECONNECT_FIRST_SECONDS
        while not self._closed.is_set():
            self._lost.clear()
            if self._closed.is_set():  # closed just before the event was cleared
                return
            try:
                connection = self._open_one(self._when_lost)
            except LinkLost as error:
                self._notify(str(error))
                self._closed.wait(wait_seconds)
                wait_seconds = min(wait_seconds * 2, RECONNECT_LAST_SECONDS)
                continue
            wait_seconds = RECONNECT_FIRST_SECONDS
            with self._changing:
                is_open = not self._lost.is_set()  # it may be lost already
                self.connection = connection if is_open else None
            if is_open:
                self._notify("")
            self._lost.wait()
            connection.close()
            self._closed.wait(wait_seconds)

    def _when_lost(self, reason: str) -> None:
        with self._changing:
            self.losses += 1
            self.connection = None
            self._lost.set()
        self._notify(reason)

    def _notify(self, reason: str) -> None:
        if not self._closed.is_set():
            self._changed(reason)


def _reason(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return f"silent for {SILENCE_SECONDS:.0f} seconds"
    return reason_of(error)
