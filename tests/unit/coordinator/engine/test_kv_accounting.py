"""The coordinator's books of KV rows, and the rows of ended sessions."""

from services.coordinator.engine.kv_accounting import (
    MAXIMUM_KEPT_SESSIONS,
    MINIMUM_PREFIX_TOKENS,
    KvAccounting,
    common_prefix_length,
)
from tests.support.sequences import a_sequence, plan_limits


def limits(kv_tokens, reserved=None):
    return plan_limits(kv_tokens=kv_tokens, reserved_kv_tokens=reserved)


def test_the_common_beginning_is_found_at_every_length():
    left = list(range(100))
    for equal in (0, 1, 7, 16, 17, 63, 64, 99, 100):
        right = left[:equal] + [-1] * (100 - equal)
        assert common_prefix_length(left, right, 100) == equal
        assert common_prefix_length(left, right, 50) == min(equal, 50)
    assert common_prefix_length(left, left[:20] + [-1] * 80, 100, least=21) == 0


def test_rows_count_as_they_are_held_and_reservations_beside_them():
    books = KvAccounting()
    a, b = a_sequence("a", range(10)), a_sequence("b", range(10))
    assert books.fits(a, 10, limits(15))
    books.hold(a, 10)
    books.hold(a, 6)  # computed again
    assert books.rows == 10
    assert not books.fits(b, 6, limits(15))
    assert books.fits(b, 5, limits(15))
    assert not books.fits(b, 5, limits(15, reserved=27))
    assert books.fits(a, 11, limits(15, reserved=14))
    books.forget("a")
    assert (books.rows, books.take_released()) == (0, [])


def test_what_is_released_is_told_once_with_its_epoch():
    books = KvAccounting()
    a = a_sequence("a", range(10))
    books.hold(a, 10)
    books.release("a", 3)
    books.release("a", 3)
    assert [(each.session_id, each.session_epoch) for each in books.take_released()] == [("a", 3)]
    assert books.take_released() == []


def kept(books, name, token_ids):
    session = a_sequence(name, token_ids)
    books.hold(session, len(token_ids))
    return books.keep(session)


def test_the_longest_beginning_is_taken_and_the_longest_unused_given_up_first():
    books = KvAccounting()
    kept(books, "short", [*range(20), 99])
    kept(books, "long", [*range(40), 98])
    found = books.prefix_for(a_sequence("new", range(60)), [])
    assert (found.session_id, found.token_count) == ("long", 40)
    found = books.prefix_for(a_sequence("new", [*range(20), 99, 97]), [])
    assert (found.session_id, found.token_count) == ("short", 21)
    assert books.give_up_kept(())
    assert books.kept_ids == ["short"]
    assert not books.give_up_kept({"short"})


def test_a_beginning_too_short_to_be_worth_it_is_computed():
    books = KvAccounting()
    kept(books, "other", [*range(MINIMUM_PREFIX_TOKENS - 1), 99])
    assert books.prefix_for(a_sequence("new", range(60)), []) is None


def test_only_so_many_are_kept():
    books = KvAccounting()
    gone = []
    for number in range(MAXIMUM_KEPT_SESSIONS + 3):
        gone += kept(books, f"s{number}", range(number * 100, number * 100 + 20))
    assert gone == ["s0", "s1", "s2"]
    assert books.rows == MAXIMUM_KEPT_SESSIONS * 20
