"""How a request wants its tokens generated, checked once for all of its forms; knows no route and no text."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from noodle.errors import ContextTooLong, InvalidRequest
from noodle.wire.messages import SamplingParameters
from services.coordinator.api.request_body import read_boolean, read_integer, read_number, wrong_type, wrong_value

FinishReason = Literal["length", "eos_token", "stop_sequence"]

MAXIMUM_NEW_TOKENS = (1 << 31) - 1  # the context is the true limit; this one keeps absurd numbers off the wire
MAXIMUM_TOP_K = (1 << 31) - 1
MAXIMUM_PRIORITY = 1000
MAXIMUM_SALT_CHARACTERS = 256
MAXIMUM_RESUME_SECONDS = 300
MAXIMUM_TIMEOUT_SECONDS = 86_400
MAXIMUM_STOP_CHARACTERS = 1000  # each of the stop strings
SEED_BITS_ON_THE_WIRE = 63
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
class GenerationParameters:
    """What a request asks of the generation; `seed` is the client's own number, or the one drawn for it.

    `length_name` is the field that asked for `max_new_tokens`; without one, the number is a default that
    `fit_into_context` cuts to what is left. After that call it is what will be generated at most.
    """

    max_new_tokens: int
    sampling: SamplingParameters
    seed: int
    length_name: str | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    stream: bool = False
    include_usage: bool = False
    scores: Scores = NO_SCORES
    priority: int = 0  # lower ones are served first
    cache_salt: str = ""  # only requests with the same one share what is computed of their beginnings
    resume_seconds: float = 0.0  # how long the request goes on without a reader
    timeout_seconds: float = 0.0  # from its arrival; 0 is none


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
) -> GenerationParameters:
    """Check the fields that all forms share: `length_names`, those of sampling, stop, ignore_eos and priority.

    Raises InvalidRequest naming the field. A seed is drawn when none is given, so that every answer can be repeated.
    """
    length_name, new_tokens = read_length(fields, length_names, minimum_tokens)
    seed = read_seed(fields)
    sampling = SamplingParameters(
        temperature=read_number(
            fields, "temperature", limits.default_temperature, minimum=0, maximum=limits.maximum_temperature
        ),
        top_p=read_top_p(fields),
        top_k=read_top_k(fields),
        seed=seed & ((1 << SEED_BITS_ON_THE_WIRE) - 1),
    )
    return GenerationParameters(
        max_new_tokens=limits.default_new_tokens if new_tokens is None else new_tokens,
        length_name=length_name,
        sampling=sampling,
        seed=seed,
        stop=read_stop(fields, limits.maximum_stop_strings),
        ignore_eos=read_boolean(fields, "ignore_eos"),
        stream=stream,
        include_usage=include_usage,
        scores=scores,
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


def fit_into_context(
    parameters: GenerationParameters, *, prompt_tokens: int, context_length: int, prompt_name: str
) -> GenerationParameters:
    """The parameters with a `max_new_tokens` that fits behind the prompt, which the request calls `prompt_name`.

    Raises ContextTooLong with the three numbers, and InvalidRequest for a prompt without tokens.
    """
    if prompt_tokens < 1:
        raise InvalidRequest(f"'{prompt_name}' is empty.", cure="Give at least one token.", param=prompt_name)
    left_tokens = context_length - prompt_tokens
    asked_tokens = parameters.max_new_tokens if parameters.length_name else 1
    if asked_tokens > left_tokens:
        cure = "Shorten the prompt" + (f", or ask for at most {left_tokens}." if left_tokens > 0 else ".")
        param = parameters.length_name if left_tokens > 0 else prompt_name
        raise ContextTooLong(_three_numbers(context_length, str(prompt_tokens), asked_tokens), cure=cure, param=param)
    return replace(parameters, max_new_tokens=min(parameters.max_new_tokens, left_tokens))


def refuse_what_can_not_fit(
    parameters: GenerationParameters, *, least_tokens: int, context_length: int, prompt_name: str
) -> None:
    """Raise ContextTooLong for a prompt that fills the context with the fewest tokens it can have.

    For what is cheap to count where tokenising it all would hold up everybody; `fit_into_context` decides later.
    """
    if least_tokens >= context_length:
        asked_tokens = parameters.max_new_tokens if parameters.length_name else 1
        raise ContextTooLong(
            _three_numbers(context_length, f"at least {least_tokens}", asked_tokens),
            cure="Shorten the prompt.",
            param=prompt_name,
        )


def _three_numbers(context_length: int, prompt_tokens: str, asked_tokens: int) -> str:
    return (
        f"This model's context is {context_length} tokens, but the prompt has {prompt_tokens} and "
        f"{asked_tokens} more {'is' if asked_tokens == 1 else 'are'} asked for."
    )
