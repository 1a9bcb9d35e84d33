"""Whose turn it is."""

from noodle.wire.messages import SamplingParameters
from services.coordinator.engine.sequence import Session
from services.coordinator.engine.waiting_queue import WaitingQueue


def line_of(*entries):
    line = WaitingQueue()
    for name, client, priority in entries:
        session = Session(name, [1], 1, 1, SamplingParameters(), frozenset(), client_name=client, priority=priority)
        line.add(session)
    return line


def order_of(line):
    """Everybody gets a place, and keeps it."""
    running, names = {}, []
    while (session := line.next(running)) is not None:
        line.take(session)
        running[session.client_name] = running.get(session.client_name, 0) + 1
        names.append(session.session_id)
    return names


def test_clients_take_turns_and_within_one_the_first_goes_first():
    assert order_of(line_of(("a1", "a", 0), ("a2", "a", 0), ("a3", "a", 0), ("b1", "b", 0))) == ["a1", "b1", "a2", "a3"]


def test_a_lower_priority_number_goes_before_all_others():
    assert order_of(line_of(("a1", "a", 0), ("a2", "a", -1), ("b1", "b", 3))) == ["a2", "a1", "b1"]


def test_whoever_lost_its_place_stands_where_it_stood():
    line = line_of(("a1", "a", 0), ("a2", "a", 0))
    first = line.next({})
    line.take(first)
    line.put_back(first)
    assert [session.session_id for session in line] == ["a1", "a2"]
    assert line.remove("a1")
    assert not line.remove("a1")
    assert len(line) == 1
