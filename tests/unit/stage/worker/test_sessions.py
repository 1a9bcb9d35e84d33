from noodle.wire.messages import PrefixCopy, ReleasedSession, Step, StepSpan
from services.stage.worker.sessions import MAXIMUM_EARLY_SPANS, UNLISTED_SECONDS, SessionTable

ROW_BYTES = 4


def step_of(*spans, gap_seconds=5.0):
    return Step(1, 1, 1, "int32", [sum(span.token_count for span in spans)], list(spans), gap_seconds)


def span_of(session_id="a", epoch=1, first=0, count=1):
    return StepSpan(session_id, epoch, first, count, 100)


def admit(table, *spans, now=0.0, gap_seconds=5.0):
    step = step_of(*spans, gap_seconds=gap_seconds)
    body = memoryview(bytes(range(step.shape[0])) * ROW_BYTES)
    return table.admit(step, body, now)


def length(table, name):
    return table._sessions[name].length


def compute(table, *spans, now=0.0):
    admission = admit(table, *spans, now=now)
    assert admission.compute == list(spans)
    return table.computed(list(spans))


def test_spans_in_order_are_computed():
    table = SessionTable(0)
    compute(table, span_of(count=5))
    compute(table, span_of(first=5), span_of("b", count=3))
    assert (length(table, "a"), length(table, "b")) == (6, 3)


def test_an_older_epoch_is_dropped_and_counted():
    table = SessionTable(0)
    compute(table, span_of(epoch=2, count=4))
    admission = admit(table, span_of(epoch=1, first=4))
    assert admission.compute == []
    assert admission.outdated == 1
    assert length(table, "a") == 4


def test_a_newer_epoch_restarts_the_session():
    table = SessionTable(0)
    compute(table, span_of(epoch=1, count=4))
    newer = span_of(epoch=2, count=2)
    admission = admit(table, newer)
    assert admission.restarted == ["a"]
    assert admission.compute == [newer]


def test_rows_that_exist_are_computed_again_without_losing_the_later_ones():
    table = SessionTable(0)
    compute(table, span_of(count=10))
    compute(table, span_of(first=3, count=1))
    assert length(table, "a") == 10


def test_an_early_span_waits_until_the_gap_before_it_closes():
    table = SessionTable(0)
    compute(table, span_of(count=2))
    assert admit(table, span_of(first=5, count=2)).compute == []
    assert admit(table, span_of(first=4, count=1)).compute == []
    ready = compute(table, span_of(first=2, count=2))
    assert [early.step.spans[0].first_position for early in ready] == [4]
    assert [early.step.spans[0].first_position for early in table.computed([ready[0].step.spans[0]])] == [5]


def test_an_early_span_keeps_its_own_rows():
    table = SessionTable(0)
    step = step_of(span_of("b", count=1), span_of("a", first=3, count=2))
    table.admit(step, memoryview(b"AAAABBBBCCCC"), 0.0)
    ready = compute(table, span_of("a", count=3))
    assert bytes(ready[0].body) == b"BBBBCCCC"
    assert ready[0].step.shape == [2]


def test_a_gap_that_does_not_close_in_time_is_refused_by_name():
    table = SessionTable(3)
    admit(table, span_of(first=2), now=10.0, gap_seconds=4.0)
    assert table.expire(13.9) == []
    (gap,) = table.expire(14.0)
    assert (gap[1].reason, gap[1].stage_id, gap[1].first_position) == ("position_gap", 3, 2)


def test_early_spans_are_bounded():
    table = SessionTable(0)
    for index in range(MAXIMUM_EARLY_SPANS):
        assert admit(table, span_of(first=10 + index)).refusals == []
    assert admit(table, span_of(first=99)).refusals[0].reason == "too_many_early"


def test_a_session_that_is_missing_from_the_lists_for_long_is_freed():
    table = SessionTable(0)
    compute(table, span_of("a"), span_of("b"), now=0.0)
    assert table.listed(["a"], UNLISTED_SECONDS) == []
    assert table.listed(["a"], UNLISTED_SECONDS + 1) == ["b"]
    assert len(table) == 1


def test_silence_frees_nothing():
    table = SessionTable(0)
    compute(table, span_of("a"), now=0.0)
    assert table.listed(["a"], 100 * UNLISTED_SECONDS) == []
    assert table.expire(200 * UNLISTED_SECONDS) == []
    assert len(table) == 1


def test_a_released_session_is_forgotten_once():
    table = SessionTable(0)
    compute(table, span_of("a"))
    assert table.release(["a", "unknown"]) == ["a"]
    assert table.release(["a"]) == []


def test_an_authoritative_list_frees_all_other_sessions_at_once():
    table = SessionTable(0)
    compute(table, span_of("a"), span_of("b"), span_of("c"))
    assert sorted(table.release_all(but=["b", "unknown"])) == ["a", "c"]
    assert (len(table), length(table, "b")) == (1, 1)


def starting_with(donor, count, name="b", first=None, tokens=2, donor_epoch=1):
    first = count if first is None else first
    return StepSpan(name, 1, first, tokens, 100, prefix=PrefixCopy(donor, donor_epoch, count))


def test_a_session_begins_with_the_rows_of_another():
    table = SessionTable(0)
    compute(table, span_of(count=8))
    span = starting_with("a", 5)
    admission = admit(table, span)
    assert (admission.compute, admission.copies, length(table, "b")) == ([span], [span], 5)
    again = admit(table, span)  # the same step, sent again
    assert (again.compute, again.copies) == ([span], [])


def test_a_prefix_whose_rows_are_missing_is_refused_and_leaves_nothing():
    table = SessionTable(0)
    compute(table, span_of(count=4))
    for span in (starting_with("a", 5), starting_with("nobody", 3), starting_with("a", 3, donor_epoch=2)):
        admission = admit(table, span)
        assert [refusal.reason for refusal in admission.refusals] == ["prefix_lost"]
        assert (admission.compute, len(table)) == ([], 1)


def test_a_release_of_an_older_epoch_leaves_a_restarted_session():
    table = SessionTable(0)
    compute(table, span_of(epoch=2, count=4), span_of("b", count=1))
    old = [ReleasedSession("a", 1), ReleasedSession("b", 1), ReleasedSession("nobody", 9)]
    assert table.release_old(old) == ["b"]
    assert length(table, "a") == 4
