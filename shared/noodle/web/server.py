"""gunicorn's threaded worker, changed so that a request takes a thread only once its whole head has arrived.

docs/adr/0010 says why gunicorn's own worker is not enough.
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
from gunicorn.http import errors
from gunicorn.http.parser import RequestParser
from gunicorn.workers.gthread import ThreadWorker

from noodle.errors import InvalidRequest, NoodleError, RequestTooSlow
from noodle.web.connection import ClientConnection
from noodle.web.service import error_object

log = logging.getLogger(__name__)

HEAD_SECONDS = 10.0  # longest wait for a head, from the connection or the first byte of a later request
HEAD_BYTES = 32 << 10  # largest head of a request
LINGER_SECONDS = 2.0  # wait after the last answer for a client that still sends; a reset could hide the answer
DRAINED_BYTES = 64 << 20  # most bytes of an unwanted body that are read away
RECEIVED_BYTES = 64 << 10  # bytes of one read
SLOW_BODIES = 16  # slow bodies received at once, at most a quarter of the threads
OTHER_FILES = 256  # files of a service besides its client connections

# Refusals of gunicorn's parser are a 400 except for these; OWN_FAULTS are errors of noodle.
REFUSAL_STATUS: dict[type[Exception], int] = {
    errors.LimitRequestLine: 414,
    errors.ExpectationFailed: 417,
    errors.LimitRequestHeaders: 431,
    errors.UnsupportedTransferCoding: 501,
    errors.ForbiddenProxyRequest: 403,
}
OWN_FAULTS = (errors.ConfigurationProblem, errors.InvalidResponseHeader, errors.InvalidResponseHeaderName)


class ClientSession:
    """A client's connection from accept to close, owned by the main loop or by the thread that answers it."""

    def __init__(self, cfg: Any, connection: ClientConnection, client: Any, server: Any) -> None:
        self.sock, self.client, self.server = connection, client, server  # gunicorn's names
        self.parser = RequestParser(cfg, connection, client)
        self.head = bytearray()  # received bytes of the next request
        self.group: dict[ClientSession, None] | None = None  # None: a thread has it, or it is closed
        self.until = 0.0
        self.drained_bytes = 0
        self.is_stuck = False  # its client does not read the answer


class BufferedHeadWorker(ThreadWorker):  # type: ignore[misc]  # gunicorn publishes no types
    """gunicorn's gthread worker; its main loop does all waiting for anonymous clients, which holds no thread.

    A connection waits for a head, is kept for a next request, or lingers after its last answer, each with a deadline.
    When there are too many, the longest-waiting connection is closed, unauthenticated ones first.
    """

    worker_connections: int
    wsgi: Callable[..., Iterable[bytes]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._heads: dict[ClientSession, None] = {}  # oldest first, as in the next two
        self._lingering: dict[ClientSession, None] = {}
        self._kept: dict[ClientSession, None] = {}
        self._slow_bodies = threading.Semaphore(min(SLOW_BODIES, self.cfg.threads // 4))

    def init_process(self) -> None:
        """Raise the limit of open files to the connections, or lower the connections to the files."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = self.worker_connections + OTHER_FILES
        if soft < wanted:
            soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            self.worker_connections = min(self.worker_connections, max(soft - OTHER_FILES, self.cfg.threads + 1))
        super().init_process()

    def load_wsgi(self) -> None:
        """Load the app; its answers end the connections of anonymous clients and of those that still send a body."""
        super().load_wsgi()
        self.wsgi = close_unkept_connections(self.wsgi)

    # the main loop

    def accept(self, listener: socket.socket) -> None:
        """Accept a connection and receive what it has sent."""
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
        """Keep the connection of an answered request, or let it linger."""
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
        """Close connections past their deadline, or all waiting ones; called about once a second."""
        now = time.monotonic()
        for group in (self._heads, self._lingering, self._kept):
            for session in [session for session in group if force or session.until <= now]:
                if session.head and not force:
                    self._refuse(session, RequestTooSlow(f"The head did not arrive in {HEAD_SECONDS:.0f} s."))
                else:
                    self._close(session)

    def _cap_keepalive(self, deadline: float) -> None:
        """Shorten all waits to the deadline of a stopping service."""
        for group in (self._heads, self._lingering, self._kept):
            for session in group:
                session.until = min(session.until, deadline)

    def _on_readable(self, session: ClientSession, _connection: ClientConnection) -> None:
        if session.group is None:
            return  # closed since the poller saw it
        if session.group is self._lingering:
            self._drain(session)
        else:
            self._receive_head(session, session.group)

    def _receive_head(self, session: ClientSession, group: dict[ClientSession, None]) -> None:
        received = _receive(session)
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
            refusal = InvalidRequest(f"The head of the request is longer than {HEAD_BYTES} bytes.")
            refusal.http_status = http.HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
            self._refuse(session, refusal)
        else:
            if session.group is not self._heads:
                session.until = time.monotonic() + HEAD_SECONDS
            self._watch(session, self._heads)

    def _refuse(self, session: ClientSession, error: NoodleError) -> None:
        log.info("refusing a request from %s: %s", _host(session.client), error)
        session.head.clear()
        try:
            session.sock.send(error_answer(error))  # fits into the empty send buffer of a new connection
        except OSError as gone:
            log.debug("answer not sent: %s", gone)
        self._linger(session)

    def _linger(self, session: ClientSession) -> None:
        """Shut the sending side and read on, so that the client can read the last answer before a reset."""
        session.until = time.monotonic() + LINGER_SECONDS
        request, body_deadline = session.sock.http_request, session.sock.body_deadline
        is_awaited = self.alive and session.sock.is_authenticated and request is not None
        if is_awaited and body_deadline is not None and body_has_rest(request.body):
            session.until = body_deadline
        try:
            session.sock.settimeout(0)
            session.sock.shutdown(socket.SHUT_WR)
        except OSError:
            self._close(session)
            return
        self._drain(session)

    def _drain(self, session: ClientSession) -> None:
        received = _receive(session)
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
        """Close the longest-waiting connection, of the least valuable kind first."""
        group = self._heads or self._lingering or self._kept
        if group:
            self._close(next(iter(group)))

    # a thread

    def handle(self, session: ClientSession) -> bool:
        """Answer one request; return whether its connection may be kept."""
        connection = session.sock
        http_request = None
        try:
            connection.begin()
            session.parser.unreader.unread(bytes(session.head))
            session.head.clear()
            connection.http_request = http_request = next(session.parser)
            return bool(self.handle_request(http_request, session)) and not body_has_rest(http_request.body)
        except StopIteration:  # gunicorn's signal that the connection must end; it has logged why
            return False
        except TimeoutError:
            session.is_stuck = True
            seconds = connection.gettimeout() or 0.0
            log.info("dropping the client at %s: it read nothing for %.0f s", _host(session.client), seconds)
            return False
        except OSError as error:  # among them gunicorn's NoMoreData
            log.debug("the client at %s is gone: %s", _host(session.client), error)
            return False
        except Exception as error:  # noqa: BLE001  # the client gets an answer, the log the details
            self.handle_error(http_request, connection, session.client, error)
            return False
        finally:
            connection.end()

    def handle_error(self, http_request: Any, connection: ClientConnection, client: Any, error: Exception) -> None:
        """Answer a request that did not reach the app with an error object, as the app does."""
        answer: NoodleError
        if isinstance(error, errors.ParseException) and not isinstance(error, OWN_FAULTS):
            answer = InvalidRequest(f"The request is not HTTP that this server accepts: {str(error)[:200]}.")
            answer.http_status = REFUSAL_STATUS.get(type(error), 400)
            log.info("refusing a request from %s: %s", _host(client), answer)
        else:
            what = f"{http_request.method} {http_request.path}" if http_request else "a request"
            log.error("%s failed", what, exc_info=error)
            answer = NoodleError(f"An error inside noodle: {type(error).__name__}.", cure="See its log.")
        try:
            connection.sendall(error_answer(answer))
        except OSError as gone:
            log.debug("answer not sent: %s", gone)


def head_is_whole(head: bytearray, before: int) -> bool:
    """Whether gunicorn's parser can accept or refuse this head; the first `before` bytes were checked already.

    A line that ends without a carriage return is enough: the parser refuses it there.
    """
    newline = head.find(b"\n", before)
    while newline >= 0:
        if newline == 0 or head[newline - 1 : newline] != b"\r" or head[newline - 3 : newline] == b"\r\n\r":
            return True
        newline = head.find(b"\n", newline + 1)
    return False


def close_unkept_connections(application: Callable[..., Iterable[bytes]]) -> Callable[..., Iterable[bytes]]:
    """Wrap the app: add "Connection: close" to each answer after which the connection is not kept.

    So an anonymous connection gets one answer, which fits into the send buffer, and no thread reads the rest of a body
    after its answer. The connection of a streamed body ends too, but without the header: Python's http.client would
    give away the socket, which the hop client still needs.
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
    """Whether the body (gunicorn's Body) has bytes left, or its end is unknown."""
    reader = body.reader
    has_more = reader.length > 0 if hasattr(reader, "length") else reader.parser is not None
    return bool(body.failed or body.buf.tell() or has_more)


def error_answer(error: NoodleError) -> bytes:
    """Return a whole HTTP answer with an error object; the connection ends after it."""
    body = msgspec.json.encode({"error": error_object(error)})
    head = (
        f"HTTP/1.1 {error.http_status:d} {http.HTTPStatus(error.http_status).phrase}\r\n"
        f"Connection: close\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def _receive(session: ClientSession) -> bytes | None:
    """Bytes that have arrived, b"" at the end or after an error, None when nothing has."""
    try:
        return session.sock.receive_now(RECEIVED_BYTES)
    except OSError:
        return b""


def _host(client: Any) -> str:
    return str(client[0]) if isinstance(client, tuple) else "a local client"
