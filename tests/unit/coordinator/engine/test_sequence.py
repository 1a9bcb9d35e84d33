"""The order in which waiting sequences are admitted."""

from services.coordinator.engine.sequence import WaitingQueue
from tests.support.sequences import a_sequence


def queue_of(*entries):
    waiting = WaitingQueue()
    for name, client, priority in entries:
        waiting.add(a_sequence(name, client_name=client, priority=priority))
    return waiting


def order_of(waiting):
    """The order of admission if no sequence ends."""
    running, names = {}, []
    while (sequence := waiting.next(running)) is not None:
        waiting.remove(sequence.session_id)
        client = sequence.request.client_name
        running[client] = running.get(client, 0) + 1
        names.append(sequence.session_id)
    return names


def test_clients_take_turns_and_their_own_requests_keep_their_order():
    assert order_of(queue_of(("a1", "a", 0), ("a2", "a", 0), ("a3", "a", 0), ("b1", "b", 0))) == [
        "a1",
        "b1",
        "a2",
        "a3",
    ]


def test_a_lower_priority_number_goes_before_all_others():
    assert order_of(queue_of(("a1", "a", 0), ("a2", "a", -1), ("b1", "b", 3))) == ["a2", "a1", "b1"]


def test_a_sequence_that_lost_its_place_returns_to_its_old_one():
    waiting = queue_of(("a1", "a", 0), ("a2", "a", 0))
    first = waiting.next({})
    waiting.remove(first.session_id)
    waiting.add(first)
    assert [sequence.session_id for sequence in waiting] == ["a1", "a2"]
    waiting.remove("a1")
    waiting.remove("a1")  # harmless where it no longer waits
    assert [sequence.session_id for sequence in waiting] == ["a2"]
