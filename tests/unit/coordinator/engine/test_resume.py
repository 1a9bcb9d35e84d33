"""Requests that can be resumed: how many may read at once, who owns them, and how long they are kept."""

import pytest

from noodle.errors import Conflict, NotFound, TooManyRequests
from services.coordinator.engine import resume
from services.coordinator.engine.request import FINISHED, Client, RequestStream, Token
from services.coordinator.engine.resume import KeptRequests
from tests.support.sequences import a_request

ALICE, BOB = Client("alice"), Client("bob")


def asked(name, *, client=ALICE, key="", digest="", resume_seconds=60.0):
    return a_request(
        f"{name}-session",
        client_request_id=name,
        client_name=client.name,
        resume_seconds=resume_seconds,
        idempotency_key=key,
        body_digest=digest,
    )


def keep(requests, name, **options):
    return requests.add(RequestStream(asked(name, **options), lambda _request_id, _outcome: None))


def test_no_more_read_at_once_than_there_are_threads_for():
    requests = KeptRequests(3)
    one, two = keep(requests, "one"), keep(requests, "two")
    readers = [requests.open_reader(kept) for kept in (one, one, two)]
    with pytest.raises(TooManyRequests, match="3 clients read") as refused:
        requests.open_reader(two)
    assert refused.value.retry_after_seconds
    with pytest.raises(TooManyRequests):
        requests.require_reader_place()
    readers[0].cancel()
    requests.open_reader(two)


def test_a_request_is_found_only_by_the_key_that_made_it():
    requests = KeptRequests(3)
    kept = keep(requests, "one")
    assert requests.find(ALICE, "one") is requests.find(ALICE, "one-session") is kept
    with pytest.raises(NotFound):
        requests.find(BOB, "one")


def test_the_same_idempotency_key_with_another_body_is_a_conflict_and_of_another_client_unknown():
    requests = KeptRequests(3)
    kept = keep(requests, "one", key="k", digest="a")
    assert requests.find_same(asked("two", key="k", digest="a")) is kept
    assert requests.find_same(asked("two", client=BOB, key="k", digest="b")) is None
    with pytest.raises(Conflict):
        requests.find_same(asked("two", key="k", digest="b"))


def test_ended_requests_are_dropped_at_the_limit_of_bytes_and_open_ones_stay(monkeypatch):
    requests = KeptRequests(3)
    kept = [keep(requests, str(number)) for number in range(3)]
    for each in kept[:2]:
        each.put(Token(1, None, "length"))
        each.end(FINISHED)
    monkeypatch.setattr(resume, "KEPT_BYTES", kept[1].kept_bytes + kept[2].kept_bytes)
    with pytest.raises(NotFound):
        requests.find(ALICE, "0")
    assert requests.find(ALICE, "1") is kept[1]
    monkeypatch.setattr(resume, "KEPT_BYTES", 0)
    with pytest.raises(NotFound):
        requests.find(ALICE, "1")
    assert requests.find(ALICE, "2") is kept[2]
