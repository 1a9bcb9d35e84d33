"""Answers are what the official client's own types say, streamed ones included."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from openai._streaming import SSEDecoder
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from noodle.wire.messages import TokenLogprob
from services.coordinator.api.openai_stream import ChatWriter, CompletionWriter
from services.coordinator.api.sse import STREAM_END
from services.coordinator.engine.request import FinishReason, Request
from services.coordinator.text.answer import Part
from tests.unit.coordinator.api.answers import answer_to

REASONS: list[tuple[FinishReason, str]] = [("length", "length"), ("eos_token", "stop"), ("stop_sequence", "stop")]
SCORED = {"want_logprob": True, "top_logprobs": 2}


def writer(
    kind: type[CompletionWriter],
    reason: FinishReason = "length",
    *,
    complete: bool = False,
    texts: Sequence[str] = ("he", "llo"),
    echo: str | None = None,
    **asked: Any,
) -> CompletionWriter:
    request = Request(max_new_tokens=8, seed=-7, **asked)
    top = (TokenLogprob(1, -0.5), TokenLogprob(2, -1.0))
    parts = [Part(1, text, -0.5, None, top) for text in texts]
    return kind(answer_to(request, [*parts, Part(3, "", -1.5, reason)], complete=complete), "m", echo)


def whole(kind: type[CompletionWriter], reason: FinishReason = "length", **asked: Any) -> Any:
    return msgspec.to_builtins(writer(kind, reason, complete=True, **asked).whole())


def chunks(kind: type[CompletionWriter], reason: FinishReason = "length", **asked: Any) -> list[Any]:
    stream = b"".join(writer(kind, reason, stream=True, **asked).events())
    events = [event.data for event in SSEDecoder().iter_bytes(iter([stream]))]
    assert events[-1] == STREAM_END
    return [json.loads(event) for event in events[:-1]]


@pytest.mark.parametrize(("reason", "expected"), REASONS)
def test_a_chat_answer_is_one_the_client_reads(reason: FinishReason, expected: str) -> None:
    answer = ChatCompletion.model_validate(whole(ChatWriter, reason), strict=True)
    assert (answer.id, answer.model, answer.created) == ("chatcmpl-1", "m", 5)
    assert answer.choices[0].message.content == "hello"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == expected
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (4, 3, 7)
    assert answer.model_extra == {"seed": -7}


@pytest.mark.parametrize(("reason", "expected"), REASONS)
def test_a_completion_answer_is_one_the_client_reads(reason: FinishReason, expected: str) -> None:
    answer = Completion.model_validate(whole(CompletionWriter, reason), strict=True)
    assert answer.choices[0].text == "hello"
    assert answer.choices[0].finish_reason == expected
    assert answer.usage is not None
    assert answer.usage.total_tokens == 7
    assert answer.model_extra == {"seed": -7}
    assert whole(CompletionWriter, reason, echo="say: ")["choices"][0]["text"] == "say: hello"


def test_chat_chunks_tell_the_speaker_then_the_text_then_why_it_ended() -> None:
    sent = chunks(ChatWriter, "eos_token")
    assert all("usage" not in chunk for chunk in sent)
    read = [ChatCompletionChunk.model_validate(chunk, strict=True) for chunk in sent]
    assert [chunk.choices[0].delta.role for chunk in read] == ["assistant", None, None, None]
    assert [chunk.choices[0].delta.content for chunk in read] == ["", "he", "llo", None]
    assert [chunk.choices[0].finish_reason for chunk in read] == [None, None, None, "stop"]


@pytest.mark.parametrize(("kind", "model"), [(ChatWriter, ChatCompletionChunk), (CompletionWriter, Completion)])
def test_with_include_usage_the_others_carry_null_and_one_more_chunk_the_numbers(kind: Any, model: Any) -> None:
    *others, last = chunks(kind, include_usage=True)
    assert all(chunk["usage"] is None for chunk in others)
    read = model.model_validate(last, strict=True)
    assert read.choices == []
    assert read.usage.total_tokens == 7


def test_completion_chunks_are_text_and_in_the_end_a_reason() -> None:
    sent = chunks(CompletionWriter, "stop_sequence", echo="say: ")
    assert [chunk["choices"][0]["text"] for chunk in sent] == ["say: ", "he", "llo", ""]
    assert [chunk["choices"][0]["finish_reason"] for chunk in sent] == [None, None, None, "stop"]
    assert all("usage" not in chunk for chunk in sent)


def test_log_probabilities_come_in_each_formats_own_shape() -> None:
    chat = ChatCompletion.model_validate(whole(ChatWriter, **SCORED), strict=True).choices[0].logprobs
    assert chat is not None
    assert chat.content is not None
    assert [(each.token, each.logprob) for each in chat.content] == [("he", -0.5), ("he", -0.5), ("</s>", -1.5)]
    assert [each.token for each in chat.content[0].top_logprobs] == ["he", "llo"]
    completion = Completion.model_validate(whole(CompletionWriter, **SCORED), strict=True).choices[0].logprobs
    assert completion is not None
    assert completion.tokens == ["he", "he", "</s>"]
    assert completion.token_logprobs == [-0.5, -0.5, -1.5]
    assert completion.top_logprobs is not None
    assert completion.top_logprobs[2] == {"</s>": -1.5}
    assert all(chunk["choices"][0]["logprobs"] for chunk in chunks(ChatWriter, **SCORED)[1:-1])


def test_a_stream_survives_the_wire() -> None:
    texts = ["line\nbreak", "\r\n", "\u2028", "\U0001f600", 'data: "quoted"']
    sent = chunks(ChatWriter, texts=texts)
    assert [chunk["choices"][0]["delta"]["content"] for chunk in sent[1:-1]] == texts
