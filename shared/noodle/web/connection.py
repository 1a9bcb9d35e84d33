"""The connection of one client: deadlines for its body and answer, and whether the client is still there."""

from __future__ import annotations

import select
import socket
import struct
import threading
import time
from typing import Any

from noodle.errors import TooManyRequests

SEND_SECONDS = 10.0  # longest wait for a client that does not read its answer
SEND_BUFFER_BYTES = 128 << 10  # kernel buffer of one client; enough for 25 MB/s over 5 ms of Wi-Fi
BODY_SECONDS = 120.0  # longest wait for a body after the key is checked; 8 MB at 1 Mbit/s take 67
BODY_MOMENT_SECONDS = 0.25  # a body that arrives this soon after its head is not a slow one
HALF_CLOSED_PROBE_SECONDS = 5.0  # between two probes of a client that closed its sending side
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class ClientConnection(socket.socket):
    """A socket that waits for the body of an authenticated client, at most BODY_SECONDS in all.

    The body of an anonymous client is not waited for: bytes that have not arrived are a TimeoutError at once. A write
    that takes longer than SEND_SECONDS is a TimeoutError. `slow_bodies` limits the clients of a service whose bodies
    take longer than a moment, so that they never hold all of its threads.
    """

    def __init__(self, accepted: socket.socket, slow_bodies: threading.Semaphore) -> None:
        super().__init__(accepted.family, accepted.type, accepted.proto, fileno=accepted.detach())
        self.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        self._slow_bodies = slow_bodies
        self._has_place = False
        self.begin()

    def begin(self) -> None:
        """Start a request; its client is anonymous until `authenticate`."""
        self.http_request: Any = None  # gunicorn's request, once its head is parsed
        self.is_authenticated = False
        self.body_deadline: float | None = 0.0  # None: a streamed body, which the socket's timeout bounds
        self._moment_ends_at = 0.0
        self._probed_at = float("-inf")
        self.__dict__.pop("recv", None)
        self.settimeout(SEND_SECONDS)

    def authenticate(self) -> None:
        """The request has a valid key or needs none: wait for its body, and allow its connection to be kept."""
        if self.is_authenticated:
            return
        now = time.monotonic()
        self.is_authenticated = True
        self.body_deadline, self._moment_ends_at = now + BODY_SECONDS, now + BODY_MOMENT_SECONDS

    def stream(self) -> None:
        """The body is an endless stream: from now on only the socket's own timeout applies."""
        self.body_deadline = None
        # each read of a hop delays a token: without a deadline to check, use the socket's own method
        self.recv = super().recv  # type: ignore[method-assign, assignment]  # until the next request

    def received_ahead(self) -> bytes:
        """Take the bytes of the body that arrived with the head, for a route that reads the body itself."""
        ahead: bytes = self.http_request.unreader.take_buffered()
        return ahead

    def end(self) -> None:
        """End a request: release its place among the slow bodies."""
        if self._has_place:
            self._has_place = False
            self._slow_bodies.release()

    def recv(self, size: int, flags: int = 0) -> bytes:
        """Receive bytes, b"" at the end; raises TimeoutError, or TooManyRequests with too many slow bodies."""
        if self.body_deadline is not None and not self._arrives_by(self.body_deadline):
            raise TimeoutError("the rest of the body did not arrive in time")
        return super().recv(size, flags)

    def receive_now(self, size: int) -> bytes | None:
        """Receive without waiting: b"" at the end, None when nothing has arrived."""
        try:
            return super().recv(size, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None

    def has_gone(self, *, takes_continue: bool) -> bool:
        """Whether the client has closed its connection; costs one system call and takes no bytes.

        A client that only shut its sending side still waits for its answer, but looks like one that closed. Only a
        closed one answers bytes with a reset. So both are sent "100 Continue", which HTTP/1.1 allows at any time and
        clients skip (HTTP/1.0 does not: `takes_continue`). The next call then tells them apart; an HTTP/1.0 client
        that closed is noticed when its answer is sent.
        """
        happened = dict(self._poll(select.POLLRDHUP, 0.0)).get(self.fileno(), 0)
        if happened & (select.POLLERR | select.POLLHUP | select.POLLNVAL):
            return True
        now = time.monotonic()
        if happened & select.POLLRDHUP and takes_continue and now - self._probed_at >= HALF_CLOSED_PROBE_SECONDS:
            self._probed_at = now
            try:
                self.send(CONTINUE)
            except OSError:
                return True
        return False

    def reset(self) -> None:
        """Close with a reset: drop unread bytes and show the client that its answer is incomplete."""
        self.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # on, 0 seconds
        self.close()

    def _arrives_by(self, deadline: float) -> bool:
        """Wait until there are bytes to receive; False when the deadline passes first."""
        if self._poll(select.POLLIN, self._moment_ends_at - time.monotonic()):
            return True
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            return False
        if not self._has_place:
            if not self._slow_bodies.acquire(blocking=False):
                raise TooManyRequests(
                    "Too many slow request bodies are being received.",
                    cure="Send the request again.",
                    retry_after_seconds=5,
                )
            self._has_place = True
        return bool(self._poll(select.POLLIN, remaining))

    def _poll(self, events: int, seconds: float) -> list[tuple[int, int]]:
        waiter = select.poll()
        waiter.register(self, events)
        return waiter.poll(max(0.0, seconds) * 1000)
