"""The stage's ends of the queue: entries of its stream go to the worker, steps to the next stage as references.

Entries are as untrusted as frames are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from noodle.cluster.plan import Plan
from noodle.cluster.valkey import hop_stream
from noodle.errors import LinkLost, QueueUnavailable, StepRefused, WireError
from noodle.http_client import HTTP_ERRORS, HttpConnection, connect, reason_of, send_request
from noodle.metrics.counted import StageMetrics
from noodle.wire.frames import ACTIVATION_DTYPES, MAXIMUM_STEP_TOKENS, body_digest, tensor_bytes
from noodle.wire.messages import ActivationRef, InlineStep, LiveSessions, QueueEntry, Step
from noodle.wire.queue_end import QueueEnd
from services.stage.transport.outbox import Outbox
from services.stage.worker.inbox import Inbox

log = logging.getLogger(__name__)

AHEAD_FRAMES = 4  # steps that are fetched before the worker has taken them
FETCH_CONNECT_SECONDS = 3.0
FETCH_SILENCE_SECONDS = 3.0  # of the stage that keeps the bytes
FETCH_TRIES = 3
TAKE_SECONDS = 3.0  # silence of a fetcher that takes nothing, or does not confirm
# The fetcher confirms in the body of its own request, with its last chunk: this needs no second request, and a relay
# in between cannot take the bytes and lose them (docs/adr/0012).
CONFIRMATION = b"1\r\n1\r\n0\r\n\r\n"


class Fetcher:
    """Fetches activations over one connection that is kept open; used by one thread."""

    def __init__(self, cluster_token: str) -> None:
        self._token = cluster_token
        self._url = ""
        self._connection: HttpConnection | None = None

    def fetch(self, url: str, activation_id: str, byte_count: int) -> bytes:
        """Fetch exactly `byte_count` bytes; raises LinkLost without an answer, StepRefused for another length."""
        failure = ""
        for _ in range(FETCH_TRIES):
            try:
                return self._fetch_once(url, activation_id, byte_count)
            except HTTP_ERRORS as error:
                self.close()
                failure = reason_of(error)
        raise LinkLost(f"{url} does not deliver the activations of a step: {failure}.")

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _fetch_once(self, url: str, activation_id: str, byte_count: int) -> bytes:
        connection = self._connected(url)
        headers = {"Transfer-Encoding": "chunked"}  # the body is the confirmation, sent below
        answer = send_request(connection, "GET", f"/activations/{activation_id}", token=self._token, headers=headers)
        if answer.status != 200:
            text = answer.read(2000).decode("utf-8", "replace")
            self.close()
            raise LinkLost(f"{url} does not deliver the activations of a step: {answer.status} {text}")
        if answer.length != byte_count:
            self.close()
            raise StepRefused(
                f"{url} has {answer.length} bytes where {byte_count} were announced.", reason="wrong_length"
            )
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
        """Confirm the arrival to the stage that keeps the bytes; if this is lost, they expire there."""
        try:
            if connection.sock is not None:
                connection.sock.sendall(CONFIRMATION)
        except OSError as error:
            log.debug("not confirmed: %s", error)
            self.close()


def confirmed_by(read: Callable[[int], bytes], is_chunked: bool) -> Callable[[], bool]:
    """Return a function that waits for the fetcher's confirmation; a request without chunks needs none."""

    def confirmed() -> bool:
        if not is_chunked:
            return True
        try:
            return read(2) == b"1"  # one byte and the end of the body
        except Exception as error:  # noqa: BLE001  # gunicorn's own errors of a cut or malformed chunked body
            log.info("the delivery of activations was not confirmed: %s", error or type(error).__name__)
            return False

    return confirmed


class QueuedInlet:
    """Puts entries of this stage's stream into the inbox; runs in the thread that reads the stream.

    `place_of` returns the plan and this stage's index in it for a step that is current; `refuse` refuses one whose
    body cannot be fetched.
    """

    def __init__(
        self,
        inbox: Inbox,
        place_of: Callable[[Step], tuple[Plan, int] | None],
        refuse: Callable[[Step, str, str], None],
        fetcher: Fetcher,
        metrics: StageMetrics,
    ) -> None:
        self._inbox, self._place_of, self._refuse = inbox, place_of, refuse
        self._fetcher, self._metrics = fetcher, metrics

    def take(self, entry: QueueEntry) -> None:
        """Take one entry; raises WireError for one that is not for a stage, TimeoutError when the worker is stuck."""
        if isinstance(entry, InlineStep):
            self._inbox.put(entry.step, memoryview(entry.body))
        elif isinstance(entry, LiveSessions):
            self._inbox.put(entry)
        elif isinstance(entry, ActivationRef):
            self._take_reference(entry)
        else:
            raise WireError(f"a {type(entry).__name__} does not travel down a hop.")

    def _take_reference(self, entry: ActivationRef) -> None:
        """Fetch the bytes of a step; without them it is refused, or left to its deadline when its sender is unknown."""
        step, place = entry.step, self._place_of(entry.step)
        if place is None:
            self._metrics.dropped_spans.labels("old_plan_or_epoch").inc(len(step.spans) or 1)
            return
        plan, index = place
        expected_url = plan.stages[index - 1].url if index else None
        if entry.url != expected_url:
            self._not_taken("wrong_url", f"a reference leads to {entry.url}, the stage before is at {expected_url}")
            return  # no session is at fault, and the step's deadline cures it
        if not 0 < _body_bytes(step, plan.hidden_size) == entry.byte_count:
            message = f"A reference to {entry.byte_count} bytes came for a step of shape {step.shape} in {step.dtype}."
            self._not_taken("wrong_length", message)
            self._refuse(step, "activations_lost", message)
            return
        self._inbox.wait_for_room(entry.byte_count, AHEAD_FRAMES)
        try:
            body = self._fetcher.fetch(entry.url, entry.activation_id, entry.byte_count)
            if body_digest(body) != entry.digest:
                raise StepRefused("The fetched activations are not those of the reference.", reason="wrong_digest")
        except (LinkLost, StepRefused) as error:
            self._not_taken(error.reason if isinstance(error, StepRefused) else "not_fetched", str(error))
            self._refuse(step, "activations_lost", str(error))
            return
        self._inbox.put(step, memoryview(body))

    def _not_taken(self, reason: str, message: str) -> None:
        self._metrics.travel.refused_entries.labels(reason).inc()
        log.warning("a queued step is not taken: %s (%s)", message, reason)


class QueuedOutlet:
    """Puts steps on the next stage's stream, and their bytes into the outbox."""

    def __init__(self, plan: Plan, stage_index: int, outbox: Outbox, end: QueueEnd, metrics: StageMetrics) -> None:
        self._own_url = plan.stages[stage_index].url
        self._stream = hop_stream(plan.stages[stage_index + 1].stage_id)
        self._outbox, self.end, self._metrics = outbox, end, metrics

    def send(self, message: Step | LiveSessions, body: memoryview, *, wait: bool) -> bool:
        """Put one message on the stream; False when the outbox has no room, or the queue is unavailable."""
        if isinstance(message, LiveSessions):
            return try_write(self.end, self._stream, message)
        if not body.nbytes:
            return try_write(self.end, self._stream, InlineStep(message))
        activation_id = self._outbox.put(body, wait=wait)
        if activation_id is None:
            if wait:
                self._metrics.dropped_spans.labels("outbox_full").inc(len(message.spans))
                log.warning("the outbox is full: step %d is dropped and will be sent again", message.step_id)
            return False
        entry = ActivationRef(message, self._own_url, activation_id, body.nbytes, body_digest(body))
        if try_write(self.end, self._stream, entry):
            return True
        self._outbox.discard(activation_id, "never offered")
        return False


def try_write(end: QueueEnd, stream: str, entry: QueueEntry) -> bool:
    """Put an entry on a stream; False when the queue is unavailable."""
    try:
        end.write(stream, entry)
    except QueueUnavailable as error:
        log.debug("not put on %s: %s", stream, error)
        return False
    return True


def _body_bytes(step: Step, hidden_size: int) -> int:
    """Bytes of the step's body, 0 for a shape or dtype that no plan with this hidden size allows."""
    if len(step.shape) != 2 or step.shape[1] != hidden_size or step.shape[0] > MAXIMUM_STEP_TOKENS:
        return 0
    return tensor_bytes(step.dtype, step.shape) if step.dtype in ACTIVATION_DTYPES else 0
