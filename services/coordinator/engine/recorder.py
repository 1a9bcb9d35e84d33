"""Keeps every open request in Valkey, tokens in batches by a thread of its own, never in a token's way.

What is not written yet is at most what the open requests may generate. After Valkey was away, or came back as another
process in between, all open requests are written anew: it may have lost its last second.
"""

from __future__ import annotations

import logging
import threading

import msgspec

from noodle.cluster.valkey import RecordedToken, RequestRecord, WorkQueue
from noodle.errors import QueueUnavailable

log = logging.getLogger(__name__)

FLUSH_SECONDS = 0.25


class Recorder:
    """Records requests; `run` is its thread."""

    def __init__(self, work_queue: WorkQueue) -> None:
        self._queue = work_queue
        self._lock = threading.Lock()
        self._live: dict[str, tuple[RequestRecord, list[RecordedToken]]] = {}
        self._unwritten: dict[str, int] = {}  # by request, how many of its tokens Valkey has not been told
        self._ended: list[str] = []
        self._kept: list[tuple[RequestRecord, list[RecordedToken]]] = []  # ended, and to be read for a while
        self._handed_over: list[str] = []  # written once more, and then no longer ours
        self._server_id = ""  # of the Valkey that has all of it
        self._wake = threading.Event()
        self._stopping = False

    def begin(self, record: RequestRecord) -> None:
        """Record a request before it is computed; raises QueueUnavailable, and then it must not be."""
        self._queue.record_request(record)
        self.go_on(record, [])

    def go_on(self, record: RequestRecord, tokens: list[RecordedToken]) -> None:
        """Record a request that was recorded by a coordinator before this one."""
        with self._lock:
            self._live[record.request_id] = (record, tokens)

    def token(self, request_id: str, token: RecordedToken) -> None:
        """Note one more token; returns at once."""
        with self._lock:
            if request_id in self._live:
                self._live[request_id][1].append(token)
                self._unwritten[request_id] = self._unwritten.get(request_id, 0) + 1

    def end(self, request_id: str, outcome: str) -> None:
        """Note that a request has ended; its record goes, or is kept for a while if its client may come back."""
        with self._lock:
            if request_id in self._handed_over:
                return
            found = self._live.pop(request_id, None)
            self._unwritten.pop(request_id, None)
            if found is not None and found[0].resume_seconds > 0:
                record, tokens = found
                self._kept.append((msgspec.structs.replace(record, outcome=outcome), tokens))
            elif found is not None:
                self._ended.append(request_id)
        self._wake.set()

    def hand_over(self, request_id: str) -> None:
        """What is recorded of a request stays, for the coordinator that goes on with it."""
        with self._lock:
            self._handed_over.append(request_id)
        self._wake.set()

    def recorded(self) -> list[tuple[RequestRecord, list[RecordedToken]]]:
        """All that is kept in Valkey; raises QueueUnavailable."""
        return self._queue.recorded_requests()

    def run(self) -> None:
        """Write what is new until `stop`; through Valkey's absences it keeps all and writes all when it is back."""
        away = False
        while True:
            self._wake.wait(FLUSH_SECONDS)
            self._wake.clear()
            stopping = self._stopping
            try:
                self._write_new()
                if away:
                    log.info("Valkey is back")
                away = False
            except QueueUnavailable as error:
                if not away:
                    log.warning("requests go on unrecorded: %s", error)
                away = True
            if stopping:
                return

    def stop(self) -> None:
        """Write once more and end the thread."""
        self._stopping = True
        self._wake.set()

    def _write_new(self) -> None:
        with self._lock:
            batches = {name: self._live[name][1][-count:] for name, count in self._unwritten.items()}
            self._unwritten.clear()
            ended, self._ended = self._ended, []
            kept, self._kept = self._kept, []
            handed_over = list(self._handed_over)
            nothing = not (batches or ended or kept or handed_over)
        if nothing:
            return
        try:
            server_id = self._queue.server_id()
            if server_id != self._server_id:
                self._write_all()
                self._server_id = server_id
            elif batches:
                self._queue.record_tokens(batches)
            while ended:
                self._queue.forget_request(ended[-1])
                ended.pop()
            while kept:
                self._queue.record_request(*kept[-1])
                kept.pop()
            with self._lock:
                for request_id in handed_over:
                    self._handed_over.remove(request_id)
                    self._live.pop(request_id, None)
        except QueueUnavailable:
            self._server_id = ""  # so that all is written when it is back
            with self._lock:
                self._ended = ended + self._ended
                self._kept = kept + self._kept
                self._unwritten = dict.fromkeys(self._live, 0)
            raise

    def _write_all(self) -> None:
        with self._lock:
            live = [(record, list(tokens)) for record, tokens in self._live.values()]
            self._unwritten.clear()
        for record, tokens in live:
            self._queue.record_request(record, tokens)
