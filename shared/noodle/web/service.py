"""A service behind gunicorn: one worker process, authenticated routes, errors as OpenAI's error object.

The master process imports nothing heavy: the worker makes the app.
"""

from __future__ import annotations

import abc
import contextlib
import hmac
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import msgspec
from flask import Blueprint, Flask, Response, request
from gunicorn.http.errors import ParseException
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from werkzeug.exceptions import HTTPException

from noodle.config.addresses import Address
from noodle.config.settings import ServiceConfig
from noodle.errors import (
    BodyTooLarge,
    InvalidRequest,
    MethodNotAllowed,
    NoodleError,
    NotAuthenticated,
    NotFound,
    PortInUse,
    RequestTooSlow,
    StartError,
    TooManyRequests,
    UnsupportedMediaType,
)
from noodle.logs import configure_logs
from noodle.threads import end_process
from noodle.web.connection import ClientConnection

log = logging.getLogger(__name__)

GRACE_SECONDS = 10  # from SIGTERM until open requests are cut
KEEP_CONNECTION_SECONDS = 75  # how long an idle connection is kept for a next request
WAITING_CONNECTIONS = 512  # connections without a thread: waiting for a head, kept or lingering
HEAD_LINE_BYTES = 4094  # longest first line of a request
HEAD_FIELDS = 64  # most header fields of a request
HEAD_FIELD_BYTES = 8190  # longest header field


ConfigT = TypeVar("ConfigT", bound=ServiceConfig)


class Service(abc.ABC, Generic[ConfigT]):
    """A service that `serve` runs: the worker calls `create_app`, then `start`, and `stop` on SIGTERM."""

    name: str
    threads: int

    def __init__(self, config: ConfigT) -> None:
        self.config = config

    @abc.abstractmethod
    def create_app(self) -> Flask:
        """Build the Flask app; raises StartError."""

    @abc.abstractmethod
    def start(self) -> None:
        """Start the service's own threads; returns at once, so that /health answers from the first second."""

    @abc.abstractmethod
    def stop(self) -> None:
        """Refuse new work and close long-lived connections; called once, in a thread of its own."""


def serve(service: Service[Any]) -> None:
    """Run a service under gunicorn until SIGTERM; raises PortInUse."""
    from gunicorn.app.base import BaseApplication

    refuse_a_port_in_use(service.config.bind, service.name)

    class Server(BaseApplication):  # type: ignore[misc]  # gunicorn publishes no types
        def load_config(self) -> None:
            settings = {
                "bind": [str(service.config.bind)],
                "workers": 1,
                "worker_class": "noodle.web.server.BufferedHeadWorker",
                "threads": service.threads,
                "worker_connections": service.threads + WAITING_CONNECTIONS,
                "limit_request_line": HEAD_LINE_BYTES,
                "limit_request_fields": HEAD_FIELDS,
                "limit_request_field_size": HEAD_FIELD_BYTES,
                "preload_app": False,  # CUDA and threads do not survive a fork
                "timeout": 0,  # it only watches the main loop, and a long native call is no error
                "graceful_timeout": GRACE_SECONDS,
                "keepalive": KEEP_CONNECTION_SECONDS,
                "control_socket_disable": True,  # its default place is not writable in a read-only container
                "worker_tmp_dir": "/dev/shm" if os.path.isdir("/dev/shm") else None,  # noqa: S108  # memory, not disk
                "loglevel": "warning",
                "proc_name": f"noodle {service.name}",
                "post_worker_init": lambda _worker: _start_in_worker(service),
            }
            for key, value in settings.items():
                self.cfg.set(key, value)

        def load(self) -> Flask:
            try:
                return service.create_app()
            except StartError as error:
                end_process(service.name, error)

    Server().run()


def run_service(name: str, make: Callable[[], Service[Any]]) -> None:
    """Configure and serve; a StartError ends the process with one line on stderr and exit code 3."""
    try:
        service = make()
        configure_logs(name, service.config.log_format)
        serve(service)
    except StartError as error:
        end_process(name, error)


def _start_in_worker(service: Service[Any]) -> None:
    """Start the service, and make SIGTERM stop it before gunicorn waits for open connections."""
    gunicorn_handler = signal.getsignal(signal.SIGTERM)
    stopping = threading.Event()

    def terminate(number: int, frame: Any) -> None:
        if not stopping.is_set():
            stopping.set()
            threading.Thread(target=service.stop, name="stop", daemon=True).start()
        if callable(gunicorn_handler):
            gunicorn_handler(number, frame)

    signal.signal(signal.SIGTERM, terminate)
    signal.siginterrupt(signal.SIGTERM, False)
    service.start()


def refuse_a_port_in_use(bind: Address, name: str) -> None:
    """Raise PortInUse when another program listens there; gunicorn alone would retry for seconds."""
    family = socket.AF_INET6 if ":" in bind.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((bind.host, bind.port))
        except OSError as error:
            raise PortInUse(
                f"The {name} cannot listen on {bind}: {error.strerror}.",
                cure=f"Stop the program that uses port {bind.port}, or choose another port with "
                f"NOODLE_{name.upper()}_BIND (NOODLE_{name.upper()}_PORT for `noodle up`).",
            ) from error


def error_response(error: NoodleError, **beside: Any) -> Response:
    """Answer with OpenAI's error object, fields `beside` it, and Retry-After where waiting helps."""
    response = json_response({**beside, "error": error_object(error)}, error.http_status)
    if error.retry_after_seconds is not None:
        response.headers["Retry-After"] = str(error.retry_after_seconds)
    if error.http_status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    return response


def error_object(error: NoodleError) -> dict[str, Any]:
    """Return `{message, type, param, code}`; the message includes the cure."""
    return {"message": str(error), "type": error.error_type, "param": error.param, "code": error.code}


def json_response(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, mimetype="application/json")


def add_success_false(routes: Blueprint) -> None:
    """Add `success: false` beside the error object to errors of these routes."""
    routes.register_error_handler(NoodleError, lambda error: _answer_error(error, success=False))


def _answer_error(error: NoodleError, **beside: Any) -> Response:
    if error.http_status >= 500:
        log.info("answered %d: %s", error.http_status, error)
    return error_response(error, **beside)


def install_error_handlers(app: Flask) -> None:
    """Answer every error with OpenAI's error object; log an unexpected one with its traceback."""
    app.register_error_handler(NoodleError, _answer_error)

    @app.errorhandler(HTTPException)
    def from_flask(error: HTTPException) -> Response:
        translated: NoodleError
        if error.code == 404:
            translated = NotFound(
                f"There is no {request.method} {request.path} here.",
                cure="GET /openapi.json on the coordinator lists the routes.",
            )
        elif error.code == 405:
            translated = MethodNotAllowed(f"{request.path} does not take {request.method}.")
        elif error.code == 413:
            translated = BodyTooLarge(f"The body is larger than the {request.max_content_length} bytes accepted here.")
        else:
            translated = InvalidRequest(error.description or error.name)
            translated.http_status = error.code or 400
        response = error_response(translated)
        if error.code == 405 and getattr(error, "valid_methods", None):
            response.headers["Allow"] = ", ".join(error.valid_methods)  # type: ignore[attr-defined]  # checked above
        return response

    @app.errorhandler(Exception)
    def unknown(error: Exception) -> Response:
        log.exception("%s %s failed", request.method, request.path)
        return error_response(NoodleError(f"An error inside noodle: {type(error).__name__}.", cure="See its log."))


def install_metrics_route(app: Flask, registry: CollectorRegistry, cluster_token: str) -> None:
    """Serve `GET /metrics` to clients that send the cluster token."""

    @app.get("/metrics")
    def metrics() -> Response:
        require_token(cluster_token)
        return Response(generate_latest(registry), content_type=CONTENT_TYPE_LATEST)


def has_token(*accepted: str) -> bool:
    """Whether this request carries one of the accepted secrets; authenticates its connection.

    Empty secrets are never accepted. Every wrong token takes the same time.
    """
    scheme, _, credential = request.headers.get("Authorization", "").partition(" ")
    given = credential.strip().encode() if scheme.lower() == "bearer" else b""
    matches = [hmac.compare_digest(given, secret.encode()) for secret in accepted if secret]
    if not any(matches):
        return False
    authenticate()
    return True


def require_token(*accepted: str) -> None:
    """Raise NotAuthenticated unless this request carries one of the accepted secrets."""
    if not has_token(*accepted):
        raise NotAuthenticated(
            "The key or cluster token is missing or wrong.", cure="Send it as `Authorization: Bearer ...`."
        )


def authenticate() -> None:
    """Mark this request as authenticated: its body is waited for, and its connection may be kept."""
    if (connection := _connection()) is not None:
        connection.authenticate()


def streaming_connection() -> ClientConnection:
    """Return this request's connection for an endless body or answer; the caller sets its timeout."""
    connection: ClientConnection = request.environ["gunicorn.socket"]
    connection.stream()
    return connection


def client_has_gone() -> bool:
    """Whether the client closed its connection; one that only shut its sending side has not."""
    connection = _connection()
    takes_continue = request.environ.get("SERVER_PROTOCOL") == "HTTP/1.1"
    return connection is not None and connection.has_gone(takes_continue=takes_continue)


def _connection() -> ClientConnection | None:
    """None outside gunicorn, as with Flask's test client."""
    return request.environ.get("gunicorn.socket")


@contextlib.contextmanager
def place_in(places: threading.BoundedSemaphore, refusal: str) -> Iterator[None]:
    """Hold one of the places; raises TooManyRequests with `refusal` when none is free."""
    if not places.acquire(blocking=False):
        raise TooManyRequests(refusal, cure="Send the next one when one of them is answered.", retry_after_seconds=1)
    try:
        yield
    finally:
        places.release()


def json_body(maximum_bytes: int, cure: str = "Send less, or raise NOODLE_MAX_BODY_BYTES.") -> bytes:
    """Return the body of a request that declares JSON, which a browser cannot send across sites unasked."""
    if request.mimetype != "application/json":
        raise UnsupportedMediaType(
            f"The body is {request.mimetype or 'of no declared type'}.", cure="Send Content-Type: application/json."
        )
    return bounded_body(maximum_bytes, cure)


def bounded_body(maximum_bytes: int, cure: str = "Send less.") -> bytes:
    """Return the body of this request; raises BodyTooLarge or InvalidRequest."""
    announced_bytes = request.content_length
    body = b"" if (announced_bytes or 0) > maximum_bytes else _received(maximum_bytes + 1)
    if max(len(body), announced_bytes or 0) > maximum_bytes:
        size = f"{announced_bytes}" if announced_bytes else f"more than {maximum_bytes}"
        raise BodyTooLarge(f"The body is {size} bytes, {request.path} accepts at most {maximum_bytes}.", cure=cure)
    if announced_bytes is not None and len(body) < announced_bytes:
        raise _logged(InvalidRequest(f"The body ended after {len(body)} of the {announced_bytes} bytes announced."))
    return body


def _received(maximum_bytes: int) -> bytes:
    """Read the body without werkzeug, which turns every failure of the connection into one error."""
    try:
        body: bytes = request.environ["wsgi.input"].read(maximum_bytes)
    except ParseException as error:
        raise _logged(InvalidRequest(f"The body's chunks are malformed: {error}.")) from error
    except TimeoutError as error:
        raise _logged(RequestTooSlow("The body did not arrive in time.", cure="Send it faster, or less.")) from error
    except OSError as error:
        raise _logged(InvalidRequest("The body was cut off.")) from error
    return body


def _logged(error: NoodleError) -> NoodleError:
    log.info("%s %s from %s: %s", request.method, request.path, request.remote_addr, error)
    return error
