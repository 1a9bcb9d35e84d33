"""Forms steps out of the sessions that want tokens, and keeps the books of what is in flight; pure, time is given.

Each step takes the decode tokens of running sessions that are not in flight and chunks of prompts, within a token
budget; KV rows are promised to a session for its whole length when it is admitted, so that no stage can run out.
"""

from __future__ import annotations

import math
from array import array
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

from noodle.messages import (
    SamplingParameters,
    SpanRefusal,
    SpanResult,
    Step,
    StepResult,
    StepSpan,
    TokenLogprob,
    TokenScore,
)

FinishReason = Literal["eos", "length"]

# A step that takes this many times its prediction, and never less than the floor, counts as lost.
DEADLINE_FACTOR = 20.0
DEADLINE_FLOOR_SECONDS = 8.0
SMALLEST_CHUNK_TOKENS = 32  # below it a chunk costs nearly as much as a larger one: weights are read for each
GAP_SECONDS = 4.0  # how long stages hold early spans; below the deadline, so that the gap is told first
MAXIMUM_REPLAYS = 8  # of one session without a new token in between: then it is the request that is at fault
REPLAYED_REASONS = frozenset({"position_gap", "too_many_early", "activations_lost"})  # refusals that a replay cures
# A stage that has no room for KV rows that were promised: the books of the two differ (it came back with less, or was
# not told of an end). The session waits again for its place, and nobody is admitted for a moment.
ROOM_REASON = "kv_budget"
ROOM_RETRY_SECONDS = 1.0


@dataclass(slots=True, eq=False)
class Session:
    """One sequence being generated. `token_ids` are the prompt and everything generated, and are never lost."""

    session_id: str
    token_ids: list[int]
    prompt_length: int
    maximum_new_tokens: int
    sampling: SamplingParameters
    end_token_ids: frozenset[int]  # empty when the end of text is ignored
    want_logprob: bool = False
    top_logprobs: int = 0
    scores: list[TokenScore | None] | None = None  # of the prompt's tokens from its second on, where they are wanted
    epoch: int = 1
    sent: int = 0  # tokens that steps of this epoch have taken
    in_flight: int = 0  # spans of this epoch that have not come back
    replays: int = 0  # since the last new token
    finished: bool = False  # it has its last token and only waits to be removed

    @property
    def reserve_tokens(self) -> int:
        """KV rows it will need at most."""
        return self.prompt_length + self.maximum_new_tokens

    @property
    def scores_are_complete(self) -> bool:
        """Whether every log-probability of the prompt that is wanted has come."""
        return self.scores is None or None not in self.scores

    def tokens_to_score(self, first: int, end: int) -> list[int]:
        """The known tokens after rows [first, end), where the log-probability of one of them is still wanted.

        A row scores the token after it: the last row of a chunk scores the first token of the next one.
        """
        if self.scores is None or None not in self.scores[first:end]:
            return []
        return self.token_ids[first + 1 : min(end + 1, self.prompt_length)]

    @property
    def wants_decode(self) -> bool:
        """Whether exactly its newest token is to be computed next."""
        return not self.finished and self.in_flight == 0 and self.sent == len(self.token_ids) - 1 and self.sent > 0

    @property
    def wants_prefill(self) -> bool:
        """Whether known tokens are still to be computed; a lone last token of a replay counts too."""
        left = len(self.token_ids) - self.sent
        return not self.finished and left > 0 and not (self.sent > 0 and left == 1)


@dataclass(slots=True)
class InFlight:
    """A step on its way: kept whole, so that it can be sent again after a cut connection."""

    step: Step
    body: bytes
    sent_at: float
    deadline: float
    sessions: dict[str, int] = field(default_factory=dict)  # session id to epoch, of spans that are not back

    @property
    def is_decode(self) -> bool:
        """Whether it has one token of each of its sessions, and no chunk of a prompt."""
        return len(self.step.spans) == self.step.shape[0]


@dataclass(frozen=True, slots=True)
class NewToken:
    """One more token of a session, and whether it was the last.

    A session that asks for no new token ends with one NewToken whose `token_id` is None: its prompt is computed.
    """

    session: Session
    token_id: int | None
    logprob: float | None
    finish_reason: FinishReason | None
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Limits:
    """What the active plan allows."""

    plan_version: int
    stage_count: int
    kv_tokens: int  # that fit on the tightest stage
    context_length: int
    decode_seconds: float  # predicted for one token through the pipeline
    prefill_seconds_per_token: float


class Scheduler:
    """Sessions waiting and running, steps in flight."""

    def __init__(self, step_tokens: int, maximum_running: int) -> None:
        self._step_tokens, self._maximum_running = step_tokens, maximum_running
        self._waiting: deque[Session] = deque()
        self._running: dict[str, Session] = {}
        self._in_flight: dict[int, InFlight] = {}
        self._next_step_id = 1
        self._promised_tokens = 0
        self._room_is_short = False
        self._admit_at = 0.0  # nobody is admitted before
        self.limits: Limits | None = None
        self.coordinator_epoch = 0

    @property
    def running(self) -> list[Session]:
        """Sessions that may hold KV rows."""
        return list(self._running.values())

    @property
    def waiting(self) -> list[Session]:
        """Sessions without a place yet, in their order."""
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
    def promised_share(self) -> float:
        """Of the tightest stage's room for KV rows, what running sessions were promised."""
        return self._promised_tokens / self.limits.kv_tokens if self.limits and self.limits.kv_tokens else 0.0

    def add(self, session: Session) -> None:
        """Put a session at the end of the line."""
        self._waiting.append(session)

    def remove(self, session_id: str) -> bool:
        """Forget a session wherever it is; True when stages may hold KV rows of it."""
        session = self._running.pop(session_id, None)
        if session is None:
            self._waiting = deque(waiting for waiting in self._waiting if waiting.session_id != session_id)
            return False
        self._forget(session)
        return True

    def all_sessions(self) -> list[Session]:
        """Running first, then waiting in their order."""
        return [*self._running.values(), *self._waiting]

    def next_step(self, now: float) -> InFlight | None:
        """The next step to send, None when nothing wants to be computed or enough is on its way."""
        if self.limits is None or len(self._in_flight) >= self.limits.stage_count:
            return None
        self._admit(self.limits, now)
        chosen = self._choose(self.limits)
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
                )
            )
            session.sent = end
            session.in_flight += 1
        step = Step(
            self._next_step_id,
            self.limits.plan_version,
            self.coordinator_epoch,
            "int32",
            [len(token_ids)],
            spans,
            GAP_SECONDS,
        )
        self._next_step_id += 1
        flight = InFlight(step, token_ids.tobytes(), now, now + self._deadline_seconds(len(token_ids), self.limits))
        flight.sessions = {span.session_id: span.session_epoch for span in spans}
        self._in_flight[step.step_id] = flight
        return flight

    def apply(self, result: StepResult) -> tuple[InFlight | None, list[NewToken], list[tuple[Session, SpanRefusal]]]:
        """Take what came back: the step, new tokens, and refusals that no replay cures. Old news is ignored.

        Sessions that were refused for want of room no longer run, though some stages may hold rows of them.
        """
        flight = self._in_flight.get(result.step_id)
        if flight is None or result.coordinator_epoch != self.coordinator_epoch:
            return None, [], []
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
                    self._restart(session)
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
                self._restart(session)
                without_room.append(session)
            elif refusal.reason in REPLAYED_REASONS:
                self._restart(session)
            else:
                fatal.append((session, refusal))
        self._step_back(without_room)
        if not flight.sessions:
            self._in_flight.pop(result.step_id, None)
        return flight, tokens, fatal

    def to_send_again(self, now: float) -> list[InFlight]:
        """All steps in flight in their order, with their time begun anew: the connection was cut, the caches stand."""
        flights = [self._in_flight[step_id] for step_id in sorted(self._in_flight)]
        for flight in flights:
            flight.deadline += now - flight.sent_at
            flight.sent_at = now
        return flights

    def replay_all(self) -> list[Session]:
        """Begin every running session anew in its next epoch: some KV cache is gone. Returns them."""
        self._in_flight.clear()
        for session in self._running.values():
            self._restart(session)
        return self.running

    def overdue(self, now: float, given_up: Collection[str] = ()) -> list[Session]:
        """Sessions whose step did not come back in time; each begins anew.

        Returned instead are those that did so too often, and those of `given_up`.
        """
        hopeless: list[Session] = []
        for step_id, flight in list(self._in_flight.items()):
            if flight.deadline > now:
                continue
            del self._in_flight[step_id]
            for session_id, epoch in flight.sessions.items():
                session = self._running.get(session_id)
                if session is None or session.epoch != epoch:
                    continue
                if session.replays >= MAXIMUM_REPLAYS or session_id in given_up:
                    hopeless.append(session)
                else:
                    self._restart(session)
        return hopeless

    def _settle(self, flight: InFlight, session_id: str, epoch: int) -> Session | None:
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

    def _restart(self, session: Session) -> None:
        session.epoch += 1
        session.sent = 0
        session.in_flight = 0
        session.replays += 1

    def _step_back(self, sessions: list[Session]) -> None:
        """Put sessions that run back to the head of the line."""
        for session in sessions:
            del self._running[session.session_id]
            self._forget(session)
            self._room_is_short = True
        self._waiting.extendleft(reversed(sessions))

    def _forget(self, session: Session) -> None:
        """Take a session that no longer runs out of the books."""
        self._promised_tokens -= session.reserve_tokens
        for step_id, flight in list(self._in_flight.items()):
            flight.sessions.pop(session.session_id, None)
            if not flight.sessions:
                del self._in_flight[step_id]

    def _admit(self, limits: Limits, now: float) -> None:
        """First come, first served, as long as every stage can hold the rows."""
        if self._room_is_short:
            self._room_is_short, self._admit_at = False, now + ROOM_RETRY_SECONDS
        if now < self._admit_at:
            return
        while self._waiting and len(self._running) < self._maximum_running:
            needed = self._waiting[0].reserve_tokens
            if self._running and self._promised_tokens + needed > limits.kv_tokens:
                return
            session = self._waiting.popleft()
            self._promised_tokens += needed
            self._running[session.session_id] = session

    def _choose(self, limits: Limits) -> list[tuple[Session, int]]:
        """Sessions and how many of their tokens: decode first, spread over the stages, then prompts in order."""
        budget = self._step_tokens
        most_decodes = min(budget, math.ceil(len(self._running) / limits.stage_count))
        chosen: list[tuple[Session, int]] = []
        for session in self._running.values():
            if len(chosen) >= most_decodes:
                break
            if session.wants_decode:
                chosen.append((session, 1))
        budget -= len(chosen)
        for session in self._running.values():
            if budget <= 0:
                break
            if session.wants_prefill:
                count = min(budget, self._chunk_tokens(session, limits), len(session.token_ids) - session.sent)
                chosen.append((session, count))
                budget -= count
        for session, _ in chosen:  # whoever was served goes to the end of the line
            self._running[session.session_id] = self._running.pop(session.session_id)
        return chosen

    def _chunk_tokens(self, session: Session, limits: Limits) -> int:
        """An even share of a prompt for each stage, so that all of them compute at once: chunk k+1 follows chunk k."""
        return max(SMALLEST_CHUNK_TOKENS, math.ceil(len(session.token_ids) / limits.stage_count))

    def _deadline_seconds(self, tokens: int, limits: Limits) -> float:
        predicted = limits.decode_seconds + tokens * limits.prefill_seconds_per_token
        ahead = len(self._in_flight) + 1
        return max(DEADLINE_FLOOR_SECONDS, DEADLINE_FACTOR * predicted * ahead)
