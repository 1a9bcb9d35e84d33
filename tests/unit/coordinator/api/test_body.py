"""Fields that all forms of a request share: what is read, and how a wrong value is refused."""

from __future__ import annotations

import json
import math
from typing import Any

import msgspec
import pytest

from noodle.errors import InvalidRequest
from noodle.wire.messages import SamplingParameters
from services.coordinator.api.body import decode_object, read
from services.coordinator.api.openai import parse_chat
from services.coordinator.api.openai_types import ChatBody
from services.coordinator.api.parameters import MAXIMUM_NEW_TOKENS
from services.coordinator.coordinator import ServedModel
from services.coordinator.engine.request import Request

SERVED = ServedModel(names=("m",), vocabulary_size=1000, created_seconds=1)
MESSAGES = [{"role": "user", "content": "hi"}]


def parameters(**fields: Any) -> Request:
    return parse_chat(json.dumps({"messages": MESSAGES, **fields}).encode(), SERVED, 2048).request


def refusal(**fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        parameters(**fields)
    return caught.value


def test_a_request_that_says_nothing_gets_the_defaults_and_a_seed_of_its_own() -> None:
    first, second = parameters(), parameters()
    assert first.max_new_tokens == MAXIMUM_NEW_TOKENS
    assert first.length_name is None
    assert first.sampling == SamplingParameters(temperature=1.0, top_p=1.0, top_k=0, seed=first.seed)
    assert first.seed != second.seed
    assert 0 <= first.seed < 1 << 53
    assert first.stop == ()
    assert not any((first.ignore_eos, first.stream, first.include_usage, first.want_logprob))


def test_null_means_absent() -> None:
    names = ("max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "ignore_eos")
    found = parameters(**dict.fromkeys(names))
    assert (found.max_new_tokens, found.sampling.temperature, found.stop) == (MAXIMUM_NEW_TOKENS, 1.0, ())


def test_what_is_given_is_what_is_used() -> None:
    found = parameters(max_tokens=5, temperature=0, top_p=0.9, top_k=40, seed=7, stop=["a", "b", "a"], ignore_eos=True)
    assert found.max_new_tokens == 5
    assert found.length_name == "max_tokens"
    assert found.sampling == SamplingParameters(temperature=0.0, top_p=0.9, top_k=40, seed=7)
    assert found.stop == ("a", "b")
    assert found.ignore_eos


@pytest.mark.parametrize("seed", [0, 1, -1, (1 << 63) - 1, -(1 << 63), -5])
def test_any_64_bit_seed_is_returned_as_given_and_travels_as_63_bits(seed: int) -> None:
    found = parameters(seed=seed)
    assert found.seed == seed
    assert found.sampling.seed == seed % (1 << 63)
    encoded = msgspec.json.encode(found.sampling)
    assert msgspec.json.decode(encoded, type=SamplingParameters) == found.sampling


@pytest.mark.parametrize("top_k", [0, -1, None])
def test_top_k_has_two_words_for_off(top_k: int | None) -> None:
    assert parameters(top_k=top_k).sampling.top_k == 0


def test_both_names_of_the_length_may_be_given_if_they_agree() -> None:
    assert parameters(max_tokens=5, max_completion_tokens=5).max_new_tokens == 5
    error = refusal(max_tokens=5, max_completion_tokens=6)
    assert "'max_completion_tokens' is 6 and 'max_tokens' is 5" in error.message


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("temperature", "hot", "Invalid type for 'temperature': expected a number, but got a string."),
        ("temperature", True, "Invalid type for 'temperature': expected a number, but got a boolean."),
        ("temperature", [1], "Invalid type for 'temperature': expected a number, but got an array."),
        ("temperature", -0.1, "Invalid value for 'temperature': expected a number from 0 to 2, but got -0.1."),
        ("temperature", 2.01, "Invalid value for 'temperature': expected a number from 0 to 2, but got 2.01."),
        ("temperature", math.nan, "Invalid value for 'temperature': expected a number from 0 to 2, but got NaN."),
        ("temperature", 10**400, "expected a number from 0 to 2, but got a huge integer."),
        ("top_p", 0, "expected a number above 0 and at most 1"),
        ("top_p", 1.1, "expected a number above 0 and at most 1 (temperature 0 is greedy), but got 1.1."),
        ("top_p", -1, "expected a number above 0 and at most 1 (temperature 0 is greedy), but got -1."),
        ("top_p", {}, "expected a number, but got an object."),
        ("top_k", -2, "expected an integer from -1 to"),
        ("top_k", 1.0, "expected an integer, but got a decimal number."),
        ("top_k", 1 << 40, "expected an integer from -1 to"),
        ("max_tokens", 0, f"expected an integer from 1 to {MAXIMUM_NEW_TOKENS}, but got 0."),
        ("max_tokens", -5, "but got -5."),
        ("max_tokens", 1 << 31, "but got 2147483648."),
        ("max_tokens", 16.0, "expected an integer, but got a decimal number."),
        ("max_tokens", "16", "expected an integer, but got a string."),
        ("max_tokens", True, "expected an integer, but got a boolean."),
        ("max_completion_tokens", 0, "expected an integer from 1"),
        ("seed", 1 << 63, "expected an integer from -9223372036854775808 to 9223372036854775807"),
        ("seed", 1.5, "expected an integer, but got a decimal number."),
        ("seed", "1", "expected an integer, but got a string."),
        ("stop", 5, "expected a string or an array of strings, but got an integer."),
        ("stop", {"a": 1}, "expected a string or an array of strings, but got an object."),
        ("stop", ["a", 1], "expected a string or an array of strings"),
        ("stop", [None], "expected a string or an array of strings"),
        ("stop", "", "a stop string is empty"),
        ("stop", ["a", ""], "a stop string is empty"),
        ("stop", ["a"] * 5, "expected at most 4 stop strings, but got 5."),
        ("stop", "x" * 1001, "expected at most 1000 characters, but got 1001."),
        ("ignore_eos", 1, "expected a boolean, but got an integer."),
        ("cache_salt", "x" * 257, "expected at most 256 characters, but got 257."),
        ("timeout_seconds", 0, "expected a number above 0 and at most 86400, or none at all, but got 0."),
        ("ignore_eos", "true", "expected a boolean, but got a string."),
    ],
)
def test_a_wrong_value_is_refused_by_name(name: str, value: Any, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read({"messages": MESSAGES, name: value}, ChatBody)
    error = caught.value
    assert message in error.message
    assert error.param == name
    assert error.http_status == 400


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not valid JSON"),
        (b'{"a": }', "byte 6"),
        (b'{"a": 1} x', "trailing characters (byte 10)"),
        (b'{"temperature": NaN}', "not valid JSON"),
        (b'{"temperature": Infinity}', "not valid JSON"),
        (b'{"temperature": 1e999}', "out of range"),
        (b'{"seed": 1' + b"0" * 100_000 + b"}", "out of range"),
        (b'{"a": "\\ud800"}', "not valid JSON"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"[1]", "an array, not a JSON object"),
        (b"null", "null, not a JSON object"),
        (b'"text"', "a string, not a JSON object"),
    ],
)
def test_a_body_that_is_no_json_object_says_where(body: bytes, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        decode_object(body)
    assert message in str(caught.value)
