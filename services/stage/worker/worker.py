"""The stage's loop: take a step, compute this stage's layers, hand it on.

The other loop is coordinator/engine/loop.py. `Worker._take_step` is the life of a step here, in order.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from msgspec.structs import replace

from noodle.cluster.plan import Plan
from noodle.errors import NoodleError, StepRefused, WireError
from noodle.logs import about
from noodle.metrics.counted import StageMetrics
from noodle.wire.frames import ActivationTensor
from noodle.wire.messages import (
    LiveSessions,
    SpanRefusal,
    SpanResult,
    StageTiming,
    Step,
    StepResult,
    StepSpan,
    total_tokens,
)
from services.stage.executors.base import ModelSlice
from services.stage.executors.hidden_states import cast
from services.stage.worker.inbox import Arrival, Inbox
from services.stage.worker.manual_sessions import ForwardSessions
from services.stage.worker.results import span_results
from services.stage.worker.sessions import Admission, SessionTable
from services.stage.worker.steps import check_step, packed_batch, refusal_of, select_spans

log = logging.getLogger(__name__)

TICK_SECONDS = 0.25  # how late an expiry may be noticed


class NextStage(Protocol):
    """The next stage of the plan."""

    def send(self, message: Step | LiveSessions, body: memoryview = ...) -> bool:
        """Send one message on; False when the next stage cannot be reached."""


@dataclass(slots=True)
class Role:
    """What this stage computes in one plan."""

    plan: Plan
    index: int
    model_slice: ModelSlice
    next_stage: NextStage | None  # None on the last stage
    forwards: ForwardSessions = field(default_factory=lambda: ForwardSessions(0, 0, 0))  # by hand, none by default


class Worker:
    """Computes steps one after the other; `run` is its thread, and alone touches the slice and its sessions."""

    def __init__(
        self, stage_id: int, inbox: Inbox, put_result: Callable[[StepResult], bool], metrics: StageMetrics
    ) -> None:
        self._stage_id = stage_id
        self._inbox, self._put_result, self._metrics = inbox, put_result, metrics
        self._sessions = SessionTable(stage_id)
        self._role: Role | None = None
        self.coordinator_epoch = 0  # the newest one in a message to this stage
        self._sent_seconds = 0.0
        self._next_tick = 0.0
        self._arrived_at = 0.0  # arrival of the message in work, or when the inbox was empty: expiries go by this time
        self._stopping = False

    @property
    def session_count(self) -> int:
        """Sessions with KV rows or early spans."""
        return len(self._sessions)

    def run(self) -> None:
        """Handle messages from the inbox until `stop`."""
        while not self._stopping:
            arrival = self._inbox.take(TICK_SECONDS)
            # Messages wait in the inbox while a step computes: no session may expire because they did.
            self._arrived_at = time.monotonic() if arrival is None else arrival.arrived_at
            if arrival is not None:
                self._take(arrival)
            now = time.monotonic()
            if now >= self._next_tick:
                self._next_tick = now + TICK_SECONDS
                self._tick()

    def stop(self) -> None:
        """End the loop after the step in progress."""
        self._inbox.put(lambda: setattr(self, "_stopping", True))

    def install(self, role: Role | None, done: Callable[[], None]) -> None:
        """Compute another plan (None: nothing) after the step in progress; all sessions are dropped."""

        def swap() -> None:
            self._release_rows(self._sessions.release_all())
            self._role = role
            done()

        self._inbox.put(swap)

    def between_steps(self, function: Callable[[Role | None], None]) -> None:
        """Call a function with the current role on the loop's thread; it must not raise."""
        self._inbox.put(lambda: function(self._role))

    def refuse(self, step: Step, reason: str, message: str) -> None:
        """Refuse a step whose body could not be fetched."""

        def refuse_it(role: Role | None) -> None:
            if role is not None and self._is_current(role, step):
                self._refuse(role, step, reason, message)

        self.between_steps(refuse_it)

    def _take(self, arrival: Arrival) -> None:
        if isinstance(arrival.message, Step):
            self._take_step(arrival.message, arrival.body, arrival.arrived_at)
        elif isinstance(arrival.message, LiveSessions):
            self._take_live_sessions(arrival.message)
        elif callable(arrival.message):
            arrival.message()

    def _take_step(self, step: Step, body: memoryview, arrived_at: float) -> None:
        """The life of a step on this stage, in the order in which it happens."""
        role = self._role
        if role is None or not self._is_current(role, step):
            self._metrics.dropped_spans.labels("old_plan_or_epoch").inc(len(step.spans) or 1)
            return
        self._release_rows(self._sessions.release_old(step.released))
        if not self._passes_check(role, step, body):
            return
        admission = self._sessions.admit(step, body, self._arrived_at)
        step, body = self._put_in_order(role, step, body, admission)
        step, body = self._for_each(step, body, admission.copies, partial(_copy_prefix, role.model_slice))
        ready = [(step, body)]
        while ready:
            step, body = ready.pop()
            step, body = self._for_each(step, body, step.spans, partial(_reserve_rows, role.model_slice))
            if not step.spans:
                self._pass_on_refusals(role, step)
                continue
            started = time.monotonic()
            computed = self._compute(role, step, body)
            if computed is None:  # refused
                continue
            finished = time.monotonic()
            step, hidden, results = computed
            timing = StageTiming(self._stage_id, started - arrived_at, finished - started, self._sent_seconds)
            step = replace(step, timings=[*step.timings, timing])
            if role.next_stage is None:
                self._answer(step, results)
            elif hidden is not None:
                self._hand_on(role, role.next_stage, step, hidden)
            self._sent_seconds = time.monotonic() - finished
            self._metrics.computed.observe(finished - started)
            self._metrics.steps.inc()
            self._metrics.tokens.inc(total_tokens(step))
            early = self._sessions.computed(step.spans)  # spans that waited for this step
            ready += [(each.step, each.body) for each in reversed(early)]
            arrived_at = time.monotonic()

    def _is_current(self, role: Role, message: Step | LiveSessions) -> bool:
        """Whether a message belongs to this plan and the leading coordinator; a newer one ends all sessions."""
        epoch = message.coordinator_epoch
        if message.plan_version != role.plan.version or epoch < self.coordinator_epoch:
            return False
        if epoch > self.coordinator_epoch:
            if self.coordinator_epoch:
                log.info("coordinator epoch %d follows %d", epoch, self.coordinator_epoch)
            self.coordinator_epoch = epoch
            self._release_rows(self._sessions.release_all())
        return True

    def _passes_check(self, role: Role, step: Step, body: memoryview) -> bool:
        """Refuse a step that does not fit the plan."""
        try:
            check_step(step, body, role.plan, role.index)
        except (StepRefused, WireError) as error:
            reason = error.reason if isinstance(error, StepRefused) else "bad_tensor"
            for span in step.spans:
                log.warning("step %d refused: %s (%s)", step.step_id, error, reason, extra=about(span.session_id))
            self._refuse(role, step, reason, str(error))
            return False
        return True

    def _put_in_order(self, role: Role, step: Step, body: memoryview, admission: Admission) -> tuple[Step, memoryview]:
        """Return the step with the spans whose turn it is: early ones wait, outdated ones are dropped."""
        for session_id in admission.restarted:
            role.model_slice.release(session_id)
        if admission.outdated:
            self._metrics.dropped_spans.labels("old_session_epoch").inc(admission.outdated)
        step, body = select_spans(step, body, admission.compute)
        return self._with_refusals(step, admission.refusals), body

    def _for_each(
        self, step: Step, body: memoryview, spans: Iterable[StepSpan], act: Callable[[StepSpan], None]
    ) -> tuple[Step, memoryview]:
        """Call `act` for spans and return the step without those it refuses: one must not stop the others."""
        refusals: dict[int, SpanRefusal] = {}  # by the identity of the span
        for span in spans:
            try:
                act(span)
            except StepRefused as error:
                refusals[id(span)] = self._fail(span, error.reason, str(error))
        if not refusals:
            return step, body
        step, body = select_spans(step, body, [span for span in step.spans if id(span) not in refusals])
        return self._with_refusals(step, refusals.values()), body

    def _compute(
        self, role: Role, step: Step, body: memoryview
    ) -> tuple[Step, ActivationTensor | None, list[SpanResult]] | None:
        """Compute a step; on the last stage, sample. Returns None for one that failed and is refused.

        Spans whose logits are not finite are refused alone and leave the step.
        """
        is_last = role.next_stage is None
        try:
            output = role.model_slice.forward(packed_batch(step, body, is_first=role.index == 0, is_last=is_last))
            results, failures = span_results(step, output.logits, role.model_slice) if is_last else ([], [])
        except Exception as error:  # one step's fault must not end the stage for all others
            is_known = isinstance(error, NoodleError)
            if not is_known:
                log.exception("step %d could not be computed", step.step_id)
            reason = error.reason if isinstance(error, StepRefused) else "computation_failed"
            message = str(error) if is_known else f"{type(error).__name__}: {error}"
            failed = self._without(step, [(span, message) for span in step.spans], reason)
            self._pass_on_refusals(role, failed)
            return None
        if failures:
            step = self._without(step, [(span, str(error)) for span, error in failures], "computation_failed")
        return step, output.hidden_states, results

    def _hand_on(self, role: Role, next_stage: NextStage, step: Step, hidden: ActivationTensor) -> None:
        hidden = cast(hidden, role.plan.stages[role.index].activation_dtype_for(total_tokens(step)))
        onward = replace(step, dtype=hidden.dtype, shape=list(hidden.shape))
        if not next_stage.send(onward, hidden.data):
            self._metrics.dropped_spans.labels("next_stage_down").inc(len(step.spans))

    def _answer(self, step: Step, results: list[SpanResult]) -> None:
        result = StepResult(
            step_id=step.step_id,
            plan_version=step.plan_version,
            coordinator_epoch=step.coordinator_epoch,
            spans=results,
            refusals=step.refusals,
            timings=step.timings,
        )
        if not self._put_result(result):
            self._metrics.dropped_spans.labels("no_reader_of_results").inc(len(results) or 1)

    def _refuse(self, role: Role, step: Step, reason: str, message: str) -> None:
        """Refuse a whole step; its sessions keep their rows."""
        refusals = [refusal_of(span, self._stage_id, reason, message) for span in step.spans]
        self._pass_on_refusals(role, self._with_refusals(step, refusals))

    def _without(self, step: Step, failures: Collection[tuple[StepSpan, str]], reason: str) -> Step:
        """Return the step without spans that failed, each with its message."""
        for span, message in failures:
            log.warning("step %d failed: %s", step.step_id, message, extra=about(span.session_id))
        refusals = [self._fail(span, reason, message) for span, message in failures]
        failed = {id(span) for span, _ in failures}
        kept = [span for span in step.spans if id(span) not in failed]
        return self._with_refusals(replace(step, spans=kept), refusals)

    def _fail(self, span: StepSpan, reason: str, message: str) -> SpanRefusal:
        """Forget a session and free its rows here; its refusal tells the other stages, by the coordinator."""
        self._release_rows(self._sessions.release([span.session_id]))
        return refusal_of(span, self._stage_id, reason, message)

    def _with_refusals(self, step: Step, refusals: Collection[SpanRefusal]) -> Step:
        """Count refusals and add them to the step, which carries them to the coordinator with the results."""
        if not refusals:
            return step
        for refusal in refusals:
            self._metrics.dropped_spans.labels(refusal.reason).inc()
        return replace(step, refusals=[*step.refusals, *refusals])

    def _pass_on_refusals(self, role: Role, step: Step) -> None:
        """Send the step's refusals on without its spans."""
        if not step.refusals:
            return
        if role.next_stage is None:
            self._answer(step, [])
            return
        dtype = role.plan.stages[role.index].activation_dtype_for(0)
        role.next_stage.send(replace(step, spans=[], dtype=dtype, shape=[0, role.plan.hidden_size]))

    def _take_live_sessions(self, live: LiveSessions) -> None:
        role = self._role
        if role is None or not self._is_current(role, live):
            return
        unlisted = self._sessions.listed(live.sessions, self._arrived_at)
        self._release_rows(unlisted)
        for session_id in unlisted:
            log.info("freed: the coordinator no longer lists it", extra=about(session_id))
        self._sessions.release(live.released)
        self._release_rows(live.released)
        if live.is_authoritative:
            self._release_rows(self._sessions.release_all(but=live.sessions))
        if role.next_stage is not None:
            role.next_stage.send(live)

    def _tick(self) -> None:
        """Expire early spans and sessions of forwards by hand."""
        gaps = self._sessions.expire(self._arrived_at)
        role = self._role
        if role is None:
            return
        self._release_rows(role.forwards.expire(self._arrived_at))
        for step, refusal in gaps:
            log.info("%s", refusal.message, extra=about(refusal.session_id))
            self._pass_on_refusals(role, self._with_refusals(step, [refusal]))

    def _release_rows(self, session_ids: Iterable[str]) -> None:
        if self._role is not None:
            for session_id in session_ids:
                self._role.model_slice.release(session_id)


def _copy_prefix(model_slice: ModelSlice, span: StepSpan) -> None:
    prefix = span.prefix
    assert prefix is not None  # noqa: S101  # it is why the span is among the copies
    model_slice.copy_rows(prefix.session_id, span.session_id, prefix.token_count, span.reserve_tokens)


def _reserve_rows(model_slice: ModelSlice, span: StepSpan) -> None:
    model_slice.reserve(span.session_id, span.reserve_tokens, span.first_position + span.token_count)
