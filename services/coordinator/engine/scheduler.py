"""Forms steps out of the sessions that want tokens, and takes in what comes back; pure, time is given.

Each step takes the decode tokens of running sessions that are not in flight and chunks of prompts, within a token
budget. Room for KV rows is taken as they are computed: when it runs out, first what is kept of ended sessions gives
way, then the youngest session, which is prefilled again later (design D2).
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from noodle.wire.messages import SpanRefusal, SpanResult, Step, StepResult, StepSpan
from services.coordinator.engine.in_flight import InFlightSteps
from services.coordinator.engine.kv_accounting import KvAccounting
from services.coordinator.engine.sequence import FinishReason, InFlightStep, NewToken, PlanLimits, Session
from services.coordinator.engine.step_costs import StepCosts
from services.coordinator.engine.waiting_queue import WaitingQueue

GAP_SECONDS = 4.0  # how long stages hold early spans; below the deadline, so that the gap is told first
MAXIMUM_REPLAYS = 8  # of one session without a new token in between: then it is the request that is at fault
# refusals that a replay cures
PREFIX_REASON = "prefix_lost"  # a stage does not have the rows that a session was to begin with
REPLAYED_REASONS = frozenset({"position_gap", "too_many_early", "activations_lost", PREFIX_REASON})
CHUNKS_AHEAD = 1  # of prompts, while no session decodes
HEADROOM_TOKENS = 16  # kept free for each running session when another is admitted: it will go on for a while
# A stage that has no room for KV rows that it should have: the books of the two differ (it came back with less, or was
# not told of an end). The session waits again for its place, and nobody is admitted for a moment.
ROOM_REASON = "kv_budget"
ROOM_RETRY_SECONDS = 1.0


@dataclass(slots=True)
class Counts:
    """What the scheduler has done since it began."""

    preemptions: int = 0
    prompt_tokens: int = 0  # of sessions that began, replays included
    reused_tokens: int = 0  # of them, those whose rows were copied


class Scheduler:
    """Sessions waiting and running, steps in flight."""

    def __init__(self, step_tokens: int, maximum_running: int) -> None:
        self._step_tokens, self._maximum_running = step_tokens, maximum_running
        self._waiting = WaitingQueue()
        self._running: dict[str, Session] = {}  # whoever was served last stands last
        self._in_flight = InFlightSteps()
        self._next_step_id = 1
        self._admissions = 0
        self._books = KvAccounting()
        self._room_is_short = False
        self._admit_at = 0.0  # nobody is admitted before
        self._limits: PlanLimits | None = None
        self._costs: StepCosts | None = None
        self.coordinator_epoch = 0
        self.counts = Counts()

    @property
    def limits(self) -> PlanLimits | None:
        """What the active plan allows, None while none is active."""
        return self._limits

    @limits.setter
    def limits(self, limits: PlanLimits | None) -> None:
        if limits is not None and (self._limits is None or self._limits.plan_version != limits.plan_version):
            self._costs = StepCosts(limits)  # of other stages than before
        self._limits = limits

    @property
    def running(self) -> list[Session]:
        """Sessions that are computed."""
        return list(self._running.values())

    @property
    def held_ids(self) -> list[str]:
        """Sessions that stages may hold KV rows of: running ones, and ended ones whose rows are kept."""
        return [*self._running, *self._books.kept_ids]

    @property
    def waiting(self) -> list[Session]:
        """Sessions without a place, by priority and arrival."""
        return list(self._waiting)

    @property
    def waiting_count(self) -> int:
        """Sessions without a place yet."""
        return len(self._waiting)

    @property
    def steps_in_flight(self) -> int:
        """Steps that are not wholly answered."""
        return len(self._in_flight)

    @property
    def used_share(self) -> float:
        """Of the tightest stage's room for KV rows, what running and kept sessions hold."""
        limits = self._limits
        return self._books.rows / limits.kv_tokens if limits and limits.kv_tokens else 0.0

    @property
    def kept_rows(self) -> int:
        """KV rows of ended sessions, which give way to whoever needs room."""
        return self._books.kept_rows

    def add(self, session: Session) -> None:
        """Put a session in line."""
        self._waiting.add(session)

    def remove(self, session_id: str, *, keep_rows: bool = False) -> list[str]:
        """Forget a session wherever it is; gives sessions that stages may still hold rows of and are to free.

        With `keep_rows` the stages keep those of a session that has ended, for others that begin with the same tokens.
        """
        session = self._running.pop(session_id, None)
        if session is None:
            self._waiting.remove(session_id)
            return []
        is_whole = session.in_flight == 0 and session.sent > 0
        self._in_flight.forget_session(session.session_id)
        if keep_rows and is_whole:
            return self._books.keep(session)
        self._books.forget(session_id)
        return [session_id]

    def next_step(self, now: float) -> InFlightStep | None:
        """The next step to send, None when nothing wants to be computed or enough is on its way."""
        limits, costs = self._limits, self._costs
        if limits is None or costs is None:
            return None
        # a chunk more than there are stages, so that none waits for a result's way back; not in a token's way
        ahead = len(self._in_flight) - limits.stage_count
        if ahead >= CHUNKS_AHEAD or (ahead >= 0 and any(session.decodes for session in self._running.values())):
            return None
        self._admit(limits, now)
        chosen = self._choose(limits, costs)
        if not chosen:
            return None
        spans: list[StepSpan] = []
        token_ids = array("i")
        for session, count in chosen:
            first, end = session.sent, session.sent + count
            token_ids.extend(session.token_ids[first:end])
            asks = end == len(session.token_ids) and session.maximum_new_tokens > 0
            spans.append(
                StepSpan(
                    session.session_id,
                    session.epoch,
                    first,
                    count,
                    session.reserve_tokens,
                    session.sampling if asks else None,
                    session.want_logprob and asks,
                    session.tokens_to_score(first, end),
                    session.top_logprobs,
                    session.prefix,
                )
            )
            session.prefix = None
            session.sent = end
            session.in_flight += 1
        step = Step(
            self._next_step_id,
            limits.plan_version,
            self.coordinator_epoch,
            "int32",
            [len(token_ids)],
            spans,
            GAP_SECONDS,
            released=self._books.take_released(),
        )
        self._next_step_id += 1
        deadline = now + self._in_flight.deadline_seconds(len(token_ids), limits)
        flight = InFlightStep(step, token_ids.tobytes(), now, deadline)
        flight.decodes = any(session.decodes for session, _ in chosen)
        flight.sessions = {span.session_id: span.session_epoch for span in spans}
        self._in_flight.add(flight)
        return flight

    def apply(
        self, result: StepResult
    ) -> tuple[InFlightStep | None, list[NewToken], list[tuple[Session, SpanRefusal]]]:
        """Take what came back: the step, new tokens, and refusals that no replay cures. Old news is ignored.

        Sessions that were refused for want of room no longer run, though some stages may hold rows of them.
        """
        flight = self._in_flight.get(result.step_id)
        if flight is None or result.coordinator_epoch != self.coordinator_epoch:
            return None, [], []
        if self._costs is not None and not result.refusals:
            if flight.is_decode:
                self._costs.add_decode(flight.step.shape[0], result.timings)
            else:
                self._costs.add_chunks(flight.step.shape[0], flight.mean_rows, result.timings)
        tokens: list[NewToken] = []
        fatal: list[tuple[Session, SpanRefusal]] = []
        without_room: list[Session] = []
        for span in result.spans:
            session = self._settle(flight, span.session_id, span.session_epoch)
            if session is None:
                continue
            session.in_flight -= 1
            self._keep_scores(session, span)
            if span.first_position + span.token_count != len(session.token_ids):
                continue
            if not session.scores_are_complete:  # a result before this one was lost
                if session.replays < MAXIMUM_REPLAYS:
                    self._replay(session)
                else:
                    fatal.append((session, self._scores_lost(span)))
            elif session.maximum_new_tokens == 0:
                session.finished = True
                tokens.append(NewToken(session, None, None, "length"))
            elif span.token_id is not None:
                tokens.append(self._append(session, span.token_id, span))
        for refusal in result.refusals:
            session = self._settle(flight, refusal.session_id, refusal.session_epoch)
            if session is None:
                continue
            if session.replays >= MAXIMUM_REPLAYS:
                fatal.append((session, refusal))
            elif refusal.reason == ROOM_REASON:
                self._replay(session)
                without_room.append(session)
            elif refusal.reason in REPLAYED_REASONS:
                if refusal.reason == PREFIX_REASON:
                    self._forget_donor(flight.step, session)
                self._replay(session)
            else:
                fatal.append((session, refusal))
        self._step_back(without_room)
        self._in_flight.close(flight)
        return flight, tokens, fatal

    def to_send_again(self, now: float) -> list[InFlightStep]:
        """All steps in flight in their order, with their time begun anew: the connection was cut, the caches stand."""
        return self._in_flight.to_send_again(now)

    def forget_kept(self) -> None:
        """What is kept of ended sessions may be gone on some stage."""
        self._books.forget_kept()

    def replay_all(self) -> list[Session]:
        """Begin every running session anew in its next epoch: some KV cache is gone. Returns them."""
        self._in_flight.clear()
        self._books.forget_kept()
        for session in self._running.values():
            self._replay(session)
        return self.running

    def overdue(self, now: float, given_up: Collection[str] = ()) -> list[Session]:
        """Sessions whose step did not come back in time; each begins anew.

        Returned instead are those that did so too often, and those of `given_up`.
        """
        hopeless: list[Session] = []
        for flight in self._in_flight.take_overdue(now):
            for session_id, epoch in flight.sessions.items():
                session = self._running.get(session_id)
                if session is None or session.epoch != epoch:
                    continue
                if session.replays >= MAXIMUM_REPLAYS or session_id in given_up:
                    hopeless.append(session)
                else:
                    self._replay(session)
        return hopeless

    def _settle(self, flight: InFlightStep, session_id: str, epoch: int) -> Session | None:
        """The session of a span that came back for the first time and in its newest epoch."""
        if flight.sessions.get(session_id) != epoch:
            return None
        del flight.sessions[session_id]
        session = self._running.get(session_id)
        return session if session is not None and session.epoch == epoch else None

    def _keep_scores(self, session: Session, span: SpanResult) -> None:
        """Note the prompt's log-probabilities; those that came before a replay stay as they were."""
        if session.scores is not None:
            for place, score in enumerate(
                span.scores[: len(session.scores) - span.first_position], span.first_position
            ):
                session.scores[place] = session.scores[place] or score

    def _scores_lost(self, span: SpanResult) -> SpanRefusal:
        last_stage = self.limits.stage_count - 1 if self.limits else 0
        message = "The prompt's log-probabilities did not come back; does every machine run the same version?"
        return SpanRefusal(span.session_id, span.session_epoch, span.first_position, last_stage, "scores_lost", message)

    def _append(self, session: Session, token_id: int, span: SpanResult) -> NewToken:
        session.token_ids.append(token_id)
        session.replays = 0
        reason: FinishReason | None = None
        if token_id in session.end_token_ids:
            reason = "eos"
        elif len(session.token_ids) - session.prompt_length >= session.maximum_new_tokens:
            reason = "length"
        session.finished = reason is not None
        return NewToken(session, token_id, span.logprob, reason, tuple(span.top))

    def _replay(self, session: Session) -> None:
        """Something of the session was lost: it begins anew."""
        session.replays += 1
        self._begin_anew(session)

    def _begin_anew(self, session: Session) -> None:
        """In the next epoch, without any rows; those of this one are freed before others take their room."""
        self._books.release(session.session_id, session.epoch)
        session.epoch += 1
        session.sent = 0
        session.in_flight = 0
        session.prefix = None

    def _forget_donor(self, step: Step, session: Session) -> None:
        """A stage does not have what the session was to copy: it computes all itself, and nobody copies that again."""
        session.copies_rows = False
        for span in step.spans:
            if span.session_id == session.session_id and span.prefix is not None:
                self._books.give_up(span.prefix.session_id)

    def _step_back(self, sessions: list[Session]) -> None:
        """Sessions that a stage had no room for wait again, and so do all others for a moment."""
        for session in sessions:
            self._lose_place(session)
            self._room_is_short = True

    def _lose_place(self, session: Session) -> None:
        del self._running[session.session_id]
        self._in_flight.forget_session(session.session_id)
        self._waiting.put_back(session)

    def _admit(self, limits: PlanLimits, now: float) -> None:
        """Give places to those whose turn it is, as long as there is room for what is known of them."""
        if self._room_is_short:
            self._room_is_short, self._admit_at = False, now + ROOM_RETRY_SECONDS
        if now < self._admit_at or not len(self._waiting):
            return
        by_client = Counter(session.client_name for session in self._running.values())
        wanted = sum(len(session.token_ids) + HEADROOM_TOKENS for session in self._running.values())
        reserved = sum(session.reserve_tokens for session in self._running.values())
        while len(self._running) < self._maximum_running and (session := self._waiting.next(by_client)) is not None:
            wanted += len(session.token_ids)
            reserved += session.reserve_tokens
            is_too_much = wanted > limits.kv_tokens or reserved > (limits.reserved_kv_tokens or reserved)
            if self._running and is_too_much:
                return
            wanted += HEADROOM_TOKENS
            self._waiting.take(session)
            self._admissions += 1
            session.admitted = self._admissions
            by_client[session.client_name] += 1
            self._running[session.session_id] = session

    def _choose(self, limits: PlanLimits, costs: StepCosts) -> list[tuple[Session, int]]:
        """Sessions and how many of their tokens: decode first, in as many steps as pay, then prompts in order."""
        budget = self._step_tokens
        decoding = sum(session.decodes for session in self._running.values())
        most_decodes = 0
        if decoding:
            steps = costs.micro_batches(decoding)
            if self._in_flight.decode_steps < steps:  # else they gather for a larger one
                most_decodes = min(budget, math.ceil(decoding / steps))
        chosen: dict[str, int] = {}
        wanted: set[str] = set()  # whose rows others copy in this step
        for session in self.running:
            if len(chosen) >= most_decodes:
                break
            if session.wants_decode and self._make_room(session, session.sent + 1, limits, chosen, wanted):
                chosen[session.session_id] = 1
        budget -= len(chosen)
        for session in self.running:
            if budget <= 0:
                break
            if session.wants_prefill and session.session_id in self._running:
                count = self._choose_chunk(session, budget, limits, costs, chosen, wanted, decoding > 0)
                if count:
                    chosen[session.session_id] = count
                    budget -= count
        found = [(self._running[session_id], count) for session_id, count in chosen.items()]
        for session, _ in found:  # whoever was served goes to the end of the line
            self._running[session.session_id] = self._running.pop(session.session_id)
        return found

    def _choose_chunk(
        self,
        session: Session,
        budget: int,
        limits: PlanLimits,
        costs: StepCosts,
        chosen: dict[str, int],
        wanted: set[str],
        others_decode: bool,
    ) -> int:
        """How many of a prompt's next tokens go now; a session that begins takes over what others have computed."""
        first, prefix = session.sent, None
        if first == 0 and session.copies_rows and session.scores is None:  # a copied row has no logits, and so no score
            prefix = self._books.prefix_for(session, self._running.values())
            first = prefix.token_count if prefix else 0
        ends = session.chunk_ends if session.sent else costs.chunk_ends(first, len(session.token_ids))
        count = min(budget, costs.chunk_tokens(first, ends, others_decode=others_decode))
        if prefix:
            wanted.add(prefix.session_id)
        if not self._make_room(session, first + count, limits, chosen, wanted):
            return 0
        if session.sent == 0:
            self.counts.prompt_tokens += len(session.token_ids)
            self.counts.reused_tokens += first
            session.chunk_ends = ends
        session.sent, session.prefix = first, prefix
        return count

    def _make_room(
        self, session: Session, end: int, limits: PlanLimits, chosen: dict[str, int], wanted: set[str]
    ) -> bool:
        """Take the room for a session's rows up to `end`; False when only older sessions could give way."""
        while not self._books.fits(session, end, limits):
            if self._books.give_up_kept(wanted):
                continue
            younger = [
                other
                for other in self._running.values()
                if other.is_younger_than(session) and other.session_id not in chosen and other.session_id not in wanted
            ]
            if not younger:
                return False
            victim = max(younger, key=lambda other: (other.priority, other.admitted))
            self.counts.preemptions += 1
            self._begin_anew(victim)
            self._lose_place(victim)
        self._books.hold(session, end)
        return True
