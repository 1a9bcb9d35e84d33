"""Activations in the outbox: bounded, freed when delivered, and their fate remembered."""

import threading
import time

import pytest

from noodle.errors import Gone, NotFound
from services.stage.transport import outbox as outbox_module
from services.stage.transport.outbox import Outbox

BODY = bytes(range(256)) * 4096  # several pieces


def test_a_body_is_delivered_whole_and_then_gone():
    box = Outbox()
    name = box.put(memoryview(BODY))
    assert box.held_bytes == len(BODY)
    assert b"".join(box.deliver(name, box.body(name), lambda: True)) == BODY
    assert box.held_bytes == 0
    with pytest.raises(Gone, match="already fetched"):
        box.body(name)


@pytest.mark.parametrize("pieces", [0, 1, 4])
def test_a_transfer_that_was_cut_does_not_count(pieces):
    box = Outbox()
    name = box.put(BODY)
    delivery = box.deliver(name, box.body(name), lambda: False)
    for _ in range(pieces):
        next(delivery)
    delivery.close()
    assert box.body(name) == BODY


def test_a_transfer_that_nobody_confirmed_does_not_count():
    box = Outbox()
    name = box.put(BODY)
    assert b"".join(box.deliver(name, box.body(name), lambda: False)) == BODY
    assert box.body(name) == BODY


def test_what_nobody_fetches_expires():
    box = Outbox(activation_seconds=0.05)
    name = box.put(BODY)
    time.sleep(0.06)
    assert box.held_bytes == 0
    with pytest.raises(Gone, match="expired"):
        box.body(name)


def test_what_was_never_there_is_not_found():
    with pytest.raises(NotFound):
        Outbox().body("0" * 32)


def test_a_full_outbox_blocks_until_something_is_fetched():
    box = Outbox(maximum_bytes=2 * len(BODY), full_seconds=10)
    first = box.put(BODY)
    box.put(BODY)
    assert box.put(BODY, wait=False) is None
    timer = threading.Timer(0.1, box.discard, [first, "already fetched"])
    timer.start()
    assert box.put(BODY) is not None
    timer.join()
    assert box.held_bytes == 2 * len(BODY)


def test_a_full_outbox_drops_after_its_time_and_what_expires_makes_room():
    assert_dropped = Outbox(maximum_bytes=len(BODY), full_seconds=0.05)
    assert_dropped.put(BODY)
    assert assert_dropped.put(BODY) is None
    expiring = Outbox(maximum_bytes=len(BODY), full_seconds=10, activation_seconds=0.05)
    expiring.put(BODY)
    assert expiring.put(BODY) is not None


def test_one_body_always_fits_and_the_next_does_not():
    box = Outbox(maximum_bytes=10, full_seconds=0)
    assert box.put(BODY) is not None
    assert box.put(b"x") is None


def test_a_new_plan_frees_everything():
    box = Outbox()
    names = [box.put(BODY) for _ in range(3)]
    box.clear()
    assert box.held_bytes == 0
    with pytest.raises(Gone, match="older plan"):
        box.body(names[0])


def test_a_bounded_number_of_past_ids_is_remembered(monkeypatch):
    monkeypatch.setattr(outbox_module, "PAST_ACTIVATIONS", 2)
    box = Outbox()
    names = [box.put(b"x") for _ in range(3)]
    box.clear()
    with pytest.raises(NotFound):
        box.body(names[0])
    with pytest.raises(Gone):
        box.body(names[2])
