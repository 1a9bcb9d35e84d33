"""Keeps every open request in Valkey. A thread writes tokens in batches, so that none waits for Valkey.

Unwritten tokens are bounded by what the open requests may generate. After Valkey was away or restarted, all open
requests are written again: it may have lost its last second.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator

import msgspec

from noodle.cluster.valkey import WorkQueue
from noodle.errors import QueueUnavailable
from services.coordinator.engine.request import Request, Token

log = logging.getLogger(__name__)

FLUSH_SECONDS = 0.25

Record = tuple[Request, list[Token]]


class Recorder:
    """Records requests; `run` is its thread."""

    def __init__(self, work_queue: WorkQueue) -> None:
        self._queue = work_queue
        self._lock = threading.Lock()
        self._live: dict[str, Record] = {}
        self._unwritten: dict[str, int] = {}  # tokens that Valkey does not have, by request
        self._ended: list[str] = []
        self._kept: list[Record] = []  # ended, and readable for a while
        self._handed_over: list[str] = []  # written once more, and then no longer ours
        self._server_id = ""  # of the Valkey that has everything
        self._wake = threading.Event()
        self._stopping = False

    def begin(self, request: Request) -> None:
        """Record a request before it is computed. Raises QueueUnavailable; then it must not be computed."""
        self._write(request, [])
        self.resume(request, [])

    def resume(self, request: Request, tokens: list[Token]) -> None:
        """Continue the record of an earlier coordinator."""
        with self._lock:
            self._live[request.request_id] = (request, tokens)

    def token(self, request_id: str, token: Token) -> None:
        """Note one more token; returns at once."""
        with self._lock:
            if request_id in self._live:
                self._live[request_id][1].append(token)
                self._unwritten[request_id] = self._unwritten.get(request_id, 0) + 1

    def end(self, request_id: str, outcome: str) -> None:
        """Drop the record of a request that has ended, or keep it for a while if its client may come back."""
        with self._lock:
            if request_id in self._handed_over:
                return
            found = self._live.pop(request_id, None)
            self._unwritten.pop(request_id, None)
            if found is not None and found[0].resume_seconds > 0:
                request, tokens = found
                self._kept.append((msgspec.structs.replace(request, outcome=outcome), tokens))
            elif found is not None:
                self._ended.append(request_id)
        self._wake.set()

    def hand_over(self, request_id: str) -> None:
        """Leave the record of a request in Valkey for the coordinator that continues it."""
        with self._lock:
            self._handed_over.append(request_id)
        self._wake.set()

    def recorded(self) -> Iterator[Record]:
        """All requests in Valkey, for a coordinator that takes the lead. Raises QueueUnavailable.

        A record that this version cannot read is logged and left out: it must not keep the others from continuing.
        """
        for request_id, (record, tokens) in self._queue.recorded_requests().items():
            try:
                request = msgspec.json.decode(record, type=Request)
                if request.request_id != request_id or not request.prompt_token_ids:
                    raise msgspec.ValidationError("it has another id or no prompt")
                yield request, [msgspec.json.decode(token, type=Token) for token in tokens]
            except msgspec.MsgspecError as error:
                log.warning("the record of request %s cannot be read and is left out: %s", request_id, error)

    def run(self) -> None:
        """Write what is new until `stop`. While Valkey is away everything is kept, and written when it is back."""
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
                    log.warning("requests continue unrecorded: %s", error)
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
        if not (batches or ended or kept or handed_over):
            return
        try:
            server_id = self._queue.server_id()
            if server_id != self._server_id:
                self._write_all()
                self._server_id = server_id
            elif batches:
                self._queue.record_tokens({name: _encoded(tokens) for name, tokens in batches.items()})
            for request_id in ended:
                self._queue.forget_request(request_id)
            for record in kept:
                self._write(*record)
            with self._lock:
                for request_id in handed_over:
                    self._handed_over.remove(request_id)
                    self._live.pop(request_id, None)
        except QueueUnavailable:
            self._server_id = ""  # write everything when it is back
            with self._lock:
                self._ended = ended + self._ended
                self._kept = kept + self._kept
                self._unwritten = dict.fromkeys(self._live, 0)
            raise

    def _write_all(self) -> None:
        with self._lock:
            live = [(request, list(tokens)) for request, tokens in self._live.values()]
            self._unwritten.clear()
        for request, tokens in live:
            self._write(request, tokens)

    def _write(self, request: Request, tokens: list[Token]) -> None:
        self._queue.record_request(request.request_id, msgspec.json.encode(request), _encoded(tokens))


def _encoded(tokens: list[Token]) -> list[bytes]:
    return [msgspec.json.encode(token) for token in tokens]
