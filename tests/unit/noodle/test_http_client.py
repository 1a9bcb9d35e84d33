"""One HTTP client for all processes: bounded answers, named timeouts, errors in words."""

import pytest

from noodle.http_client import HTTP_ERRORS, AnswerTooLarge, message_of, reason_of, request
from tests.support.network.http_stand_in import http_stand_in
from tests.support.processes.cluster import free_ports


def get(url, **options):
    defaults = {"connect_seconds": 2.0, "answer_seconds": 2.0, "maximum_bytes": 1000}
    return request("GET", url, **{**defaults, **options})


def test_a_request_carries_its_token_and_reads_the_whole_answer():
    with http_stand_in() as stand_in:
        stand_in.answer("/health", {"status": "ready"}, status=503)
        answer = get(f"{stand_in.url}/health", token="secret")
        assert (answer.status, answer.body) == (503, b'{"status": "ready"}')
        assert stand_in.asked[0].authorization == "Bearer secret"


def test_a_proxy_of_the_environment_is_not_used(monkeypatch):
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_ports(1)[0]}")
    with http_stand_in() as stand_in:
        stand_in.answer("/health", {})
        assert get(f"{stand_in.url}/health").status == 200


def test_a_larger_answer_than_accepted_is_refused():
    with http_stand_in() as stand_in:
        stand_in.answer("/health", "x" * 101)
        with pytest.raises(AnswerTooLarge, match="more than 100 bytes"):
            get(f"{stand_in.url}/health", maximum_bytes=100)


def test_a_process_that_is_not_there_is_an_error_with_a_reason():
    with pytest.raises(HTTP_ERRORS) as caught:
        get(f"http://127.0.0.1:{free_ports(1)[0]}/health")
    assert reason_of(caught.value) == "Connection refused"
    assert reason_of(TimeoutError()) == "TimeoutError"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error": {"message": "No room."}}', "No room."),
        (b'{"error": "No room."}', '{"error": "No room."}'),
        (b"[]", "[]"),
        (b"\xff" + b"x" * 500, "\N{REPLACEMENT CHARACTER}" + "x" * 199),
    ],
)
def test_a_refusal_is_shown_by_its_message_or_its_first_characters(body, message):
    assert message_of(body) == message
