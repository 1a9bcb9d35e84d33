"""The coordinator's connections to the stages of one plan: steps to stage 0, results from the last, and their state."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from noodle.cluster.plan import Plan, StageAssignment, StageState
from noodle.cluster.valkey import RESULTS_STREAM, WorkQueue, hop_stream
from noodle.errors import LinkLost, QueueUnavailable, WireError
from noodle.metrics.counted import TravelMetrics
from noodle.threads import start_loop
from noodle.wire import messages
from noodle.wire.hop_client import HopConnection, KeptOpen, ResultsConnection
from noodle.wire.queue_end import QueueEnd

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.25  # between two looks at the stages' heartbeats, if the queue is in use


@dataclass(frozen=True, slots=True)
class PipelineUp:
    """Every stage is reachable. A `boot_id` that differs from before means that a KV cache is gone.

    Sent again with equal ones after a lost connection between them, as steps in flight may be lost with it.
    """

    plan_version: int
    boot_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PipelineDown:
    """Some stage is not reachable."""

    plan_version: int
    reason: str


PipelineEvent = PipelineUp | PipelineDown | messages.StepResult  # that the last stage returned


class Pipeline:
    """All connections of one plan, direct and by the queue as `transport` says, until it is closed."""

    def __init__(
        self,
        plan: Plan,
        coordinator_epoch: int,
        cluster_token: str,
        notify: Callable[[PipelineEvent], None],
        *,
        transport: str,
        work_queue: WorkQueue,
        travel: TravelMetrics,
    ) -> None:
        self._plan, self._transport, self._notify, self._travel = plan, transport, notify, travel
        self._work_queue = work_queue
        self._chain: list[messages.ChainLink] = []  # as keep-alives of stage 0 report it
        self._states: dict[int, StageState] = {}  # as heartbeats report it
        self._losses: dict[tuple[int, str], int] = {}  # of a stage's connection to the next, by stage and boot id
        self._results_changes = 0
        self._reasons = {
            "hop": f"{_named(plan.stages[0])} is not connected",
            "results": f"{_named(plan.stages[-1])} does not send its results yet",
        }
        self._notified: tuple[object, ...] | None = None  # what the last PipelineUp was sent for, None while it is down
        self._lock = threading.RLock()  # held while notifying, so that events arrive in order
        self._closed = threading.Event()
        self._hop: KeptOpen[HopConnection] | None = None
        self._results: KeptOpen[ResultsConnection] | None = None
        self._queue: QueueEnd | None = None

        def open_hop(when_lost: Callable[[str], None]) -> HopConnection:
            connection = HopConnection(
                plan.stages[0].url, cluster_token, self._receive, when_lost, travel.round_trip.observe
            )
            connection.open(plan.version)
            return connection

        def open_results(when_lost: Callable[[str], None]) -> ResultsConnection:
            connection = ResultsConnection(plan.stages[-1].url, cluster_token, self._receive, when_lost)
            connection.open(plan.version, coordinator_epoch)
            return connection

        with self._lock:
            if transport != "direct":
                self._queue = QueueEnd(
                    work_queue,
                    RESULTS_STREAM,
                    take=self._take_entry,
                    changed=self._look,
                    refused=lambda reason: travel.refused_entries.labels(reason).inc(),
                )
                self._queue.start("coordinator")
                start_loop("heartbeats", self._watch_heartbeats, "coordinator")
            if transport != "queue":
                self._results = KeptOpen("results", "coordinator", open_results, self._results_changed)
                self._hop = KeptOpen("hop", "coordinator", open_hop, self._hop_changed)

    def send(self, message: messages.Step | messages.LiveSessions, body: bytes = b"") -> None:
        """Send one message to stage 0. Raises LinkLost if neither the connection nor the queue takes it."""
        hop = self._hop.connection if self._hop is not None else None
        try:
            if hop is None:
                raise LinkLost(f"{self._plan.stages[0].url} is not connected.")
            hop.send(message, body)
            transport = "direct"
        except LinkLost:
            if self._queue is None:
                raise
            entry: messages.QueueEntry = (
                messages.InlineStep(message, body) if isinstance(message, messages.Step) else message
            )
            try:
                self._queue.write(hop_stream(self._plan.stages[0].stage_id), entry)
            except QueueUnavailable as error:
                raise LinkLost(str(error)) from error
            transport = "queue"
        if isinstance(message, messages.Step):
            self._travel.step(transport, len(body))

    def close(self) -> None:
        """Close every connection; no event follows."""
        self._closed.set()
        for connection in (self._hop, self._results, self._queue):
            if connection is not None:
                connection.close()

    # messages from stages

    def _receive(self, message: messages.HopMessage) -> None:
        if isinstance(message, messages.StepResult):
            self._send_event(self._within_vocabulary(message))
        elif isinstance(message, messages.KeepAlive) and message.chain:
            with self._lock:
                self._chain = message.chain
            self._look()
        elif isinstance(message, messages.HopRefused):
            log.warning("stage %d refused a frame: %s (%s)", message.stage_id, message.message, message.reason)

    def _take_entry(self, entry: messages.QueueEntry) -> None:
        if not isinstance(entry, messages.StepResult):
            raise WireError(f"a {type(entry).__name__} is no result.")
        self._send_event(self._within_vocabulary(entry))

    def _within_vocabulary(self, result: messages.StepResult) -> messages.StepResult:
        """Replace each span that has a token outside the model's vocabulary by a refusal.

        Such a token would be refused by stage 0, has no text, and would stay in the request's record.
        """
        vocab_size, last = self._plan.vocab_size, self._plan.stages[-1].stage_id
        wrong = [span for span in result.spans if _largest_token_id(span) >= vocab_size]
        if not wrong:
            return result
        spans = [span for span in result.spans if span not in wrong]
        refusals = [
            messages.SpanRefusal(
                span.session_id,
                span.session_epoch,
                span.first_position,
                last,
                reason="unknown_token",
                message=f"it answered token {_largest_token_id(span)}, and the model has {vocab_size}; "
                "does every machine have the same model?",
            )
            for span in wrong
        ]
        return msgspec.structs.replace(result, spans=spans, refusals=[*result.refusals, *refusals])

    def _hop_changed(self, reason: str) -> None:
        with self._lock:
            self._reasons["hop"] = _lost(self._plan.stages[0], reason)
            if reason:
                self._chain = []
        self._look()

    def _results_changed(self, reason: str) -> None:
        with self._lock:
            was, self._reasons["results"] = self._reasons["results"], _lost(self._plan.stages[-1], reason)
            if bool(was) != bool(reason):  # also when it is back: the stage may have used the old one until now
                self._results_changes += 1
        self._look()

    def _watch_heartbeats(self) -> None:
        stage_ids = [stage.stage_id for stage in self._plan.stages]
        while not self._closed.is_set():
            try:
                states = self._work_queue.states_of(stage_ids)
                with self._lock:
                    self._states = states
                self._look()
            except QueueUnavailable as error:
                log.debug("no heartbeats read: %s", error)
            self._closed.wait(LOOK_SECONDS)

    # the pipeline's state

    def _look(self) -> None:
        """Compare the known state with the plan, and notify of a change."""
        with self._lock:
            links = self._links()
            missing = self._missing(links)
            if missing is not None:
                was_up, self._notified = self._notified is not None, None
                if was_up:
                    self._send_event(PipelineDown(self._plan.version, missing))
                return
            boot_ids = tuple(link.boot_id for link in links)
            state = (boot_ids, self._losses_of(links), self._results_changes)
            if state != self._notified:
                self._notified = state
                self._send_event(PipelineUp(self._plan.version, boot_ids))

    def _links(self) -> list[messages.ChainLink]:
        """Return the link of each stage: as far as connections reach from their reports, then from heartbeats."""
        links: list[messages.ChainLink] = []
        for link in self._chain:
            links.append(link)
            if link.by_queue:  # its view of downstream stages may be stale
                break
        for stage in self._plan.stages[len(links) :]:
            state = self._states.get(stage.stage_id)
            if state is None or state.link is None or state.ready_version != self._plan.version:
                break
            links.append(state.link)
        return links

    def _missing(self, links: list[messages.ChainLink]) -> str | None:
        """Return why the pipeline is incomplete, None if it is complete."""
        queue_failure = self._queue.failure if self._queue is not None else None
        for name, kept in (("hop", self._hop), ("results", self._results)):
            if (kept is None or kept.connection is None) and queue_failure != "":
                return queue_failure or self._reasons[name]
        for index, stage in enumerate(self._plan.stages):
            state = self._states.get(stage.stage_id)
            if self._transport == "queue" and state is not None and state.transport == "direct":
                return f"{_named(stage)} has NOODLE_TRANSPORT=direct, this coordinator has NOODLE_TRANSPORT=queue"
            if index >= len(links):
                return f"{_named(stage)} is not connected"
            link = links[index]
            if link.stage_id != stage.stage_id or link.plan_version != self._plan.version:
                return f"{_named(stage)} is not ready for plan {self._plan.version}"
            if not link.next_link_up:
                behind = self._plan.stages[min(index + 1, len(self._plan.stages) - 1)]
                reason = f" ({link.detail.rstrip('.')})" if link.detail else ""
                return f"{_named(stage)} does not reach {_named(behind)}{reason}"
        return None

    def _losses_of(self, links: list[messages.ChainLink]) -> tuple[int, ...]:
        """Return how often each connection was lost. A heartbeat may be older than its stage's last report."""
        counts = [self._hop.losses if self._hop is not None else 0]
        for link in links:
            key = (link.stage_id, link.boot_id)
            self._losses[key] = max(link.losses, self._losses.get(key, 0))
            counts.append(self._losses[key])
        return tuple(counts)

    def _send_event(self, event: PipelineEvent) -> None:
        if not self._closed.is_set():
            self._notify(event)


def _largest_token_id(span: messages.SpanResult) -> int:
    """Return the largest token id that a span's result names, -1 if it names none."""
    if span.token_id is None and not span.scores:
        return -1  # most spans of a prompt
    scored = [each.token_id for score in span.scores for each in score.top]
    return max(-1 if span.token_id is None else span.token_id, *(each.token_id for each in span.top), *scored, -1)


def _named(stage: StageAssignment) -> str:
    return f"stage {stage.stage_id} on {stage.machine}"


def _lost(stage: StageAssignment, reason: str) -> str:
    """Name the stage whose connection KeptOpen reports as lost; empty if it is not."""
    return f"{_named(stage)} is lost ({reason.rstrip('.')})" if reason else ""
