"""The shapes of /generate: what is read, what is refused, what comes back."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from noodle.errors import InvalidRequest, RequestError
from services.coordinator.api.generate_format import (
    HONOURED,
    NEUTRAL,
    GeneratedToken,
    GenerateRequest,
    generate_answer,
    generation_details,
    last_token_event,
    parse_generate,
    token_event,
)
from tests.support.clients.random_json import random_body, random_value


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


@pytest.mark.parametrize("name", NEUTRAL)
def test_what_is_not_honoured_is_refused_by_name(name: str) -> None:
    for value in (None, *NEUTRAL[name]):
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


TOKENS = [GeneratedToken(5, "he", False, -0.5), GeneratedToken(2, "", True, -1.5)]


def test_an_answer_tells_how_it_came_about() -> None:
    parameters = parse(seed=-3).request
    details = generation_details("eos_token", parameters, prompt_tokens=4, tokens=TOKENS)
    assert generate_answer("he", details) == {
        "generated_text": "he",
        "details": {
            "finish_reason": "eos_token",
            "generated_tokens": 2,
            "prompt_tokens": 4,
            "seed": -3,
            "tokens": [{"id": 5, "text": "he", "special": False}, {"id": 2, "text": "", "special": True}],
        },
    }
    assert generate_answer("he", details, prompt_text="say: ")["generated_text"] == "say: he"


def test_details_add_the_log_probabilities() -> None:
    parameters = parse(details=True).request
    details = generation_details("length", parameters, prompt_tokens=4, tokens=TOKENS)
    assert [token["logprob"] for token in details["tokens"]] == [-0.5, -1.5]
    assert token_event(1, TOKENS[0], parameters)["token"]["logprob"] == -0.5


def test_a_stream_has_an_event_for_each_token_and_the_last_one_has_it_all() -> None:
    parameters = parse(seed=1).request
    assert token_event(1, TOKENS[0], parameters) == {
        "index": 1,
        "token": {"id": 5, "text": "he", "special": False},
        "generated_text": None,
        "details": None,
    }
    last = last_token_event(
        TOKENS[1], "he", "stop_sequence", parameters, prompt_tokens=4, generated_tokens=2, prompt_text="say: "
    )
    assert last["index"] == 2
    assert last["generated_text"] == "say: he"
    assert last["details"] == {"finish_reason": "stop_sequence", "generated_tokens": 2, "prompt_tokens": 4, "seed": 1}


def test_random_bodies_are_taken_or_refused_and_nothing_else() -> None:
    generator = random.Random(32)
    names = sorted(HONOURED | set(NEUTRAL) | {"unknown"})
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
