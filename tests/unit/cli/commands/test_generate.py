from __future__ import annotations

import io
from collections.abc import Iterator

import pytest

from noodle.errors import InvalidRequest, LinkLost, NoodleError
from services.cli.client.target import Target
from services.cli.commands.generate import _writer, stream_answer
from tests.support.network.http_stand_in import StandIn, http_stand_in


@pytest.fixture
def server() -> Iterator[StandIn]:
    with http_stand_in() as stand_in:
        stand_in.answer("/v1/models", {"data": [{"id": "a-model"}]})
        yield stand_in


def target(server: StandIn) -> Target:
    return Target(server.url, "a-key", "", None)


def chat_event(text: str) -> dict[str, object]:
    return {"choices": [{"delta": {"content": text}}], "usage": None}


def test_a_chat_streams_its_text(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    usage = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}
    server.stream("/v1/chat/completions", chat_event("Hel"), ": waiting\n\n", chat_event("lo"), usage)
    assert stream_answer(target(server), "Say hello", {"seed": 1}, raw=False) == 0
    assert capsys.readouterr().out == "Hello\n"
    asked = server.asked[-1]
    assert asked.authorization == "Bearer a-key"
    assert asked.body == {
        "model": "a-model",
        "stream": True,
        "stream_options": {"include_usage": True},
        "seed": 1,
        "messages": [{"role": "user", "content": "Say hello"}],
    }


def test_raw_text_is_gone_on_from_without_a_template(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    server.stream("/v1/completions", {"choices": [{"text": " three"}]})
    stream_answer(target(server), "one, two,", {}, raw=True)
    assert capsys.readouterr().out == " three\n"
    assert server.asked[-1].body["prompt"] == "one, two,"


def test_an_error_in_the_stream_is_raised_after_the_text_before_it(
    server: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    server.stream("/v1/chat/completions", chat_event("Hel"), {"error": {"message": "Stage 1 is gone."}})
    with pytest.raises(NoodleError, match=r"Stage 1 is gone\."):
        stream_answer(target(server), "Say hello", {}, raw=False)
    assert capsys.readouterr().out == "Hel\n"


def test_a_stream_without_its_end_is_not_taken_for_an_answer(server: StandIn) -> None:
    server.stream("/v1/chat/completions", chat_event("Hel"), end="")
    with pytest.raises(LinkLost):
        stream_answer(target(server), "Say hello", {}, raw=False)


def test_a_refused_prompt_prints_nothing(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    server.answer("/v1/chat/completions", {"error": {"message": "No."}}, 400)
    with pytest.raises(NoodleError):
        stream_answer(target(server), "Say hello", {}, raw=False)
    assert capsys.readouterr().out == ""


def test_an_empty_prompt_is_not_sent(server: StandIn) -> None:
    with pytest.raises(InvalidRequest):
        stream_answer(target(server), "", {}, raw=False)
    assert not server.asked


def test_a_model_cannot_steer_the_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    _writer(terminal)("a\x1b]0;title\x07\tb\n")
    assert terminal.getvalue() == "a\ufffd]0;title\ufffd\tb\n"
    pipe = io.StringIO()
    _writer(pipe)("a\x1bb")
    assert pipe.getvalue() == "a\x1bb"
