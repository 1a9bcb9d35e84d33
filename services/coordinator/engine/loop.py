"""THE loop: a request becomes a session, sessions become steps, results become tokens. Start reading here.

    HTTP thread: admission.submit() -> Generation  loop thread: next_step() -> pipeline.send()
    HTTP thread: its reader.next()  <-  token   loop thread: result -> scheduler.apply() -> Generation

The other loop is services/stage/worker/worker.py. This one knows sessions, steps and the two connections of the
pipeline, but neither text nor routes.
"""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable
from dataclasses import replace

from noodle.cluster.plan import Plan
from noodle.cluster.valkey import RecordedToken
from noodle.errors import GenerationFailed, LinkLost, NoodleError, NotReady, RequestTimedOut
from noodle.logs import about
from noodle.metrics.counted import CoordinatorMetrics
from noodle.wire.messages import LiveSessions, StepResult
from services.coordinator.engine.admission import Admission
from services.coordinator.engine.loop_events import (
    Activate,
    Ended,
    LimitsChanged,
    LoopEvent,
    LoopState,
    StandBy,
    Submitted,
)
from services.coordinator.engine.open_requests import OpenRequests
from services.coordinator.engine.pipeline import Pipeline, PipelineDown, PipelineEvent, PipelineUp, ResultArrived
from services.coordinator.engine.recorder import Recorder
from services.coordinator.engine.recovery import Recovery
from services.coordinator.engine.request import FINISHED, PromptComputed, Token
from services.coordinator.engine.scheduler import MAXIMUM_REPLAYS, ROOM_REASON, Counts, Scheduler
from services.coordinator.engine.sequence import NewToken, PlanLimits

log = logging.getLogger(__name__)

LIVE_SESSIONS_SECONDS = 1.0  # how often every stage is told which sessions live
TICK_SECONDS = 0.25  # how late a deadline may be noticed
# Stages free what they hear no list of for 5 s, and a break is noticed up to 3 s late: after so long they may have
KEPT_OVER_BREAK_SECONDS = 1.0


class EngineLoop:
    """Computes all requests; `run` is its thread, everything else may be called from any."""

    def __init__(
        self,
        scheduler: Scheduler,
        recorder: Recorder,
        metrics: CoordinatorMetrics,
        make_pipeline: Callable[[Plan, int, Callable[[PipelineEvent], None]], Pipeline],
        *,
        maximum_open: int,
        recovery_seconds: float,
        keeps_rows: bool = True,
    ) -> None:
        self._scheduler, self._recorder, self._metrics = scheduler, recorder, metrics
        self._make_pipeline = make_pipeline
        self._recovery = Recovery(recovery_seconds)
        self._keeps_rows = keeps_rows  # of ended sessions, for others that begin alike
        # Unbounded by itself; its writers are bounded: open requests, and results of at most the steps in flight.
        self._events: queue.SimpleQueue[LoopEvent | None] = queue.SimpleQueue()
        self._open = OpenRequests(maximum_open)
        self._pipeline: Pipeline | None = None
        self._pending: Activate | None = None
        self._next_live = 0.0
        self._next_tick = 0.0
        self._broke_at = 0.0
        self._counted = Counts()  # of the scheduler's counts, what the metrics have
        self.state = LoopState()
        self.admission = Admission(
            self._open, recorder, self._events.put, lambda: self._scheduler.limits, lambda: self.state
        )

    @property
    def kept_rows(self) -> int:
        """KV rows of ended requests that every stage keeps, for /health."""
        return self._scheduler.kept_rows

    # called by the thread that leads

    def activate(self, plan: Plan, limits: PlanLimits, coordinator_epoch: int) -> None:
        """Compute by this plan as soon as the steps in flight are back."""
        self._events.put(Activate(plan, limits, coordinator_epoch))

    def limits_changed(self, limits: PlanLimits) -> None:
        """A stage came back with more or less room for KV rows under the same plan."""
        self._events.put(LimitsChanged(limits))

    def stand_by(self, error: NoodleError) -> None:
        """Another coordinator leads: end every open request with this error and compute nothing."""
        self._events.put(StandBy(error))

    def drain(self, seconds: float) -> None:
        """Refuse new requests, and return when the open ones have ended or the time is over."""
        self.admission.is_draining = True
        self._open.wait_until_none(seconds)

    def stop(self) -> None:
        """End the loop; open requests end with an error."""
        self._events.put(None)

    # the loop

    def run(self) -> None:
        """Take events and send steps until `stop`."""
        while True:
            try:
                event = self._events.get(timeout=TICK_SECONDS)
            except queue.Empty:
                event = _NOTHING
            if event is None:
                self._hand_over(NotReady("The coordinator is stopping.", retry_after_seconds=5))
                self._close_pipeline()
                return
            self._handle(event)
            self._send_steps()
            now = time.monotonic()
            if now >= self._next_tick:
                self._next_tick = now + TICK_SECONDS
                self._tick(now)

    def _handle(self, event: LoopEvent) -> None:
        if isinstance(event, ResultArrived):
            self._take_result(event.result)
        elif isinstance(event, Submitted):
            self._scheduler.add(event.session)
        elif isinstance(event, Ended):
            self._end(event.request_id, event.outcome, event.error)
        elif isinstance(event, PipelineUp):
            self._pipeline_is_up(event)
        elif isinstance(event, PipelineDown):
            self._pipeline_is_down(event.plan_version, event.reason)
        elif isinstance(event, Activate):
            self._pending = event
        elif isinstance(event, LimitsChanged):
            if self._scheduler.limits and self._scheduler.limits.plan_version == event.limits.plan_version:
                self._scheduler.limits = event.limits
        elif isinstance(event, StandBy):
            self._stand_by(event.error)

    def _send_steps(self) -> None:
        """Hand every step that can be formed to the pipeline."""
        if self._pending is not None and (self._scheduler.steps_in_flight == 0 or not self.state.up):
            self._switch(self._pending)
        if not self.state.up or self._pending is not None or self._pipeline is None:
            return
        while (flight := self._scheduler.next_step(time.monotonic())) is not None:
            if self._scheduler.steps_in_flight == 1:
                self._recovery.began(flight.sent_at)
            try:
                self._pipeline.send(flight.step, flight.body)
            except LinkLost as error:  # the step stays in flight and is sent again when the pipeline is back
                self._pipeline_is_down(flight.step.plan_version, str(error))
                return

    def _take_result(self, result: StepResult) -> None:
        """Hand new tokens to their requests, and count where the step's time went."""
        now = time.monotonic()
        flight, tokens, fatal = self._scheduler.apply(result)
        if flight is None:
            return
        waiting = () if self._recovery.is_whole else (session.session_id for session in self._scheduler.waiting)
        self._recovery.computed(now, (*(span.session_id for span in result.spans), *waiting))
        if any(refusal.reason == ROOM_REASON for refusal in result.refusals):
            self._tell_live_sessions(is_authoritative=True)  # whatever takes the room, it is none of ours
        self._send_steps()  # the stages first: text, books and counts have time while they compute
        computed_seconds = sum(timing.computed_seconds for timing in result.timings)
        ended: list[str] = []
        since_last: list[float] = []
        for token in tokens:
            waited_seconds = self._deliver(token, now, computed_seconds)
            if waited_seconds is not None:
                since_last.append(waited_seconds)
            if token.finish_reason is not None:
                ended.append(token.session.session_id)
        for request_id in ended:
            self._end(request_id, "finished", None)
        for session, refusal in fatal:
            message = f"Stage {refusal.stage_id} refused a step of this request: {refusal.message} ({refusal.reason})."
            self._end(session.session_id, "failed", GenerationFailed(message))
        self._metrics.steps.came_back(
            result.timings,
            now - flight.sent_at,
            is_decode=flight.is_decode,
            tokens=len(since_last),
            since_last_seconds=sum(since_last),
        )

    def _deliver(self, new: NewToken, now: float, computed_seconds: float) -> float | None:
        """Hand one token to its request; gives the seconds since the one before it, None for a first one."""
        books = self._open.get(new.session.session_id)
        if books is None:
            return None
        if books.last_token_at is None and (new.session.scores is not None or new.token_id is None):
            scores = tuple(score for score in new.session.scores or () if score is not None)
            books.generation.put(PromptComputed(scores, is_all=new.token_id is None))
        if new.token_id is None:
            return None
        books.generation.put(Token(new.token_id, new.logprob, new.finish_reason, new.top))
        recorded = RecordedToken(new.token_id, new.logprob, new.finish_reason or "", list(new.top))
        self._recorder.token(new.session.session_id, recorded)
        self._metrics.generated_tokens.inc()
        since_last_seconds = None
        if books.last_token_at is None:
            self._metrics.time_to_first_token.observe(now - books.arrived_at)
        else:
            since_last_seconds = now - books.last_token_at
            self._metrics.inter_token.observe(since_last_seconds)
            self._metrics.token_overhead.observe(max(0.0, since_last_seconds - computed_seconds))
        books.last_token_at = now
        books.tokens += 1
        return since_last_seconds

    def _end(self, request_id: str, outcome: str, error: NoodleError | None) -> None:
        """Close a request's books and free its KV rows everywhere; harmless when it has ended."""
        books = self._open.pop(request_id)
        if books is None:
            return
        books.generation.end(error or FINISHED)
        seconds = time.monotonic() - books.arrived_at
        self._metrics.requests.labels(outcome, books.client_name).inc()
        if outcome == "finished":
            self._metrics.request_seconds.observe(seconds)
        log.info(
            "%s after %d new tokens and %.2f s, for %s%s",
            outcome,
            books.tokens,
            seconds,
            books.client_name,
            f": {error}" if error is not None else "",
            extra=about(request_id),
        )
        self._recorder.end(request_id, outcome if error is None else str(error))
        self._recovery.forget(request_id)
        freed = self._scheduler.remove(request_id, keep_rows=self._keeps_rows and outcome == "finished")
        if freed:
            self._tell_live_sessions(released=freed)

    def _hand_over(self, error: NoodleError) -> None:
        """Let go of every open request; the coordinator that leads next goes on with what is recorded of it."""
        for request_id, _ in self._open.all():
            self._recorder.hand_over(request_id)
            self._end(request_id, "handed_over", error)

    def _tell_live_sessions(self, *, released: list[str] | None = None, is_authoritative: bool = False) -> None:
        """Tell every stage which sessions live; one that is away now is told when the pipeline stands again."""
        if self._pipeline is None or self._scheduler.limits is None or not self.state.up:
            return
        live = LiveSessions(
            self._scheduler.limits.plan_version,
            self._scheduler.coordinator_epoch,
            self._scheduler.held_ids,
            released or [],
            is_authoritative,
        )
        try:
            self._pipeline.send(live)
        except LinkLost as error:
            self._pipeline_is_down(self._scheduler.limits.plan_version, str(error))

    # the pipeline comes and goes (design D2)

    def _pipeline_is_up(self, event: PipelineUp) -> None:
        state = self.state
        if state.plan is None or event.plan_version != state.plan.version:
            return
        was_up, same_caches = state.up, state.boot_ids == event.boot_ids
        state.up, state.detail, state.boot_ids = True, "ready", event.boot_ids
        log.info("the pipeline stands: %d stages, plan %d", len(event.boot_ids), event.plan_version)
        if not same_caches:
            self._replay("stage_restarted")
        elif not was_up and time.monotonic() - self._broke_at > KEPT_OVER_BREAK_SECONDS:
            self._scheduler.forget_kept()
        # before any step: sessions that ended while the pipeline was down still hold their room on some stage
        self._tell_live_sessions(is_authoritative=True)
        for flight in self._scheduler.to_send_again(time.monotonic()):
            if self._pipeline is not None:
                try:
                    self._pipeline.send(flight.step, flight.body)
                except LinkLost as error:
                    self._pipeline_is_down(event.plan_version, str(error))
                    return

    def _pipeline_is_down(self, plan_version: int, reason: str) -> None:
        state = self.state
        if state.plan is None or plan_version != state.plan.version or not state.up:
            return
        now = self._broke_at = time.monotonic()
        state.up, state.detail = False, reason
        log.warning("the pipeline is broken: %s", reason)
        self._end_out_of_time(now)  # now and not at a tick: a pipeline that comes and goes may be up at each of them

    def _end_out_of_time(self, now: float) -> None:
        """The pipeline is down: note it for every open request, and end those that have waited for too long."""
        arrived_at = {request_id: books.arrived_at for request_id, books in self._open.all()}
        is_busy = self._scheduler.steps_in_flight > 0
        self._recovery.broke(self.state.detail, now, arrived_at, is_busy=is_busy)
        for request_id, error in self._recovery.out_of_time(now).items():
            self._end(request_id, "failed", error)

    def _replay(self, reason: str) -> None:
        replayed = self._scheduler.replay_all()
        if replayed:
            self._metrics.replays.labels(reason).inc(len(replayed))
            log.info("%d sessions are prefilled again: %s", len(replayed), reason)
            for session in replayed:
                log.info("prefilled again: %s", reason, extra=about(session.session_id))
        for session in replayed:
            if session.replays > MAXIMUM_REPLAYS:  # it is begun again and again and gets no token in between
                self._end(session.session_id, "failed", _lost_too_often())

    def _switch(self, activate: Activate) -> None:
        """Let the new plan take over; every session begins anew in it."""
        self._pending = None
        self._close_pipeline()
        self.state = LoopState(activate.plan, False, f"connecting to the stages of plan {activate.plan.version}")
        self._scheduler.limits = activate.limits
        self._scheduler.coordinator_epoch = activate.coordinator_epoch
        self._metrics.steps.begin_plan((stage.stage_id, stage.machine) for stage in activate.plan.stages)
        self._replay("new_plan")
        self._pipeline = self._make_pipeline(activate.plan, activate.coordinator_epoch, self._events.put)
        log.info("plan %d is active, coordinator epoch %d", activate.plan.version, activate.coordinator_epoch)

    def _stand_by(self, error: NoodleError) -> None:
        self._hand_over(error)
        self._close_pipeline()
        self._scheduler.limits = None
        self._pending = None
        self.state = LoopState(detail=str(error))

    def _close_pipeline(self) -> None:
        if self._pipeline is not None:
            self._pipeline.close()
            self._pipeline = None

    def _tick(self, now: float) -> None:
        self._metrics.running.set(len(self._scheduler.running))
        self._metrics.waiting.set(self._scheduler.waiting_count)
        self._count()
        self._end_left_and_late(now)
        self._metrics.kv_use.set(self._scheduler.used_share)
        if self.state.up:
            # what a pipeline that stands again was given may come late; only a step that is lost is not tried again
            late = self._recovery.out_of_time(now)
            for session in self._scheduler.overdue(now, late.keys()):
                error = late.get(session.session_id) or _lost_too_often()
                self._end(session.session_id, "failed", error)
            if now >= self._next_live:
                self._next_live = now + LIVE_SESSIONS_SECONDS
                self._tell_live_sessions()
        elif self.state.plan is not None:
            self._end_out_of_time(now)

    def _end_left_and_late(self, now: float) -> None:
        """End requests whose client did not come back, and those that took longer than they may."""
        for request_id, books in self._open.all():
            if books.generation.is_left(now):
                self._end(request_id, "cancelled", GenerationFailed("The request's client did not come back in time."))
            elif books.deadline is not None and now >= books.deadline:
                late = RequestTimedOut(
                    f"The request was not finished in the time that it gave; it has {books.tokens} tokens.",
                    cure="Ask for fewer tokens, or raise timeout_seconds.",
                )
                self._end(request_id, "failed", late)

    def _count(self) -> None:
        """Let the metrics have what the scheduler counted since the last tick."""
        counts, counted, metrics = self._scheduler.counts, self._counted, self._metrics
        metrics.kept_tokens.set(self._scheduler.kept_rows)
        metrics.preemptions.inc(counts.preemptions - counted.preemptions)
        metrics.prefix_queries.inc(counts.prompt_tokens - counted.prompt_tokens)
        metrics.prefix_hits.inc(counts.reused_tokens - counted.reused_tokens)
        self._counted = replace(counts)


def _lost_too_often() -> NoodleError:
    return GenerationFailed("The request's steps were lost too often.", cure="See the stages' logs.")


_NOTHING = Ended("", "", None)  # a tick: nothing happened
