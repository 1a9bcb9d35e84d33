"""Clients that disconnect and resume, repeat a request, cancel it, or find a restarted coordinator."""

import contextlib
import http.client
import os
import signal

import pytest

from tests.integration.conftest import ALICE, BOB
from tests.support.clients.event_reader import EventReader
from tests.support.processes.cluster import request, wait_until

pytestmark = pytest.mark.timeout(300)
AS_ALICE = {"Authorization": f"Bearer {ALICE}"}
AS_BOB = {"Authorization": f"Bearer {BOB}"}
NEW_TOKENS = 200


@pytest.fixture(scope="module")
def cluster(keyed):
    return keyed


def asked(prompt, new_tokens=NEW_TOKENS, **parameters):
    return {"inputs": prompt, "parameters": {"max_new_tokens": new_tokens, "ignore_eos": True, **parameters}}


def whole(cluster, prompt, new_tokens=NEW_TOKENS):
    status, answer = cluster.post("/generate", asked(prompt, new_tokens), **AS_ALICE)
    assert status == 200, answer
    return answer["generated_text"]


def stream(cluster, body, **headers):
    return EventReader(cluster.port, "POST", "/generate_stream", body, **AS_ALICE, **headers)


def events_of(cluster, request_id, after, **headers):
    path = f"/v1/requests/{request_id}/events?after={after}"
    return EventReader(cluster.port, "GET", path, **(headers or AS_ALICE))


def status_of(cluster, request_id, **headers):
    return request(cluster.port, "GET", f"/v1/requests/{request_id}", **(headers or AS_ALICE))


def text_of(events):
    return "".join(event["token"]["text"] for _, event in events)


def test_a_client_that_comes_back_gets_the_rest_and_the_same_whenever_it_asks(cluster):
    expected = whole(cluster, "one")
    with stream(cluster, asked("one", resume_seconds=60)) as first:
        had = first.take(7)
    assert [event_id for event_id, _ in had] == [str(count) for count in range(1, 8)]
    with events_of(cluster, first.request_id, 7) as again:
        rest = list(again)
    assert text_of(had) + text_of(rest) == expected
    assert rest[-1][1]["generated_text"] == expected
    assert rest[0][0] == "8"
    with events_of(cluster, first.request_id, 7) as once_more:
        assert list(once_more) == rest
    with events_of(cluster, first.request_id, NEW_TOKENS) as nothing:
        assert list(nothing) == []
    assert status_of(cluster, first.request_id)[1]["status"] == "finished"


def test_a_request_that_cannot_be_resumed_ends_with_its_client(cluster):
    with stream(cluster, asked("two", 230)) as first:
        first.take(3)
    wait_until(lambda: status_of(cluster, first.request_id)[0] == 404, 15, "it is gone")
    wait_until(lambda: cluster.kv_bytes_held() == 0, 15, "its rows are free")


def test_the_same_key_with_the_same_body_is_the_same_request_and_with_another_none(cluster):
    body = asked("three", 30, temperature=1.0)
    first, second = (cluster.post("/generate", body, **AS_ALICE, Idempotency_Key="k1") for _ in range(2))
    assert first == second
    assert first[0] == 200
    status, answer = cluster.post("/generate", asked("other"), **AS_ALICE, Idempotency_Key="k1")
    assert (status, answer["error"]["code"]) == (409, "conflict")
    other = cluster.post("/generate", body, **AS_BOB, Idempotency_Key="k1")[1]
    assert other["details"]["seed"] != first[1]["details"]["seed"]
    chat = {"model": cluster.get("/v1/models", ALICE)[1]["data"][0]["id"], "max_tokens": 5,
            "messages": [{"role": "user", "content": "a"}]}  # fmt: skip
    answers = [cluster.post("/v1/chat/completions", chat, **AS_ALICE, Idempotency_Key="k2") for _ in range(2)]
    assert answers[0] == answers[1]


def test_two_readers_of_one_key_read_the_same_stream(cluster):
    body = asked("four", 100, temperature=1.0)
    with (
        stream(cluster, body, Idempotency_Key="k4") as first,
        stream(cluster, body, Idempotency_Key="k4") as second,
    ):
        assert list(first) == list(second)


def test_only_the_key_that_made_a_request_may_read_or_end_it(cluster):
    with stream(cluster, asked("five", 230, resume_seconds=30)) as first:
        first.take(1)
        assert status_of(cluster, first.request_id, **AS_BOB)[0] == 404
        assert request(cluster.port, "DELETE", f"/v1/requests/{first.request_id}", **AS_BOB)[0] == 404
        assert request(cluster.port, "GET", f"/v1/requests/{first.request_id}/events")[0] == 401
        assert status_of(cluster, first.request_id)[1]["status"] == "running"
        assert request(cluster.port, "DELETE", f"/v1/requests/{first.request_id}", **AS_ALICE)[0] == 200
        assert "cancelled" in list(first)[-1][1]["error"]["message"]
    wait_until(lambda: cluster.kv_bytes_held() == 0, 15, "its rows are free")


@pytest.mark.parametrize("after", ["-1", "a", "1.5", "999999999999", "150"])
def test_a_position_that_is_none_or_not_reached_is_refused(cluster, after):
    with stream(cluster, asked("six", 20, resume_seconds=5)) as first:
        list(first)
    status, answer = request(cluster.port, "GET", f"/v1/requests/{first.request_id}/events?after={after}", **AS_ALICE)
    assert (status, answer["error"]["param"]) == (400, "after")


def test_a_request_has_no_longer_than_it_gave_itself(cluster):
    with contextlib.ExitStack() as others:  # alone it may be done before the deadline is noticed
        for index in range(16):
            others.enter_context(stream(cluster, asked(f"beside {index}", 230)))
        status, answer = cluster.post("/generate", asked("seven", 230, timeout_seconds=0.001), **AS_ALICE)
    assert (status, answer["error"]["code"]) == (504, "timed_out")
    for wrong in (0, -1, "soon"):
        status, answer = cluster.post("/generate", asked("seven", timeout_seconds=wrong), **AS_ALICE)
        assert (status, answer["error"]["param"]) == (400, "timeout_seconds")
    status, answer = cluster.post("/generate", asked("seven", resume_seconds=301), **AS_ALICE)
    assert (status, answer["error"]["param"]) == (400, "resume_seconds")


@pytest.mark.parametrize("death", [signal.SIGKILL, signal.SIGTERM])
def test_a_coordinator_that_dies_loses_no_request(cluster, death):
    prompts = [f"{death.name} {index}" for index in range(3)]
    expected = [whole(cluster, prompt) for prompt in prompts]
    had = {}
    # a graceful stop may finish requests first: then only resumable ones are kept
    resumable = {"resume_seconds": 60} if death == signal.SIGTERM else {}
    streams = [stream(cluster, asked(prompt, **resumable), X_Request_Id=f"{death.name}-{index}")
               for index, prompt in enumerate(prompts)]  # fmt: skip
    for index, reader in enumerate(streams):
        had[index] = reader.take(4)
    os.kill(cluster.worker_pid("coordinator"), death)
    for reader in streams:
        reader.__exit__()

    def answers():
        try:
            statuses = [status_of(cluster, f"{death.name}-{index}")[0] for index in range(3)]
        except (OSError, http.client.HTTPException):
            return False
        assert 404 not in statuses, "a coordinator that does not know the records yet says that there is no such one"
        return statuses == [200] * 3

    wait_until(answers, 60, "the coordinator is back and has the requests")
    for index, text in enumerate(expected):
        with events_of(cluster, f"{death.name}-{index}", 4) as again:
            assert text_of(had[index]) + text_of(again) == text
    wait_until(lambda: cluster.kv_bytes_held() == 0, 30, "only what is kept on purpose is left")
