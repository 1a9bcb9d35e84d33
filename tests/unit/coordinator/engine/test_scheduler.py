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


def a_session(name="a", prompt=5, new=4, end=(END,), **options):
    return a_sequence(name, range(10, 10 + prompt), new, end, **options)


def answer(flight, token_id=7, only=None):
    """What the stages would send back, each asked-for token being `token_id`."""
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
    scheduler.add(a_session(prompt=7))
    first, second = scheduler.next_step(0), scheduler.next_step(0)
    assert scheduler.next_step(0) is None  # two stages, two steps on their way
    assert [f.step.spans[0].first_position for f in (first, second)] == [0, 3]
    scheduler.apply(answer(first))
    scheduler.apply(answer(second))
    last = scheduler.next_step(0)
    assert (last.step.spans[0].first_position, last.step.spans[0].token_count) == (6, 1)
    assert [bool(f.step.spans[0].sampling) for f in (first, second, last)] == [False, False, True]


def test_each_result_lets_the_next_token_go():
    scheduler = a_scheduler()
    session = a_session(new=3)
    scheduler.add(session)
    for expected in ("no", "no", "length"):
        _, ((_, token),), _ = scheduler.apply(answer(scheduler.next_step(0)))
        assert (token.finish_reason or "no") == expected
    assert session.token_ids[5:] == [7, 7, 7]


def test_the_end_of_text_ends_a_session():
    scheduler = a_scheduler()
    scheduler.add(a_session())
    _, ((_, token),), _ = scheduler.apply(answer(scheduler.next_step(0), END))
    assert token.finish_reason == "eos"


def test_decoding_sessions_are_spread_over_the_stages():
    scheduler = a_scheduler(stages=2, step_tokens=100)
    for name in "abcd":
        scheduler.add(a_session(name))
    scheduler.apply(answer(scheduler.next_step(0)))
    first, second = scheduler.next_step(0), scheduler.next_step(0)
    names = [{span.session_id for span in flight.step.spans} for flight in (first, second)]
    assert [len(group) for group in names] == [2, 2]
    assert names[0] | names[1] == set("abcd")


def test_decode_does_not_wait_for_a_long_prompt():
    scheduler = a_scheduler(stages=1, step_tokens=8)
    scheduler.add(a_session("short"))
    scheduler.apply(answer(scheduler.next_step(0)))
    scheduler.add(a_session("long", prompt=50))
    flight = scheduler.next_step(0)
    assert [(span.session_id, span.token_count) for span in flight.step.spans] == [("short", 1), ("long", 7)]


def test_a_session_waits_until_its_kv_rows_are_free():
    scheduler = a_scheduler(kv_tokens=30, step_tokens=100)
    scheduler.add(a_session("a", new=10))
    scheduler.add(a_session("b", prompt=15, new=10))
    flight = scheduler.next_step(0)
    assert [span.session_id for span in flight.step.spans] == ["a"]
    assert len(scheduler.waiting) == 1
    assert scheduler.remove("a") == ["a"]
    assert [span.session_id for span in scheduler.next_step(0).step.spans] == ["b"]


def test_a_request_that_reserves_much_and_needs_little_keeps_nobody_waiting():
    scheduler = a_scheduler(kv_tokens=100, step_tokens=100)
    scheduler.add(a_session("a", new=90))
    scheduler.add(a_session("b", new=90))
    assert [span.session_id for span in scheduler.next_step(0).step.spans] == ["a", "b"]


def test_stages_that_hold_whole_reservations_are_not_given_more_than_they_hold():
    scheduler = a_scheduler(kv_tokens=100, step_tokens=100)
    scheduler.limits = plan_limits(2, 100, reserved_kv_tokens=100)
    scheduler.add(a_session("a", new=90))
    scheduler.add(a_session("b", new=90))
    assert [span.session_id for span in scheduler.next_step(0).step.spans] == ["a"]


def test_a_result_that_comes_twice_counts_once():
    scheduler = a_scheduler()
    session = a_session()
    scheduler.add(session)
    flight = scheduler.next_step(0)
    scheduler.apply(answer(flight))
    assert scheduler.apply(answer(flight)) == (None, [], [])
    assert len(session.token_ids) == 6


def test_a_replay_prefills_all_known_tokens_in_a_new_epoch_and_ignores_the_old_one():
    scheduler = a_scheduler(step_tokens=100)
    session = a_session()
    scheduler.add(session)
    scheduler.apply(answer(scheduler.next_step(0)))
    old = scheduler.next_step(0)
    scheduler.replay_all()
    flight = scheduler.next_step(0)
    span = flight.step.spans[0]
    assert (span.session_epoch, span.first_position, span.token_count) == (2, 0, 6)
    assert scheduler.apply(answer(old, 99)) == (None, [], [])
    scheduler.apply(answer(flight, 8))
    assert session.token_ids[5:] == [7, 8]


def test_a_position_gap_is_cured_by_a_replay_and_another_refusal_ends_the_session():
    scheduler = a_scheduler()
    scheduler.add(a_session())
    _, _, fatal = scheduler.apply(refusal(scheduler.next_step(0), "position_gap"))
    assert fatal == []
    flight = scheduler.next_step(0)
    assert flight.step.spans[0].session_epoch == 2
    _, _, fatal = scheduler.apply(refusal(flight, "computation_failed"))
    assert [session.session_id for session, _ in fatal] == ["a"]


def test_sessions_that_find_no_room_go_back_to_the_head_of_the_line_and_are_tried_again_after_a_moment():
    scheduler = a_scheduler(step_tokens=100, maximum_running=2)
    sessions = [a_session(name) for name in "abc"]
    for session in sessions:
        scheduler.add(session)
    flight = scheduler.next_step(10.0)
    spans = [SpanRefusal(s.session_id, s.session_epoch, 0, 1, "kv_budget", "full") for s in flight.step.spans]
    assert scheduler.apply(StepResult(flight.step.step_id, 1, 1, [], spans, []))[1:] == ([], [])
    assert (scheduler.running, scheduler.steps_in_flight) == ([], 0)
    assert list(scheduler.waiting) == sessions
    assert scheduler.next_step(10.0) is None
    assert scheduler.next_step(10.0 + ROOM_RETRY_SECONDS / 2) is None
    again = scheduler.next_step(10.0 + ROOM_RETRY_SECONDS)
    assert [(span.session_id, span.session_epoch) for span in again.step.spans] == [("a", 2), ("b", 2)]


def test_one_session_without_room_leaves_the_others_of_its_step_alone():
    scheduler = a_scheduler(step_tokens=100)
    for name in "ab":
        scheduler.add(a_session(name))
    flight = scheduler.next_step(0)
    fits, refused = flight.step.spans
    result = StepResult(
        flight.step.step_id, 1, 1, [SpanResult(fits.session_id, 1, 0, fits.token_count, 7)],
        [SpanRefusal(refused.session_id, 1, 0, 1, "kv_budget", "full")], [],
    )  # fmt: skip
    _, tokens, fatal = scheduler.apply(result)
    assert ([sequence.session_id for sequence, _ in tokens], fatal) == (["a"], [])
    assert [session.session_id for session in scheduler.running] == ["a"]
    assert [span.session_id for span in scheduler.next_step(0).step.spans] == ["a"]
    scheduler.remove("a")
    assert [span.session_id for span in scheduler.next_step(ROOM_RETRY_SECONDS).step.spans] == ["b"]


def test_a_session_that_never_finds_room_is_given_up():
    scheduler = a_scheduler()
    scheduler.add(a_session())
    for attempt in range(MAXIMUM_REPLAYS):
        flight = scheduler.next_step(attempt * ROOM_RETRY_SECONDS)
        assert scheduler.apply(refusal(flight, "kv_budget"))[2] == []
        assert scheduler.next_step(attempt * ROOM_RETRY_SECONDS) is None
    flight = scheduler.next_step(MAXIMUM_REPLAYS * ROOM_RETRY_SECONDS)
    assert [session.session_id for session, _ in scheduler.apply(refusal(flight, "kv_budget"))[2]] == ["a"]


def a_scored_session(prompt=7, new=1):
    session = a_session(prompt=prompt, new=new)
    session.scores = [None] * (prompt - 1)
    return session


def scored_answer(flight, token_id=7):
    """What the stages would send back: each score is the token it belongs to."""
    spans = [
        SpanResult(s.session_id, s.session_epoch, s.first_position, s.token_count, token_id if s.sampling else None,
                   scores=[TokenScore(float(token)) for token in s.scored_token_ids])
        for s in flight.step.spans
    ]  # fmt: skip
    return StepResult(flight.step.step_id, 1, flight.step.coordinator_epoch, spans, [], [])


def test_the_last_row_of_a_chunk_scores_the_first_token_of_the_next():
    scheduler = a_scheduler(step_tokens=3)
    session = a_scored_session()
    scheduler.add(session)
    asked = []
    for _ in range(3):
        flight = scheduler.next_step(0)
        asked.append(flight.step.spans[0].scored_token_ids)
        _, tokens, _ = scheduler.apply(scored_answer(flight))
    assert asked == [[11, 12, 13], [14, 15, 16], []]
    assert [score.logprob for score in session.scores] == [11, 12, 13, 14, 15, 16]
    assert [token.finish_reason for _, token in tokens] == ["length"]


def test_after_a_replay_only_chunks_with_a_missing_score_are_scored_again():
    scheduler = a_scheduler(step_tokens=3)
    session = a_scored_session()
    scheduler.add(session)
    scheduler.apply(scored_answer(scheduler.next_step(0)))
    scheduler.replay_all()
    asked = []
    for _ in range(3):
        flight = scheduler.next_step(0)
        asked.append(flight.step.spans[0].scored_token_ids)
        scheduler.apply(scored_answer(flight))
    assert asked == [[], [14, 15, 16], []]
    assert session.scores_are_complete


def test_a_token_without_all_of_its_prompts_scores_is_drawn_again():
    scheduler = a_scheduler(step_tokens=4)
    session = a_scored_session()
    scheduler.add(session)
    lost, last = scheduler.next_step(0), scheduler.next_step(0)
    _, tokens, fatal = scheduler.apply(scored_answer(last))
    assert (tokens, fatal, session.epoch) == ([], [], 2)
    assert scheduler.apply(scored_answer(lost))[1] == []
    scheduler.apply(scored_answer(scheduler.next_step(0)))
    _, ((_, token),), _ = scheduler.apply(scored_answer(scheduler.next_step(0)))
    assert (token.token_id, session.scores_are_complete) == (7, True)


def test_scores_that_never_come_end_the_session_and_not_the_patience():
    scheduler = a_scheduler(step_tokens=100)
    scheduler.add(a_scored_session())
    for _ in range(MAXIMUM_REPLAYS):
        assert scheduler.apply(answer(scheduler.next_step(0)))[2] == []
    ((session, refused),) = scheduler.apply(answer(scheduler.next_step(0)))[2]
    assert (session.session_id, refused.reason) == ("a", "scores_lost")


def test_a_session_that_asks_for_no_token_ends_with_its_prompt():
    scheduler = a_scheduler(step_tokens=4)
    session = a_scored_session(new=0)
    scheduler.add(session)
    flights = [scheduler.next_step(0), scheduler.next_step(0)]
    assert [flight.step.spans[0].sampling for flight in flights] == [None, None]
    assert scheduler.apply(scored_answer(flights[0]))[1] == []
    assert scheduler.apply(scored_answer(flights[1]))[1] == [(session, None)]
    assert session.finished
    assert scheduler.next_step(0) is None
    assert session.token_ids == list(range(10, 17))


def test_a_session_that_gets_nowhere_is_given_up_and_not_tried_for_ever():
    scheduler = a_scheduler()
    scheduler.add(a_session())
    for _ in range(MAXIMUM_REPLAYS):
        assert scheduler.apply(refusal(scheduler.next_step(0), "position_gap"))[2] == []
    assert len(scheduler.apply(refusal(scheduler.next_step(0), "position_gap"))[2]) == 1


def test_a_step_that_does_not_come_back_in_time_is_replayed():
    scheduler = a_scheduler()
    scheduler.add(a_session())
    flight = scheduler.next_step(0.0)
    assert scheduler.overdue(flight.deadline - 0.1) == []
    assert scheduler.steps_in_flight == 1
    assert scheduler.overdue(flight.deadline) == []
    assert scheduler.next_step(0).step.spans[0].session_epoch == 2


def test_a_lost_step_of_a_session_whose_time_is_over_is_not_replayed():
    scheduler = a_scheduler(stages=1, step_tokens=100)
    for name in "ab":
        scheduler.add(a_session(name))
    flight = scheduler.next_step(0.0)
    assert [session.session_id for session in scheduler.overdue(flight.deadline, {"b"})] == ["b"]
    assert [span.session_epoch for span in scheduler.next_step(0).step.spans] == [2]


def test_a_removed_session_does_not_hold_its_step_back():
    scheduler = a_scheduler(stages=1, step_tokens=100)
    for name in "ab":
        scheduler.add(a_session(name))
    flight = scheduler.next_step(0)
    scheduler.remove("a")
    assert scheduler.steps_in_flight == 1
    scheduler.apply(answer(flight))
    assert scheduler.steps_in_flight == 0


def test_after_a_cut_the_same_steps_go_again_in_their_order():
    scheduler = a_scheduler(step_tokens=3)
    scheduler.add(a_session(prompt=6))
    flights = [scheduler.next_step(0), scheduler.next_step(0)]
    assert scheduler.to_send_again(5.0) == flights
    assert all(flight.sent_at == 5.0 for flight in flights)


def test_in_a_random_life_no_token_is_lost_or_doubled():
    """Random answers, partial answers, refusals, lost steps, replays and cancellations: each session still gets
    exactly its tokens in order, each the successor of what was known."""
    chance = random.Random(11)
    scheduler = a_scheduler(stages=3, step_tokens=16, maximum_running=5)
    sessions = [a_session(f"s{i}", chance.randrange(1, 20), chance.randrange(1, 9), ()) for i in range(30)]
    for session in sessions:
        scheduler.add(session)
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
            for session, token in tokens:
                assert token.token_id == 1000 + len(session.token_ids) - 1
                if token.finish_reason:
                    finished.add(session.session_id)
                    scheduler.remove(session.session_id)
        if chance.random() < 0.004:
            scheduler.replay_all()
            for session in scheduler.running:
                session.replays = 0
        if chance.random() < 0.01:
            for session in scheduler.overdue(now + 100):
                session.replays = 0
        if len(finished) == len(sessions):
            break
    assert len(finished) == len(sessions)
    for session in sessions:
        generated = session.token_ids[session.prompt_length :]
        assert generated == [1000 + position for position in range(session.prompt_length, len(session.token_ids))]
        assert len(generated) == session.request.max_new_tokens
    assert scheduler.steps_in_flight == 0


def test_a_prompt_is_cut_so_that_every_stage_computes_at_once():
    scheduler = a_scheduler(step_tokens=512)
    scheduler.add(a_session(prompt=200))
    flights = [scheduler.next_step(0), scheduler.next_step(0)]
    counts = [flight.step.spans[0].token_count for flight in flights]
    assert counts[0] == pytest.approx(counts[1], abs=2)
    assert counts[0] < 100
    assert [flight.step.spans[0].sampling for flight in flights] == [None, None]


# room


def decoded(scheduler, count, token_id=7, now=0.0):
    """Let steps come back until so many tokens have come."""
    tokens = []
    while len(tokens) < count:
        tokens += scheduler.apply(answer(scheduler.next_step(now), token_id))[1]
    return tokens


def test_when_room_runs_out_the_youngest_gives_way_and_comes_back_with_all_its_tokens():
    scheduler = a_scheduler(stages=1, step_tokens=100, kv_tokens=60)
    old, young = a_session("old", prompt=10, new=30, end=()), a_session("young", prompt=10, new=30, end=())
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
    assert young.replays == 0  # that others needed its room is not its fault


def test_a_lower_priority_gives_way_before_a_younger_one():
    scheduler = a_scheduler(stages=1, step_tokens=100, kv_tokens=60)
    first, second = a_session("first", 10, 30, (), priority=5), a_session("second", 10, 30, ())
    scheduler.add(first)
    scheduler.next_step(0)
    scheduler.replay_all()
    scheduler.add(second)
    while scheduler.counts.preemptions == 0:
        scheduler.apply(answer(scheduler.next_step(0)))
    assert [session.session_id for session in scheduler.running] == ["second"]


def test_however_little_room_there_is_all_sessions_end_and_hold_no_more_than_it():
    chance = random.Random(5)
    scheduler = a_scheduler(stages=2, step_tokens=16, kv_tokens=48, maximum_running=8)
    sessions = [a_session(f"s{i}", chance.randrange(1, 20), chance.randrange(1, 25), ()) for i in range(24)]
    for session in sessions:
        scheduler.add(session)
    stage = {}  # what one stage holds: rows by session
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
            for session, token in scheduler.apply(answer(flights.pop(0)))[1]:
                if token.finish_reason:
                    ended += 1
                    for name in scheduler.remove(session.session_id, keep_rows=chance.random() < 0.5):
                        stage.pop(name, None)
        if ended == len(sessions):
            break
    assert ended == len(sessions)
    assert scheduler.counts.preemptions > 0
    assert set(stage) == set(scheduler.held_ids)


# rows of others


def test_a_prompt_that_begins_like_an_ended_one_copies_its_rows():
    scheduler = a_scheduler(stages=1, step_tokens=100)
    scheduler.add(a_session("first", prompt=40, new=2, end=()))
    decoded(scheduler, 2)
    assert scheduler.remove("first", keep_rows=True) == []
    assert scheduler.held_ids == ["first"]
    second = a_session("second", prompt=60, new=1)
    scheduler.add(second)
    span = scheduler.next_step(0).step.spans[0]
    assert (span.first_position, span.token_count) == (40, 20)
    assert (span.prefix.session_id, span.prefix.session_epoch, span.prefix.token_count) == ("first", 1, 40)
    assert (scheduler.counts.prompt_tokens, scheduler.counts.reused_tokens) == (100, 40)


def test_a_prompt_that_is_wholly_there_still_computes_its_last_token():
    scheduler = a_scheduler(stages=1, step_tokens=100)
    scheduler.add(a_session("first", prompt=40, new=2, end=()))
    decoded(scheduler, 2)
    scheduler.remove("first", keep_rows=True)
    scheduler.add(a_session("second", prompt=40, new=1))
    span = scheduler.next_step(0).step.spans[0]
    assert (span.first_position, span.token_count, span.prefix.token_count) == (39, 1, 39)
    assert span.sampling is not None


def test_rows_of_a_session_that_still_runs_are_copied_too():
    scheduler = a_scheduler(stages=1, step_tokens=100)
    scheduler.add(a_session("first", prompt=40, new=20, end=()))
    scheduler.apply(answer(scheduler.next_step(0)))
    scheduler.add(a_session("second", prompt=50, new=1))
    spans = {span.session_id: span for span in scheduler.next_step(0).step.spans}
    assert spans["second"].prefix.token_count == 40


def test_a_chats_next_turn_makes_the_turn_before_redundant():
    scheduler = a_scheduler(stages=1, step_tokens=100)
    scheduler.add(a_session("first", prompt=40, new=2, end=()))
    decoded(scheduler, 2)
    scheduler.remove("first", keep_rows=True)
    second = a_session("second", prompt=41, new=2, end=())
    second.token_ids[40] = 7  # what the first one answered
    scheduler.add(second)
    decoded(scheduler, 2)
    assert scheduler.remove("second", keep_rows=True) == ["first"]
    assert scheduler.held_ids == ["second"]


def test_kept_rows_give_way_before_any_session_does():
    scheduler = a_scheduler(stages=1, step_tokens=100, kv_tokens=80)
    scheduler.add(a_session("first", prompt=40, new=2, end=()))
    decoded(scheduler, 2)
    scheduler.remove("first", keep_rows=True)
    other = a_session("other", prompt=60, new=2)
    other.token_ids = list(range(100, 160))
    scheduler.add(other)
    flight = scheduler.next_step(0)
    assert [each.session_id for each in flight.step.released] == ["first"]
    assert (scheduler.kept_rows, scheduler.counts.preemptions) == (0, 0)


def test_prompts_whose_log_probabilities_are_wanted_are_computed_whole():
    scheduler = a_scheduler(stages=1, step_tokens=100)
    scheduler.add(a_session("first", prompt=40, new=2, end=()))
    decoded(scheduler, 2)
    scheduler.remove("first", keep_rows=True)
    second = a_session("second", prompt=60, new=1)
    second.scores = [None] * 59
    scheduler.add(second)
    span = scheduler.next_step(0).step.spans[0]
    assert (span.first_position, span.prefix) == (0, None)


def test_rows_that_are_gone_on_some_stage_are_computed_anew():
    scheduler = a_scheduler(stages=1, step_tokens=100)
    scheduler.add(a_session("first", prompt=40, new=2, end=()))
    decoded(scheduler, 2)
    scheduler.remove("first", keep_rows=True)
    scheduler.add(a_session("second", prompt=60, new=1))
    flight = scheduler.next_step(0)
    scheduler.replay_all()
    assert scheduler.held_ids == ["second"]
    span = scheduler.next_step(0).step.spans[0]
    assert (span.session_epoch, span.first_position, span.prefix) == (2, 0, None)
    assert scheduler.apply(answer(flight)) == (None, [], [])


def test_a_stage_that_lost_the_rows_to_copy_says_so_and_the_session_begins_anew():
    scheduler = a_scheduler(stages=1, step_tokens=100)
    scheduler.add(a_session("first", prompt=40, new=2, end=()))
    decoded(scheduler, 2)
    scheduler.remove("first", keep_rows=True)
    scheduler.add(a_session("second", prompt=60, new=1))
    assert scheduler.apply(refusal(scheduler.next_step(0), "prefix_lost"))[2] == []
    step = scheduler.next_step(0).step
    assert (step.spans[0].session_epoch, step.spans[0].first_position, step.spans[0].prefix) == (2, 0, None)
    assert "first" in [each.session_id for each in step.released]


def test_sessions_of_another_salt_copy_nothing():
    scheduler = a_scheduler(stages=1, step_tokens=100)
    scheduler.add(a_session("first", prompt=40, new=2, end=()))
    decoded(scheduler, 2)
    scheduler.remove("first", keep_rows=True)
    scheduler.add(a_session("second", prompt=60, new=1, cache_salt="of its own"))
    assert scheduler.next_step(0).step.spans[0].prefix is None
