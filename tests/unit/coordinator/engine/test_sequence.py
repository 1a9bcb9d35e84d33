"""Whose turn it is."""

from services.coordinator.engine.sequence import WaitingQueue
from tests.support.sequences import a_sequence


def line_of(*entries):
    line = WaitingQueue()
    for name, client, priority in entries:
        line.add(a_sequence(name, client_name=client, priority=priority))
    return line


def order_of(line):
    """Everybody gets a place, and keeps it."""
    running, names = {}, []
    while (sequence := line.next(running)) is not None:
        line.remove(sequence.session_id)
        client = sequence.request.client_name
        running[client] = running.get(client, 0) + 1
        names.append(sequence.session_id)
    return names


def test_clients_take_turns_and_within_one_the_first_goes_first():
    assert order_of(line_of(("a1", "a", 0), ("a2", "a", 0), ("a3", "a", 0), ("b1", "b", 0))) == ["a1", "b1", "a2", "a3"]


def test_a_lower_priority_number_goes_before_all_others():
    assert order_of(line_of(("a1", "a", 0), ("a2", "a", -1), ("b1", "b", 3))) == ["a2", "a1", "b1"]


def test_whoever_lost_its_place_stands_where_it_stood():
    line = line_of(("a1", "a", 0), ("a2", "a", 0))
    first = line.next({})
    line.remove(first.session_id)
    line.add(first)
    assert [sequence.session_id for sequence in line] == ["a1", "a2"]
    assert line.remove("a1")
    assert not line.remove("a1")
    assert len(line) == 1
