"""Activations that wait until the next stage fetches them, by id: bounded in bytes, freed when delivered or too old."""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from noodle.errors import Gone, NotFound

OUTBOX_BYTES = 256 << 20
OUTBOX_FULL_SECONDS = 5.0  # back-pressure until a step is dropped; below the least deadline of a step
ACTIVATION_SECONDS = 60.0  # far above a step's deadline on machines of a home network
PAST_ACTIVATIONS = 4096  # ids whose fate is remembered
PIECE_BYTES = 256 << 10


@dataclass(frozen=True, slots=True)
class _Kept:
    body: bytes
    expires_at: float


class Outbox:
    """Bodies that this stage has computed and the next one has not fetched yet."""

    def __init__(
        self,
        maximum_bytes: int = OUTBOX_BYTES,
        full_seconds: float = OUTBOX_FULL_SECONDS,
        activation_seconds: float = ACTIVATION_SECONDS,
    ) -> None:
        self._maximum_bytes, self._full_seconds = maximum_bytes, full_seconds
        self._activation_seconds = activation_seconds
        self._kept: OrderedDict[str, _Kept] = OrderedDict()  # oldest first, and so in the order they expire
        self._past: OrderedDict[str, str] = OrderedDict()  # id to its fate
        self._bytes = 0
        self._changed = threading.Condition()

    @property
    def held_bytes(self) -> int:
        """Bytes that wait now, without expired ones."""
        with self._changed:
            self._expire(time.monotonic())
            return self._bytes

    def put(self, body: bytes | memoryview, *, wait: bool = True) -> str | None:
        """Keep a copy and return its id; None when there is no room, after OUTBOX_FULL_SECONDS if it may wait."""
        size = memoryview(body).nbytes
        give_up_at = time.monotonic() + (self._full_seconds if wait else 0.0)
        with self._changed:
            while not self._has_room(size):
                now = time.monotonic()
                if now >= give_up_at:
                    return None
                first_expiry = next(iter(self._kept.values())).expires_at
                self._changed.wait(max(0.0, min(give_up_at, first_expiry) - now))
            activation_id = secrets.token_hex(16)
            self._kept[activation_id] = _Kept(bytes(body), time.monotonic() + self._activation_seconds)
            self._bytes += size
            return activation_id

    def body(self, activation_id: str) -> bytes:
        """Return the bytes of an id; raises Gone with their fate, or NotFound for an unknown id."""
        with self._changed:
            self._expire(time.monotonic())
            kept = self._kept.get(activation_id)
            if kept is not None:
                return kept.body
            fate = self._past.get(activation_id)
        if fate is None:
            raise NotFound(
                f"There are no activations {activation_id[:64]!r} on this stage.",
                cure="The stage may have restarted since; the coordinator sends the step again.",
            )
        raise Gone(f"The activations {activation_id!r} are gone: {fate}.", cure="The coordinator sends the step again.")

    def deliver(self, activation_id: str, body: bytes, confirmed: Callable[[], bool]) -> Iterator[bytes]:
        """Yield the body in pieces; it is freed when all were taken and `confirmed` returns True."""
        view = memoryview(body)
        for start in range(0, len(view), PIECE_BYTES):
            yield bytes(view[start : start + PIECE_BYTES])
        if confirmed():
            self.discard(activation_id, "already fetched")

    def discard(self, activation_id: str, fate: str) -> None:
        """Free the bytes of an id and remember why; harmless when they are gone."""
        with self._changed:
            self._drop(activation_id, fate)
            self._changed.notify_all()

    def clear(self) -> None:
        """Free everything: another plan is computed."""
        with self._changed:
            for activation_id in list(self._kept):
                self._drop(activation_id, "of an older plan")
            self._changed.notify_all()

    def _has_room(self, size: int) -> bool:
        self._expire(time.monotonic())
        return not self._kept or self._bytes + size <= self._maximum_bytes  # one always fits: a step is bounded

    def _expire(self, now: float) -> None:
        while self._kept:
            activation_id, kept = next(iter(self._kept.items()))
            if kept.expires_at > now:
                return
            self._drop(activation_id, "expired")

    def _drop(self, activation_id: str, fate: str) -> None:
        kept = self._kept.pop(activation_id, None)
        if kept is None:
            return
        self._bytes -= len(kept.body)
        self._past[activation_id] = fate
        if len(self._past) > PAST_ACTIVATIONS:
            self._past.popitem(last=False)
