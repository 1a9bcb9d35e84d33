"""Numbers and stop strings of a request, and the length that fits into the context."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from noodle.errors import ContextTooLong, InvalidRequest
from noodle.wire.messages import SamplingParameters
from services.coordinator.api.request_body import decode_object
from services.coordinator.engine.parameters import (
    MAXIMUM_NEW_TOKENS,
    ParameterLimits,
    read_generation_parameters,
)
from services.coordinator.engine.request import Request, fit_into_context, refuse_what_cannot_fit

LIMITS = ParameterLimits(maximum_temperature=2, default_temperature=1, maximum_stop_strings=4, default_new_tokens=16)


def read(**fields: Any) -> Request:
    return read_generation_parameters(fields, LIMITS, length_names=("max_completion_tokens", "max_tokens"))


def refusal(**fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        read(**fields)
    return caught.value


def test_a_request_that_says_nothing_gets_the_defaults_and_a_seed_of_its_own() -> None:
    first, second = read(), read()
    assert first.max_new_tokens == 16
    assert first.length_name is None
    assert first.sampling == SamplingParameters(temperature=1.0, top_p=1.0, top_k=0, seed=first.seed)
    assert first.seed != second.seed
    assert 0 <= first.seed < 1 << 53
    assert first.stop == ()
    assert not any((first.ignore_eos, first.stream, first.include_usage, first.want_logprob))


def test_null_means_absent() -> None:
    names = ("max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "ignore_eos")
    parameters = read(**dict.fromkeys(names))
    assert (parameters.max_new_tokens, parameters.sampling.temperature, parameters.stop) == (16, 1.0, ())


def test_what_is_given_is_what_is_used() -> None:
    parameters = read(max_tokens=5, temperature=0, top_p=0.9, top_k=40, seed=7, stop=["a", "b", "a"], ignore_eos=True)
    assert parameters.max_new_tokens == 5
    assert parameters.length_name == "max_tokens"
    assert parameters.sampling == SamplingParameters(temperature=0.0, top_p=0.9, top_k=40, seed=7)
    assert parameters.stop == ("a", "b")
    assert parameters.ignore_eos


@pytest.mark.parametrize("seed", [0, 1, -1, (1 << 63) - 1, -(1 << 63), -5])
def test_any_64_bit_seed_is_returned_as_given_and_travels_as_63_bits(seed: int) -> None:
    parameters = read(seed=seed)
    assert parameters.seed == seed
    assert parameters.sampling.seed == seed % (1 << 63)
    encoded = msgspec.json.encode(parameters.sampling)
    assert msgspec.json.decode(encoded, type=SamplingParameters) == parameters.sampling


@pytest.mark.parametrize("top_k", [0, -1, None])
def test_top_k_has_two_words_for_off(top_k: int | None) -> None:
    assert read(top_k=top_k).sampling.top_k == 0


def test_both_names_of_the_length_may_be_given_if_they_agree() -> None:
    assert read(max_tokens=5, max_completion_tokens=5).max_new_tokens == 5
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
        ("top_p", 1.1, "expected a number from 0 to 1, but got 1.1."),
        ("top_p", -1, "expected a number from 0 to 1, but got -1."),
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
        ("stop", ["a"] * 5, "expected at most 4 strings, but got 5."),
        ("stop", "x" * 1001, "expected at most 1000 characters, but one has 1001."),
        ("ignore_eos", 1, "expected a boolean, but got an integer."),
        ("ignore_eos", "true", "expected a boolean, but got a string."),
    ],
)
def test_a_wrong_value_is_refused_by_name(name: str, value: Any, message: str) -> None:
    error = refusal(**{name: value})
    assert message in error.message
    assert error.param == name
    assert error.http_status == 400


def fitted(prompt_tokens: int, context_length: int, **fields: Any) -> Request:
    request = msgspec.structs.replace(read(**fields), prompt_token_ids=[1] * prompt_tokens)
    return fit_into_context(request, context_length=context_length, prompt_name="prompt")


def test_a_length_that_fits_stays_and_a_default_is_cut_to_what_is_left() -> None:
    assert fitted(90, 100, max_tokens=10).max_new_tokens == 10
    assert fitted(50, 100).max_new_tokens == 16
    assert fitted(90, 100).max_new_tokens == 10
    assert fitted(99, 100).max_new_tokens == 1


def test_a_length_that_does_not_fit_is_refused_with_the_three_numbers() -> None:
    with pytest.raises(ContextTooLong) as caught:
        fitted(90, 100, max_tokens=11)
    assert "context is 100 tokens" in caught.value.message
    assert "prompt has 90" in caught.value.message
    assert "11 more are asked for" in caught.value.message
    assert "at most 10" in caught.value.cure
    assert caught.value.param == "max_tokens"
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize("fields", [{}, {"max_tokens": 3}])
def test_a_prompt_that_fills_the_context_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ContextTooLong, match="prompt has 100") as caught:
        fitted(100, 100, **fields)
    assert caught.value.param == "prompt"


def test_a_prompt_without_tokens_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="'prompt' is empty"):
        fitted(0, 100)


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


def test_a_prompt_that_fills_the_context_at_its_shortest_is_refused_with_the_three_numbers() -> None:
    parameters = read(max_tokens=3)
    refuse_what_cannot_fit(parameters, least_tokens=99, context_length=100, prompt_name="messages")
    with pytest.raises(ContextTooLong, match=r"context is 100 tokens.*at least 100 and 3 more are") as caught:
        refuse_what_cannot_fit(parameters, least_tokens=100, context_length=100, prompt_name="messages")
    assert caught.value.param == "messages"
