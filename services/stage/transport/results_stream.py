"""The way of results to the coordinator: a connection that it reads, GET /results, else the queue.

The client's end is `noodle/wire/hop_client.py`.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator

from noodle.metrics.counted import TravelMetrics
from noodle.wire.frames import whole_frame
from noodle.wire.hop_client import KEEP_ALIVE_SECONDS, SILENCE_SECONDS
from noodle.wire.messages import HopMessage, KeepAlive, StepResult

log = logging.getLogger(__name__)

WAITING_RESULTS = 256  # for a connection that has no room; more are not taken


class ResultsOutlet:
    """Hands results to the coordinator: over the connection that reads them, else by the queue.

    A result that goes neither way is dropped, and the coordinator sends its step again.
    """

    def __init__(self, travel: TravelMetrics, by_queue: Callable[[StepResult], bool] = lambda _: False) -> None:
        self._travel, self._by_queue = travel, by_queue
        self._reader: ResultsReader | None = None  # the newest connection
        self._lock = threading.Lock()

    def put(self, result: StepResult) -> bool:
        """Hand over one result; False when the coordinator cannot be reached."""
        reader = self._reader
        if reader is None or not reader.put(result):
            return self._put_queued(result)
        self._travel.results.labels("direct").inc()
        return True

    def _put_queued(self, result: StepResult) -> bool:
        if not self._by_queue(result):
            return False
        self._travel.results.labels("queue").inc()
        return True

    def serve(self, connection: socket.socket) -> Iterator[bytes]:
        """Answer one GET /results; a newer connection ends an older one."""
        connection.settimeout(SILENCE_SECONDS)  # also for what gunicorn writes: a reader that takes nothing is gone
        reader = ResultsReader(connection)
        self._replace(reader)
        try:
            yield whole_frame(KeepAlive())
            # gunicorn asks for more, so it has sent the head and that frame. All others are written here instead of
            # yielded: the worker writes a result itself, because waking another thread would delay each token.
            reader.serve()
        finally:
            with self._lock:
                if self._reader is reader:
                    self._reader = None
            for result in reader.close():
                self._put_queued(result)

    def close(self) -> None:
        self._replace(None)

    def _replace(self, reader: ResultsReader | None) -> None:
        with self._lock:
            older, self._reader = self._reader, reader
        if older is not None:
            older.end()


class ResultsReader:
    """One coordinator's connection, written to by the thread that has a result, or by `serve` when it has no room.

    No thread waits for room while it holds the lock, so a coordinator that reads nothing does not stop the worker.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = socket.socket(fileno=os.dup(connection.fileno()))
        self._connection.setblocking(False)  # also without the wait for room that a timeout brings
        # The first write after the other end has closed is lost silently. The other end sends nothing, so anything to
        # read is its end.
        self._gone, self._room = select.poll(), select.poll()
        self._gone.register(connection, select.POLLIN | select.POLLRDHUP)
        self._room.register(connection, select.POLLOUT)
        self._changed = threading.Condition()  # held while writing: frames must not mix
        self._waiting: deque[StepResult] = deque()
        self._rest = b""  # of a chunk that the connection had no room for
        self._begun = self._ended = False

    def put(self, result: StepResult) -> bool:
        """Write one result, or leave it to `serve`; False when the reader has gone, or too many results wait."""
        with self._changed:
            if self._ended or len(self._waiting) >= WAITING_RESULTS:
                return False
            if self._rest or self._waiting or not self._begun:
                self._waiting.append(result)
                return True
            if self._gone.poll(0):
                self.end()
                return False
            try:
                self._write(_chunk(result))
            except OSError as error:
                log.info("a result cannot be written: %s", error)
                self.end()
                return False
            if self._rest:
                self._changed.notify_all()
            return True

    def serve(self) -> None:
        """Write keep-alives and waiting results until `end` or until the reader has gone.

        Raises TimeoutError when the reader takes nothing for SILENCE_SECONDS, OSError when the connection is broken.
        """
        self._begun = True
        while True:
            with self._changed:
                has_work = self._changed.wait_for(
                    lambda: self._ended or self._rest or self._waiting, KEEP_ALIVE_SECONDS
                )
                if self._ended:
                    return
                if self._rest:
                    self._write(self._rest)
                elif self._waiting:
                    if self._gone.poll(0):
                        return
                    self._write(_chunk(self._waiting.popleft()))
                elif not has_work:
                    self._write(_chunk(KeepAlive()))
                is_full = bool(self._rest)
            if is_full and not self._room.poll(SILENCE_SECONDS * 1000):
                raise TimeoutError(f"the reader of results took nothing for {SILENCE_SECONDS:.0f} seconds")

    def end(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def close(self) -> list[StepResult]:
        """Write nothing more and close the connection; returns the results that were not written."""
        with self._changed:
            self.end()
            self._connection.close()
            waiting = list(self._waiting)
            self._waiting.clear()
            return waiting

    def _write(self, chunk: bytes) -> None:
        """Write what there is room for and keep the rest."""
        try:
            sent = self._connection.send(chunk)
        except BlockingIOError:
            sent = 0
        self._rest = chunk[sent:]


def _chunk(message: HopMessage) -> bytes:
    """A frame as one chunk of the answer, as gunicorn would write it."""
    frame = whole_frame(message)
    return b"%x\r\n%b\r\n" % (len(frame), frame)
