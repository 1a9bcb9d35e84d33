"""A process's end of the queued way over a hop: reads its stream and appends to others', through Valkey's absences.

Knows entries and streams, not what is done with a step. Bodies do not come this way: the bytes that a reference
names are fetched from the stage that made them (`services/stage/transport/outbox.py`).
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

BLOCK_SECONDS = 1.0  # one wait for entries; also how late a lost stream or a closed reader is noticed
RETRY_SECONDS = 0.2  # between two tries of a reader while the queue is away
WRITE_RETRY_SECONDS = 1.0  # a writer that failed fails at once for so long: nobody waits for a queue that is away
STREAM_TIMEOUT_SECONDS = 2.0  # one answer; longer than a blocked read


class Streams(Protocol):
    """The part of WorkQueue that hops need; every method raises QueueUnavailable when there is no answer."""

    def append(self, stream: str, entry: bytes) -> None:
        """Add one entry at the end."""

    def newest(self, stream: str) -> str:
        """The id of the last entry."""

    def read(self, stream: str, after: str, block_seconds: float) -> list[tuple[str, bytes]]:
        """The next entries, each with its id."""


class QueueEnd:
    """One process's end of the queued way: reads its own stream in a thread, appends to others', knows whether it can.

    It reads from what is newest at its own start. What was there before is nobody's loss: steps are sent again by
    whoever misses their results (design D2). For the same reason there is no consumer group: one reader, nothing to
    acknowledge, nothing to take over.
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
        self._read_failure = f"{own_stream} is not read yet"
        self._write_failure: QueueUnavailable | None = None
        self._write_again_at = 0.0
        self._told_failure: str | None = None
        self._telling = threading.Lock()
        self._logged: set[str] = set()
        self._closed = threading.Event()

    def start(self, service_name: str) -> None:
        """Begin to read."""
        start_loop(f"read {self._own_stream}", self._run, service_name)

    @property
    def failure(self) -> str:
        """Why the queue can not be used now, empty while it can; `changed` is called when this comes or goes."""
        write_failure = self._write_failure
        return self._read_failure or (str(write_failure) if write_failure is not None else "")

    def write(self, stream: str, entry: QueueEntry) -> None:
        """Append one entry; raises QueueUnavailable, for a while after a failure at once."""
        failure = self._write_failure
        if failure is not None and time.monotonic() < self._write_again_at:
            raise QueueUnavailable(failure.message, cure=failure.cure, retry_after_seconds=failure.retry_after_seconds)
        try:
            self._streams.append(stream, encode_entry(entry))
        except QueueUnavailable as error:
            self._write_again_at = time.monotonic() + WRITE_RETRY_SECONDS
            self._write_failure = error
            self._tell()
            raise
        if failure is not None:
            self._write_failure = None
            self._tell()

    def close(self) -> None:
        """End the thread, at the latest when its wait for entries is over."""
        self._closed.set()

    def _run(self) -> None:
        while not self._closed.is_set():
            try:
                entries = self._next_entries()
            except QueueUnavailable as error:
                self._read_failure = str(error)
                self._tell()
                self._closed.wait(RETRY_SECONDS)
                continue
            for position, data in entries:
                if self._closed.is_set():
                    return
                self._position = position
                self._take_one(data)
            self._try_to_write_again()

    def _next_entries(self) -> list[tuple[str, bytes]]:
        """What comes next; a stream that is shorter than what was read of it has been lost, and begins anew."""
        if self._position is None or self._read_failure:
            self._find_position()
            self._read_failure = ""
            self._tell()
        entries = self._streams.read(self._own_stream, self._position or "", BLOCK_SECONDS)
        if not entries:
            self._find_position()
        return entries

    def _find_position(self) -> None:
        newest = self._streams.newest(self._own_stream)
        if self._position is None or _order(newest) < _order(self._position):
            self._position = newest

    def _take_one(self, data: bytes) -> None:
        """Hand one entry on; junk is counted, said once for each kind, and skipped."""
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
                log.warning("an entry of %s is skipped: %s (%s; said once)", self._own_stream, error, reason)

    def _try_to_write_again(self) -> None:
        """After a failed write nobody may come to write again: a harmless entry to ourselves says when it works."""
        if self._write_failure is not None and time.monotonic() >= self._write_again_at:
            with contextlib.suppress(QueueUnavailable):  # it is noted, and tried again later
                self.write(self._own_stream, KeepAlive())

    def _tell(self) -> None:
        with self._telling:
            failure = self.failure
            told, self._told_failure = self._told_failure, failure
        if bool(failure) == bool(told) and told is not None:
            return
        if failure:
            log.warning("the queue can not be used: %s", failure)
        else:
            log.info("steps can travel by the queue")
        self._changed()


def _order(entry_id: str) -> tuple[int, int]:
    """Ids of entries in their order: milliseconds, then a number within them."""
    milliseconds, _, number = entry_id.partition("-")
    return int(milliseconds), int(number or 0)
