import random

import pytest

from noodle.wire.messages import SpanRefusal, SpanResult, StepResult, TokenScore
from services.coordinator.engine.scheduler import MAXIMUM_REPLAYS, ROOM_RETRY_SECONDS, Scheduler
from tests.support.sequences import a_sequence, plan_limits

END = 2


def a_scheduler(stages=2, step_tokens=8, kv_tokens=10_000, maximum_running=16):
    scheduler = Scheduler(step_tokens, maximum_running)
    scheduler.limits = plan_limits(stages, kv_tokens)
    scheduler.coordinator_epoch = 1
    return scheduler


def a_test_sequence(name="a", prompt=5, new=4, end=(END,), **options):
    return a_sequence(name, range(10, 10 + prompt), new, end, **options)


def answer(flight, token_id=7, only=None):
    """The result of a step in which every sampled token is `token_id`."""
    spans = [
        SpanResult(s.session_id, s.session_epoch, s.first_position, s.token_count, token_id if s.sampling else None)
        for s in flight.step.spans
        if only is None or s.session_id in only
    ]
    return StepResult(flight.step.step_id, 1, flight.step.coordinator_epoch, spans, [], [])


def refusal(flight, reason):
    s = flight.step.spans[0]
    refused = SpanRefusal(s.session_id, s.session_epoch, s.first_position, 0, reason, "because")
    return StepResult(flight.step.step_id, 1, 1, [], [refused], [])


def test_a_prompt_goes_in_chunks_of_the_budget_and_only_the_last_asks_for_a_token():
    scheduler = a_scheduler(step_tokens=3)
    scheduler.add(a_test_sequence(prompt=7))
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
    scheduler.add(sequence)
    for expected in ("no", "no", "length"):
        _, ((_, token),), _ = scheduler.apply(answer(scheduler.next_step(0)))
        assert (token.finish_reason or "no") == expected
    assert sequence.token_ids[5:] == [7, 7, 7]


def test_the_end_of_text_ends_a_sequence():
    scheduler = a_scheduler()
    scheduler.add(a_test_sequence())
    _, ((_, token),), _ = scheduler.apply(answer(scheduler.next_step(0), END))
    assert token.finish_reason == "eos"


def test_decoding_sessions_are_spread_over_the_stages():
    scheduler = a_scheduler(stages=2, step_tokens=100)
    for name in "abcd":
        scheduler.add(a_test_sequence(name))
    scheduler.apply(answer(scheduler.next_step(0)))
    first, second = scheduler.next_step(0), scheduler.next_step(0)
    names = [{span.session_id for span in flight.step.spans} for flight in (first, second)]
    assert [len(group) for group in names] == [2, 2]
    assert names[0] | names[1] == set("abcd")


def test_decode_does_not_wait_for_a_long_prompt():
    scheduler = a_scheduler(stages=1, step_tokens=8)
    scheduler.add(a_test_sequence("short"))
    scheduler.apply(answer(scheduler.next_step(0)))
    scheduler.add(a_test_sequence("long", prompt=50))
    flight = scheduler.next_step(0)
    assert [(span.session_id, span.token_count) for span in flight.step.spans] == [("short", 1), ("long", 7)]


def test_a_sequence_waits_until_its_kv_rows_are_free():
    scheduler = a_scheduler(kv_tokens=30, step_tokens=100)
    scheduler.add(a_test_sequence("a", new=10))
    scheduler.add(a_test_sequence("b", prompt=15, new=10))
    flight = scheduler.next_step(0)
    assert [span.session_id for span in flight.step.spans] == ["a"]
    assert len(scheduler.waiting) == 1
    assert scheduler.remove("a") == ["a"]
    assert [span.session_id for span in scheduler.next_step(0).step.spans] == ["b"]


def test_a_request_that_reserves_much_and_needs_little_does_not_delay_others():
    scheduler = a_scheduler(kv_tokens=100, step_tokens=100)
    scheduler.add(a_test_sequence("a", new=90))
    scheduler.add(a_test_sequence("b", new=90))
    assert [span.session_id for span in scheduler.next_step(0).step.spans] == ["a", "b"]


def test_stages_that_reserve_upfront_get_no_more_than_they_can_reserve():
    scheduler = a_scheduler(kv_tokens=100, step_tokens=100)
    scheduler.limits = plan_limits(2, 100, reserved_kv_tokens=100)
    scheduler.add(a_test_sequence("a", new=90))
    scheduler.add(a_test_sequence("b", new=90))
    assert [span.session_id for span in scheduler.next_step(0).step.spans] == ["a"]


def test_a_result_that_comes_twice_counts_once():
    scheduler = a_scheduler()
    sequence = a_test_sequence()
    scheduler.add(sequence)
    flight = scheduler.next_step(0)
    scheduler.apply(answer(flight))
    assert scheduler.apply(answer(flight)) == (None, [], [])
    assert len(sequence.token_ids) == 6


def test_a_replay_prefills_all_known_tokens_in_a_new_epoch_and_ignores_the_old_one():
    scheduler = a_scheduler(step_tokens=100)
    sequence = a_test_sequence()
    scheduler.add(sequence)
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
    scheduler.add(a_test_sequence())
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
        scheduler.add(sequence)
    flight = scheduler.next_step(10.0)
    spans = [SpanRefusal(s.session_id, s.session_epoch, 0, 1, "kv_budget", "full") for s in flight.step.spans]
    assert scheduler.apply(StepResult(flight.step.step_id, 1, 1, [], spans, []))[1:] == ([], [])
    assert (scheduler.running, scheduler.steps_in_flight) == ([], 0)
    assert list(scheduler.waiting) == sequences
    assert scheduler.next_step(10.0) is None
    assert scheduler.next_step(10.0 + ROOM_RETRY_SECONDS / 2) is None
    again = scheduler.next_step(10.0 + ROOM_RETRY_SECONDS)
    assert [(span.session_id, span.session_epoch) for span in again.step.spans] == [("a", 2), ("b", 2)]


def test_one_sequence_without_room_does_not_affect_the_others_of_its_step():
    scheduler = a_scheduler(step_tokens=100)
    for name in "ab":
        scheduler.add(a_test_sequence(name))
    flight = scheduler.next_step(0)
    fits, refused = flight.step.spans
    result = StepResult(
        flight.step.step_id, 1, 1, [SpanResult(fits.session_id, 1, 0, fits.token_count, 7)],
        [SpanRefusal(refused.session_id, 1, 0, 1, "kv_budget", "full")], [],
    )  # fmt: skip
    _, tokens, fatal = scheduler.apply(result)
    assert ([sequence.session_id for sequence, _ in tokens], fatal) == (["a"], [])
    assert [sequence.session_id for sequence in scheduler.running] == ["a"]
    assert [span.session_id for span in scheduler.next_step(0).step.spans] == ["a"]
    scheduler.remove("a")
    assert [span.session_id for span in scheduler.next_step(ROOM_RETRY_SECONDS).step.spans] == ["b"]


def test_a_sequence_that_never_finds_room_is_given_up():
    scheduler = a_scheduler()
    scheduler.add(a_test_sequence())
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
    return StepResult(flight.step.step_id, 1, flight.step.coordinator_epoch, spans, [], [])


def test_the_last_row_of_a_chunk_scores_the_first_token_of_the_next():
    scheduler = a_scheduler(step_tokens=3)
    sequence = a_scored_sequence()
    scheduler.add(sequence)
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
    scheduler.add(sequence)
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
    scheduler.add(sequence)
    lost, last = scheduler.next_step(0), scheduler.next_step(0)
    _, tokens, fatal = scheduler.apply(scored_answer(last))
    assert (tokens, fatal, sequence.epoch) == ([], [], 2)
    assert scheduler.apply(scored_answer(lost))[1] == []
    scheduler.apply(scored_answer(scheduler.next_step(0)))
    _, ((_, token),), _ = scheduler.apply(scored_answer(scheduler.next_step(0)))
    assert (token.token_id, sequence.scores_are_complete) == (7, True)


def test_scores_that_never_come_end_the_sequence():
    scheduler = a_scheduler(step_tokens=100)
    scheduler.add(a_scored_sequence())
    for _ in range(MAXIMUM_REPLAYS):
        assert scheduler.apply(answer(scheduler.next_step(0)))[2] == []
    ((sequence, refused),) = scheduler.apply(answer(scheduler.next_step(0)))[2]
    assert (sequence.session_id, refused.reason) == ("a", "scores_lost")


def test_a_sequence_that_asks_for_no_token_ends_with_its_prompt():
    scheduler = a_scheduler(step_tokens=4)
    sequence = a_scored_sequence(new=0)
    scheduler.add(sequence)
    flights = [scheduler.next_step(0), scheduler.next_step(0)]
    assert [flight.step.spans[0].sampling for flight in flights] == [None, None]
    assert scheduler.apply(scored_answer(flights[0]))[1] == []
    assert scheduler.apply(scored_answer(flights[1]))[1] == [(sequence, None)]
    assert sequence.finished
    assert scheduler.next_step(0) is None
    assert sequence.token_ids == list(range(10, 17))


def test_a_sequence_without_progress_is_given_up():
    scheduler = a_scheduler()
    scheduler.add(a_test_sequence())
    for _ in range(MAXIMUM_REPLAYS):
        assert scheduler.apply(refusal(scheduler.next_step(0), "position_gap"))[2] == []
    assert len(scheduler.apply(refusal(scheduler.next_step(0), "position_gap"))[2]) == 1


def test_a_step_that_does_not_come_back_in_time_is_replayed():
    scheduler = a_scheduler()
    scheduler.add(a_test_sequence())
    flight = scheduler.next_step(0.0)
    assert scheduler.overdue(flight.deadline - 0.1) == []
    assert scheduler.steps_in_flight == 1
    assert scheduler.overdue(flight.deadline) == []
    assert scheduler.next_step(0).step.spans[0].session_epoch == 2


def test_a_lost_step_of_a_sequence_out_of_time_is_not_replayed():
    scheduler = a_scheduler(stages=1, step_tokens=100)
    for name in "ab":
        scheduler.add(a_test_sequence(name))
    flight = scheduler.next_step(0.0)
    assert [sequence.session_id for sequence in scheduler.overdue(flight.deadline, {"b"})] == ["b"]
    assert [span.session_epoch for span in scheduler.next_step(0).step.spans] == [2]


def test_a_removed_sequence_does_not_keep_its_step_open():
    scheduler = a_scheduler(stages=1, step_tokens=100)
    for name in "ab":
        scheduler.add(a_test_sequence(name))
    flight = scheduler.next_step(0)
    scheduler.remove("a")
    assert scheduler.steps_in_flight == 1
    scheduler.apply(answer(flight))
    assert scheduler.steps_in_flight == 0


def test_after_a_lost_connection_the_same_steps_are_sent_again_in_order():
    scheduler = a_scheduler(step_tokens=3)
    scheduler.add(a_test_sequence(prompt=6))
    flights = [scheduler.next_step(0), scheduler.next_step(0)]
    assert scheduler.to_send_again(5.0) == flights
    assert all(flight.sent_at == 5.0 for flight in flights)


def test_no_token_is_lost_or_doubled_in_random_runs():
    """Random results, partial results, lost steps and replays: each sequence still gets exactly its tokens in order."""
    chance = random.Random(11)
    scheduler = a_scheduler(stages=3, step_tokens=16, maximum_running=5)
    sequences = [a_test_sequence(f"s{i}", chance.randrange(1, 20), chance.randrange(1, 9), ()) for i in range(30)]
    for sequence in sequences:
        scheduler.add(sequence)
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
            _, tokens, fatal = scheduler.apply(StepResult(flight.step.step_id, 1, 1, spans, [], []))
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
    scheduler.add(a_test_sequence(prompt=200))
    flights = [scheduler.next_step(0), scheduler.next_step(0)]
    counts = [flight.step.spans[0].token_count for flight in flights]
    assert counts[0] == pytest.approx(counts[1], abs=2)
    assert counts[0] < 100
    assert [flight.step.spans[0].sampling for flight in flights] == [None, None]


# room


def decoded(scheduler, count, token_id=7, now=0.0):
    """Answer steps until `count` tokens have come."""
    tokens = []
    while len(tokens) < count:
        tokens += scheduler.apply(answer(scheduler.next_step(now), token_id))[1]
    return tokens


def test_when_room_runs_out_the_youngest_is_preempted_and_returns_with_all_its_tokens():
    scheduler = a_scheduler(stages=1, step_tokens=100, kv_tokens=60)
    old, young = a_test_sequence("old", prompt=10, new=30, end=()), a_test_sequence("young", prompt=10, new=30, end=())
    scheduler.add(old)
    scheduler.add(young)
    released = []
    while not old.finished:
        flight = scheduler.next_step(0)
        released += flight.step.released
        assert sum(s.first_position + s.token_count for s in flight.step.spans) <= 60
        scheduler.apply(answer(flight))
    assert scheduler.counts.preemptions == 1
    assert [(each.session_id, each.session_epoch) for each in released] == [("young", 1)]
    kept = list(young.token_ids)
    scheduler.remove("old")
    span = scheduler.next_step(0).step.spans[0]
    assert (span.session_id, span.session_epoch, span.first_position) == ("young", 2, 0)
    assert (span.token_count, young.token_ids) == (len(kept), kept)
    assert young.replays == 0  # a preemption does not count as a replay


def test_a_lower_priority_is_preempted_before_a_younger_sequence():
    scheduler = a_scheduler(stages=1, step_tokens=100, kv_tokens=60)
    first, second = a_test_sequence("first", 10, 30, (), priority=5), a_test_sequence("second", 10, 30, ())
    scheduler.add(first)
    scheduler.next_step(0)
    scheduler.replay_all()
    scheduler.add(second)
    while scheduler.counts.preemptions == 0:
        scheduler.apply(answer(scheduler.next_step(0)))
    assert [sequence.session_id for sequence in scheduler.running] == ["second"]


def test_with_little_room_all_sequences_end_and_never_hold_more_than_it():
    chance = random.Random(5)
    scheduler = a_scheduler(stages=2, step_tokens=16, kv_tokens=48, maximum_running=8)
    sequences = [a_test_sequence(f"s{i}", chance.randrange(1, 20), chance.randrange(1, 25), ()) for i in range(24)]
    for sequence in sequences:
        scheduler.add(sequence)
    stage = {}  # the rows that one stage holds, by sequence
    flights, ended = [], 0
    for _ in range(20_000):
        flight = scheduler.next_step(0)
        if flight is not None:
            for each in flight.step.released:
                if stage.get(each.session_id, (0, 0))[0] <= each.session_epoch:
                    stage.pop(each.session_id, None)
            for span in flight.step.spans:
                _, rows = stage.get(span.session_id, (0, 0))
                stage[span.session_id] = span.session_epoch, max(rows, span.first_position + span.token_count)
            assert sum(rows for _, rows in stage.values()) <= 48
            flights.append(flight)
        if flights and (flight is None or chance.random() < 0.5):
            for sequence, token in scheduler.apply(answer(flights.pop(0)))[1]:
                if token.finish_reason:
                    ended += 1
                    for name in scheduler.remove(sequence.session_id, keep_rows=chance.random() < 0.5):
                        stage.pop(name, None)
        if ended == len(sequences):
            break
    assert ended == len(sequences)
    assert scheduler.counts.preemptions > 0
    assert set(stage) == set(scheduler.held_ids)


# rows of others


def test_a_prompt_reuses_the_prefix_of_an_ended_one():
    scheduler = a_scheduler(stages=1, step_tokens=100)
    scheduler.add(a_test_sequence("first", prompt=40, new=2, end=()))
    decoded(scheduler, 2)
    assert scheduler.remove("first", keep_rows=True) == []
    assert scheduler.held_ids == ["first"]
    second = a_test_sequence("second", prompt=60, new=1)
    scheduler.add(second)
    span = scheduler.next_step(0).step.spans[0]
    assert (span.first_position, span.token_count) == (40, 20)
    assert (span.prefix.session_id, span.prefix.session_epoch, span.prefix.token_count) == ("first", 1, 40)
    assert (scheduler.counts.prompt_tokens, scheduler.counts.reused_tokens) == (100, 40)


def test_a_prompt_whose_rows_all_exist_still_computes_its_last_token():
    scheduler = a_scheduler(stages=1, step_tokens=100)
    scheduler.add(a_test_sequence("first", prompt=40, new=2, end=()))
    decoded(scheduler, 2)
    scheduler.remove("first", keep_rows=True)
    scheduler.add(a_test_sequence("second", prompt=40, new=1))
    span = scheduler.next_step(0).step.spans[0]
    assert (span.first_position, span.token_count, span.prefix.token_count) == (39, 1, 39)
    assert span.sampling is not None


def test_rows_of_a_running_sequence_are_copied_too():
    scheduler = a_scheduler(stages=1, step_tokens=100)
    scheduler.add(a_test_sequence("first", prompt=40, new=20, end=()))
    scheduler.apply(answer(scheduler.next_step(0)))
    scheduler.add(a_test_sequence("second", prompt=50, new=1))
    spans = {span.session_id: span for span in scheduler.next_step(0).step.spans}
    assert spans["second"].prefix.token_count == 40


def test_the_next_turn_of_a_chat_makes_the_previous_one_redundant():
    scheduler = a_scheduler(stages=1, step_tokens=100)
    scheduler.add(a_test_sequence("first", prompt=40, new=2, end=()))
    decoded(scheduler, 2)
    scheduler.remove("first", keep_rows=True)
    second = a_test_sequence("second", prompt=41, new=2, end=())
    second.token_ids[40] = 7  # the first one's answer
    scheduler.add(second)
    decoded(scheduler, 2)
    assert scheduler.remove("second", keep_rows=True) == ["first"]
    assert scheduler.held_ids == ["second"]


def test_kept_rows_are_freed_before_any_sequence_is_preempted():
    scheduler = a_scheduler(stages=1, step_tokens=100, kv_tokens=80)
    scheduler.add(a_test_sequence("first", prompt=40, new=2, end=()))
    decoded(scheduler, 2)
    scheduler.remove("first", keep_rows=True)
    other = a_test_sequence("other", prompt=60, new=2)
    other.token_ids = list(range(100, 160))
    scheduler.add(other)
    flight = scheduler.next_step(0)
    assert [each.session_id for each in flight.step.released] == ["first"]
    assert (scheduler.kept_rows, scheduler.counts.preemptions) == (0, 0)


def test_prompts_to_score_reuse_no_prefix():
    scheduler = a_scheduler(stages=1, step_tokens=100)
    scheduler.add(a_test_sequence("first", prompt=40, new=2, end=()))
    decoded(scheduler, 2)
    scheduler.remove("first", keep_rows=True)
    second = a_test_sequence("second", prompt=60, new=1)
    second.scores = [None] * 59
    scheduler.add(second)
    span = scheduler.next_step(0).step.spans[0]
    assert (span.first_position, span.prefix) == (0, None)


def test_rows_that_some_stage_lost_are_computed_again():
    scheduler = a_scheduler(stages=1, step_tokens=100)
    scheduler.add(a_test_sequence("first", prompt=40, new=2, end=()))
    decoded(scheduler, 2)
    scheduler.remove("first", keep_rows=True)
    scheduler.add(a_test_sequence("second", prompt=60, new=1))
    flight = scheduler.next_step(0)
    scheduler.replay_all()
    assert scheduler.held_ids == ["second"]
    span = scheduler.next_step(0).step.spans[0]
    assert (span.session_epoch, span.first_position, span.prefix) == (2, 0, None)
    assert scheduler.apply(answer(flight)) == (None, [], [])


def test_a_sequence_restarts_if_a_stage_lost_the_rows_to_copy():
    scheduler = a_scheduler(stages=1, step_tokens=100)
    scheduler.add(a_test_sequence("first", prompt=40, new=2, end=()))
    decoded(scheduler, 2)
    scheduler.remove("first", keep_rows=True)
    scheduler.add(a_test_sequence("second", prompt=60, new=1))
    assert scheduler.apply(refusal(scheduler.next_step(0), "prefix_lost"))[2] == []
    step = scheduler.next_step(0).step
    assert (step.spans[0].session_epoch, step.spans[0].first_position, step.spans[0].prefix) == (2, 0, None)
    assert "first" in [each.session_id for each in step.released]


def test_sequences_with_another_salt_copy_nothing():
    scheduler = a_scheduler(stages=1, step_tokens=100)
    scheduler.add(a_test_sequence("first", prompt=40, new=2, end=()))
    decoded(scheduler, 2)
    scheduler.remove("first", keep_rows=True)
    scheduler.add(a_test_sequence("second", prompt=60, new=1, cache_salt="of its own"))
    assert scheduler.next_step(0).step.spans[0].prefix is None
