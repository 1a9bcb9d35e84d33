"""The worker's inbox: messages in the order they came, bounded in frames and bytes."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from noodle.wire.messages import HopMessage

INBOX_FRAMES = 64
INBOX_BYTES = 256 << 20
INBOX_FULL_SECONDS = 60.0  # a worker that takes nothing for this long is stuck
NO_BODY = memoryview(b"")


@dataclass(frozen=True, slots=True)
class Arrival:
    """A message for the worker, and when it came by this process's monotonic clock."""

    message: HopMessage | Callable[[], None]  # the worker calls a function between two steps
    body: memoryview
    arrived_at: float


class Inbox:
    """A full inbox blocks its writer, and thereby the TCP connection behind it.

    A SimpleQueue carries the arrivals: it wakes the worker in a third of the time a Condition takes, and every token
    pays for that on every stage. The Condition guards the counts; only a writer waits for it, when the inbox is full.
    """

    def __init__(self) -> None:
        self._arrivals: queue.SimpleQueue[Arrival] = queue.SimpleQueue()
        self._frames = 0
        self._bytes = 0
        self._changed = threading.Condition()

    def put(self, message: HopMessage | Callable[[], None], body: memoryview = NO_BODY) -> None:
        """Add one message; raises TimeoutError when the worker takes nothing for INBOX_FULL_SECONDS."""
        arrival = Arrival(message, body, time.monotonic())
        with self._changed:
            self._wait_until(lambda: self._has_room(body.nbytes))
            self._frames += 1
            self._bytes += body.nbytes
        self._arrivals.put(arrival)

    def take(self, timeout_seconds: float) -> Arrival | None:
        """Return the next message, or None when none comes in time."""
        try:
            arrival = self._arrivals.get(timeout=timeout_seconds)
        except queue.Empty:
            return None
        with self._changed:
            self._frames -= 1
            self._bytes -= arrival.body.nbytes
            self._changed.notify_all()
        return arrival

    def wait_for_room(self, new_bytes: int, ahead_frames: int) -> None:
        """Return when fewer than `ahead_frames` wait and `new_bytes` have room; raises TimeoutError as `put` does."""
        with self._changed:
            self._wait_until(lambda: self._frames < ahead_frames and self._has_room(new_bytes))

    def _wait_until(self, has_room: Callable[[], bool]) -> None:
        if not self._changed.wait_for(has_room, INBOX_FULL_SECONDS):
            raise TimeoutError(f"the stage's worker took nothing for {INBOX_FULL_SECONDS:.0f} seconds")

    def _has_room(self, new_bytes: int) -> bool:
        if not self._frames:  # one frame always fits: its size was bounded when it was read
            return True
        return self._frames < INBOX_FRAMES and self._bytes + new_bytes <= INBOX_BYTES
