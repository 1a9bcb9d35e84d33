"""How a request wants its tokens generated, checked once for all of its forms; knows no route and no text."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from noodle.errors import InvalidRequest
from services.coordinator.api.request_body import read_boolean, read_integer, read_number, wrong_type, wrong_value
from services.coordinator.engine.request import Request

MAXIMUM_NEW_TOKENS = (1 << 31) - 1  # the context is the true limit; this one keeps absurd numbers off the wire
MAXIMUM_TOP_K = (1 << 31) - 1
MAXIMUM_PRIORITY = 1000
MAXIMUM_SALT_CHARACTERS = 256
MAXIMUM_RESUME_SECONDS = 300
MAXIMUM_TIMEOUT_SECONDS = 86_400
MAXIMUM_STOP_CHARACTERS = 1000  # each of the stop strings
DRAWN_SEED_BITS = 53  # what a client that reads numbers as doubles can send back exactly


@dataclass(frozen=True)
class Scores:
    """Which log-probabilities a request asks for: of each new token, of so many likeliest tokens beside it, and
    whether the prompt's own tokens are scored in the same way."""

    wanted: bool = False
    top: int = 0
    of_prompt: bool = False


NO_SCORES = Scores()


@dataclass(frozen=True)
class ParameterLimits:
    """Where the forms of a request differ."""

    maximum_temperature: float
    default_temperature: float
    maximum_stop_strings: int
    default_new_tokens: int


def read_generation_parameters(
    fields: Mapping[str, Any],
    limits: ParameterLimits,
    *,
    length_names: tuple[str, ...],
    stream: bool = False,
    include_usage: bool = False,
    scores: Scores = NO_SCORES,
    minimum_tokens: int = 1,
) -> Request:
    """Check the fields that all forms share: `length_names`, those of sampling, stop, ignore_eos and priority.

    Raises InvalidRequest naming the field. A seed is drawn when none is given, so that every answer can be repeated.
    """
    length_name, new_tokens = read_length(fields, length_names, minimum_tokens)
    return Request(
        max_new_tokens=limits.default_new_tokens if new_tokens is None else new_tokens,
        length_name=length_name,
        temperature=read_number(
            fields, "temperature", limits.default_temperature, minimum=0, maximum=limits.maximum_temperature
        ),
        top_p=read_top_p(fields),
        top_k=read_top_k(fields),
        seed=read_seed(fields),
        stop=read_stop(fields, limits.maximum_stop_strings),
        ignore_eos=read_boolean(fields, "ignore_eos"),
        stream=stream,
        include_usage=include_usage,
        want_logprob=scores.wanted,
        top_logprobs=scores.top,
        score_prompt=scores.of_prompt,
        cache_salt=read_cache_salt(fields),
        resume_seconds=read_number(fields, "resume_seconds", 0.0, minimum=0, maximum=MAXIMUM_RESUME_SECONDS),
        timeout_seconds=read_timeout(fields),
        priority=read_integer(fields, "priority", minimum=-MAXIMUM_PRIORITY, maximum=MAXIMUM_PRIORITY) or 0,
    )


def read_length(fields: Mapping[str, Any], names: tuple[str, ...], minimum: int = 1) -> tuple[str | None, int | None]:
    """The number of new tokens and which of its names gave it; two that differ are refused."""
    given = {name: read_integer(fields, name, minimum=minimum, maximum=MAXIMUM_NEW_TOKENS) for name in names}
    numbers = {name: number for name, number in given.items() if number is not None}
    if len(set(numbers.values())) > 1:
        values = " and ".join(f"'{name}' is {number}" for name, number in numbers.items())
        raise InvalidRequest(f"{values}, but they mean the same.", cure="Give one of them.", param=next(iter(numbers)))
    return next(iter(numbers.items()), (None, None))


def read_seed(fields: Mapping[str, Any]) -> int:
    """Any 64-bit signed integer, as given; without one a random one."""
    seed = read_integer(fields, "seed", minimum=-(1 << 63), maximum=(1 << 63) - 1)
    return secrets.randbits(DRAWN_SEED_BITS) if seed is None else seed


def read_top_p(fields: Mapping[str, Any]) -> float:
    top_p = read_number(fields, "top_p", 1.0, minimum=0, maximum=1)
    if top_p == 0:
        wrong_value("top_p", "a number above 0 and at most 1 (temperature 0 is greedy)", fields["top_p"])
    return top_p


def read_cache_salt(fields: Mapping[str, Any]) -> str:
    """A word of the client's, as in vLLM; none is the empty one."""
    salt = fields.get("cache_salt")
    if salt is None:
        return ""
    if not isinstance(salt, str):
        wrong_type("cache_salt", "a string", salt)
    if len(salt) > MAXIMUM_SALT_CHARACTERS:
        wrong_value("cache_salt", f"at most {MAXIMUM_SALT_CHARACTERS} characters", salt)
    return str(salt)


def read_timeout(fields: Mapping[str, Any]) -> float:
    """Seconds from a request's arrival until it ends at the latest; 0 when it has no such bound."""
    if fields.get("timeout_seconds") is None:
        return 0.0
    seconds = read_number(fields, "timeout_seconds", 0.0, minimum=0, maximum=MAXIMUM_TIMEOUT_SECONDS)
    if seconds == 0:
        wrong_value("timeout_seconds", "a number above 0, or none at all", fields["timeout_seconds"])
    return seconds


def read_top_k(fields: Mapping[str, Any]) -> int:
    """0 is off, as is -1 in other servers."""
    top_k = read_integer(fields, "top_k", minimum=-1, maximum=MAXIMUM_TOP_K)
    return max(top_k or 0, 0)


def read_stop(fields: Mapping[str, Any], maximum_stop_strings: int) -> tuple[str, ...]:
    """Stop strings, one or a list; an empty one would stop before the first token and is refused."""
    value = fields.get("stop")
    if value is None:
        return ()
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list):
        wrong_type("stop", "a string or an array of strings", value)
    if len(texts) > maximum_stop_strings:
        raise InvalidRequest(
            f"Invalid value for 'stop': expected at most {maximum_stop_strings} strings, but got {len(texts)}.",
            param="stop",
        )
    for text in texts:
        if not isinstance(text, str):
            wrong_type("stop", "a string or an array of strings", texts)
        if not text:
            raise InvalidRequest("Invalid value for 'stop': a stop string is empty.", param="stop")
        if len(text) > MAXIMUM_STOP_CHARACTERS:
            raise InvalidRequest(
                f"Invalid value for 'stop': expected at most {MAXIMUM_STOP_CHARACTERS} characters, "
                f"but one has {len(text)}.",
                param="stop",
            )
    return tuple(dict.fromkeys(texts))
