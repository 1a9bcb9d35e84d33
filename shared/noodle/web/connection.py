"""One client's connection as a service's threads see it: how long it is waited for, and whether it is still there.

Knows a socket and its deadlines; not HTTP's syntax, no routes. `doors.py` makes it, a route finds it in its request.
"""

from __future__ import annotations

import select
import socket
import struct
import threading
import time
from typing import Any

from noodle.errors import TooManyRequests

SEND_SECONDS = 10.0  # a client that makes no room for what is sent to it so long has left
SEND_BUFFER_BYTES = 128 << 10  # of the kernel for one client that does not read; 25 MB/s over 5 ms of Wi-Fi
BODY_SECONDS = 120.0  # a whole body, from the check of the key on: 8 MB over a Wi-Fi of 1 Mbit/s take 67
BODY_MOMENT_SECONDS = 0.25  # a body that follows its head closely takes no place among the slow ones
HALF_CLOSED_PROBE_SECONDS = 5.0
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class ClientConnection(socket.socket):
    """A socket that waits for a body only if its client was let in, and never longer than BODY_SECONDS in all.

    A stranger's body is not waited for at all: what has not come is a TimeoutError at once. Each write may take
    SEND_SECONDS, then it is a TimeoutError. `slow_bodies` are the places for clients whose body takes longer than a
    moment, shared by all connections of a service, so that these never have all of its threads.
    """

    def __init__(self, accepted: socket.socket, slow_bodies: threading.Semaphore) -> None:
        super().__init__(accepted.family, accepted.type, accepted.proto, fileno=accepted.detach())
        self.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        self._slow_bodies = slow_bodies
        self._has_place = False
        self.begin()

    def begin(self) -> None:
        """A new request: whoever sends it is a stranger until let in."""
        self.http_request: Any = None  # gunicorn's, when its head has been read
        self.is_authenticated = False
        self.body_deadline: float | None = 0.0  # None: a streamed body, bounded by the silence between its frames
        self._waits_freely_until = 0.0
        self._probed_at = float("-inf")
        self.__dict__.pop("recv", None)
        self.settimeout(SEND_SECONDS)

    def authenticate(self) -> None:
        """The request showed a key, or needs none here: its body is waited for, its connection may be kept."""
        if self.is_authenticated:
            return
        now = time.monotonic()
        self.is_authenticated = True
        self.body_deadline, self._waits_freely_until = now + BODY_SECONDS, now + BODY_MOMENT_SECONDS

    def stream(self) -> None:
        """The body is a stream without an end: from now on only the socket's own timeout holds."""
        self.body_deadline = None
        # a token waits for each read of a hop: without a deadline to look at, the socket's own way is enough
        self.recv = super().recv  # type: ignore[method-assign, assignment]  # of this connection, until its next request

    def received_ahead(self) -> bytes:
        """What came of the body together with the head; whoever reads the body itself begins with it."""
        ahead: bytes = self.http_request.unreader.take_buffered()
        return ahead

    def end(self) -> None:
        """The request is answered: give back what it held."""
        if self._has_place:
            self._has_place = False
            self._slow_bodies.release()

    def recv(self, size: int, flags: int = 0) -> bytes:
        """Bytes of the request, b"" at its end; TimeoutError after the deadline, TooManyRequests without a place."""
        if self.body_deadline is not None and not self._comes_by(self.body_deadline):
            raise TimeoutError("the rest of the body did not come in time")
        return super().recv(size, flags)

    def receive_now(self, size: int) -> bytes | None:
        """What has come already, b"" at the end, None when nothing has; for who watches many connections."""
        try:
            return super().recv(size, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None

    def has_gone(self, *, takes_continue: bool) -> bool:
        """Whether the client is not there any more; costs one system call and takes no bytes.

        A client that has sent all it wants and shut its sending side still waits for its answer, but looks like one
        that closed: both are the end of what comes. They answer differently to bytes sent: one that closed refuses
        them with a reset. So a client at its end is sent "100 Continue", which HTTP/1.1 lets a server send at any time
        and a client skip (`takes_continue`: not to be sent to HTTP/1.0), and the next look tells. So one that closed
        is noticed at the second look; one of HTTP/1.0 only when its answer is sent.
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
        """Let the kernel forget what was not read, and the client see that its answer is not whole."""
        self.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # on, 0 seconds
        self.close()

    def _comes_by(self, deadline: float) -> bool:
        """Wait until there is something to receive."""
        if self._poll(select.POLLIN, self._waits_freely_until - time.monotonic()):
            return True
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            return False
        if not self._has_place:
            if not self._slow_bodies.acquire(blocking=False):
                raise TooManyRequests(
                    "As many slow bodies are being received as may at once.",
                    cure="Send it again.",
                    retry_after_seconds=5,
                )
            self._has_place = True
        return bool(self._poll(select.POLLIN, remaining))

    def _poll(self, events: int, seconds: float) -> list[tuple[int, int]]:
        waiter = select.poll()
        waiter.register(self, events)
        return waiter.poll(max(0.0, seconds) * 1000)
