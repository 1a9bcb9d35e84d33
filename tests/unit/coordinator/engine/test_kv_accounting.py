"""The KV rows that the coordinator counts, and the rows of ended sequences."""

from services.coordinator.engine.kv_accounting import (
    MAXIMUM_KEPT_SESSIONS,
    MINIMUM_PREFIX_TOKENS,
    KvAccounting,
    common_prefix_length,
)
from tests.support.sequences import a_sequence, plan_limits


def limits(kv_tokens, reserved=None):
    return plan_limits(kv_tokens=kv_tokens, reserved_kv_tokens=reserved)


def test_the_common_prefix_is_found_at_every_length():
    left = list(range(100))
    for equal in (0, 1, 7, 16, 17, 63, 64, 99, 100):
        right = left[:equal] + [-1] * (100 - equal)
        assert common_prefix_length(left, right, 100) == equal
        assert common_prefix_length(left, right, 50) == min(equal, 50)
    assert common_prefix_length(left, left[:20] + [-1] * 80, 100, least=21) == 0


def test_held_rows_and_reservations_are_counted_separately():
    accounting = KvAccounting()
    a, b = a_sequence("a", range(10)), a_sequence("b", range(10))
    assert accounting.fits(a, 10, limits(15))
    accounting.hold(a, 10)
    accounting.hold(a, 6)  # computed again
    assert accounting.rows == 10
    assert not accounting.fits(b, 6, limits(15))
    assert accounting.fits(b, 5, limits(15))
    assert not accounting.fits(b, 5, limits(15, reserved=27))
    assert accounting.fits(a, 11, limits(15, reserved=14))
    accounting.forget("a")
    assert (accounting.rows, accounting.take_released()) == (0, [])


def test_a_released_session_is_returned_once_with_its_epoch():
    accounting = KvAccounting()
    a = a_sequence("a", range(10))
    accounting.hold(a, 10)
    accounting.release("a", 3)
    accounting.release("a", 3)
    assert [(each.session_id, each.session_epoch) for each in accounting.take_released()] == [("a", 3)]
    assert accounting.take_released() == []


def kept(accounting, name, token_ids):
    session = a_sequence(name, token_ids)
    accounting.hold(session, len(token_ids))
    return accounting.keep(session)


def test_the_longest_prefix_is_reused_and_the_longest_unused_session_is_freed_first():
    accounting = KvAccounting()
    kept(accounting, "short", [*range(20), 99])
    kept(accounting, "long", [*range(40), 98])
    found = accounting.prefix_for(a_sequence("new", range(60)), [])
    assert (found.session_id, found.token_count) == ("long", 40)
    found = accounting.prefix_for(a_sequence("new", [*range(20), 99, 97]), [])
    assert (found.session_id, found.token_count) == ("short", 21)
    assert accounting.give_up_kept(())
    assert list(accounting.kept) == ["short"]
    assert not accounting.give_up_kept({"short"})


def test_a_prefix_too_short_to_copy_is_computed():
    accounting = KvAccounting()
    kept(accounting, "other", [*range(MINIMUM_PREFIX_TOKENS - 1), 99])
    assert accounting.prefix_for(a_sequence("new", range(60)), []) is None


def test_the_number_of_kept_sessions_is_bounded():
    accounting = KvAccounting()
    gone = []
    for number in range(MAXIMUM_KEPT_SESSIONS + 3):
        gone += kept(accounting, f"s{number}", range(number * 100, number * 100 + 20))
    assert gone == ["s0", "s1", "s2"]
    assert accounting.rows == MAXIMUM_KEPT_SESSIONS * 20
