"""The client's end of the direct way over a hop: a streamed POST with its answer, a streamed GET of results.

Knows frames and connections, not what is in a step. The server's end is `services/stage/transport/hop_server.py`.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Generic, Protocol, TypeVar

from noodle.errors import LinkLost, WireError
from noodle.http_client import HTTP_ERRORS, HttpConnection, connect, message_of, reason_of
from noodle.threads import start_loop
from noodle.wire.chunked import ChunkStream
from noodle.wire.frames import encode_frame, read_frame
from noodle.wire.messages import HopMessage, KeepAlive

log = logging.getLogger(__name__)

KEEP_ALIVE_SECONDS = 1.0  # a frame at least this often, both ways
SILENCE_SECONDS = 3.0  # three missed keep-alives: the other end is lost
CONNECT_TIMEOUT_SECONDS = 3.0
RECONNECT_FIRST_SECONDS = 0.1
RECONNECT_LAST_SECONDS = 1.0  # between two tries to open a connection
SEND_TIMEOUT_SECONDS = 15.0  # back-pressure this long is a loss
MAXIMUM_ANSWER_BYTES = 32 << 20  # of a frame from a stage back to its caller: no activations among them
MAXIMUM_REFUSAL_BYTES = 64 << 10
SMALL_FRAME_BYTES = 64 << 10  # below it, one copy and one system call are cheaper than three calls

PLAN_VERSION_HEADER = "X-Noodle-Plan-Version"
COORDINATOR_EPOCH_HEADER = "X-Noodle-Coordinator-Epoch"


class _FrameStream:
    """A connection whose answer is a stream of frames, read by a thread of its own until it ends or is lost."""

    def __init__(
        self,
        url: str,
        cluster_token: str,
        on_message: Callable[[HopMessage], None],
        on_lost: Callable[[str], None],
    ) -> None:
        self.url = url
        self._token = cluster_token
        self._on_message = on_message
        self._on_lost = on_lost
        self._lost = threading.Event()
        self._losing = threading.Lock()
        self._socket: socket.socket | None = None  # for writing: the same connection with a timeout of its own
        self._connection: HttpConnection | None = None

    def _open(self, method: str, path: str, headers: Mapping[str, str]) -> None:
        """Connect and read the answer's head; raises LinkLost with what the other end said."""
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
            chunks = ChunkStream(self._answer.fp.read1)  # what came behind the head is in there
            while (frame := read_frame(chunks.read, MAXIMUM_ANSWER_BYTES)) is not None:
                self._on_message(frame[0])
            self._lose("the other end closed it")
        except (*HTTP_ERRORS, WireError, ValueError, AttributeError) as error:
            # ValueError and AttributeError: http.client's file was closed under the read by close()
            self._lose(_reason(error))
        except Exception as error:  # whoever was told failed: the owner hears of it, and the connection begins anew
            log.exception("a message from %s could not be taken", self.url)
            self._lose(f"a message could not be taken: {type(error).__name__}")

    def _lose(self, reason: str) -> None:
        """Say once, and only if nobody closed it on purpose, that the connection is gone."""
        with self._losing:
            if self._lost.is_set():
                return
            self._lost.set()
        self._shut()
        self._on_lost(f"{self.url}: {reason}")

    def close(self) -> None:
        """End the connection on purpose: `on_lost` is not called."""
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
    """Frames down to the next stage; what it says of itself and of those behind it comes back by `on_message`.

    `on_round_trip` is told the seconds between a keep-alive and its echo, by this process's clock alone.
    """

    def __init__(
        self,
        url: str,
        cluster_token: str,
        on_message: Callable[[HopMessage], None],
        on_lost: Callable[[str], None],
        on_round_trip: Callable[[float], None] = lambda _: None,
    ) -> None:
        super().__init__(url, cluster_token, self._heard, on_lost)
        self._tell, self._on_round_trip = on_message, on_round_trip
        self._asked = self._answered = 0
        self._asked_at = 0.0

    def open(self, plan_version: int) -> None:
        """Open the hop for one plan version; raises LinkLost when the stage is not there or not ready for it."""
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
        """Write one frame; blocks while the other end does not read (back-pressure); LinkLost when it is gone."""
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

    def _heard(self, message: HopMessage) -> None:
        if isinstance(message, KeepAlive) and message.echo == self._asked > self._answered:
            self._answered = self._asked
            self._on_round_trip(time.monotonic() - self._asked_at)
        self._tell(message)

    def _beat(self) -> None:
        """Keep the connection alive, and ask for an echo each second, under load too; one question at a time."""
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
    """The results of the last stage, by `on_message`."""

    def open(self, plan_version: int, coordinator_epoch: int) -> None:
        """Take the results of one plan; raises LinkLost when the stage is not there, not last or not ready."""
        headers = {PLAN_VERSION_HEADER: str(plan_version), COORDINATOR_EPOCH_HEADER: str(coordinator_epoch)}
        self._open("GET", "/results", headers)


class Opened(Protocol):
    """A connection that stands."""

    def close(self) -> None:
        """End it on purpose."""


Connection = TypeVar("Connection", bound=Opened)


class KeptOpen(Generic[Connection]):
    """Keeps one connection open, trying again with back-off until it is closed.

    `open_one` gets what to call when the connection is lost, and raises LinkLost when there is none to be had.
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
        self._connection: Connection | None = None
        self._changing = threading.Lock()
        self._lost = threading.Event()
        self._closed = threading.Event()
        self.losses = 0  # of connections that stood
        start_loop(name, self._keep_open, service_name)

    @property
    def connection(self) -> Connection | None:
        """The connection that stands now."""
        return self._connection

    def close(self) -> None:
        """Close it and stop trying; nothing more is said."""
        self._closed.set()
        self._lost.set()
        connection = self._connection
        if connection is not None:
            connection.close()

    def _keep_open(self) -> None:
        wait_seconds = RECONNECT_FIRST_SECONDS
        while not self._closed.is_set():
            self._lost.clear()
            if self._closed.is_set():  # between the look above and the clearing
                return
            try:
                connection = self._open_one(self._when_lost)
            except LinkLost as error:
                self._say(str(error))
                self._closed.wait(wait_seconds)
                wait_seconds = min(wait_seconds * 2, RECONNECT_LAST_SECONDS)
                continue
            wait_seconds = RECONNECT_FIRST_SECONDS
            with self._changing:
                stands = not self._lost.is_set()  # it may be lost already
                self._connection = connection if stands else None
            if stands:
                self._say("")
            self._lost.wait()
            connection.close()
            self._closed.wait(wait_seconds)

    def _when_lost(self, reason: str) -> None:
        with self._changing:
            self.losses += 1
            self._connection = None
            self._lost.set()
        self._say(reason)

    def _say(self, reason: str) -> None:
        if not self._closed.is_set():
            self._changed(reason)


def _reason(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return f"silent for {SILENCE_SECONDS:.0f} seconds"
    return reason_of(error)
