"""THE loop: a request becomes a sequence, sequences become steps, results become tokens. Start reading at `run`.

    HTTP thread   admission.submit()                  a Sequence waits in the scheduler
    loop thread   scheduler.next_step()               a Step takes tokens of some sequences
    loop thread   pipeline.send()                     stage 0 gets the step, each stage hands it on
    loop thread   scheduler.apply()                   the last stage's result becomes a Token for each sequence
    loop thread   RequestStream.put()
    HTTP thread   RequestReader.next()                text/answer.py makes text of the token

The other loop is services/stage/worker/worker.py.
"""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable

from noodle.cluster.plan import Plan
from noodle.errors import GenerationFailed, LinkLost, NoodleError, NotReady, RequestTimedOut
from noodle.logs import about
from noodle.metrics.counted import CoordinatorMetrics
from noodle.wire.messages import LiveSessions, SpanRefusal, StepResult
from services.coordinator.engine import admission
from services.coordinator.engine.pipeline import Pipeline, PipelineDown, PipelineEvent, PipelineUp
from services.coordinator.engine.recorder import Recorder
from services.coordinator.engine.recovery import Recovery
from services.coordinator.engine.request import FINISHED, PromptComputed, Token
from services.coordinator.engine.scheduler import MAXIMUM_REPLAYS, ROOM_REASON, Counts, Scheduler
from services.coordinator.engine.sequence import InFlightStep, Sequence

log = logging.getLogger(__name__)

LIVE_SESSIONS_SECONDS = 1.0  # between two lists of live sessions for every stage
TICK_SECONDS = 0.25  # how late a deadline may be noticed
# Stages free sessions that no list has named for 5 s, and a break is noticed up to 3 s late: after a longer break than
# this, rows that are kept for later requests may be gone.
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
        self._keeps_rows = keeps_rows  # of ended requests, for others with the same prefix
        # Unbounded, but its writers are bounded: by open requests, and by results of the steps in flight.
        self._events: queue.SimpleQueue[admission.LoopEvent] = queue.SimpleQueue()
        self._open = admission.OpenRequests(maximum_open)
        self._pipeline: Pipeline | None = None
        self._pending: admission.Activate | None = None
        self._next_live = 0.0
        self._next_tick = 0.0
        self._broke_at = 0.0
        self.state = admission.LoopState()
        self.admission = admission.Admission(
            self._open, recorder, self.notify, limits=lambda: self._scheduler.limits, state=lambda: self.state
        )

    @property
    def kept_rows(self) -> int:
        """KV rows of ended requests that every stage keeps, for /health."""
        return self._scheduler.kv.kept_rows

    def notify(self, event: admission.LoopEvent) -> None:
        """Hand an event to the loop; `leadership.py` sends those about plans."""
        self._events.put(event)

    def drain(self, seconds: float) -> None:
        """Refuse new requests, and return when the open ones have ended or the time is over."""
        self.admission.is_draining = True
        self._open.wait_until_none(seconds)

    def stop(self) -> None:
        """End the loop; open requests end with an error."""
        self.notify(admission.Stop())

    # the loop

    def run(self) -> None:
        """Compute all requests until `stop`. This is a token's life in this process, from 1 to 5."""
        while not isinstance(event := self._next_event(), admission.Stop):
            now, flight = time.monotonic(), None
            if isinstance(event, Sequence):
                # 1. An HTTP thread has admitted a request (admission.py): its sequence waits for a place.
                self._scheduler.waiting.add(event)
            elif isinstance(event, StepResult):
                # 3. The last stage has returned a step (pipeline.py): each of its sequences gets its next token.
                result = event
                flight, tokens, refusals = self._scheduler.apply(result)
                if flight is not None:
                    self._note_computed(result, now)
            elif event is not None:
                self._handle(event)  # a request ends early, a plan changes, the pipeline comes or goes
            # 2. Sequences that want tokens form steps (scheduler.py), and stage 0 gets them (pipeline.py). After a
            # result this comes before delivery, so that the stages compute meanwhile.
            self._send_steps()
            if flight is not None:
                # 4. Each token goes to its request's stream, and an HTTP thread makes text of it (text/answer.py).
                computed_seconds = sum(timing.computed_seconds for timing in result.timings)
                since_last = [self._deliver(*each, now, computed_seconds) for each in tokens]
                # 5. A request with its last token ends, and others take its room.
                self._end_answered(tokens, refusals)
                self._count_step(flight, result, now, since_last)
                self._send_steps()
            if (now := time.monotonic()) >= self._next_tick:
                self._tick(now)
        self._hand_over(NotReady("The coordinator is stopping.", retry_after_seconds=5))
        self._close_pipeline()

    def _next_event(self) -> admission.LoopEvent | None:
        try:
            return self._events.get(timeout=TICK_SECONDS)
        except queue.Empty:
            return None

    def _handle(self, event: admission.LoopEvent) -> None:
        if isinstance(event, admission.Ended):
            self._end(event.request_id, event.outcome, event.error)
        elif isinstance(event, PipelineUp):
            self._pipeline_is_up(event)
        elif isinstance(event, PipelineDown):
            self._pipeline_is_down(event.plan_version, event.reason)
        elif isinstance(event, admission.Activate):
            self._activate(event)
        elif isinstance(event, admission.StandBy):
            self._stand_by(event.error)

    def _send_steps(self) -> None:
        if self._pending is not None and (self._scheduler.steps_in_flight == 0 or not self.state.up):
            self._switch(self._pending)
        if not self.state.up or self._pending is not None or self._pipeline is None:
            return
        while (flight := self._scheduler.next_step(time.monotonic())) is not None:
            if self._scheduler.steps_in_flight == 1:
                self._recovery.computed(flight.sent_at)
            try:
                self._pipeline.send(flight.step, flight.body)
            except LinkLost as error:  # the step stays in flight and is sent again when the pipeline is back
                self._pipeline_is_down(flight.step.plan_version, str(error))
                return

    def _note_computed(self, result: StepResult, now: float) -> None:
        """Give requests that something was computed for their full recovery time, and act on a lack of KV room."""
        waiting = () if self._recovery.is_whole else (each.session_id for each in self._scheduler.waiting)
        self._recovery.computed(now, (*(span.session_id for span in result.spans), *waiting))
        if any(refusal.reason == ROOM_REASON for refusal in result.refusals):
            self._send_live_sessions(is_authoritative=True)  # the rows that take the room are none of ours

    def _deliver(self, sequence: Sequence, token: Token | None, now: float, computed_seconds: float) -> float | None:
        """Put one token into its request's stream. Returns the seconds since the previous one, None for the first."""
        stream = self._open.get(sequence.session_id)
        if stream is None:
            return None
        previous_at = stream.last_token_at
        if previous_at is None and (sequence.scores is not None or token is None):
            scores = tuple(score for score in sequence.scores or () if score is not None)
            stream.put(PromptComputed(scores, is_all=token is None))
        if token is None:
            return None
        stream.put(token)
        stream.last_token_at = now
        self._recorder.token(sequence.session_id, token)
        self._metrics.generated_tokens.inc()
        if previous_at is None:
            self._metrics.time_to_first_token.observe(now - stream.arrived_at)
            return None
        self._metrics.inter_token.observe(now - previous_at)
        self._metrics.token_overhead.observe(max(0.0, now - previous_at - computed_seconds))
        return now - previous_at

    def _end_answered(
        self, tokens: list[tuple[Sequence, Token | None]], refusals: list[tuple[Sequence, SpanRefusal]]
    ) -> None:
        """End the requests that have their last token, or that a stage refused."""
        for sequence, _ in tokens:
            if sequence.finished:
                self._end(sequence.session_id, "finished", None)
        for sequence, refusal in refusals:
            message = f"Stage {refusal.stage_id} refused a step of this request: {refusal.message} ({refusal.reason})."
            self._end(sequence.session_id, "failed", GenerationFailed(message))

    def _count_step(self, flight: InFlightStep, result: StepResult, now: float, since_last: list[float | None]) -> None:
        waited = [seconds for seconds in since_last if seconds is not None]
        self._metrics.steps.count_step(
            result.timings,
            now - flight.sent_at,
            is_decode=flight.is_decode,
            tokens=len(waited),
            since_last_seconds=sum(waited),
        )

    def _end(self, request_id: str, outcome: str, error: NoodleError | None) -> None:
        """Close a request's stream and free its KV rows everywhere. Does nothing if it has ended."""
        stream = self._open.pop(request_id)
        if stream is None:
            return
        stream.end(error or FINISHED)
        seconds = time.monotonic() - stream.arrived_at
        client_name = stream.request.client_name
        self._metrics.requests.labels(outcome, client_name).inc()
        if outcome == "finished":
            self._metrics.request_seconds.observe(seconds)
        log.info(
            "%s after %d new tokens and %.2f s, for %s%s",
            outcome,
            stream.token_count,
            seconds,
            client_name,
            f": {error}" if error is not None else "",
            extra=about(request_id),
        )
        self._recorder.end(request_id, outcome if error is None else str(error))
        self._recovery.forget(request_id)
        freed = self._scheduler.remove(request_id, keep_rows=self._keeps_rows and outcome == "finished")
        if freed:
            self._send_live_sessions(released=freed)

    def _hand_over(self, error: NoodleError) -> None:
        """End every open request here; the coordinator that leads next continues it from its record."""
        for stream in self._open.all():
            self._recorder.hand_over(stream.request_id)
            self._end(stream.request_id, "handed_over", error)

    def _send_live_sessions(self, *, released: list[str] | None = None, is_authoritative: bool = False) -> None:
        """Tell every stage which sessions live. While the pipeline is down nothing is sent; `_pipeline_is_up` does."""
        if self._pipeline is None or self._scheduler.limits is None or not self.state.up:
            return
        live = LiveSessions(
            plan_version=self._scheduler.limits.plan_version,
            coordinator_epoch=self._scheduler.coordinator_epoch,
            sessions=self._scheduler.held_ids,
            released=released or [],
            is_authoritative=is_authoritative,
        )
        try:
            self._pipeline.send(live)
        except LinkLost as error:
            self._pipeline_is_down(live.plan_version, str(error))

    # the pipeline comes and goes (design D2)

    def _pipeline_is_up(self, event: PipelineUp) -> None:
        state = self.state
        if state.plan is None or event.plan_version != state.plan.version:
            return
        was_up, same_caches = state.up, state.boot_ids == event.boot_ids
        state.up, state.detail, state.boot_ids = True, "ready", event.boot_ids
        log.info("the pipeline is up: %d stages, plan %d", len(event.boot_ids), event.plan_version)
        if not same_caches:
            self._replay("stage_restarted")
        elif not was_up and time.monotonic() - self._broke_at > KEPT_OVER_BREAK_SECONDS:
            self._scheduler.kv.forget_kept()  # some stage may have freed them
        # Before any step: sessions that ended while the pipeline was down still take room on some stage.
        self._send_live_sessions(is_authoritative=True)
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
        self._end_out_of_time(now)  # not at the next tick: a pipeline that comes and goes may be up at every tick

    def _end_out_of_time(self, now: float) -> None:
        """Note a break for every open request, and end those that have waited too long since one."""
        arrived_at = {stream.request_id: stream.arrived_at for stream in self._open.all()}
        is_busy = self._scheduler.steps_in_flight > 0
        self._recovery.broke(self.state.detail, now, arrived_at, is_busy=is_busy)
        for request_id, error in self._recovery.out_of_time(now).items():
            self._end(request_id, "failed", error)

    def _replay(self, reason: str) -> None:
        replayed = self._scheduler.replay_all()
        if replayed:
            self._metrics.replays.labels(reason).inc(len(replayed))
            log.info("%d requests are prefilled again: %s", len(replayed), reason)
            for sequence in replayed:
                log.info("prefilled again: %s", reason, extra=about(sequence.session_id))
        for sequence in replayed:
            if sequence.replays > MAXIMUM_REPLAYS:  # it restarts again and again without a token in between
                self._end(sequence.session_id, "failed", _lost_too_often())

    def _activate(self, event: admission.Activate) -> None:
        plan, epoch = self.state.plan, self._scheduler.coordinator_epoch
        if plan is not None and (plan.version, epoch) == (event.plan.version, event.coordinator_epoch):
            self._scheduler.limits = event.limits
        else:
            self._pending = event

    def _switch(self, activate: admission.Activate) -> None:
        """Make a new plan the active one; every sequence restarts in it."""
        self._pending = None
        self._close_pipeline()
        self.state = admission.LoopState(
            activate.plan, False, f"connections to the stages of plan {activate.plan.version}"
        )
        self._scheduler.limits = activate.limits
        self._scheduler.coordinator_epoch = activate.coordinator_epoch
        self._metrics.steps.begin_plan((stage.stage_id, stage.machine) for stage in activate.plan.stages)
        self._replay("new_plan")
        self._pipeline = self._make_pipeline(activate.plan, activate.coordinator_epoch, self.notify)
        log.info("plan %d is active, coordinator epoch %d", activate.plan.version, activate.coordinator_epoch)

    def _stand_by(self, error: NoodleError) -> None:
        self._hand_over(error)
        self._close_pipeline()
        self._scheduler.limits = None
        self._pending = None
        self.state = admission.LoopState(detail=str(error))

    def _close_pipeline(self) -> None:
        if self._pipeline is not None:
            self._pipeline.close()
            self._pipeline = None

    # every TICK_SECONDS

    def _tick(self, now: float) -> None:
        self._next_tick = now + TICK_SECONDS
        self._update_metrics()
        self._end_abandoned_and_late(now)
        if self.state.up:
            # Replayed steps may be late without being lost, so a request out of time ends only if its step is overdue.
            late = self._recovery.out_of_time(now)
            for sequence in self._scheduler.overdue(now, late.keys()):
                error = late.get(sequence.session_id) or _lost_too_often()
                self._end(sequence.session_id, "failed", error)
            if now >= self._next_live:
                self._next_live = now + LIVE_SESSIONS_SECONDS
                self._send_live_sessions()
        elif self.state.plan is not None:
            self._end_out_of_time(now)

    def _end_abandoned_and_late(self, now: float) -> None:
        """End requests whose client did not come back, and those past their deadline."""
        for stream in self._open.all():
            if stream.is_abandoned(now):
                abandoned = GenerationFailed("The request's client did not come back in time.")
                self._end(stream.request_id, "cancelled", abandoned)
            elif stream.deadline is not None and now >= stream.deadline:
                late = RequestTimedOut(
                    f"The request was not finished in the time that it gave; it has {stream.token_count} tokens.",
                    cure="Ask for fewer tokens, or raise timeout_seconds.",
                )
                self._end(stream.request_id, "failed", late)

    def _update_metrics(self) -> None:
        """Give the metrics the scheduler's state, and what it counted since the last tick."""
        scheduler, metrics = self._scheduler, self._metrics
        metrics.running.set(len(scheduler.running))
        metrics.waiting.set(len(scheduler.waiting))
        metrics.kv_use.set(scheduler.used_share)
        metrics.kept_tokens.set(scheduler.kv.kept_rows)
        counts, scheduler.counts = scheduler.counts, Counts()
        metrics.preemptions.inc(counts.preemptions)
        metrics.prefix_queries.inc(counts.prompt_tokens)
        metrics.prefix_hits.inc(counts.reused_tokens)


def _lost_too_often() -> NoodleError:
    return GenerationFailed("The request's steps were lost too often.", cure="See the stages' logs.")
