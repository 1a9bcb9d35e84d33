"""Requests that clients can come back to, bounded in time and bytes.

An open request is here as long as it is open. One whose client may come back (`resume_seconds`, Idempotency-Key) stays
for a while after its end.
"""

from __future__ import annotations

import threading
import time

from noodle.cluster.valkey import RECORD_EXPIRES_SECONDS
from noodle.errors import Conflict, NotFound, TooManyRequests
from services.coordinator.engine.request import Client, Request, RequestReader, RequestStream

KEPT_BYTES = 64 << 20


class KeptRequests:
    """Streams of requests, open and ended; HTTP threads use it at the same time.

    Each reader holds one of the service's threads until its request ends, and a request may have any number of them.
    So at most `maximum_readers` read at once, which leaves threads for everything else.
    """

    def __init__(self, maximum_readers: int) -> None:
        self._maximum_readers = maximum_readers
        self._streams: dict[str, RequestStream] = {}  # the oldest first
        self.lock = threading.RLock()  # held from the search for an idempotency key until its request is added

    def add(self, stream: RequestStream) -> RequestStream:
        """Add a request that has begun, and drop those that were kept for too long."""
        with self.lock:
            self._expire()
            self._streams[stream.request_id] = stream
            return stream

    def require_reader_place(self) -> None:
        """Raise TooManyRequests if as many read as may. Call it under the lock, before opening a reader."""
        if sum(stream.reader_count for stream in self._streams.values()) >= self._maximum_readers:
            raise TooManyRequests(
                f"{self._maximum_readers} clients read answers, which is the limit.",
                cure="Close the streams that are no longer read, or retry later.",
                retry_after_seconds=2,
            )

    def open_reader(self, stream: RequestStream) -> RequestReader:
        """Open one more reader at the beginning of a request. Raises TooManyRequests."""
        with self.lock:
            self.require_reader_place()
            return stream.open_reader()

    def find(self, client: Client, name: str) -> RequestStream:
        """Return a request of this client by our id or by its own, the newest if it used that twice, or NotFound."""
        with self.lock:
            self._expire()
            for stream in reversed(self._streams.values()):
                request = stream.request
                if name in (request.request_id, request.client_request_id) and request.client_name == client.name:
                    return stream
        raise NotFound(
            f"There is no request {name[:80]!r} of this key.",
            cure="It is the X-Request-Id of its answer. Requests that can be resumed are kept for "
            f"{RECORD_EXPIRES_SECONDS} seconds after their end, others until their end.",
        )

    def find_same(self, request: Request) -> RequestStream | None:
        """Return the request that came with the same idempotency key. Raises Conflict if its body was another."""
        if not request.idempotency_key:
            return None
        with self.lock:
            self._expire()
            for stream in reversed(self._streams.values()):
                kept = stream.request
                if (kept.client_name, kept.idempotency_key) != (request.client_name, request.idempotency_key):
                    continue
                if kept.body_digest != request.body_digest:
                    raise Conflict(
                        f"The Idempotency-Key {request.idempotency_key[:80]!r} came with another request before.",
                        cure="Send the same body to the same route, or use another key.",
                    )
                return stream
        return None

    def _expire(self) -> None:
        now = time.monotonic()
        for request_id, stream in list(self._streams.items()):
            if stream.ended_at is None:
                continue
            if stream.request.resume_seconds == 0 or now - stream.ended_at > RECORD_EXPIRES_SECONDS:
                del self._streams[request_id]
        total_bytes = sum(stream.kept_bytes for stream in self._streams.values())
        for request_id, stream in list(self._streams.items()):
            if total_bytes <= KEPT_BYTES:
                return
            if stream.ended_at is not None:
                total_bytes -= stream.kept_bytes
                del self._streams[request_id]
