"""Answers are what the official client's own types say, streamed ones included."""

from __future__ import annotations

import json

import pytest
from openai._streaming import SSEDecoder
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from noodle.errors import UnknownModel
from noodle.web.service import server_sent_event
from services.coordinator.api import openai_format
from services.coordinator.api.openai_format import AnswerHead
from services.coordinator.api.openai_request import ServedModel
from services.coordinator.engine.request import FinishReason

HEAD = AnswerHead(id="chatcmpl-1", model="m", created_seconds=5, seed=-7)
HEAD_WITH_USAGE = AnswerHead(id="chatcmpl-1", model="m", created_seconds=5, seed=-7, include_usage=True)
USED = openai_format.usage(3, 4)
SERVED = ServedModel(names=("m", "noodle"), vocabulary_size=10, created_seconds=5)
REASONS: list[tuple[FinishReason, str]] = [("length", "length"), ("eos_token", "stop"), ("stop_sequence", "stop")]


@pytest.mark.parametrize(("reason", "expected"), REASONS)
def test_a_chat_answer_is_one_the_client_reads(reason: FinishReason, expected: str) -> None:
    answer = ChatCompletion.model_validate(openai_format.chat_answer(HEAD, "hi", reason, USED), strict=True)
    assert (answer.id, answer.model, answer.created) == ("chatcmpl-1", "m", 5)
    assert answer.choices[0].message.content == "hi"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == expected
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (3, 4, 7)
    assert answer.model_extra == {"seed": -7}


@pytest.mark.parametrize(("reason", "expected"), REASONS)
def test_a_completion_answer_is_one_the_client_reads(reason: FinishReason, expected: str) -> None:
    answer = Completion.model_validate(openai_format.completion_answer(HEAD, "hi", reason, USED), strict=True)
    assert answer.choices[0].text == "hi"
    assert answer.choices[0].finish_reason == expected
    assert answer.usage is not None
    assert answer.usage.total_tokens == 7
    assert answer.model_extra == {"seed": -7}


def test_chat_chunks_tell_the_speaker_then_the_text_then_why_it_ended() -> None:
    chunks = [
        openai_format.chat_first_chunk(HEAD),
        openai_format.chat_text_chunk(HEAD, "hi"),
        openai_format.chat_last_chunk(HEAD, "eos_token"),
    ]
    assert all("usage" not in chunk for chunk in chunks)
    read = [ChatCompletionChunk.model_validate(chunk, strict=True) for chunk in chunks]
    assert [chunk.choices[0].delta.role for chunk in read] == ["assistant", None, None]
    assert [chunk.choices[0].delta.content for chunk in read] == ["", "hi", None]
    assert [chunk.choices[0].finish_reason for chunk in read] == [None, None, "stop"]


def test_with_include_usage_the_others_carry_null_and_one_more_chunk_the_numbers() -> None:
    for chunk in (
        openai_format.chat_first_chunk(HEAD_WITH_USAGE),
        openai_format.chat_last_chunk(HEAD_WITH_USAGE, "length"),
        openai_format.completion_text_chunk(HEAD_WITH_USAGE, "x"),
        openai_format.completion_last_chunk(HEAD_WITH_USAGE, "length"),
    ):
        assert chunk["usage"] is None
    chat = ChatCompletionChunk.model_validate(openai_format.chat_usage_chunk(HEAD_WITH_USAGE, USED), strict=True)
    completion = Completion.model_validate(openai_format.completion_usage_chunk(HEAD_WITH_USAGE, USED), strict=True)
    for last in (chat, completion):
        assert last.choices == []
        assert last.usage is not None
        assert last.usage.total_tokens == 7


def test_completion_chunks_are_text_and_in_the_end_a_reason() -> None:
    text = openai_format.completion_text_chunk(HEAD, "hi")
    last = openai_format.completion_last_chunk(HEAD, "stop_sequence")
    assert (text["choices"][0]["text"], text["choices"][0]["finish_reason"]) == ("hi", None)
    assert (last["choices"][0]["text"], last["choices"][0]["finish_reason"]) == ("", "stop")
    assert "usage" not in text


def test_a_stream_survives_the_wire() -> None:
    texts = ["line\nbreak", "\r\n", "\u2028", "😀", 'data: "quoted"', ""]
    stream = b"".join(server_sent_event(openai_format.chat_text_chunk(HEAD, text)) for text in texts)
    stream += server_sent_event(openai_format.STREAM_END)
    events = list(SSEDecoder().iter_bytes(iter([stream])))
    assert [json.loads(event.data)["choices"][0]["delta"]["content"] for event in events[:-1]] == texts
    assert events[-1].data == "[DONE]"


def test_models_are_listed_under_each_name() -> None:
    listed = openai_format.model_list(SERVED)
    assert listed["object"] == "list"
    assert [Model.model_validate(model, strict=True).id for model in listed["data"]] == ["m", "noodle"]
    assert Model.model_validate(openai_format.model_object("noodle", SERVED), strict=True).created == 5
    with pytest.raises(UnknownModel):
        openai_format.model_object("gpt-4o", SERVED)


def test_ids_are_never_the_same() -> None:
    ids = {openai_format.new_chat_id() for _ in range(100)} | {openai_format.new_completion_id() for _ in range(100)}
    assert len(ids) == 200
