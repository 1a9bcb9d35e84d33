"""How steps are formed, and what becomes of sequences when their results come, are late or are refused."""

import itertools
import random

import pytest

from noodle.wire.messages import SpanRefusal, SpanResult, StageTiming, TokenScore
from services.coordinator.engine.scheduler import MAXIMUM_REPLAYS, ROOM_RETRY_SECONDS
from services.coordinator.engine.step_costs import DECODE_GAP_SECONDS
from tests.support.sequences import a_result, a_scheduler, a_sequence, answer, plan_limits, refusal

END = 2


def a_test_sequence(name="a", prompt=5, new=4, end=(END,), **options):
    return a_sequence(name, range(10, 10 + prompt), new, end, **options)


def test_a_prompt_goes_in_chunks_of_the_budget_and_only_the_last_asks_for_a_token():
    scheduler = a_scheduler(step_tokens=3)
    scheduler.waiting.add(a_test_sequence(prompt=7))
    first, second = scheduler.next_step(0), scheduler.next_step(0)
    assert scheduler.next_step(0) is None  # two stages, two steps in flight
    assert [f.step.spans[0].first_position for f in (first, second)] == [0, 3]
    scheduler.apply(answer(first))
    scheduler.apply(answer(second))
    last = scheduler.next_step(0)
    assert (last.step.spans[0].first_position, last.step.spans[0].token_count) == (6, 1)
    assert [bool(f.step.spans[0].sampling) for f in (first, second, last)] == [False, False, True]


def test_each_result_lets_the_next_token_go():
    scheduler = a_scheduler()
    sequence = a_test_sequence(new=3)
    scheduler.waiting.add(sequence)
    for expected in ("no", "no", "length"):
        _, ((_, token),), _ = scheduler.apply(answer(scheduler.next_step(0)))
        assert (token.finish_reason or "no") == expected
    assert sequence.token_ids[5:] == [7, 7, 7]


def test_the_end_of_text_ends_a_sequence():
    scheduler = a_scheduler()
    scheduler.waiting.add(a_test_sequence())
    _, ((_, token),), _ = scheduler.apply(answer(scheduler.next_step(0), END))
    assert token.finish_reason == "eos"


def test_decoding_sessions_are_spread_over_the_stages():
    scheduler = a_scheduler(stages=2, step_tokens=100)
    for name in "abcd":
        scheduler.waiting.add(a_test_sequence(name))
    scheduler.apply(answer(scheduler.next_step(0)))
    first, second = scheduler.next_step(0), scheduler.next_step(0)
    names = [{span.session_id for span in flight.step.spans} for flight in (first, second)]
    assert [len(group) for group in names] == [2, 2]
    assert names[0] | names[1] == set("abcd")


def test_decode_does_not_wait_for_a_long_prompt():
    scheduler = a_scheduler(stages=1, step_tokens=8)
    scheduler.waiting.add(a_test_sequence("short"))
    scheduler.apply(answer(scheduler.next_step(0)))
    scheduler.waiting.add(a_test_sequence("long", prompt=50))
    flight = scheduler.next_step(0)
    assert [(span.session_id, span.token_count) for span in flight.step.spans] == [("short", 1), ("long", 7)]


class SimulatedStages:
    """Two stages that compute one step at a time; a step of n tokens takes `fixed + per_token * n` seconds."""

    def __init__(self, scheduler, fixed, per_token):
        self.scheduler, self.fixed, self.per_token = scheduler, fixed, per_token
        self.now, self.free_at, self.in_flight, self.token_times = 0.0, [0.0, 0.0], [], {}

    def run_until(self, is_over):
        while not is_over():
            while (flight := self.scheduler.next_step(self.now)) is not None:
                seconds = self.fixed + self.per_token * flight.step.shape[0]
                done = self.now
                for stage in range(2):
                    done = self.free_at[stage] = max(done, self.free_at[stage]) + seconds
                self.in_flight.append((done, seconds, flight))
            self.now, seconds, flight = self.in_flight.pop(0)
            result = answer(flight)
            result.timings.extend(StageTiming(stage, 0.0, seconds, 0.0) for stage in range(2))
            for sequence, _ in self.scheduler.apply(result)[1]:
                self.token_times.setdefault(sequence.session_id, []).append(self.now)

    def longest_gap(self, session_id, begin):
        times = [at for at in self.token_times[session_id] if at >= begin]
        return max(after - before for before, after in itertools.pairwise(times))


@pytest.mark.parametrize("streams", [1, 4, 5])
@pytest.mark.parametrize(("fixed", "per_token"), [(0.005, 0.0005), (0.01, 0.001), (0.02, 0.002)])
def test_streams_beside_a_long_prompt_wait_for_one_chunk(streams, fixed, per_token):
    scheduler = a_scheduler(stages=2, step_tokens=2048, kv_tokens=100_000)
    scheduler.limits = plan_limits(2, 100_000, decode_seconds=2 * (fixed + per_token))
    stages = SimulatedStages(scheduler, fixed, per_token)
    names = [f"stream{number}" for number in range(streams)]
    for name in names:
        scheduler.waiting.add(a_test_sequence(name, new=100_000))
    stages.run_until(lambda: len(stages.token_times.get(names[-1], ())) > 20)
    for number in range(3):  # the first prompt teaches what chunks cost
        begin = stages.now
        scheduler.waiting.add(a_test_sequence(f"long{number}", prompt=2000, new=1))
        stages.run_until(lambda number=number: f"long{number}" in stages.token_times)
        scheduler.remove(f"long{number}")
    gaps = [stages.longest_gap(name, begin) for name in names]
    assert max(gaps) <= 1.5 * DECODE_GAP_SECONDS  # the first chunk finds steps in flight


def test_a_sequence_waits_until_its_kv_rows_are_free():
    scheduler = a_scheduler(kv_tokens=30, step_tokens=100)
    scheduler.waiting.add(a_test_sequence("a", new=10))
    scheduler.waiting.add(a_test_sequence("b", prompt=15, new=10))
    flight = scheduler.next_step(0)
    assert [span.session_id for span in flight.step.spans] == ["a"]
    assert len(scheduler.waiting) == 1
    assert scheduler.remove("a") == ["a"]
    assert [span.session_id for span in scheduler.next_step(0).step.spans] == ["b"]


def test_a_request_that_reserves_much_and_needs_little_does_not_delay_others():
    scheduler = a_scheduler(kv_tokens=100, step_tokens=100)
    scheduler.waiting.add(a_test_sequence("a", new=90))
    scheduler.waiting.add(a_test_sequence("b", new=90))
    assert [span.session_id for span in scheduler.next_step(0).step.spans] == ["a", "b"]


def test_stages_that_reserve_upfront_get_no_more_than_they_can_reserve():
    scheduler = a_scheduler(kv_tokens=100, step_tokens=100)
    scheduler.limits = plan_limits(2, 100, reserved_kv_tokens=100)
    scheduler.waiting.add(a_test_sequence("a", new=90))
    scheduler.waiting.add(a_test_sequence("b", new=90))
    assert [span.session_id for span in scheduler.next_step(0).step.spans] == ["a"]


def test_a_result_that_comes_twice_counts_once():
    scheduler = a_scheduler()
    sequence = a_test_sequence()
    scheduler.waiting.add(sequence)
    flight = scheduler.next_step(0)
    scheduler.apply(answer(flight))
    assert scheduler.apply(answer(flight)) == (None, [], [])
    assert len(sequence.token_ids) == 6


def test_a_replay_prefills_all_known_tokens_in_a_new_epoch_and_ignores_the_old_one():
    scheduler = a_scheduler(step_tokens=100)
    sequence = a_test_sequence()
    scheduler.waiting.add(sequence)
    scheduler.apply(answer(scheduler.next_step(0)))
    old = scheduler.next_step(0)
    scheduler.replay_all()
    flight = scheduler.next_step(0)
    span = flight.step.spans[0]
    assert (span.session_epoch, span.first_position, span.token_count) == (2, 0, 6)
    assert scheduler.apply(answer(old, 99)) == (None, [], [])
    scheduler.apply(answer(flight, 8))
    assert sequence.token_ids[5:] == [7, 8]


def test_a_position_gap_is_replayed_and_another_refusal_ends_the_sequence():
    scheduler = a_scheduler()
    scheduler.waiting.add(a_test_sequence())
    _, _, fatal = scheduler.apply(refusal(scheduler.next_step(0), "position_gap"))
    assert fatal == []
    flight = scheduler.next_step(0)
    assert flight.step.spans[0].session_epoch == 2
    _, _, fatal = scheduler.apply(refusal(flight, "computation_failed"))
    assert [sequence.session_id for sequence, _ in fatal] == ["a"]


def test_sequences_without_room_return_to_the_head_of_the_queue_and_are_retried_after_a_moment():
    scheduler = a_scheduler(step_tokens=100, maximum_running=2)
    sequences = [a_test_sequence(name) for name in "abc"]
    for sequence in sequences:
        scheduler.waiting.add(sequence)
    flight = scheduler.next_step(10.0)
    spans = [SpanRefusal(s.session_id, s.session_epoch, 0, 1, "kv_budget", message="full") for s in flight.step.spans]
    assert scheduler.apply(a_result(flight, refusals=spans))[1:] == ([], [])
    assert (scheduler.running, scheduler.steps_in_flight) == ([], 0)
    assert list(scheduler.waiting) == sequences
    assert scheduler.next_step(10.0) is None
    assert scheduler.next_step(10.0 + ROOM_RETRY_SECONDS / 2) is None
    again = scheduler.next_step(10.0 + ROOM_RETRY_SECONDS)
    assert [(span.session_id, span.session_epoch) for span in again.step.spans] == [("a", 2), ("b", 2)]


def test_one_sequence_without_room_does_not_affect_the_others_of_its_step():
    scheduler = a_scheduler(step_tokens=100)
    for name in "ab":
        scheduler.waiting.add(a_test_sequence(name))
    flight = scheduler.next_step(0)
    fits, refused = flight.step.spans
    result = a_result(
        flight,
        [SpanResult(fits.session_id, 1, 0, fits.token_count, 7)],
        [SpanRefusal(refused.session_id, 1, 0, 1, "kv_budget", message="full")],
    )
    _, tokens, fatal = scheduler.apply(result)
    assert ([sequence.session_id for sequence, _ in tokens], fatal) == (["a"], [])
    assert [sequence.session_id for sequence in scheduler.running] == ["a"]
    assert [span.session_id for span in scheduler.next_step(0).step.spans] == ["a"]
    scheduler.remove("a")
    assert [span.session_id for span in scheduler.next_step(ROOM_RETRY_SECONDS).step.spans] == ["b"]


def test_a_sequence_that_never_finds_room_is_given_up():
    scheduler = a_scheduler()
    scheduler.waiting.add(a_test_sequence())
    for attempt in range(MAXIMUM_REPLAYS):
        flight = scheduler.next_step(attempt * ROOM_RETRY_SECONDS)
        assert scheduler.apply(refusal(flight, "kv_budget"))[2] == []
        assert scheduler.next_step(attempt * ROOM_RETRY_SECONDS) is None
    flight = scheduler.next_step(MAXIMUM_REPLAYS * ROOM_RETRY_SECONDS)
    assert [sequence.session_id for sequence, _ in scheduler.apply(refusal(flight, "kv_budget"))[2]] == ["a"]


def a_scored_sequence(prompt=7, new=1):
    sequence = a_test_sequence(prompt=prompt, new=new)
    sequence.scores = [None] * (prompt - 1)
    return sequence


def scored_answer(flight, token_id=7):
    """The result of a step in which each score is the id of its token."""
    spans = [
        SpanResult(s.session_id, s.session_epoch, s.first_position, s.token_count, token_id if s.sampling else None,
                   scores=[TokenScore(float(token)) for token in s.scored_token_ids])
        for s in flight.step.spans
    ]  # fmt: skip
    return a_result(flight, spans)


def test_the_last_row_of_a_chunk_scores_the_first_token_of_the_next():
    scheduler = a_scheduler(step_tokens=3)
    sequence = a_scored_sequence()
    scheduler.waiting.add(sequence)
    asked = []
    for _ in range(3):
        flight = scheduler.next_step(0)
        asked.append(flight.step.spans[0].scored_token_ids)
        _, tokens, _ = scheduler.apply(scored_answer(flight))
    assert asked == [[11, 12, 13], [14, 15, 16], []]
    assert [score.logprob for score in sequence.scores] == [11, 12, 13, 14, 15, 16]
    assert [token.finish_reason for _, token in tokens] == ["length"]


def test_after_a_replay_only_chunks_with_a_missing_score_are_scored_again():
    scheduler = a_scheduler(step_tokens=3)
    sequence = a_scored_sequence()
    scheduler.waiting.add(sequence)
    scheduler.apply(scored_answer(scheduler.next_step(0)))
    scheduler.replay_all()
    asked = []
    for _ in range(3):
        flight = scheduler.next_step(0)
        asked.append(flight.step.spans[0].scored_token_ids)
        scheduler.apply(scored_answer(flight))
    assert asked == [[], [14, 15, 16], []]
    assert sequence.scores_are_complete


def test_a_token_without_all_of_its_prompts_scores_is_drawn_again():
    scheduler = a_scheduler(step_tokens=4)
    sequence = a_scored_sequence()
    scheduler.waiting.add(sequence)
    lost, last = scheduler.next_step(0), scheduler.next_step(0)
    _, tokens, fatal = scheduler.apply(scored_answer(last))
    assert (tokens, fatal, sequence.epoch) == ([], [], 2)
    assert scheduler.apply(scored_answer(lost))[1] == []
    scheduler.apply(scored_answer(scheduler.next_step(0)))
    _, ((_, token),), _ = scheduler.apply(scored_answer(scheduler.next_step(0)))
    assert (token.token_id, sequence.scores_are_complete) == (7, True)


def test_scores_that_never_come_end_the_sequence():
    scheduler = a_scheduler(step_tokens=100)
    scheduler.waiting.add(a_scored_sequence())
    for _ in range(MAXIMUM_REPLAYS):
        assert scheduler.apply(answer(scheduler.next_step(0)))[2] == []
    ((sequence, refused),) = scheduler.apply(answer(scheduler.next_step(0)))[2]
    assert (sequence.session_id, refused.reason) == ("a", "scores_lost")


def test_a_sequence_that_asks_for_no_token_ends_with_its_prompt():
    scheduler = a_scheduler(step_tokens=4)
    sequence = a_scored_sequence(new=0)
    scheduler.waiting.add(sequence)
    flights = [scheduler.next_step(0), scheduler.next_step(0)]
    assert [flight.step.spans[0].sampling for flight in flights] == [None, None]
    assert scheduler.apply(scored_answer(flights[0]))[1] == []
    assert scheduler.apply(scored_answer(flights[1]))[1] == [(sequence, None)]
    assert sequence.finished
    assert scheduler.next_step(0) is None
    assert sequence.token_ids == list(range(10, 17))


def test_a_sequence_without_progress_is_given_up():
    scheduler = a_scheduler()
    scheduler.waiting.add(a_test_sequence())
    for _ in range(MAXIMUM_REPLAYS):
        assert scheduler.apply(refusal(scheduler.next_step(0), "position_gap"))[2] == []
    assert len(scheduler.apply(refusal(scheduler.next_step(0), "position_gap"))[2]) == 1


def test_a_step_that_does_not_come_back_in_time_is_replayed():
    scheduler = a_scheduler()
    scheduler.waiting.add(a_test_sequence())
    flight = scheduler.next_step(0.0)
    assert scheduler.overdue(flight.deadline - 0.1) == []
    assert scheduler.steps_in_flight == 1
    assert scheduler.overdue(flight.deadline) == []
    assert scheduler.next_step(0).step.spans[0].session_epoch == 2


def test_a_lost_step_of_a_sequence_out_of_time_is_not_replayed():
    scheduler = a_scheduler(stages=1, step_tokens=100)
    for name in "ab":
        scheduler.waiting.add(a_test_sequence(name))
    flight = scheduler.next_step(0.0)
    assert [sequence.session_id for sequence in scheduler.overdue(flight.deadline, {"b"})] == ["b"]
    assert [span.session_epoch for span in scheduler.next_step(0).step.spans] == [2]


def test_a_removed_sequence_does_not_keep_its_step_open():
    scheduler = a_scheduler(stages=1, step_tokens=100)
    for name in "ab":
        scheduler.waiting.add(a_test_sequence(name))
    flight = scheduler.next_step(0)
    scheduler.remove("a")
    assert scheduler.steps_in_flight == 1
    scheduler.apply(answer(flight))
    assert scheduler.steps_in_flight == 0


def test_after_a_lost_connection_the_same_steps_are_sent_again_in_order():
    scheduler = a_scheduler(step_tokens=3)
    scheduler.waiting.add(a_test_sequence(prompt=6))
    flights = [scheduler.next_step(0), scheduler.next_step(0)]
    assert scheduler.to_send_again(5.0) == flights
    assert all(flight.sent_at == 5.0 for flight in flights)


def test_no_token_is_lost_or_doubled_in_random_runs():
    """Random results, partial results, lost steps and replays: each sequence still gets exactly its tokens in order."""
    chance = random.Random(11)
    scheduler = a_scheduler(stages=3, step_tokens=16, maximum_running=5)
    sequences = [a_test_sequence(f"s{i}", chance.randrange(1, 20), chance.randrange(1, 9), ()) for i in range(30)]
    for sequence in sequences:
        scheduler.waiting.add(sequence)
    flights, finished, now = [], set(), 0.0
    for _ in range(20_000):
        now += 0.01
        if (flight := scheduler.next_step(now)) is not None:
            flights.append(flight)
        if flights and chance.random() < 0.7:
            flight = chance.choice(flights[-6:])
            spans = []
            for span in flight.step.spans:
                known = span.first_position + span.token_count
                spans.append(
                    SpanResult(span.session_id, span.session_epoch, span.first_position, span.token_count,
                               1000 + known if span.sampling else None)
                )  # fmt: skip
            if chance.random() < 0.3:
                spans = spans[: chance.randrange(len(spans) + 1)]
            _, tokens, fatal = scheduler.apply(a_result(flight, spans))
            assert fatal == []
            for sequence, token in tokens:
                assert token.token_id == 1000 + len(sequence.token_ids) - 1
                if token.finish_reason:
                    finished.add(sequence.session_id)
                    scheduler.remove(sequence.session_id)
        if chance.random() < 0.004:
            scheduler.replay_all()
            for sequence in scheduler.running:
                sequence.replays = 0
        if chance.random() < 0.01:
            for sequence in scheduler.overdue(now + 100):
                sequence.replays = 0
        if len(finished) == len(sequences):
            break
    assert len(finished) == len(sequences)
    for sequence in sequences:
        generated = sequence.token_ids[sequence.prompt_length :]
        assert generated == [1000 + position for position in range(sequence.prompt_length, len(sequence.token_ids))]
        assert len(generated) == sequence.request.max_new_tokens
    assert scheduler.steps_in_flight == 0


def test_a_prompt_is_cut_so_that_every_stage_computes_at_once():
    scheduler = a_scheduler(step_tokens=512)
    scheduler.waiting.add(a_test_sequence(prompt=200))
    flights = [scheduler.next_step(0), scheduler.next_step(0)]
    counts = [flight.step.spans[0].token_count for flight in flights]
    assert counts[0] == pytest.approx(counts[1], abs=2)
    assert counts[0] < 100
    assert [flight.step.spans[0].sampling for flight in flights] == [None, None]
