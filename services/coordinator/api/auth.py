"""Clients: the owner of an API key, the cluster itself, or a program on this machine.

Logs and metrics show a key's name, never the key.
"""

from __future__ import annotations

import hashlib
import re
import uuid

from flask import g, request
from msgspec.structs import replace

from noodle.config.settings import CoordinatorConfig
from noodle.errors import InvalidRequest, NotAuthenticated
from noodle.web.service import authenticate, has_token
from services.coordinator.engine.request import LOOPBACK, Client, Request

LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "[::1]")
IDEMPOTENCY_KEY = re.compile(r"[!-~]{1,255}")
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
CLUSTER = Client("cluster")


class Clients:
    """Finds the client of the current request."""

    def __init__(self, config: CoordinatorConfig) -> None:
        self._config = config

    def find(self) -> Client | None:
        """Return the client, None for an anonymous request.

        Without API keys every request to this machine's own address is authenticated. Requests under another name are
        not: a web page may have let its name point here.
        """
        config = self._config
        # compares every key, so that the time it takes does not reveal a near match
        found = [Client(each.name, config.maximum_requests_per_key) for each in config.api_keys if has_token(each.key)]
        if has_token(config.cluster_token):
            return CLUSTER
        if found:
            return found[0]
        if config.api_keys or request.host.rsplit(":", 1)[0] not in LOOPBACK_HOSTS:
            return None
        authenticate()  # as a key would
        return LOOPBACK

    def require(self) -> Client:
        """Return the client; raises NotAuthenticated."""
        client = self.find()
        if client is not None:
            return client
        if self._config.api_keys:
            raise NotAuthenticated(
                "The key or cluster token is missing or wrong.", cure="Send it as `Authorization: Bearer ...`."
            )
        raise NotAuthenticated(
            f"The request is for {request.host[:80]!r}, not for this machine.",
            cure="Use http://127.0.0.1, or set NOODLE_API_KEY.",
        )


def sent_by(client: Client, asked: Request, body: bytes) -> Request:
    """Return the request with its client, the client's id for it, and its Idempotency-Key."""
    asked = replace(asked, client_name=client.name, client_request_id=g.request_id)
    key = request.headers.get("Idempotency-Key", "")
    if not key:
        return asked
    if not IDEMPOTENCY_KEY.fullmatch(key):
        raise InvalidRequest(
            "The Idempotency-Key is not 1 to 255 visible ASCII characters.",
            cure="A UUID will do.",
            param="Idempotency-Key",
        )
    digest = hashlib.sha256(request.path.encode() + b"\0" + body).hexdigest()
    return replace(asked, idempotency_key=key, body_digest=digest)


def take_request_id() -> str:
    """Set the request's id, which answers and logs carry: the client's own, if it is safe to log, or a new one."""
    asked = request.headers.get("X-Request-Id", "")
    g.request_id = asked if REQUEST_ID.fullmatch(asked) else uuid.uuid4().hex
    return str(g.request_id)
