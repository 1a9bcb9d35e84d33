"""Room for KV rows: preemption, rows kept of ended sequences, and prefixes that are reused."""

import random

from tests.support.sequences import a_scheduler, a_sequence, answer, refusal

END = 2


def a_test_sequence(name="a", prompt=5, new=4, end=(END,), **options):
    return a_sequence(name, range(10, 10 + prompt), new, end, **options)


def decoded(scheduler, count, token_id=7, now=0.0):
    """Answer steps until `count` tokens have come."""
    tokens = []
    while len(tokens) < count:
        tokens += scheduler.apply(answer(scheduler.next_step(now), token_id))[1]
    return tokens


def test_when_room_runs_out_the_youngest_is_preempted_and_returns_with_all_its_tokens():
    scheduler = a_scheduler(stages=1, step_tokens=100, kv_tokens=60)
    old, young = a_test_sequence("old", prompt=10, new=30, end=()), a_test_sequence("young", prompt=10, new=30, end=())
    scheduler.waiting.add(old)
    scheduler.waiting.add(young)
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
    scheduler.waiting.add(first)
    scheduler.next_step(0)
    scheduler.replay_all()
    scheduler.waiting.add(second)
    while scheduler.counts.preemptions == 0:
        scheduler.apply(answer(scheduler.next_step(0)))
    assert [sequence.session_id for sequence in scheduler.running] == ["second"]


def test_with_little_room_all_sequences_end_and_never_hold_more_than_it():
    chance = random.Random(5)
    scheduler = a_scheduler(stages=2, step_tokens=16, kv_tokens=48, maximum_running=8)
    sequences = [a_test_sequence(f"s{i}", chance.randrange(1, 20), chance.randrange(1, 25), ()) for i in range(24)]
    for sequence in sequences:
        scheduler.waiting.add(sequence)
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


def test_a_prompt_reuses_the_prefix_of_an_ended_one():
    scheduler = a_scheduler(stages=1, step_tokens=100)
    scheduler.waiting.add(a_test_sequence("first", prompt=40, new=2, end=()))
    decoded(scheduler, 2)
    assert scheduler.remove("first", keep_rows=True) == []
    assert scheduler.held_ids == ["first"]
    second = a_test_sequence("second", prompt=60, new=1)
    scheduler.waiting.add(second)
    span = scheduler.next_step(0).step.spans[0]
    assert (span.first_position, span.token_count) == (40, 20)
    assert (span.prefix.session_id, span.prefix.session_epoch, span.prefix.token_count) == ("first", 1, 40)
    assert (scheduler.counts.prompt_tokens, scheduler.counts.reused_tokens) == (100, 40)


def test_a_prompt_whose_rows_all_exist_still_computes_its_last_token():
    scheduler = a_scheduler(stages=1, step_tokens=100)
    scheduler.waiting.add(a_test_sequence("first", prompt=40, new=2, end=()))
    decoded(scheduler, 2)
    scheduler.remove("first", keep_rows=True)
    scheduler.waiting.add(a_test_sequence("second", prompt=40, new=1))
    span = scheduler.next_step(0).step.spans[0]
    assert (span.first_position, span.token_count, span.prefix.token_count) == (39, 1, 39)
    assert span.sampling is not None


def test_rows_of_a_running_sequence_are_copied_too():
    scheduler = a_scheduler(stages=1, step_tokens=100)
    scheduler.waiting.add(a_test_sequence("first", prompt=40, new=20, end=()))
    scheduler.apply(answer(scheduler.next_step(0)))
    scheduler.waiting.add(a_test_sequence("second", prompt=50, new=1))
    spans = {span.session_id: span for span in scheduler.next_step(0).step.spans}
    assert spans["second"].prefix.token_count == 40


def test_the_next_turn_of_a_chat_makes_the_previous_one_redundant():
    scheduler = a_scheduler(stages=1, step_tokens=100)
    scheduler.waiting.add(a_test_sequence("first", prompt=40, new=2, end=()))
    decoded(scheduler, 2)
    scheduler.remove("first", keep_rows=True)
    second = a_test_sequence("second", prompt=41, new=2, end=())
    second.token_ids[40] = 7  # the first one's answer
    scheduler.waiting.add(second)
    decoded(scheduler, 2)
    assert scheduler.remove("second", keep_rows=True) == ["first"]
    assert scheduler.held_ids == ["second"]


def test_kept_rows_are_freed_before_any_sequence_is_preempted():
    scheduler = a_scheduler(stages=1, step_tokens=100, kv_tokens=80)
    scheduler.waiting.add(a_test_sequence("first", prompt=40, new=2, end=()))
    decoded(scheduler, 2)
    scheduler.remove("first", keep_rows=True)
    other = a_test_sequence("other", prompt=60, new=2)
    other.token_ids = list(range(100, 160))
    scheduler.waiting.add(other)
    flight = scheduler.next_step(0)
    assert [each.session_id for each in flight.step.released] == ["first"]
    assert (scheduler.kv.kept_rows, scheduler.counts.preemptions) == (0, 0)


def test_prompts_to_score_reuse_no_prefix():
    scheduler = a_scheduler(stages=1, step_tokens=100)
    scheduler.waiting.add(a_test_sequence("first", prompt=40, new=2, end=()))
    decoded(scheduler, 2)
    scheduler.remove("first", keep_rows=True)
    second = a_test_sequence("second", prompt=60, new=1)
    second.scores = [None] * 59
    scheduler.waiting.add(second)
    span = scheduler.next_step(0).step.spans[0]
    assert (span.first_position, span.prefix) == (0, None)


def test_rows_that_some_stage_lost_are_computed_again():
    scheduler = a_scheduler(stages=1, step_tokens=100)
    scheduler.waiting.add(a_test_sequence("first", prompt=40, new=2, end=()))
    decoded(scheduler, 2)
    scheduler.remove("first", keep_rows=True)
    scheduler.waiting.add(a_test_sequence("second", prompt=60, new=1))
    flight = scheduler.next_step(0)
    scheduler.replay_all()
    assert scheduler.held_ids == ["second"]
    span = scheduler.next_step(0).step.spans[0]
    assert (span.session_epoch, span.first_position, span.prefix) == (2, 0, None)
    assert scheduler.apply(answer(flight)) == (None, [], [])


def test_a_sequence_restarts_if_a_stage_lost_the_rows_to_copy():
    scheduler = a_scheduler(stages=1, step_tokens=100)
    scheduler.waiting.add(a_test_sequence("first", prompt=40, new=2, end=()))
    decoded(scheduler, 2)
    scheduler.remove("first", keep_rows=True)
    scheduler.waiting.add(a_test_sequence("second", prompt=60, new=1))
    assert scheduler.apply(refusal(scheduler.next_step(0), "prefix_lost"))[2] == []
    step = scheduler.next_step(0).step
    assert (step.spans[0].session_epoch, step.spans[0].first_position, step.spans[0].prefix) == (2, 0, None)
    assert "first" in [each.session_id for each in step.released]


def test_sequences_with_another_salt_copy_nothing():
    scheduler = a_scheduler(stages=1, step_tokens=100)
    scheduler.waiting.add(a_test_sequence("first", prompt=40, new=2, end=()))
    decoded(scheduler, 2)
    scheduler.remove("first", keep_rows=True)
    scheduler.waiting.add(a_test_sequence("second", prompt=60, new=1, cache_salt="of its own"))
    assert scheduler.next_step(0).step.spans[0].prefix is None
