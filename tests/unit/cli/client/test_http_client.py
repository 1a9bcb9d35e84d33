from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from noodle.errors import LinkLost, NoodleError, NotAuthenticated, NotReady, RequestTimedOut
from services.cli.client import http_client
from services.cli.client.http_client import get_json, post_for_events, post_json
from tests.support.network.http_stand_in import StandIn, http_stand_in


@pytest.fixture
def server() -> Iterator[StandIn]:
    with http_stand_in() as stand_in:
        yield stand_in


def test_json_goes_there_and_back_with_the_key(server: StandIn) -> None:
    server.answer("/generate", {"generated_text": "ä"})
    assert post_json(f"{server.url}/generate", {"inputs": "ö"}, "a-key") == {"generated_text": "ä"}
    asked = server.asked[0]
    assert (asked.method, asked.authorization, asked.body) == ("POST", "Bearer a-key", {"inputs": "ö"})


def test_nothing_there_says_how_to_start_it() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # bound, but not listening
        with pytest.raises(NotReady) as refused:
            get_json(f"http://127.0.0.1:{free.getsockname()[1]}/health")
    assert "noodle up" in refused.value.cure


def test_a_refusal_is_said_in_the_servers_words(server: StandIn) -> None:
    server.answer("/generate", {"error": {"message": "The prompt is too long."}}, 400)
    with pytest.raises(NoodleError) as refused:
        post_json(f"{server.url}/generate", {})
    assert refused.value.message == "The prompt is too long."


def test_a_wrong_key_says_where_to_give_one(server: StandIn) -> None:
    server.answer("/generate", {"error": {"message": "The key is wrong."}}, 401)
    with pytest.raises(NotAuthenticated) as refused:
        post_json(f"{server.url}/generate", {})
    assert "--key" in refused.value.cure


def test_a_cluster_that_is_not_ready_says_when_to_come_back(server: StandIn) -> None:
    server.answer("/generate", {"error": {"message": "Loading."}}, 503, {"Retry-After": "7"})
    with pytest.raises(NotReady) as refused:
        post_json(f"{server.url}/generate", {})
    assert "7 s" in refused.value.cure


def test_another_program_on_the_port_is_called_that(server: StandIn) -> None:
    server.answer("/health", "<html>")
    with pytest.raises(NoodleError) as refused:
        get_json(f"{server.url}/health")
    assert "another program" in refused.value.message


def test_a_url_that_is_none_is_refused() -> None:
    for url in ("192.168.1.101:8080/health", "https://example.com/health"):
        with pytest.raises(NoodleError, match="not an http:// URL"):
            get_json(url)


def test_silence_is_waited_for_only_so_long() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(RequestTimedOut):
        get_json(f"http://127.0.0.1:{silent.getsockname()[1]}/health", timeout_seconds=0.05)


def test_events_come_without_comments_and_with_all_their_lines(server: StandIn) -> None:
    server.stream("/stream", ": waiting\n\n", "data: one\ndata: more\n\n", "event: x\ndata:two\n\n")
    assert list(post_for_events(f"{server.url}/stream", {})) == ["one\nmore", "two", "[DONE]"]


def test_a_stream_that_breaks_off_in_an_event_is_an_error(server: StandIn) -> None:
    server.stream("/stream", "data: one\n\n", end="data: tw")
    events = post_for_events(f"{server.url}/stream", {})
    assert next(events) == "one"
    with pytest.raises(LinkLost):
        next(events)


def test_an_answer_without_end_is_not_taken_in(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_client, "MAXIMUM_ANSWER_BYTES", 100)
    server.answer("/health", "x" * 200)
    with pytest.raises(NoodleError, match="more than 100 bytes"):
        get_json(f"{server.url}/health")
