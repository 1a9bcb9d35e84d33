"""The stage's ends of the queued way: entries of its stream go to the worker, steps to the next stage as references.

Knows streams, the outbox and how its bytes are fetched; not what a step computes. Entries are distrusted as frames are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from noodle.cluster.plan import Plan
from noodle.cluster.valkey import RESULTS_STREAM, hop_stream
from noodle.errors import LinkLost, QueueUnavailable, StepRefused, WireError
from noodle.http_client import HTTP_ERRORS, HttpConnection, connect
from noodle.metrics.counted import StageMetrics
from noodle.wire.frames import ACTIVATION_DTYPES, MAXIMUM_STEP_TOKENS, body_digest, tensor_bytes
from noodle.wire.messages import (
    ActivationRef,
    InlineStep,
    LiveSessions,
    QueueEntry,
    Step,
    StepResult,
)
from noodle.wire.queue_end import QueueEnd
from services.stage.transport.outbox import Outbox
from services.stage.worker.inbox import Inbox
from services.stage.worker.worker import Role, Worker

log = logging.getLogger(__name__)

AHEAD_FRAMES = 4  # steps that are fetched before the worker has taken them
FETCH_CONNECT_SECONDS = 3.0
FETCH_SILENCE_SECONDS = 3.0  # of the stage that keeps the bytes
FETCH_TRIES = 3
TAKE_SECONDS = 3.0  # a fetcher that takes nothing, or does not say that it has all, for so long is gone
# The fetcher says so in the body of its own request, as its last word: no second request, and a relay in between
# can not take the bytes and lose them (docs/adr/0012).
CONFIRMATION = b"1\r\n1\r\n0\r\n\r\n"


class Fetcher:
    """Fetches activations over one connection that is kept open; used by one thread."""

    def __init__(self, cluster_token: str) -> None:
        self._token = cluster_token
        self._url = ""
        self._connection: HttpConnection | None = None

    def fetch(self, url: str, activation_id: str, byte_count: int) -> bytes:
        """Exactly so many bytes; raises LinkLost when they can not be had, StepRefused when they are others."""
        failure = ""
        for _ in range(FETCH_TRIES):
            try:
                return self._fetch_once(url, activation_id, byte_count)
            except HTTP_ERRORS as error:
                self.close()
                failure = str(error) or type(error).__name__
        raise LinkLost(f"{url} does not give the activations of a step: {failure}.")

    def close(self) -> None:
        """Close the connection; the next fetch opens another."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _fetch_once(self, url: str, activation_id: str, byte_count: int) -> bytes:
        connection = self._connected(url)
        connection.putrequest("GET", f"/activations/{activation_id}", skip_accept_encoding=True)
        connection.putheader("Authorization", f"Bearer {self._token}")
        connection.putheader("Transfer-Encoding", "chunked")
        connection.endheaders()
        answer = connection.getresponse()
        if answer.status != 200 or answer.length != byte_count:
            said = answer.read(2000).decode("utf-8", "replace") if answer.status != 200 else f"{answer.length} bytes"
            self.close()
            if answer.status == 200:
                raise StepRefused(f"{url} has {said} where {byte_count} were announced.", reason="wrong_length")
            raise LinkLost(f"{url} does not give the activations of a step: {answer.status} {said}")
        body = answer.read(byte_count)
        if len(body) < byte_count:
            raise ConnectionResetError(f"cut after {len(body)} of {byte_count} bytes")
        self._confirm(connection)
        return body

    def _connected(self, url: str) -> HttpConnection:
        if self._connection is None or self._url != url:
            self.close()
            self._connection = connect(url, connect_seconds=FETCH_CONNECT_SECONDS, answer_seconds=FETCH_SILENCE_SECONDS)
            self._url = url
        return self._connection

    def _confirm(self, connection: HttpConnection) -> None:
        """Tell the stage that has the bytes that they are here; if it does not hear it, they expire there."""
        try:
            if connection.sock is not None:
                connection.sock.sendall(CONFIRMATION)
        except OSError as error:
            log.debug("not confirmed: %s", error)
            self.close()


def confirmed_by(read: Callable[[int], bytes], is_chunked: bool) -> Callable[[], bool]:
    """How the route knows that a body arrived: by the fetcher's last word, or, if it gives none, by having sent all."""

    def confirmed() -> bool:
        if not is_chunked:
            return True
        try:
            return read(2) == b"1"  # one byte and the end of the body
        except Exception as error:  # noqa: BLE001  # gunicorn's own errors of a cut or malformed chunked body
            log.info("activations were not taken whole: %s", error or type(error).__name__)
            return False

    return confirmed


class QueuedInlet:
    """Gives the worker what comes in this stage's stream; runs in the thread that reads it, never in the worker's."""

    def __init__(
        self, inbox: Inbox, worker: Worker, role: Callable[[], Role | None], fetcher: Fetcher, metrics: StageMetrics
    ) -> None:
        self._inbox, self._worker, self._role = inbox, worker, role
        self._fetcher, self._metrics = fetcher, metrics

    def take(self, entry: QueueEntry) -> None:
        """Take one entry; raises WireError for what has no place here, TimeoutError when the worker takes nothing."""
        if isinstance(entry, InlineStep):
            self._inbox.put(entry.step, memoryview(entry.body))
        elif isinstance(entry, LiveSessions):
            self._inbox.put(entry)
        elif isinstance(entry, ActivationRef):
            self._take_reference(entry)
        else:
            raise WireError(f"a {type(entry).__name__} does not travel down a hop.")

    def refused(self, reason: str) -> None:
        """Count an entry that was not taken."""
        self._metrics.travel.refused_entries.labels(reason).inc()

    def _take_reference(self, entry: ActivationRef) -> None:
        """Fetch the bytes and hand them on; a step whose bytes can not be had is refused or left to its deadline."""
        step, role = entry.step, self._role()
        if role is None or step.plan_version != role.plan.version:
            self._metrics.dropped_spans.labels("old_plan_or_epoch").inc(len(step.spans) or 1)
            return
        if step.coordinator_epoch < self._worker.coordinator_epoch:
            self._metrics.dropped_spans.labels("old_plan_or_epoch").inc(len(step.spans) or 1)
            return
        expected_url = role.plan.stages[role.index - 1].url if role.index else None
        if entry.url != expected_url:
            self._not_taken("wrong_url", f"a reference leads to {entry.url}, the stage before is at {expected_url}")
            return  # whoever wrote it, no session is at fault: the step's deadline cures it
        if not 0 < _body_bytes(step, role.plan.hidden_size) == entry.byte_count:
            message = f"A reference to {entry.byte_count} bytes came for a step of shape {step.shape} in {step.dtype}."
            self._not_taken("wrong_length", message)
            self._worker.refuse(step, "activations_lost", message)
            return
        self._inbox.wait_for_room(entry.byte_count, AHEAD_FRAMES)
        try:
            body = self._fetcher.fetch(entry.url, entry.activation_id, entry.byte_count)
            if body_digest(body) != entry.digest:
                raise StepRefused("The fetched activations are not those of the reference.", reason="wrong_digest")
        except (LinkLost, StepRefused) as error:
            self._not_taken(error.reason if isinstance(error, StepRefused) else "not_fetched", str(error))
            self._worker.refuse(step, "activations_lost", str(error))
            return
        self._inbox.put(step, memoryview(body))

    def _not_taken(self, reason: str, message: str) -> None:
        self.refused(reason)
        log.warning("a step by the queue is not taken: %s (%s)", message, reason)


class QueuedOutlet:
    """Puts steps on the next stage's stream, their bytes into the outbox."""

    def __init__(self, plan: Plan, stage_index: int, outbox: Outbox, end: QueueEnd, metrics: StageMetrics) -> None:
        self._own_url = plan.stages[stage_index].url
        self._stream = hop_stream(plan.stages[stage_index + 1].stage_id)
        self._outbox, self._end, self._metrics = outbox, end, metrics

    @property
    def failure(self) -> str:
        """Why steps can not go by the queue now; empty when they can."""
        return self._end.failure

    def send(self, message: Step | LiveSessions, body: memoryview, *, wait: bool) -> bool:
        """Put one message on the stream; False when the outbox has no room or the queue takes nothing."""
        if isinstance(message, LiveSessions):
            return self._write(message)
        if not body.nbytes:
            return self._write(InlineStep(message))
        activation_id = self._outbox.put(body, wait=wait)
        if activation_id is None:
            if wait:
                self._metrics.dropped_spans.labels("outbox_full").inc(len(message.spans))
                log.warning("the outbox is full: step %d is dropped and will be sent again", message.step_id)
            return False
        entry = ActivationRef(message, self._own_url, activation_id, body.nbytes, body_digest(body))
        if self._write(entry):
            return True
        self._outbox.discard(activation_id, "never offered")
        return False

    def _write(self, entry: QueueEntry) -> bool:
        try:
            self._end.write(self._stream, entry)
        except QueueUnavailable as error:
            log.debug("not put on %s: %s", self._stream, error)
            return False
        return True


def results_by(end: QueueEnd) -> Callable[[StepResult], bool]:
    """How results travel by the queue."""

    def put(result: StepResult) -> bool:
        try:
            end.write(RESULTS_STREAM, result)
        except QueueUnavailable as error:
            log.debug("a result is not put on its stream: %s", error)
            return False
        return True

    return put


def _body_bytes(step: Step, hidden_size: int) -> int:
    """What the step's body must take, 0 for one that no plan with this hidden size allows: nothing is allocated."""
    if len(step.shape) != 2 or step.shape[1] != hidden_size or step.shape[0] > MAXIMUM_STEP_TOKENS:
        return 0
    return tensor_bytes(step.dtype, step.shape) if step.dtype in ACTIVATION_DTYPES else 0
