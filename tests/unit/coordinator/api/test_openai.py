"""What OpenAI's clients send is honoured or refused by name, never accepted and ignored."""

from __future__ import annotations

import inspect
import json
import random
from functools import partial
from typing import Any

import msgspec
import pytest
from openai.types import Model, completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

from noodle.errors import ContextTooLong, InvalidRequest, RequestError, UnknownModel
from services.coordinator.api.openai import (
    ChatRequest,
    CompletionRequest,
    model_list,
    model_object,
    parse_chat,
    parse_completion,
)
from services.coordinator.api.openai_types import ChatBody, CompletionBody, Message, OpenAIFields, StreamOptions
from services.coordinator.api.parameters import MAXIMUM_NEW_TOKENS
from services.coordinator.coordinator import ServedModel
from tests.support.clients.random_json import random_body, random_value

SERVED = ServedModel(names=("SmolLM2-135M-Instruct", "noodle"), vocabulary_size=1000, created_seconds=1)
CONTEXT = 2048
MESSAGES = [{"role": "user", "content": "hi"}]
# values that no field takes as neutral
UNUSUAL: list[Any] = [7, 0.25, "unusual", [7], {"unusual": 7}]


def chat(**fields: Any) -> ChatRequest:
    return parse_chat(json.dumps({"model": "noodle", "messages": MESSAGES, **fields}).encode(), SERVED, CONTEXT)


def completion(**fields: Any) -> CompletionRequest:
    return parse_completion(json.dumps({"model": "noodle", "prompt": "hi", **fields}).encode(), SERVED)


PARSERS = {"chat": chat, "completion": completion}
NEUTRAL_CASES = [
    (kind, name, value)
    for kind, table in (("chat", ChatBody.NEUTRAL), ("completion", CompletionBody.NEUTRAL))
    for name, values in table.items()
    for value in (None, *values)
]
REFUSED_CASES = [
    (kind, name, value)
    for kind, table in (("chat", ChatBody.NEUTRAL), ("completion", CompletionBody.NEUTRAL))
    for name in table
    for value in UNUSUAL
]


def known_fields(kind: type[OpenAIFields]) -> set[str]:
    return {*kind.__struct_fields__, *kind.HARMLESS, *kind.NEUTRAL}


def refusal(kind: str, **fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        PARSERS[kind](**fields)
    return caught.value


@pytest.mark.parametrize(("kind", "name", "value"), NEUTRAL_CASES)
def test_a_value_that_asks_for_nothing_is_taken(kind: str, name: str, value: Any) -> None:
    PARSERS[kind](**{name: value})


@pytest.mark.parametrize(("kind", "name", "value"), REFUSED_CASES)
def test_what_is_not_honoured_is_refused_by_name(kind: str, name: str, value: Any) -> None:
    error = refusal(kind, **{name: value})
    assert f"'{name}' is not supported here" in error.message
    assert error.param == name
    assert error.cure


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        ("chat", "n", 2),
        ("chat", "n", True),
        ("chat", "logprobs", 3),
        ("chat", "top_logprobs", 1),  # without logprobs
        ("chat", "echo", True),
        ("chat", "max_tokens", 0),
        ("chat", "tool_choice", "required"),
        ("chat", "response_format", {"type": "json_object"}),
        ("chat", "presence_penalty", 0.1),
        ("chat", "store", True),
        ("chat", "logit_bias", {"50256": -100}),
        ("chat", "modalities", ["text", "audio"]),
        ("chat", "skip_special_tokens", False),
        ("completion", "logprobs", 21),
        ("completion", "logprobs", True),
        ("completion", "logprobs", -1),
        ("completion", "echo", 1),
        ("completion", "max_tokens", 0),  # without echo
        ("completion", "top_logprobs", 1),
        ("completion", "best_of", 2),
        ("completion", "suffix", "x"),
        ("completion", "use_beam_search", True),
    ],
)
def test_the_usual_wishes_that_are_not_honoured_are_refused(kind: str, name: str, value: Any) -> None:
    assert refusal(kind, **{name: value}).param == name


def scores_of(parsed: ChatRequest | CompletionRequest) -> tuple[bool, int, bool]:
    request = parsed.request
    return request.want_logprob, request.top_logprobs, request.score_prompt


def test_log_probabilities_are_asked_for_in_each_routes_own_way() -> None:
    assert scores_of(completion()) == (False, 0, False)
    assert scores_of(completion(logprobs=None)) == (False, 0, False)
    assert scores_of(completion(logprobs=0)) == (True, 0, False)
    assert scores_of(completion(logprobs=20)) == (True, 20, False)
    echoed = completion(logprobs=1, echo=True, max_tokens=0)
    assert echoed.echo
    assert scores_of(echoed) == (True, 1, True)
    assert (echoed.request.max_new_tokens, echoed.request.length_name) == (0, "max_tokens")
    assert scores_of(completion(echo=True)) == (False, 0, False)
    assert scores_of(chat(logprobs=True)) == (True, 0, False)
    assert scores_of(chat(logprobs=True, top_logprobs=4)) == (True, 4, False)
    assert scores_of(chat(logprobs=False, top_logprobs=0)) == (False, 0, False)


def test_every_parameter_of_the_official_client_is_known() -> None:
    for module, known in (
        (chat_create_params, known_fields(ChatBody)),
        (completion_create_params, known_fields(CompletionBody)),
    ):
        names = set(inspect.get_annotations(module.CompletionCreateParamsBase)) | {"stream"}
        assert names <= known, names - known


def test_labels_and_hints_are_taken() -> None:
    for kind in PARSERS:
        PARSERS[kind](user="u", metadata={"a": "b"}, safety_identifier="s", prompt_cache_key="k")


def test_an_unknown_parameter_is_refused_with_the_name_it_may_have_meant() -> None:
    error = refusal("chat", temprature=0.5)
    assert "Unrecognized request argument supplied: 'temprature'" in error.message
    assert "'temperature'" in error.cure
    assert error.param == "temprature"
    many = refusal("chat", **{f"unknown_{number}": 1 for number in range(20)})
    assert "and 15 more" in many.message
    assert len(str(refusal("chat", **{"x" * 100_000: 1}))) < 300


def test_a_chat_has_what_is_left_of_the_context_and_a_completion_16_tokens() -> None:
    assert chat().request.max_new_tokens == MAXIMUM_NEW_TOKENS
    assert chat().request.length_name is None
    assert completion().request.max_new_tokens == 16
    assert chat(max_completion_tokens=5).request.max_new_tokens == 5
    assert chat(max_tokens=5).request.max_new_tokens == 5
    assert refusal("chat", max_tokens=5, max_completion_tokens=6).param in ("max_tokens", "max_completion_tokens")
    assert refusal("completion", max_completion_tokens=5).param == "max_completion_tokens"


def test_the_model_is_the_one_served_under_any_of_its_names() -> None:
    for name in (*SERVED.names, None):
        chat(model=name)
    parse_chat(json.dumps({"messages": MESSAGES}).encode(), SERVED, CONTEXT)
    with pytest.raises(UnknownModel) as caught:
        completion(model="gpt-4o")
    assert caught.value.http_status == 404
    assert caught.value.code == "model_not_found"
    assert '"gpt-4o"' in caught.value.message
    assert "SmolLM2-135M-Instruct" in caught.value.cure
    assert refusal("chat", model=5).param == "model"


def test_streaming_and_its_usage_option() -> None:
    assert not chat().request.stream
    assert chat(stream=True).request.stream
    assert not chat(stream=True).request.include_usage
    assert chat(stream=True, stream_options={"include_usage": True}).request.include_usage
    assert not chat(stream=True, stream_options={"include_usage": False}).request.include_usage
    assert not completion(stream=False, stream_options=None).request.include_usage
    for name, neutral in StreamOptions.NEUTRAL.items():
        chat(stream=True, stream_options={name: neutral[0]})
        assert refusal("chat", stream=True, stream_options={name: True}).param == f"stream_options.{name}"
    assert refusal("chat", stream_options={"include_usage": True}).param == "stream_options"
    assert refusal("chat", stream=True, stream_options={"x": 1}).param == "stream_options.x"
    assert refusal("chat", stream=True, stream_options={"include_usage": 1}).param == "include_usage"
    assert refusal("chat", stream=True, stream_options=[]).param == "stream_options"
    assert refusal("chat", stream="yes").param == "stream"


def test_messages_become_what_a_template_reads() -> None:
    request = chat(
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
            {"role": "assistant", "content": "", "refusal": None, "tool_calls": None, "annotations": []},
            {"role": "user", "content": "x", "name": "Ann"},
            {"role": "system", "content": []},
        ]
    )
    assert request.messages == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one\ntwo"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "x", "name": "Ann"},
        {"role": "system", "content": ""},
    ]


@pytest.mark.parametrize(
    ("messages", "param", "message"),
    [
        (None, "messages", "expected an array of messages, but got null"),
        ("hi", "messages", "expected an array of messages, but got a string"),
        ([], "messages", "empty"),
        (["hi"], "messages[0]", "expected an object"),
        ([{"content": "x"}], "messages[0].role", "It is null"),
        ([{"role": "tool", "content": "x"}], "messages[0].role", "Tools are not supported"),
        ([{"role": "function", "content": "x"}], "messages[0].role", "Tools are not supported"),
        ([{"role": ["user"], "content": "x"}], "messages[0].role", "an array"),
        ([{"role": "User", "content": "x"}], "messages[0].role", '"User"'),
        ([*MESSAGES, {"role": "user"}], "messages[1].content", "but got null"),
        ([{"role": "user", "content": 5}], "messages[0].content", "a string or an array of text parts"),
        ([{"role": "user", "content": ["x"]}], "messages[0].content[0]", "expected an object"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            "messages[0].content[0].type",
            '"image_url" content is not supported',
        ),
        ([{"role": "user", "content": [{"text": "x"}]}], "messages[0].content[0].type", "null content"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text", "expected a string"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "x", "cache_control": {}}]}],
            "messages[0].content[0].cache_control",
            "Unrecognized",
        ),
        ([{"role": "user", "content": "x", "name": 5}], "messages[0].name", "expected a string"),
        ([{"role": "user", "content": "x", "mood": "good"}], "messages[0].mood", "Unrecognized"),
    ],
)
def test_a_wrong_message_is_refused_by_its_place(messages: Any, param: str, message: str) -> None:
    error = refusal("chat", messages=messages)
    assert message in error.message
    assert error.param == param


@pytest.mark.parametrize("name", Message.NEUTRAL)
def test_what_a_message_may_not_carry_is_refused_by_name(name: str) -> None:
    for value in (None, *Message.NEUTRAL[name]):
        chat(messages=[{"role": "assistant", "content": "x", name: value}])
    error = refusal("chat", messages=[{"role": "assistant", "content": "x", name: [{"id": 1}]}])
    assert error.param == f"messages[0].{name}"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("hi", "hi"), (["hi"], "hi"), ([1, 2, 999], (1, 2, 999)), ([[1, 2]], (1, 2)), (" ", " ")],
)
def test_a_prompt_is_a_text_or_token_ids_alone_or_in_a_list(prompt: Any, expected: Any) -> None:
    assert completion(prompt=prompt).prompt == expected


@pytest.mark.parametrize(
    ("prompt", "param", "message"),
    [
        (None, "prompt", "expected a string or an array of token ids, but got null"),
        (5, "prompt", "but got an integer"),
        ({}, "prompt", "but got an object"),
        ("", "prompt", "empty"),
        ([], "prompt", "empty"),
        ([""], "prompt", "empty"),
        ([[]], "prompt", "empty"),
        (["a", "b"], "prompt", "expected one prompt, but got 2"),
        ([[1], [2]], "prompt", "expected one prompt, but got 2"),
        ([1, "a"], "prompt[1]", "expected a token id, but got a string"),
        ([1.5], "prompt[0]", "expected a token id, but got a decimal number"),
        ([True], "prompt[0]", "expected a token id, but got a boolean"),
        ([-1], "prompt[0]", "from 0 to 999, but got -1"),
        ([0, 1000], "prompt[1]", "from 0 to 999, but got 1000"),
        ([[0, 1 << 70]], "prompt[1]", "from 0 to 999"),
    ],
)
def test_a_wrong_prompt_is_refused(prompt: Any, param: str, message: str) -> None:
    error = refusal("completion", prompt=prompt)
    assert message in error.message
    assert error.param == param


def test_what_vllm_bench_sends_is_taken() -> None:
    completion(
        prompt="x",
        repetition_penalty=1.0,
        max_tokens=8,
        logprobs=None,
        stream=True,
        stream_options={"include_usage": True},
        ignore_eos=True,
        temperature=0.0,
    )
    chat(
        messages=[{"role": "user", "content": [{"type": "text", "text": "x"}]}],
        max_completion_tokens=8,
        stream=True,
        stream_options={"include_usage": True},
        ignore_eos=True,
    )


def test_random_bodies_are_taken_or_refused_and_nothing_else() -> None:
    generator = random.Random(30)
    chat_names = sorted(known_fields(ChatBody) - ChatBody.HARMLESS | {"user", "unknown"})
    completion_names = sorted(known_fields(CompletionBody) - CompletionBody.HARMLESS | {"user", "unknown"})
    taken = longest = 0
    for _ in range(5000):
        for parse, valid, names in (
            (partial(parse_chat, context_length=CONTEXT), {"model": "noodle", "messages": MESSAGES}, chat_names),
            (parse_completion, {"model": "noodle", "prompt": "hi"}, completion_names),
        ):
            body = random_body(generator, valid, names)
            try:
                parse(body, SERVED)
            except RequestError as error:
                longest = max(longest, len(str(error)))
            else:
                taken += 1
    assert 0 < longest < 1000
    assert taken > 400


def test_random_messages_are_taken_or_refused_and_nothing_else() -> None:
    generator = random.Random(31)
    for _ in range(5000):
        messages = [random_value(generator), {"role": "user", "content": random_value(generator)}]
        generator.shuffle(messages)
        try:
            request = chat(messages=messages)
        except RequestError:
            continue
        assert all(isinstance(message["content"], str) for message in request.messages)


def test_more_messages_than_the_context_has_tokens_are_refused_with_the_three_numbers_before_each_is_read() -> None:
    unread: list[Any] = [{"role": "nobody"}] * CONTEXT
    with pytest.raises(ContextTooLong) as caught:
        chat(messages=unread, max_tokens=7)
    assert str(CONTEXT) in caught.value.message
    assert f"at least {CONTEXT} and 7 more" in caught.value.message
    assert caught.value.param == "messages"
    assert len(chat(messages=MESSAGES * (CONTEXT - 1)).messages) == CONTEXT - 1


def test_more_text_parts_than_the_context_has_tokens_are_refused() -> None:
    parts = [{"type": "text", "text": ""}] * (CONTEXT // 2 + 1)
    with pytest.raises(InvalidRequest, match=f"{CONTEXT + 2} text parts"):
        chat(messages=[{"role": "user", "content": parts}] * 2)
    chat(messages=[{"role": "user", "content": parts}])


def test_models_are_listed_under_each_name() -> None:
    listed = msgspec.to_builtins(model_list(SERVED))
    assert listed["object"] == "list"
    assert [Model.model_validate(model, strict=True).id for model in listed["data"]] == list(SERVED.names)
    assert Model.model_validate(msgspec.to_builtins(model_object("noodle", SERVED)), strict=True).created == 1
    with pytest.raises(UnknownModel):
        model_object("gpt-4o", SERVED)
