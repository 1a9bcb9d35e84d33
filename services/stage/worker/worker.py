"""The stage's loop: take a step, compute this stage's layers, hand it on. The twin of coordinator/generate.py.

Everything that touches the slice and its sessions happens in this one thread; it knows no connection, only an inbox
and two outlets, and no text.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import msgspec
import numpy as np

from noodle.cluster.plan import Plan
from noodle.errors import GenerationFailed, NoodleError, StepRefused, WireError
from noodle.logs import about
from noodle.metrics.counted import StageMetrics
from noodle.wire.frames import MAXIMUM_STEP_TOKENS, ActivationTensor, checked_tensor, row_bytes
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
from services.stage.executors.base import ModelSlice, PackedBatch, Span
from services.stage.executors.hidden_states import recast
from services.stage.worker.inbox import Arrival, Inbox
from services.stage.worker.manual_sessions import ForwardSessions
from services.stage.worker.results import span_results
from services.stage.worker.sessions import Admission, SessionTable

log = logging.getLogger(__name__)

TICK_SECONDS = 0.25  # how late an expiry may be noticed


class Next(Protocol):
    """Where hidden states go from here."""

    def send(self, message: Step | LiveSessions, body: memoryview = ...) -> bool:
        """Hand one frame to the next stage; False when it is not there."""
        ...


class Results(Protocol):
    """Where the last stage's results go."""

    def put(self, result: StepResult) -> bool:
        """Hand one result to the coordinator; False when no way leads there."""
        ...


@dataclass(slots=True)
class Role:
    """What this stage does in one plan."""

    plan: Plan
    index: int
    model_slice: ModelSlice
    next_stage: Next | None  # None on the last stage
    forwards: ForwardSessions = field(default_factory=lambda: ForwardSessions(0, 0, 0))  # by hand, none by default

    @property
    def expected_dtypes(self) -> tuple[str, ...]:
        """Of a step's body as it may come in."""
        return ("int32",) if self.index == 0 else self.plan.stages[self.index - 1].may_hand_on


class Worker:
    """Computes steps one after the other; `run` is its thread."""

    def __init__(self, stage_id: int, inbox: Inbox, results: Results, metrics: StageMetrics) -> None:
        self._stage_id = stage_id
        self._inbox, self._results, self._metrics = inbox, results, metrics
        self._sessions = SessionTable(stage_id)
        self._role: Role | None = None
        self._coordinator_epoch = 0
        self._sent_seconds = 0.0
        self._next_tick = 0.0
        self._heard_at = 0.0  # when what is worked on came, or that nothing waited: the time by which things expire
        self._stopping = False

    @property
    def coordinator_epoch(self) -> int:
        """Of the newest coordinator this stage has heard."""
        return self._coordinator_epoch

    @property
    def session_count(self) -> int:
        """Sessions with KV rows or early spans."""
        return len(self._sessions)

    def run(self) -> None:
        """Take what comes until `stop`."""
        while not self._stopping:
            arrival = self._inbox.take(TICK_SECONDS)
            # While a step computes, others wait in the inbox: sessions must not be old by the time that these waited.
            self._heard_at = time.monotonic() if arrival is None else arrival.arrived_at
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
        """Between two steps, compute another plan from now on (None: nothing); all sessions begin anew."""

        def swap() -> None:
            if self._role is not None:
                self._release(self._sessions.release_all())
            self._role = role
            done()

        self._inbox.put(swap)

    def between_steps(self, function: Callable[[Role | None], None]) -> None:
        """Run a function on the loop's thread, with what it computes then; it must not raise."""
        self._inbox.put(lambda: function(self._role))

    def refuse(self, step: Step, reason: str, message: str) -> None:
        """Between two steps, refuse one whose body could not be had."""

        def refuse_it() -> None:
            role = self._role
            if role is not None and self._is_current(role, step.plan_version, step.coordinator_epoch):
                self._refuse(role, step, step.spans, reason, message)

        self._inbox.put(refuse_it)

    def _take(self, arrival: Arrival) -> None:
        if isinstance(arrival.message, Step):
            self._take_step(arrival.message, arrival.body, arrival.arrived_at)
        elif isinstance(arrival.message, LiveSessions):
            self._take_live_sessions(arrival.message)
        elif callable(arrival.message):
            arrival.message()

    def _take_step(self, step: Step, body: memoryview, arrived_at: float) -> None:
        role = self._role
        if role is None or not self._is_current(role, step.plan_version, step.coordinator_epoch):
            self._metrics.dropped_spans.labels("old_plan_or_epoch").inc(len(step.spans) or 1)
            return
        self._release(self._sessions.release_old(step.released))
        try:
            self._check(role, step, body)
        except (StepRefused, WireError) as error:
            reason = error.reason if isinstance(error, StepRefused) else "bad_tensor"
            for span in step.spans:
                log.warning("step %d refused: %s (%s)", step.step_id, error, reason, extra=about(span.session_id))
            self._refuse(role, step, step.spans, reason, str(error))
            return
        bytes_of_row = row_bytes(step.dtype, role.plan.hidden_size if role.index else 1)
        admission = self._sessions.admit(step, body, bytes_of_row, self._heard_at)
        for session_id in admission.restarted:
            role.model_slice.release(session_id)
        for reason, count in admission.dropped.items():
            self._metrics.dropped_spans.labels(reason).inc(count)
        self._copy_prefixes(role, step, admission)
        if len(admission.compute) < len(step.spans):
            step, body = _only(step, body, bytes_of_row, admission.compute)
        if admission.refusals:
            self._count_refusals(admission.refusals)
            step = msgspec.structs.replace(step, refusals=[*step.refusals, *admission.refusals])
        self._compute(role, step, body, arrived_at)

    def _copy_prefixes(self, role: Role, step: Step, admission: Admission) -> None:
        """Let sessions that begin with another's rows have them; one that can not is refused and not computed."""
        for index in admission.copies:
            span, prefix = step.spans[index], step.spans[index].prefix
            assert prefix is not None  # noqa: S101  # it is why the span is among the copies
            try:
                tokens = prefix.token_count
                role.model_slice.copy_rows(prefix.session_id, span.session_id, tokens, span.reserve_tokens)
            except StepRefused as error:
                self._sessions.failed([span])
                role.model_slice.release(span.session_id)
                admission.compute.remove(index)
                admission.refusals.append(self._refusal(span, error.reason, str(error)))

    def _with_room(self, role: Role, step: Step, body: memoryview) -> tuple[Step, memoryview]:
        """The step with those spans that there is room for; one session that has none must not stop the others."""
        fits: list[int] = []
        refusals: list[SpanRefusal] = []
        for index, span in enumerate(step.spans):
            try:
                end = span.first_position + span.token_count
                role.model_slice.reserve(span.session_id, span.reserve_tokens, end)
                fits.append(index)
            except StepRefused as error:
                self._sessions.failed([span])
                role.model_slice.release(span.session_id)
                refusals.append(self._refusal(span, error.reason, str(error)))
        if not refusals:
            return step, body
        self._count_refusals(refusals)
        bytes_of_row = row_bytes(step.dtype, role.plan.hidden_size if role.index else 1)
        step, body = _only(step, body, bytes_of_row, fits)
        return msgspec.structs.replace(step, refusals=[*step.refusals, *refusals]), body

    def _compute(self, role: Role, step: Step, body: memoryview, arrived_at: float) -> None:
        """Compute spans that are all in order, hand them on, then those that waited for them."""
        step, body = self._with_room(role, step, body)
        if not step.spans:
            if step.refusals:
                self._pass_on_refusals(role, step)
            return
        started = time.monotonic()
        is_last = role.next_stage is None
        try:
            output = role.model_slice.forward(_packed(role, step, body, is_last))
            results, failures = span_results(step, output.logits, role.model_slice) if is_last else ([], [])
        except Exception as error:  # one step's fault must not end the stage for all others
            known = isinstance(error, NoodleError)
            if not known:
                log.exception("step %d could not be computed", step.step_id)
            for span in step.spans:
                log.warning("step %d failed: %s", step.step_id, error, extra=about(span.session_id))
            message = str(error) if known else f"{type(error).__name__}: {error}"
            self._sessions.failed(step.spans)
            self._release([span.session_id for span in step.spans])
            reason = error.reason if isinstance(error, StepRefused) else "computation_failed"
            self._refuse(role, step, step.spans, reason, message)
            return
        finished = time.monotonic()
        timing = StageTiming(self._stage_id, started - arrived_at, finished - started, self._sent_seconds)
        timings = [*step.timings, timing]
        if failures:
            step = self._without(step, failures)
        if role.next_stage is None:
            self._answer(step, results, step.refusals, timings)
        elif output.hidden_states is not None:
            hidden = recast(output.hidden_states, role.plan.stages[role.index].hands_on(total_tokens(step)))
            onward = msgspec.structs.replace(step, dtype=hidden.dtype, shape=list(hidden.shape), timings=timings)
            if not role.next_stage.send(onward, hidden.data):
                self._metrics.dropped_spans.labels("next_stage_down").inc(len(step.spans))
        self._sent_seconds = time.monotonic() - finished
        self._metrics.computed.observe(finished - started)
        self._metrics.steps.inc()
        self._metrics.tokens.inc(total_tokens(step))
        for early in self._sessions.computed(step.spans):
            self._compute(role, early.step, early.body, time.monotonic())

    def _without(self, step: Step, failures: list[tuple[StepSpan, GenerationFailed]]) -> Step:
        """The step without spans that came to nothing; their rows are freed here, and told for the other stages."""
        spans = [span for span, _ in failures]
        self._sessions.failed(spans)
        self._release([span.session_id for span in spans])
        refusals = [self._refusal(span, "computation_failed", str(error)) for span, error in failures]
        self._count_refusals(refusals)
        for span, error in failures:
            log.warning("step %d failed: %s", step.step_id, error, extra=about(span.session_id))
        kept = [span for span in step.spans if span not in spans]
        return msgspec.structs.replace(step, spans=kept, refusals=[*step.refusals, *refusals])

    def _take_live_sessions(self, live: LiveSessions) -> None:
        role = self._role
        if role is None or not self._is_current(role, live.plan_version, live.coordinator_epoch):
            return
        unlisted = self._sessions.listed(live.sessions, self._heard_at)
        self._release(unlisted)
        for session_id in unlisted:
            log.info("freed: the coordinator no longer lists it", extra=about(session_id))
        self._sessions.release(live.released)
        self._release(live.released)
        if live.is_authoritative:
            self._release(self._sessions.release_unlisted(live.sessions))
        if role.next_stage is not None:
            role.next_stage.send(live)

    def _is_current(self, role: Role, plan_version: int, coordinator_epoch: int) -> bool:
        """Whether a message belongs to this plan and the leading coordinator; a newer coordinator starts afresh."""
        if plan_version != role.plan.version or coordinator_epoch < self._coordinator_epoch:
            return False
        if coordinator_epoch > self._coordinator_epoch:
            if self._coordinator_epoch:
                log.info("coordinator epoch %d follows %d", coordinator_epoch, self._coordinator_epoch)
            self._coordinator_epoch = coordinator_epoch
            self._release(self._sessions.release_all())
        return True

    def _check(self, role: Role, step: Step, body: memoryview) -> None:
        """Distrust everything (design D5): dtype, shape, length, positions and token ids against the plan."""
        if step.dtype not in role.expected_dtypes:
            takes = " or ".join(role.expected_dtypes)
            raise StepRefused(f"The step's dtype is {step.dtype}, this stage takes {takes}.", reason="wrong_dtype")
        tokens = total_tokens(step)
        expected = [tokens] if role.index == 0 else [tokens, role.plan.hidden_size]
        if step.shape != expected or tokens > MAXIMUM_STEP_TOKENS:
            raise StepRefused(
                f"The step has shape {step.shape}, its spans ask for {expected}; {MAXIMUM_STEP_TOKENS} tokens at most.",
                reason="wrong_shape",
            )
        tensor = checked_tensor(step.dtype, tuple(step.shape), body)
        for span in step.spans:
            end = span.first_position + span.token_count
            if span.reserve_tokens > role.plan.context_length or end > span.reserve_tokens:
                raise StepRefused(
                    f"A span ends at position {end} of a session of {span.reserve_tokens} tokens; "
                    f"the context is {role.plan.context_length}.",
                    reason="wrong_position",
                )
            scored = span.scored_token_ids
            if len(scored) > span.token_count or (scored and max(scored) >= role.plan.vocab_size):
                raise StepRefused(
                    f"A span of {span.token_count} tokens asks for the scores of {len(scored)} tokens, each of which "
                    f"must be in the vocabulary of {role.plan.vocab_size}.",
                    reason="wrong_token",
                )
        if role.index == 0 and tokens:
            token_ids = tensor.data.cast("i")  # a decode step has a few: numpy's reductions would cost more
            if min(token_ids) < 0 or max(token_ids) >= role.plan.vocab_size:
                raise StepRefused(
                    f"A token id is outside the vocabulary of {role.plan.vocab_size}.", reason="wrong_token"
                )

    def _refuse(self, role: Role, step: Step, spans: list[StepSpan], reason: str, message: str) -> None:
        """Send spans on as refused, so that the coordinator hears of it with the results."""
        refusals = [self._refusal(span, reason, message) for span in spans]
        self._count_refusals(refusals)
        self._pass_on_refusals(role, msgspec.structs.replace(step, refusals=[*step.refusals, *refusals]))

    def _refusal(self, span: StepSpan, reason: str, message: str) -> SpanRefusal:
        return SpanRefusal(
            span.session_id, span.session_epoch, span.first_position, self._stage_id, reason, message[:1990]
        )

    def _pass_on_refusals(self, role: Role, step: Step) -> None:
        if role.next_stage is None:
            self._answer(step, [], step.refusals, step.timings)
            return
        dtype = role.plan.stages[role.index].hands_on(0)
        empty = msgspec.structs.replace(step, spans=[], dtype=dtype, shape=[0, role.plan.hidden_size])
        role.next_stage.send(empty)

    def _answer(
        self, step: Step, results: list[SpanResult], refusals: list[SpanRefusal], timings: list[StageTiming]
    ) -> None:
        result = StepResult(step.step_id, step.plan_version, step.coordinator_epoch, results, refusals, timings)
        if not self._results.put(result):
            self._metrics.dropped_spans.labels("no_reader_of_results").inc(len(results) or 1)

    def _tick(self) -> None:
        gaps = self._sessions.expire(self._heard_at)
        role = self._role
        if role is None:
            return
        for name in role.forwards.expire(self._heard_at):
            role.model_slice.release(name)
        for step, refusal in gaps:
            log.info("%s", refusal.message, extra=about(refusal.session_id))
            self._count_refusals([refusal])
            self._pass_on_refusals(role, msgspec.structs.replace(step, refusals=[refusal]))

    def _release(self, session_ids: list[str]) -> None:
        if self._role is not None:
            for session_id in session_ids:
                self._role.model_slice.release(session_id)

    def _count_refusals(self, refusals: list[SpanRefusal]) -> None:
        for refusal in refusals:
            self._metrics.dropped_spans.labels(refusal.reason).inc()


def _packed(role: Role, step: Step, body: memoryview, is_last: bool) -> PackedBatch:
    """The step as the slice takes it; logits are asked for the last row of each span that wants a token."""
    spans, rows, end = [], [], 0
    for span in step.spans:
        spans.append(Span(span.session_id, span.first_position, span.token_count, span.reserve_tokens))
        end += span.token_count
        if is_last and span.sampling is not None:
            rows.append(end - 1)
    token_ids = np.frombuffer(body, np.int32).astype(np.int64) if role.index == 0 else None
    hidden = None
    if role.index:
        hidden = ActivationTensor(step.dtype, tuple(step.shape), body)
        if step.dtype == "int8":  # a format of hops alone: no slice computes with it
            hidden = recast(hidden, "float32")
    return PackedBatch(tuple(spans), np.array(rows, np.int64), token_ids, hidden)


def _only(step: Step, body: memoryview, bytes_of_row: int, indexes: list[int]) -> tuple[Step, memoryview]:
    """The step with only some of its spans, and their rows."""
    parts, row, chosen = [], 0, set(indexes)
    for index, span in enumerate(step.spans):
        if index in chosen:
            parts.append(body[row * bytes_of_row : (row + span.token_count) * bytes_of_row])
        row += span.token_count
    spans = [step.spans[index] for index in indexes]
    shape = [sum(span.token_count for span in spans), *step.shape[1:]]
    return msgspec.structs.replace(step, spans=spans, shape=shape), memoryview(b"".join(parts))
