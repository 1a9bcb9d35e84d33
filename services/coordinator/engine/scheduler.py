"""Forms steps out of the sequences that want tokens, and takes in their results. Time is passed in.

Each step takes the decode tokens of running sequences that are not in flight and chunks of prompts, within a token
budget. Room for KV rows is taken as they are computed: when it runs out, first the rows kept of ended sequences are
freed, then the youngest sequence is preempted, and prefilled again later (design D2).
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

from noodle.wire.messages import SpanRefusal, SpanResult, Step, StepResult, StepSpan
from services.coordinator.engine.kv_accounting import KvAccounting
from services.coordinator.engine.request import Token
from services.coordinator.engine.sequence import InFlightStep, PlanLimits, Sequence, WaitingQueue
from services.coordinator.engine.step_costs import StepCosts

# A step that takes DEADLINE_FACTOR times its prediction, and never less than the floor, counts as lost.
DEADLINE_FACTOR = 20.0
DEADLINE_FLOOR_SECONDS = 8.0
GAP_SECONDS = 4.0  # how long stages hold early spans; below the deadline, so that a gap is reported first
MAXIMUM_REPLAYS = 8  # of one sequence without a new token in between: after that the request itself is at fault
PREFIX_REASON = "prefix_lost"  # a stage does not have the rows that a session was to copy
REPLAYED_REASONS = frozenset({"position_gap", "too_many_early", "activations_lost", PREFIX_REASON})  # a replay helps
# A stage has no room for KV rows that it should have: its accounting differs from ours (it came back with less, or
# missed an end). The sequence waits for its place again, and for a moment nothing is admitted.
ROOM_REASON = "kv_budget"
ROOM_RETRY_SECONDS = 1.0
CHUNKS_AHEAD = 1  # of prompts, while no sequence decodes
HEADROOM_TOKENS = 16  # kept free for each running sequence when another is admitted: it will generate more


@dataclass(slots=True)
class Counts:
    """Totals since the metrics last took them."""

    preemptions: int = 0
    prompt_tokens: int = 0  # of sequences that began, replays included
    reused_tokens: int = 0  # of these, tokens whose rows were copied


@dataclass(slots=True)
class _Choice:
    """The step that is being formed."""

    limits: PlanLimits
    costs: StepCosts
    others_decode: bool
    token_counts: dict[str, int] = field(default_factory=dict)  # by session id
    donors: set[str] = field(default_factory=set)  # sessions whose rows others copy in this step


class Scheduler:
    """Sequences waiting and running, and steps in flight."""

    def __init__(self, step_tokens: int, maximum_running: int) -> None:
        self._step_tokens, self._maximum_running = step_tokens, maximum_running
        self.waiting = WaitingQueue()
        self._running: dict[str, Sequence] = {}  # the last served is last
        self._in_flight: dict[int, InFlightStep] = {}  # by step id, oldest first
        self._next_step_id = 1
        self._admissions = 0
        self.kv = KvAccounting()
        self._room_is_short = False
        self._admit_at = 0.0  # nothing is admitted before
        self._limits: PlanLimits | None = None
        self._costs: StepCosts | None = None
        self.coordinator_epoch = 0
        self.counts = Counts()

    @property
    def limits(self) -> PlanLimits | None:
        return self._limits

    @limits.setter
    def limits(self, limits: PlanLimits | None) -> None:
        if limits is not None and (self._limits is None or self._limits.plan_version != limits.plan_version):
            self._costs = StepCosts(limits)  # other stages have other costs
        self._limits = limits

    @property
    def running(self) -> list[Sequence]:
        return list(self._running.values())

    @property
    def held_ids(self) -> list[str]:
        """Sessions that stages may hold KV rows of: running ones, and ended ones whose rows are kept."""
        return [*self._running, *self.kv.kept]

    @property
    def steps_in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def used_share(self) -> float:
        """Share of the tightest stage's KV room that running and kept sessions hold."""
        limits = self._limits
        return self.kv.rows / limits.kv_tokens if limits and limits.kv_tokens else 0.0

    def remove(self, session_id: str, *, keep_rows: bool = False) -> list[str]:
        """Drop a sequence. Returns the session ids whose KV rows the stages must free.

        With `keep_rows` the stages keep the rows of a sequence that has ended, for others with the same prefix.
        """
        sequence = self._running.pop(session_id, None)
        if sequence is None:
            self.waiting.remove(session_id)
            return []
        is_whole = sequence.in_flight == 0 and sequence.sent > 0
        self._forget_in_flight(session_id)
        if keep_rows and is_whole:
            return self.kv.keep(sequence)
        self.kv.forget(session_id)
        return [session_id]

    def next_step(self, now: float) -> InFlightStep | None:
        """Return the next step to send, None if nothing is to be computed or enough steps are in flight."""
        limits, costs = self._limits, self._costs
        if limits is None or costs is None:
            return None
        # One chunk more than there are stages, so that none waits for a result to return; never in a token's way.
        ahead = len(self._in_flight) - limits.stage_count
        if ahead >= CHUNKS_AHEAD or (ahead >= 0 and any(each.decodes for each in self._running.values())):
            return None
        self._admit(limits, now)
        chosen = self._choose(limits, costs)
        if not chosen:
            return None
        spans: list[StepSpan] = []
        token_ids = array("i")
        for sequence, count in chosen:
            token_ids.extend(sequence.token_ids[sequence.sent : sequence.sent + count])
            spans.append(self._take_span(sequence, count))
        step = Step(
            step_id=self._next_step_id,
            plan_version=limits.plan_version,
            coordinator_epoch=self.coordinator_epoch,
            dtype="int32",
            shape=[len(token_ids)],
            spans=spans,
            gap_seconds=GAP_SECONDS,
            released=self.kv.take_released(),
        )
        self._next_step_id += 1
        predicted = limits.decode_seconds + len(token_ids) * limits.prefill_seconds_per_token
        most_seconds = max(DEADLINE_FLOOR_SECONDS, DEADLINE_FACTOR * predicted * (len(self._in_flight) + 1))
        flight = self._in_flight[step.step_id] = InFlightStep(
            step=step,
            body=token_ids.tobytes(),
            sent_at=now,
            deadline=now + most_seconds,
            decodes=any(sequence.decodes for sequence, _ in chosen),
            epochs={span.session_id: span.session_epoch for span in spans},
        )
        return flight

    def _take_span(self, sequence: Sequence, count: int) -> StepSpan:
        """Make the span of a sequence's next `count` tokens, and note that they are sent."""
        request, first, end = sequence.request, sequence.sent, sequence.sent + count
        asks = end == len(sequence.token_ids) and request.max_new_tokens > 0
        span = StepSpan(
            session_id=sequence.session_id,
            session_epoch=sequence.epoch,
            first_position=first,
            token_count=count,
            reserve_tokens=sequence.reserve_tokens,
            sampling=sequence.sampling if asks else None,
            logprob=request.want_logprob and asks,
            scored_token_ids=sequence.tokens_to_score(first, end),
            top_logprobs=request.top_logprobs,
            prefix=sequence.prefix,
        )
        sequence.prefix = None
        sequence.sent = end
        sequence.in_flight += 1
        return span

    def apply(
        self, result: StepResult
    ) -> tuple[InFlightStep | None, list[tuple[Sequence, Token | None]], list[tuple[Sequence, SpanRefusal]]]:
        """Take in a result. Returns its step, new tokens, and refusals that no replay can help; ignores old results.

        A token is None if the prompt is computed and no token was asked for. Sequences that were refused for lack of
        room no longer run, though some stages may hold rows of them.
        """
        flight = self._in_flight.get(result.step_id)
        if flight is None or result.coordinator_epoch != self.coordinator_epoch:
            return None, [], []
        if self._costs is not None and not result.refusals:
            if flight.is_decode:
                self._costs.add_decode(flight.step.shape[0], result.timings)
            else:
                self._costs.add_chunks(flight.step.shape[0], flight.mean_rows, result.timings)
        tokens: list[tuple[Sequence, Token | None]] = []
        fatal: list[tuple[Sequence, SpanRefusal]] = []
        without_room: list[Sequence] = []
        for span in result.spans:
            sequence = self._settle(flight, span.session_id, span.session_epoch)
            if sequence is None:
                continue
            sequence.in_flight -= 1
            self._keep_scores(sequence, span)
            if span.first_position + span.token_count != len(sequence.token_ids):
                continue
            if not sequence.scores_are_complete:  # an earlier result was lost
                if sequence.replays < MAXIMUM_REPLAYS:
                    self._replay(sequence)
                else:
                    fatal.append((sequence, self._scores_lost(span)))
            elif sequence.request.max_new_tokens == 0:
                sequence.finished = True
                tokens.append((sequence, None))
            elif span.token_id is not None:
                tokens.append((sequence, self._append(sequence, span.token_id, span)))
        for refusal in result.refusals:
            sequence = self._settle(flight, refusal.session_id, refusal.session_epoch)
            if sequence is None:
                continue
            if sequence.replays >= MAXIMUM_REPLAYS:
                fatal.append((sequence, refusal))
            elif refusal.reason == ROOM_REASON:
                self._replay(sequence)
                without_room.append(sequence)
            elif refusal.reason in REPLAYED_REASONS:
                if refusal.reason == PREFIX_REASON:
                    self._forget_donor(flight.step, sequence)
                self._replay(sequence)
            else:
                fatal.append((sequence, refusal))
        for sequence in without_room:
            self._lose_place(sequence)
            self._room_is_short = True
        if not flight.epochs:
            self._in_flight.pop(flight.step.step_id, None)
        return flight, tokens, fatal

    def to_send_again(self, now: float) -> list[InFlightStep]:
        """Return all steps in flight in order and restart their deadlines: a connection was lost, the caches remain."""
        for flight in self._in_flight.values():
            flight.deadline += now - flight.sent_at
            flight.sent_at = now
        return list(self._in_flight.values())

    def replay_all(self) -> list[Sequence]:
        """Restart every running sequence in its next epoch, because some KV cache is gone. Returns them."""
        self._in_flight.clear()
        self.kv.forget_kept()
        for sequence in self._running.values():
            self._replay(sequence)
        return self.running

    def overdue(self, now: float, given_up: Collection[str] = ()) -> list[Sequence]:
        """Replay sequences whose step is overdue.

        Returns, without replaying them, those of `given_up` and those that were replayed too often.
        """
        hopeless: list[Sequence] = []
        for flight in [each for each in self._in_flight.values() if each.deadline <= now]:
            del self._in_flight[flight.step.step_id]
            for session_id, epoch in flight.epochs.items():
                sequence = self._running.get(session_id)
                if sequence is None or sequence.epoch != epoch:
                    continue
                if sequence.replays >= MAXIMUM_REPLAYS or session_id in given_up:
                    hopeless.append(sequence)
                else:
                    self._replay(sequence)
        return hopeless

    def _forget_in_flight(self, session_id: str) -> None:
        for flight in list(self._in_flight.values()):
            flight.epochs.pop(session_id, None)
            if not flight.epochs:
                del self._in_flight[flight.step.step_id]

    def _settle(self, flight: InFlightStep, session_id: str, epoch: int) -> Sequence | None:
        """Return the sequence of a span that is back for the first time and in its newest epoch."""
        if flight.epochs.get(session_id) != epoch:
            return None
        del flight.epochs[session_id]
        sequence = self._running.get(session_id)
        return sequence if sequence is not None and sequence.epoch == epoch else None

    def _keep_scores(self, sequence: Sequence, span: SpanResult) -> None:
        """Note the prompt's log-probabilities; those known before a replay stay as they are."""
        if sequence.scores is not None:
            first = span.first_position
            for place, score in enumerate(span.scores[: len(sequence.scores) - first], first):
                sequence.scores[place] = sequence.scores[place] or score

    def _scores_lost(self, span: SpanResult) -> SpanRefusal:
        last_stage = self.limits.stage_count - 1 if self.limits else 0
        message = "The prompt's log-probabilities did not come back; does every machine run the same version?"
        return SpanRefusal(
            span.session_id, span.session_epoch, span.first_position, last_stage, reason="scores_lost", message=message
        )

    def _append(self, sequence: Sequence, token_id: int, span: SpanResult) -> Token:
        sequence.token_ids.append(token_id)
        sequence.replays = 0
        if token_id in sequence.end_token_ids:
            sequence.finished = True
            return Token(token_id, span.logprob, "eos", tuple(span.top))
        sequence.finished = len(sequence.token_ids) >= sequence.reserve_tokens
        return Token(token_id, span.logprob, "length" if sequence.finished else "", tuple(span.top))

    def _replay(self, sequence: Sequence) -> None:
        sequence.replays += 1
        self._restart(sequence)

    def _restart(self, sequence: Sequence) -> None:
        """Begin the next epoch without any rows; those of this epoch are freed before others take their room."""
        self.kv.release(sequence.session_id, sequence.epoch)
        sequence.epoch += 1
        sequence.sent = 0
        sequence.in_flight = 0
        sequence.prefix = None

    def _forget_donor(self, step: Step, sequence: Sequence) -> None:
        """A stage lacks the rows to copy: the sequence computes all itself, and the donor's rows are freed."""
        sequence.reuses_prefix = False
        for span in step.spans:
            if span.session_id == sequence.session_id and span.prefix is not None:
                self.kv.give_up(span.prefix.session_id)

    def _lose_place(self, sequence: Sequence) -> None:
        del self._running[sequence.session_id]
        self._forget_in_flight(sequence.session_id)
        self.waiting.add(sequence)

    def _admit(self, limits: PlanLimits, now: float) -> None:
        """Admit waiting sequences in turn while there is room for their known tokens."""
        if self._room_is_short:
            self._room_is_short, self._admit_at = False, now + ROOM_RETRY_SECONDS
        if now < self._admit_at or not len(self.waiting):
            return
        by_client = Counter(each.request.client_name for each in self._running.values())
        wanted = sum(len(each.token_ids) + HEADROOM_TOKENS for each in self._running.values())
        reserved = sum(each.reserve_tokens for each in self._running.values())
        while len(self._running) < self._maximum_running and (sequence := self.waiting.next(by_client)) is not None:
            wanted += len(sequence.token_ids)
            reserved += sequence.reserve_tokens
            is_too_much = wanted > limits.kv_tokens or reserved > (limits.reserved_kv_tokens or reserved)
            if self._running and is_too_much:
                return
            wanted += HEADROOM_TOKENS
            self.waiting.remove(sequence.session_id)
            self._admissions += 1
            sequence.admitted = self._admissions
            by_client[sequence.request.client_name] += 1
            self._running[sequence.session_id] = sequence

    def _choose(self, limits: PlanLimits, costs: StepCosts) -> list[tuple[Sequence, int]]:
        """Choose sequences and token counts: decode first, in as many steps as are worth it, then prompts in order."""
        budget = self._step_tokens
        decoding = sum(each.decodes for each in self._running.values())
        choice = _Choice(limits, costs, others_decode=decoding > 0)
        most_decodes = 0
        if decoding:
            steps = costs.micro_batches(decoding)
            decoding_now = sum(flight.decodes for flight in self._in_flight.values())
            # Otherwise they gather for a larger step; but never behind another chunk of a prompt.
            if decoding_now < steps or any(each.wants_prefill for each in self._running.values()):
                most_decodes = min(budget, math.ceil(decoding / steps))
        counts = choice.token_counts
        for sequence in self.running:
            if len(counts) >= most_decodes:
                break
            if sequence.wants_decode and self._make_room(sequence, sequence.sent + 1, choice):
                counts[sequence.session_id] = 1
        budget -= len(counts)
        for sequence in self.running:
            if budget <= 0:
                break
            if sequence.wants_prefill and sequence.session_id in self._running:
                count = self._choose_chunk(sequence, budget, choice)
                if count:
                    counts[sequence.session_id] = count
                    budget -= count
        chosen = [(self._running[session_id], count) for session_id, count in counts.items()]
        for sequence, _ in chosen:  # the served go to the end of the line
            self._running[sequence.session_id] = self._running.pop(sequence.session_id)
        return chosen

    def _choose_chunk(self, sequence: Sequence, budget: int, choice: _Choice) -> int:
        """Return how many of a prompt's next tokens go now. A sequence that begins may copy rows of another."""
        first, prefix = sequence.sent, None
        if first == 0 and sequence.reuses_prefix and sequence.scores is None:  # copied rows have no logits to score
            prefix = self.kv.prefix_for(sequence, self._running.values())
            first = prefix.token_count if prefix else 0
        ends = sequence.chunk_ends if sequence.sent else choice.costs.chunk_ends(first, len(sequence.token_ids))
        count = min(budget, choice.costs.chunk_tokens(first, ends, others_decode=choice.others_decode))
        if prefix:
            choice.donors.add(prefix.session_id)
        if not self._make_room(sequence, first + count, choice):
            return 0
        if sequence.sent == 0:
            self.counts.prompt_tokens += len(sequence.token_ids)
            self.counts.reused_tokens += first
            sequence.chunk_ends = ends
        sequence.sent, sequence.prefix = first, prefix
        return count

    def _make_room(self, sequence: Sequence, end: int, choice: _Choice) -> bool:
        """Take room for the sequence's rows up to `end`. Returns False if only older sequences could be preempted."""
        while not self.kv.fits(sequence, end, choice.limits):
            if self.kv.give_up_kept(choice.donors):
                continue
            younger = [
                other
                for other in self._running.values()
                if other.is_younger_than(sequence)
                and other.session_id not in choice.token_counts
                and other.session_id not in choice.donors
            ]
            if not younger:
                return False
            victim = max(younger, key=lambda other: (other.request.priority, other.admitted))
            self.counts.preemptions += 1
            self._restart(victim)
            self._lose_place(victim)
        self.kv.hold(sequence, end)
        return True
