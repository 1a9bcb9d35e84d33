"""One process's end of the queue: reads its own stream and appends to others, also while Valkey comes and goes.

Activations are not in the queue: a stage fetches the bytes of a reference from the stage that made them
(`services/stage/transport/outbox.py`).
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

from noodle.errors import FrameTooLarge, QueueUnavailable, WireError
from noodle.threads import start_loop
from noodle.wire.frames import decode_entry, encode_entry
from noodle.wire.messages import KeepAlive, QueueEntry

log = logging.getLogger(__name__)

BLOCK_SECONDS = 1.0  # longest wait for entries; a lost stream or a close is noticed after it
RETRY_SECONDS = 0.2  # between two reads while the queue is unavailable
WRITE_RETRY_SECONDS = 1.0  # writes fail at once for this long after a failure, so that nobody waits
STREAM_TIMEOUT_SECONDS = 2.0  # longest wait for an answer; longer than a blocked read


class Streams(Protocol):
    """The part of WorkQueue that hops need; every method may raise QueueUnavailable."""

    def append(self, stream: str, entry: bytes) -> None: ...
    def newest(self, stream: str) -> str: ...
    def read(self, stream: str, after: str, block_seconds: float) -> list[tuple[str, bytes]]: ...


class QueueEnd:
    """Reads the stream of this process in a thread, appends to others, and knows whether the queue is available.

    Reading starts with entries newer than this process. Older ones need no reader: the coordinator sends a step again
    when its result is missing (design D2). So there is no consumer group and nothing to acknowledge.
    """

    def __init__(
        self,
        streams: Streams,
        own_stream: str,
        *,
        take: Callable[[QueueEntry], None],
        changed: Callable[[], None],
        refused: Callable[[str], None],
    ) -> None:
        self._streams, self._own_stream = streams, own_stream
        self._take, self._changed, self._refused = take, changed, refused
        self._position: str | None = None
        self._read_failure = f"{own_stream} is not being read yet"
        self._write_failure: QueueUnavailable | None = None
        self._write_again_at = 0.0
        self._notified_failure: str | None = None
        self._notifying = threading.Lock()
        self._logged: set[str] = set()
        self._closed = threading.Event()

    def start(self, service_name: str) -> None:
        start_loop(f"read {self._own_stream}", self._run, service_name)

    @property
    def failure(self) -> str:
        """Why the queue is unavailable, empty while it works; `changed` is called when this changes."""
        write_failure = self._write_failure
        return self._read_failure or (str(write_failure) if write_failure is not None else "")

    def write(self, stream: str, entry: QueueEntry) -> None:
        """Append one entry; raises QueueUnavailable, for WRITE_RETRY_SECONDS after a failure at once."""
        failure = self._write_failure
        if failure is not None and time.monotonic() < self._write_again_at:
            raise QueueUnavailable(failure.message, cure=failure.cure, retry_after_seconds=failure.retry_after_seconds)
        try:
            self._streams.append(stream, encode_entry(entry))
        except QueueUnavailable as error:
            self._write_again_at = time.monotonic() + WRITE_RETRY_SECONDS
            self._write_failure = error
            self._notify()
            raise
        if failure is not None:
            self._write_failure = None
            self._notify()

    def close(self) -> None:
        """Stop the thread, at the latest after its wait for entries."""
        self._closed.set()

    def _run(self) -> None:
        while not self._closed.is_set():
            try:
                entries = self._next_entries()
            except QueueUnavailable as error:
                self._read_failure = str(error)
                self._notify()
                self._closed.wait(RETRY_SECONDS)
                continue
            for position, data in entries:
                if self._closed.is_set():
                    return
                self._position = position
                self._take_one(data)
            self._try_to_write_again()

    def _next_entries(self) -> list[tuple[str, bytes]]:
        """Read the next entries; a stream that is shorter than the read position was lost, and is read from its end."""
        if self._position is None or self._read_failure:
            self._find_position()
            self._read_failure = ""
            self._notify()
        entries = self._streams.read(self._own_stream, self._position or "", BLOCK_SECONDS)
        if not entries:
            self._find_position()
        return entries

    def _find_position(self) -> None:
        newest = self._streams.newest(self._own_stream)
        if self._position is None or _order(newest) < _order(self._position):
            self._position = newest

    def _take_one(self, data: bytes) -> None:
        """Hand one entry on; a malformed or refused one is counted, logged once per reason, and skipped."""
        try:
            entry = decode_entry(data)
            if not isinstance(entry, KeepAlive):
                self._take(entry)
        except (WireError, TimeoutError) as error:
            reason = "too_large" if isinstance(error, FrameTooLarge) else "junk"
            if isinstance(error, TimeoutError):
                reason = "not_taken"
            self._refused(reason)
            if reason not in self._logged:
                self._logged.add(reason)
                log.warning("skipping an entry of %s: %s (%s; logged once)", self._own_stream, error, reason)

    def _try_to_write_again(self) -> None:
        """After a failed write, test with a harmless entry to ourselves whether the queue works again."""
        if self._write_failure is not None and time.monotonic() >= self._write_again_at:
            with contextlib.suppress(QueueUnavailable):  # recorded; tried again later
                self.write(self._own_stream, KeepAlive())

    def _notify(self) -> None:
        with self._notifying:
            failure = self.failure
            notified, self._notified_failure = self._notified_failure, failure
        if bool(failure) == bool(notified) and notified is not None:
            return
        if failure:
            log.warning("the queue is unavailable: %s", failure)
        else:
            log.info("the queue is available")
        self._changed()


def _order(entry_id: str) -> tuple[int, int]:
    """Sort key of an entry id: milliseconds, then a number within them."""
    milliseconds, _, number = entry_id.partition("-")
    return int(milliseconds), int(number or 0)
