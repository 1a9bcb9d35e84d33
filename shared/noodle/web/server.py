"""How requests come in: gunicorn's threaded worker, with a thread only for a request whose head has come whole.

Knows connections, heads and gunicorn; no routes and no keys. docs/adr/0010 says why gunicorn's own way is not enough.
"""

from __future__ import annotations

import errno
import http
import logging
import resource
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from functools import partial
from typing import Any

import msgspec
from gunicorn.http.errors import (
    ConfigurationProblem,
    ExpectationFailed,
    ForbiddenProxyRequest,
    InvalidResponseHeader,
    InvalidResponseHeaderName,
    LimitRequestHeaders,
    LimitRequestLine,
    ParseException,
    UnsupportedTransferCoding,
)
from gunicorn.http.parser import RequestParser
from gunicorn.workers.gthread import ThreadWorker

from noodle.errors import InvalidRequest, NoodleError, RequestTooSlow
from noodle.web.connection import ClientConnection
from noodle.web.service import error_object

log = logging.getLogger(__name__)

HEAD_SECONDS = 10.0  # from connecting, or from the first byte of a later request, to the end of its head
HEAD_BYTES = 32 << 10
LINGER_SECONDS = 2.0  # after the last answer, for a client that still sends and would not read it if reset
DRAINED_BYTES = 64 << 20  # of a body that nobody wanted
RECEIVED_BYTES = 64 << 10  # at once
SLOW_BODIES = 16  # at once, and never more than a quarter of the threads
OTHER_FILES = 256  # what a service has open beside its clients' connections

# What gunicorn's parser refuses is a 400 but for these; the last ones are nobody's fault but ours.
REFUSAL_STATUS: dict[type[Exception], int] = {
    LimitRequestLine: 414,
    ExpectationFailed: 417,
    LimitRequestHeaders: 431,
    UnsupportedTransferCoding: 501,
    ForbiddenProxyRequest: 403,
}
OWN_FAULTS = (ConfigurationProblem, InvalidResponseHeader, InvalidResponseHeaderName)


class ClientSession:
    """A client's connection from accept to close; belongs to the main loop, or to the one thread that answers it."""

    def __init__(self, cfg: Any, connection: ClientConnection, client: Any, server: Any) -> None:
        self.sock, self.client, self.server = connection, client, server  # gunicorn's names
        self.parser = RequestParser(cfg, connection, client)
        self.head = bytearray()  # what came of the next request
        self.group: dict[ClientSession, None] | None = None  # None: a thread has it, or it is closed
        self.until = 0.0
        self.drained_bytes = 0
        self.is_stuck = False  # its client took nothing of an answer


class BufferedHeadWorker(ThreadWorker):  # type: ignore[misc]  # gunicorn publishes no types
    """gunicorn's gthread, but every wait for a client that is not let in is the main loop's, which holds no thread.

    A connection waits for its head, is kept for a next request, or lingers after its last answer; in each it has a
    deadline, and when there are too many, the longest waiting of these is closed for a newcomer: strangers first.
    """

    worker_connections: int
    wsgi: Callable[..., Iterable[bytes]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._heads: dict[ClientSession, None] = {}  # oldest first, as in the others
        self._lingering: dict[ClientSession, None] = {}
        self._kept: dict[ClientSession, None] = {}
        self._slow_bodies = threading.Semaphore(min(SLOW_BODIES, self.cfg.threads // 4))

    def init_process(self) -> None:
        """As gunicorn, with as many files allowed as there may be connections, or as many connections as files."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = self.worker_connections + OTHER_FILES
        if soft < wanted:
            soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            self.worker_connections = min(self.worker_connections, max(soft - OTHER_FILES, self.cfg.threads + 1))
        super().init_process()

    def load_wsgi(self) -> None:
        """As gunicorn; what the app answers ends the connection of a stranger, or of who still has a body to send."""
        super().load_wsgi()
        self.wsgi = keeping_known_connections(self.wsgi)

    # ------------------------------------------------------------------ the main loop

    def accept(self, listener: socket.socket) -> None:
        """Take a connection and what it has sent already."""
        try:
            accepted, client = listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                self._make_room()
            elif error.errno not in (errno.EAGAIN, errno.EWOULDBLOCK, errno.ECONNABORTED):
                raise
            return
        self.nr_conns += 1
        if self.nr_conns >= self.worker_connections:
            self._make_room()
        session = ClientSession(self.cfg, ClientConnection(accepted, self._slow_bodies), client, listener.getsockname())
        session.sock.settimeout(0)
        session.until = time.monotonic() + HEAD_SECONDS
        self._receive_head(session, self._heads)

    def finish_request(self, session: ClientSession, future: Future[bool]) -> None:
        """A thread is done with a request: keep the connection, or see its client off."""
        is_kept = not future.cancelled() and future.exception() is None and future.result()
        if session.is_stuck:
            self._close(session)
        elif not is_kept:
            self._linger(session)
        else:
            session.sock.begin()
            session.sock.settimeout(0)
            session.until = time.monotonic() + self.cfg.keepalive
            if begun := session.parser.unreader.take_buffered():
                self._take_head(session, begun)
            else:
                self._receive_head(session, self._kept)

    def murder_keepalived(self, force: bool = False) -> None:
        """Close whatever has waited long enough, or everything that waits; called about each second."""
        now = time.monotonic()
        for group in (self._heads, self._lingering, self._kept):
            for session in [session for session in group if force or session.until <= now]:
                if session.head and not force:
                    self._refuse(session, RequestTooSlow(f"The request's head did not come in {HEAD_SECONDS:.0f} s."))
                else:
                    self._close(session)

    def _cap_keepalive(self, deadline: float) -> None:
        """The service stops: nothing waits beyond the deadline."""
        for group in (self._heads, self._lingering, self._kept):
            for session in group:
                session.until = min(session.until, deadline)

    def _on_readable(self, session: ClientSession, _connection: ClientConnection) -> None:
        if session.group is None:
            return  # closed, for another or by its deadline, since the poller saw it
        if session.group is self._lingering:
            self._drain(session)
        else:
            self._receive_head(session, session.group)

    def _receive_head(self, session: ClientSession, group: dict[ClientSession, None]) -> None:
        try:
            received = session.sock.receive_now(RECEIVED_BYTES)
        except OSError:
            received = b""
        if received is None:
            self._watch(session, group)
        elif received:
            self._take_head(session, received)
        else:
            self._close(session)

    def _take_head(self, session: ClientSession, received: bytes) -> None:
        before = len(session.head)
        session.head += received
        if head_is_whole(session.head, before):
            self._unwatch(session)
            self.enqueue_req(session)
        elif len(session.head) > HEAD_BYTES:
            refusal = InvalidRequest(f"The request's head is longer than {HEAD_BYTES} bytes.")
            refusal.http_status = http.HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
            self._refuse(session, refusal)
        else:
            if session.group is not self._heads:
                session.until = time.monotonic() + HEAD_SECONDS
            self._watch(session, self._heads)

    def _refuse(self, session: ClientSession, error: NoodleError) -> None:
        log.info("a request from %s is refused: %s", _host(session.client), error)
        session.head.clear()
        try:
            session.sock.send(error_answer(error))  # less than the kernel takes of any new connection
        except OSError as gone:
            log.debug("not told: %s", gone)
        self._linger(session)

    def _linger(self, session: ClientSession) -> None:
        """No more answers: let the client read the last one before what it still sends resets the connection."""
        session.until = time.monotonic() + LINGER_SECONDS
        body_deadline = session.sock.body_deadline
        if self.alive and session.sock.is_authenticated and body_deadline is not None and _rest_of_body(session):
            session.until = body_deadline
        try:
            session.sock.settimeout(0)
            session.sock.shutdown(socket.SHUT_WR)
        except OSError:
            self._close(session)
            return
        self._drain(session)

    def _drain(self, session: ClientSession) -> None:
        try:
            received = session.sock.receive_now(RECEIVED_BYTES)
        except OSError:
            received = b""
        session.drained_bytes += len(received or b"")
        if received == b"" or session.drained_bytes > DRAINED_BYTES:
            self._close(session)
        else:
            self._watch(session, self._lingering)

    def _watch(self, session: ClientSession, group: dict[ClientSession, None]) -> None:
        if session.group is group:
            return
        if session.group is None:
            self.poller.register(session.sock, selectors.EVENT_READ, partial(self._on_readable, session))
        else:
            del session.group[session]
        group[session] = None
        session.group = group

    def _unwatch(self, session: ClientSession) -> None:
        if session.group is not None:
            self.poller.unregister(session.sock)
            del session.group[session]
            session.group = None

    def _close(self, session: ClientSession) -> None:
        self._unwatch(session)
        self.nr_conns -= 1
        if session.is_stuck:
            session.sock.reset()
        else:
            session.sock.close()

    def _make_room(self) -> None:
        """Close the longest waiting connection of the least wanted kind."""
        group = self._heads or self._lingering or self._kept
        if group:
            self._close(next(iter(group)))

    # ------------------------------------------------------------------ a thread

    def handle(self, session: ClientSession) -> bool:
        """Answer one request; whether its connection may be kept."""
        connection = session.sock
        http_request = None
        try:
            connection.begin()
            session.parser.unreader.unread(bytes(session.head))
            session.head.clear()
            connection.http_request = http_request = next(session.parser)
            return bool(self.handle_request(http_request, session)) and not body_has_rest(http_request.body)
        except StopIteration:  # gunicorn's word for a connection that can not go on; it has logged why
            return False
        except TimeoutError:
            session.is_stuck = True
            seconds = connection.gettimeout() or 0.0
            log.info("the client at %s took nothing for %.0f s: it is dropped", _host(session.client), seconds)
            return False
        except OSError as error:  # among them gunicorn's NoMoreData
            log.debug("the client at %s has gone: %s", _host(session.client), error)
            return False
        except Exception as error:  # noqa: BLE001  # whatever it is: the client gets an answer, the log the rest
            self.handle_error(http_request, connection, session.client, error)
            return False
        finally:
            connection.end()

    def handle_error(self, http_request: Any, connection: ClientConnection, client: Any, error: Exception) -> None:
        """Say what was wrong with a request that never reached the app, as the app would."""
        answer: NoodleError
        if isinstance(error, ParseException) and not isinstance(error, OWN_FAULTS):
            answer = InvalidRequest(f"The request is not HTTP as it is taken here: {str(error)[:200]}.")
            answer.http_status = REFUSAL_STATUS.get(type(error), 400)
            log.info("a request from %s is refused: %s", _host(client), answer)
        else:
            what = f"{http_request.method} {http_request.path}" if http_request else "a request"
            log.error("%s failed", what, exc_info=error)
            answer = NoodleError(f"An error inside noodle: {type(error).__name__}.", cure="See its log.")
        try:
            connection.sendall(error_answer(answer))
        except OSError as gone:
            log.debug("not told: %s", gone)


def head_is_whole(head: bytearray, before: int) -> bool:
    """Whether gunicorn's parser has all it needs, to take or to refuse; the first `before` bytes were looked at.

    A line that ends without a carriage return makes it whole: the parser refuses it there.
    """
    newline = head.find(b"\n", before)
    while newline >= 0:
        if newline == 0 or head[newline - 1 : newline] != b"\r" or head[newline - 3 : newline] == b"\r\n\r":
            return True
        newline = head.find(b"\n", newline + 1)
    return False


def keeping_known_connections(application: Callable[..., Iterable[bytes]]) -> Callable[..., Iterable[bytes]]:
    """The app, with "Connection: close" on each answer after which the connection is not kept.

    So one connection of a stranger gets one answer, which the kernel takes at once; and nobody's body is read away
    on a thread after the answer. A streamed body's connection ends too, but unsaid: Python's http.client gives the
    socket of a connection that will close away, and the hop's client needs it.
    """

    def with_close(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        connection: ClientConnection = environ["gunicorn.socket"]

        def start(status: str, headers: list[tuple[str, str]], *error: Any) -> Any:
            http_request = connection.http_request
            ends_with_rest = connection.body_deadline is not None and body_has_rest(http_request.body)
            if not connection.is_authenticated or ends_with_rest:
                http_request.force_close()
            return start_response(status, headers, *error)

        return application(environ, start)

    return with_close


def body_has_rest(body: Any) -> bool:
    """Whether bytes of a request's body are still to come, or where it ends is not known (gunicorn's Body)."""
    reader = body.reader
    to_come = reader.length > 0 if hasattr(reader, "length") else reader.parser is not None
    return bool(body.failed or body.buf.tell() or to_come)


def error_answer(error: NoodleError) -> bytes:
    """A whole HTTP answer with OpenAI's error object, after which the connection ends."""
    body = msgspec.json.encode({"error": error_object(error)})
    head = (
        f"HTTP/1.1 {error.http_status:d} {http.HTTPStatus(error.http_status).phrase}\r\n"
        f"Connection: close\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def _rest_of_body(session: ClientSession) -> bool:
    http_request = session.sock.http_request
    return http_request is not None and body_has_rest(http_request.body)


def _host(client: Any) -> str:
    return str(client[0]) if isinstance(client, tuple) else "a local client"
