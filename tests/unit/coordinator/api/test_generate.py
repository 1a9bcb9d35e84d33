"""The shapes of /generate: what is read, what is refused, what comes back."""

from __future__ import annotations

import json
import random
from typing import Any

import msgspec
import pytest
from openai._streaming import SSEDecoder

from noodle.errors import InvalidRequest, RequestError
from noodle.wire.messages import TokenLogprob
from services.coordinator.api.generate import (
    GenerateParameters,
    GenerateRequest,
    generate_answer,
    generate_events,
    parse_generate,
)
from services.coordinator.text.answer import Part
from tests.support.clients.random_json import random_body, random_value
from tests.unit.coordinator.api.answers import answer_to


def parse(inputs: Any = "hi", stream: bool = False, **parameters: Any) -> GenerateRequest:
    body = json.dumps({"inputs": inputs, "parameters": parameters}).encode()
    return parse_generate(body, vocabulary_size=1000, stream=stream)


def refusal(inputs: Any = "hi", **parameters: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        parse(inputs, **parameters)
    return caught.value


def test_inputs_alone_are_enough_and_greedy() -> None:
    request = parse_generate(b'{"inputs": "hi"}', vocabulary_size=1000, stream=True)
    assert request.prompt == "hi"
    assert request.request.max_new_tokens == 100
    assert request.request.length_name is None
    assert request.request.temperature == 0
    assert request.request.stream
    assert not request.request.want_logprob
    assert not request.return_full_text


def test_everything_that_is_honoured() -> None:
    request = parse(
        inputs=[1, 2],
        max_new_tokens=5,
        temperature=50,
        top_p=0.9,
        top_k=3,
        do_sample=True,
        seed=7,
        stop=[str(number) for number in range(16)],
        ignore_eos=True,
        details=True,
        return_full_text=True,
    )
    parameters = request.request
    assert request.prompt == (1, 2)
    assert request.return_full_text
    assert (parameters.max_new_tokens, parameters.length_name, parameters.seed) == (5, "max_new_tokens", 7)
    assert (parameters.temperature, parameters.top_p, parameters.top_k) == (50, 0.9, 3)
    assert len(parameters.stop) == 16
    assert parameters.ignore_eos
    assert parameters.want_logprob
    assert not parameters.stream


@pytest.mark.parametrize(
    ("asked", "temperature"),
    [
        ({}, 0.0),
        ({"do_sample": False}, 0.0),
        ({"do_sample": False, "temperature": 0}, 0.0),
        ({"do_sample": False, "top_p": 1.0, "top_k": 0}, 0.0),
        ({"do_sample": True}, 1.0),
        ({"do_sample": True, "temperature": 0.5}, 0.5),
        ({"temperature": 0.5}, 0.5),
        ({"temperature": 0, "top_p": 0.5}, 0.0),
        ({"top_p": 0.5}, 1.0),
        ({"top_k": 5}, 1.0),
    ],
)
def test_when_it_samples(asked: dict[str, Any], temperature: float) -> None:
    assert parse(**asked).request.temperature == temperature


@pytest.mark.parametrize(
    "asked",
    [
        {"do_sample": False, "temperature": 0.5},
        {"do_sample": False, "top_p": 0.5},
        {"do_sample": False, "top_k": 5},
        {"do_sample": True, "temperature": 0},
    ],
)
def test_do_sample_may_not_say_the_contrary(asked: dict[str, Any]) -> None:
    assert refusal(**asked).param == "parameters.do_sample"


@pytest.mark.parametrize("name", GenerateParameters.NEUTRAL)
def test_what_is_not_honoured_is_refused_by_name(name: str) -> None:
    for value in (None, *GenerateParameters.NEUTRAL[name]):
        parse(**{name: value})
    for value in (7, 0.25, "unusual", [7], {"type": "json"}):
        error = refusal(**{name: value})
        assert error.param == f"parameters.{name}"
        assert f"'parameters.{name}' is not supported here" in error.message


def test_an_unknown_parameter_is_refused_with_the_name_it_may_have_meant() -> None:
    error = refusal(max_tokens=5)
    assert error.param == "parameters.max_tokens"
    assert "max_new_tokens" in error.cure
    with pytest.raises(InvalidRequest, match="'options'"):
        parse_generate(b'{"inputs": "hi", "options": {}}', vocabulary_size=1000, stream=False)
    with pytest.raises(InvalidRequest, match="'parameters': expected an object"):
        parse_generate(b'{"inputs": "hi", "parameters": [1]}', vocabulary_size=1000, stream=False)


@pytest.mark.parametrize(
    ("inputs", "param"),
    [
        (None, "inputs"),
        (5, "inputs"),
        ({}, "inputs"),
        ("", "inputs"),
        ([], "inputs"),
        (["hi"], "inputs[0]"),
        ([[1]], "inputs[0]"),
        ([1, 1000], "inputs[1]"),
        ([-1], "inputs[0]"),
        ([True], "inputs[0]"),
    ],
)
def test_wrong_inputs_are_refused(inputs: Any, param: str) -> None:
    assert refusal(inputs).param == param


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", -1),
        ("max_new_tokens", 1.5),
        ("temperature", 100.5),
        ("temperature", -1),
        ("temperature", "0.5"),
        ("top_p", 0),
        ("top_k", -2),
        ("seed", "x"),
        ("stop", [""]),
        ("stop", ["a"] * 17),
        ("do_sample", 1),
        ("details", "yes"),
        ("return_full_text", 0),
        ("ignore_eos", []),
    ],
)
def test_a_wrong_value_is_refused_by_name(name: str, value: Any) -> None:
    assert refusal(**{name: value}).param == name


PARTS = [
    Part(1, "he", -0.5, None, (TokenLogprob(1, -0.5), TokenLogprob(2, -0.75))),
    Part(3, "", -1.5, "eos_token", (TokenLogprob(3, -1.5),)),
]


def answer(before: str = "", **asked: Any) -> Any:
    return msgspec.to_builtins(generate_answer(answer_to(parse(**asked).request, PARTS, complete=True), before))


def events(before: str = "", after: int = 0, **asked: Any) -> list[Any]:
    stream = b"".join(generate_events(answer_to(parse(stream=True, **asked).request, PARTS), before, after))
    return [(event.id, json.loads(event.data)) for event in SSEDecoder().iter_bytes(iter([stream]))]


def test_an_answer_tells_how_it_came_about() -> None:
    assert answer(seed=-3) == {
        "generated_text": "he",
        "details": {
            "finish_reason": "eos_token",
            "generated_tokens": 2,
            "prompt_tokens": 4,
            "seed": -3,
            "tokens": [{"id": 1, "text": "he", "special": False}, {"id": 3, "text": "", "special": True}],
        },
    }
    assert answer("say: ")["generated_text"] == "say: he"


def test_details_add_the_log_probabilities() -> None:
    details = answer(details=True, top_n_tokens=2)["details"]
    assert [token["logprob"] for token in details["tokens"]] == [-0.5, -1.5]
    assert [[top["id"] for top in each] for each in details["top_tokens"]] == [[1, 2], [3]]
    assert details["top_tokens"][0][1] == {"id": 2, "text": "llo", "special": False, "logprob": -0.75}
    assert details["prompt_token_ids"] == [1, 2, 1, 2]
    assert details["prefill"] == []
    assert events(details=True)[0][1]["token"]["logprob"] == -0.5


def test_a_stream_has_an_event_for_each_token_and_the_last_one_has_it_all() -> None:
    (first_id, first), (last_id, last) = events("say: ", seed=1)
    assert (first_id, last_id) == ("1", "2")
    assert first == {
        "index": 1,
        "token": {"id": 1, "text": "he", "special": False},
        "generated_text": None,
        "details": None,
    }
    assert last["index"] == 2
    assert last["generated_text"] == "say: he"
    assert last["details"] == {"finish_reason": "eos_token", "generated_tokens": 2, "prompt_tokens": 4, "seed": 1}
    assert events("say: ", after=1, seed=1) == [(last_id, last)]


def test_random_bodies_are_taken_or_refused_and_nothing_else() -> None:
    generator = random.Random(32)
    names = sorted({*GenerateParameters.__struct_fields__, *GenerateParameters.NEUTRAL, "unknown"})
    taken = longest = 0
    for _ in range(5000):
        inner = random_body(generator, {"max_new_tokens": 4}, names)
        try:
            parameters = json.loads(inner)
        except ValueError:
            parameters = random_value(generator)
        body = random_body(generator, {"inputs": "hi", "parameters": parameters}, ["inputs", "parameters", "x"])
        for candidate in (body, json.dumps({"inputs": "hi", "parameters": parameters}).encode()):
            try:
                parse_generate(candidate, vocabulary_size=1000, stream=False)
            except RequestError as error:
                longest = max(longest, len(str(error)))
            else:
                taken += 1
    assert 0 < longest < 1000
    assert taken > 300


def test_a_parameter_beside_inputs_is_told_where_it_belongs():
    body = json.dumps({"inputs": "a", "resume_seconds": 5}).encode()
    with pytest.raises(InvalidRequest, match="Put it into 'parameters'") as refused:
        parse_generate(body, vocabulary_size=10, stream=False)
    assert refused.value.param == "resume_seconds"
