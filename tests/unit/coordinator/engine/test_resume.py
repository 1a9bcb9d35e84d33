"""Requests that can be taken up: how many may read at once, whose they are, and how long they stay."""

import pytest

from noodle.errors import Conflict, NotFound, TooManyRequests
from noodle.wire.messages import SamplingParameters
from services.coordinator.engine import resume
from services.coordinator.engine.request import (
    FINISHED,
    Client,
    Generation,
    GenerationRequest,
    Idempotency,
    Token,
    record_of,
)
from services.coordinator.engine.resume import KeptRequests

ALICE, BOB = Client("alice"), Client("bob")


def keep(requests, name, *, client=ALICE, key="", digest="", resume_seconds=60.0):
    idempotency = Idempotency(key, digest)
    request = GenerationRequest(
        [1, 2], 5, SamplingParameters(), frozenset(), client=client, request_id=name, resume_seconds=resume_seconds,
        idempotency=idempotency,
    )  # fmt: skip
    generation = Generation(f"{name}-session", lambda _: None, lambda _: None, resume_seconds)
    return requests.add(record_of(f"{name}-session", request), generation)


def test_no_more_read_at_once_than_there_are_threads_for():
    requests = KeptRequests(3)
    one, two = keep(requests, "one"), keep(requests, "two")
    readers = [requests.open_reader(kept) for kept in (one, one, two)]
    with pytest.raises(TooManyRequests, match="3 clients read") as refused:
        requests.open_reader(two)
    assert refused.value.retry_after_seconds
    with pytest.raises(TooManyRequests):
        requests.refuse_a_crowd()
    readers[0].cancel()
    requests.open_reader(two)


def test_a_request_is_found_by_the_key_that_made_it_alone():
    requests = KeptRequests(3)
    kept = keep(requests, "one")
    assert requests.find(ALICE, "one") is requests.find(ALICE, "one-session") is kept
    with pytest.raises(NotFound):
        requests.find(BOB, "one")


def test_the_same_idempotency_key_with_another_body_is_a_conflict_and_of_another_client_unknown():
    requests = KeptRequests(3)
    kept = keep(requests, "one", key="k", digest="a")
    assert requests.joined(ALICE, Idempotency("k", "a")) is kept
    assert requests.joined(BOB, Idempotency("k", "b")) is None
    with pytest.raises(Conflict):
        requests.joined(ALICE, Idempotency("k", "b"))


def test_what_has_ended_goes_when_the_kept_bytes_are_too_many_and_what_is_open_stays(monkeypatch):
    requests = KeptRequests(3)
    kept = [keep(requests, str(number)) for number in range(3)]
    for each in kept[:2]:
        each.generation.put(Token(1, None, "length"))
        each.generation.end(FINISHED)
    monkeypatch.setattr(resume, "KEPT_BYTES", kept[1].bytes + kept[2].bytes)
    with pytest.raises(NotFound):
        requests.find(ALICE, "0")
    assert requests.find(ALICE, "1") is kept[1]
    monkeypatch.setattr(resume, "KEPT_BYTES", 0)
    with pytest.raises(NotFound):
        requests.find(ALICE, "1")
    assert requests.find(ALICE, "2") is kept[2]
