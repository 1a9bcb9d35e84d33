"""Requests that can be taken up: who made them, what they asked, and all that came of them; bounded in time and bytes.

Open requests are here as long as they are open. One whose client may come back (`resume_seconds`, Idempotency-Key)
stays for a while after its end.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from noodle.cluster.valkey import RECORD_EXPIRES_SECONDS, RequestRecord
from noodle.errors import Conflict, NotFound, TooManyRequests
from services.coordinator.engine.request import Client, Generation, GenerationReader, Idempotency

KEPT_BYTES = 64 << 20
TOKEN_BYTES = 200  # that a token with all its objects takes, about
PROMPT_TOKEN_BYTES = 36


@dataclass(slots=True)
class KeptRequest:
    """One request, open or ended."""

    record: RequestRecord
    generation: Generation
    was_taken_up: bool = False  # from the records of a coordinator before, which may lack the newest tokens
    ended_at: float | None = None  # when its end was first seen

    @property
    def bytes(self) -> int:
        """About what it takes."""
        return len(self.record.prompt_token_ids) * PROMPT_TOKEN_BYTES + self.generation.token_count * TOKEN_BYTES


class KeptRequests:
    """All of them; HTTP threads use it at the same time.

    Each reader holds one of the service's threads until its request ends, and one request may have any number of them.
    So no more than `maximum_readers` read at once, and a thread is left for everything else.
    """

    def __init__(self, maximum_readers: int) -> None:
        self._maximum_readers = maximum_readers
        self._requests: dict[str, KeptRequest] = {}  # the oldest first
        self.lock = threading.RLock()  # held from looking for an idempotency key until its request is here

    def add(self, record: RequestRecord, generation: Generation, *, was_taken_up: bool = False) -> KeptRequest:
        """Note one that has begun; what has been kept for too long goes."""
        with self.lock:
            self._expire()
            kept = self._requests[record.request_id] = KeptRequest(record, generation, was_taken_up)
            return kept

    def refuse_a_crowd(self) -> None:
        """Raise TooManyRequests when as many read as may; to be called under the lock, before a reader is opened."""
        if sum(kept.generation.reader_count for kept in self._requests.values()) >= self._maximum_readers:
            raise TooManyRequests(
                f"{self._maximum_readers} clients read answers, which is the limit.",
                cure="Close what is not read any more, or come again.",
                retry_after_seconds=2,
            )

    def open_reader(self, kept: KeptRequest) -> GenerationReader:
        """One more reader of a request, from its beginning; raises TooManyRequests."""
        with self.lock:
            self.refuse_a_crowd()
            return kept.generation.open_reader()

    def find(self, client: Client, request_id: str) -> KeptRequest:
        """One of this client's by its own word for it, the newest if it used that twice, or by ours; or NotFound."""
        with self.lock:
            self._expire()
            for kept in reversed(self._requests.values()):
                names = (kept.record.request_id, kept.record.client_request_id)
                if request_id in names and kept.record.client_name == client.name:
                    return kept
        raise NotFound(
            f"There is no request {request_id[:80]!r} of this key.",
            cure="It is the X-Request-Id of its answer. Requests that can be resumed are kept for "
            f"{RECORD_EXPIRES_SECONDS} seconds after their end, others until their end.",
        )

    def joined(self, client: Client, idempotency: Idempotency) -> KeptRequest | None:
        """The request that came with the same key before; raises Conflict if it asked for something else."""
        if not idempotency.key:
            return None
        with self.lock:
            self._expire()
            for kept in reversed(self._requests.values()):
                if (kept.record.client_name, kept.record.idempotency_key) != (client.name, idempotency.key):
                    continue
                if kept.record.body_digest != idempotency.body_digest:
                    raise Conflict(
                        f"The Idempotency-Key {idempotency.key[:80]!r} came with another request before.",
                        cure="Send the same body to the same route, or take another key.",
                    )
                return kept
        return None

    def _expire(self) -> None:
        now = time.monotonic()
        for kept in self._requests.values():
            if kept.ended_at is None and kept.generation.has_ended:
                kept.ended_at = now
        for request_id, kept in list(self._requests.items()):
            if kept.ended_at is None:
                continue
            if kept.record.resume_seconds == 0 or now - kept.ended_at > RECORD_EXPIRES_SECONDS:
                del self._requests[request_id]
        total_bytes = sum(kept.bytes for kept in self._requests.values())
        for request_id, kept in list(self._requests.items()):
            if total_bytes <= KEPT_BYTES:
                return
            if kept.ended_at is not None:
                total_bytes -= kept.bytes
                del self._requests[request_id]
