"""The shapes of /generate and /generate_stream, as text-generation-inference has them; knows no HTTP, no generation.

A request that asks for no temperature, top_p, top_k or do_sample is greedy; with any of them it samples, at
temperature 1 unless told otherwise. `max_new_tokens` is 100 unless told otherwise, or what is left of the context if
that is less. Every answer has details; `details` adds each token's log-probability to them, `top_n_tokens` the
likeliest tokens at its place, `decoder_input_details` the prompt's tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from noodle.errors import InvalidRequest
from noodle.wire.messages import MAXIMUM_TOP_LOGPROBS
from services.coordinator.api.request_body import (
    JsonObject,
    decode_object,
    read_boolean,
    read_integer,
    read_object,
    read_token_ids,
    refuse_what_is_not_honoured,
    wrong_type,
)
from services.coordinator.engine.parameters import (
    ParameterLimits,
    Scores,
    read_generation_parameters,
    read_top_k,
    read_top_p,
)
from services.coordinator.engine.request import FinishReason, Request

MAXIMUM_STOP_STRINGS = 16
MAXIMUM_TEMPERATURE = 100.0
SAMPLING_TEMPERATURE = 1.0  # where sampling is asked for without a temperature
DEFAULT_NEW_TOKENS = 100

HONOURED = frozenset(
    {
        "max_new_tokens",
        "temperature",
        "top_p",
        "top_k",
        "do_sample",
        "seed",
        "stop",
        "ignore_eos",
        "priority",
        "cache_salt",
        "resume_seconds",
        "timeout_seconds",
        "details",
        "return_full_text",
        "decoder_input_details",
        "top_n_tokens",
    }
)
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "watermark": (False,),
    "truncate": (),
    "typical_p": (1,),
    "repetition_penalty": (1,),
    "frequency_penalty": (0,),
    "grammar": (),
    "adapter_id": (),
}


@dataclass(frozen=True)
class GenerateRequest:
    """A checked body of /generate or /generate_stream; the prompt is a text or token ids."""

    prompt: str | tuple[int, ...]
    request: Request
    return_full_text: bool


@dataclass(frozen=True)
class GeneratedToken:
    """One token of an answer. `text` is what it let out: held-back text comes with a later token."""

    id: int
    text: str
    special: bool
    logprob: float | None = None
    top: tuple[GeneratedToken, ...] = ()  # the likeliest at its place


def parse_generate(body: bytes, *, vocabulary_size: int, stream: bool) -> GenerateRequest:
    """Check a body; `stream` says which of the two routes it came to. Raises InvalidRequest naming the field."""
    fields = decode_object(body)
    if misplaced := sorted((HONOURED | set(NEUTRAL)) & set(fields)):
        raise InvalidRequest(
            f"'{misplaced[0]}' stands beside 'inputs'.",
            cure=f'Put it into \'parameters\': {{"inputs": ..., "parameters": {{"{misplaced[0]}": ...}}}}.',
            param=misplaced[0],
        )
    refuse_what_is_not_honoured(fields, {"inputs", "parameters"}, {})
    asked = read_object(fields, "parameters")
    refuse_what_is_not_honoured(asked, HONOURED, NEUTRAL, where="parameters.")
    limits = ParameterLimits(MAXIMUM_TEMPERATURE, default_temperature(asked), MAXIMUM_STOP_STRINGS, DEFAULT_NEW_TOKENS)
    request = read_generation_parameters(
        asked,
        limits,
        length_names=("max_new_tokens",),
        stream=stream,
        scores=read_scores(asked, stream),
    )
    check_do_sample(asked, request)
    return GenerateRequest(
        prompt=read_inputs(fields, vocabulary_size),
        request=request,
        return_full_text=read_boolean(asked, "return_full_text"),
    )


def read_scores(asked: Mapping[str, Any], stream: bool) -> Scores:
    """`details` and what adds to them: `top_n_tokens`, and `decoder_input_details`, which no stream has."""
    details = read_boolean(asked, "details")
    prompt_details = read_boolean(asked, "decoder_input_details")
    top_tokens = read_integer(asked, "top_n_tokens", minimum=0, maximum=MAXIMUM_TOP_LOGPROBS) or 0
    for name, given in (("decoder_input_details", prompt_details), ("top_n_tokens", top_tokens > 0)):
        if given and not details:
            raise InvalidRequest(
                f"'parameters.{name}' is given, but 'parameters.details' is not true.",
                cure="Set 'parameters.details'.",
                param=f"parameters.{name}",
            )
    if prompt_details and stream:
        raise InvalidRequest(
            "'parameters.decoder_input_details' is not supported in a stream.",
            cure="Use /generate.",
            param="parameters.decoder_input_details",
        )
    return Scores(details, top_tokens, prompt_details)


def default_temperature(asked: Mapping[str, Any]) -> float:
    """What an absent temperature means: greedy, unless something else asks for sampling."""
    samples = read_boolean(asked, "do_sample") or read_top_p(asked) < 1 or read_top_k(asked) > 0
    return SAMPLING_TEMPERATURE if samples else 0.0


def check_do_sample(asked: Mapping[str, Any], request: Request) -> None:
    """Raise InvalidRequest where `do_sample` says the contrary of the other parameters."""
    if asked.get("do_sample") is None:
        return
    do_sample = read_boolean(asked, "do_sample")
    if do_sample != (request.temperature > 0):
        others = "the temperature is 0" if do_sample else "a temperature, top_p or top_k asks for sampling"
        raise InvalidRequest(
            f"'parameters.do_sample' is {str(do_sample).lower()}, but {others}.",
            cure="Leave one of them out.",
            param="parameters.do_sample",
        )


def read_inputs(fields: Mapping[str, Any], vocabulary_size: int) -> str | tuple[int, ...]:
    """The prompt: a text or token ids."""
    inputs = fields.get("inputs")
    if not isinstance(inputs, str | list):
        wrong_type("inputs", "a string or an array of token ids", inputs)
    if not inputs:
        raise InvalidRequest("'inputs' is empty.", cure="Give at least one token.", param="inputs")
    return inputs if isinstance(inputs, str) else read_token_ids("inputs", inputs, vocabulary_size)


def generate_answer(text: str, details: JsonObject, *, prompt_text: str = "") -> JsonObject:
    """A whole answer; `prompt_text` is given when the request asked for the full text."""
    return {"generated_text": prompt_text + text, "details": details}


def generation_details(
    reason: FinishReason,
    request: Request,
    *,
    prompt_tokens: int,
    tokens: Sequence[GeneratedToken],
    prompt: Sequence[GeneratedToken] = (),
) -> JsonObject:
    """How a whole answer came about, with its tokens; `prompt` is given when the request asked for its details."""
    details: JsonObject = {
        **_counts(reason, request, prompt_tokens, len(tokens)),
        "tokens": [token_object(token, request.want_logprob) for token in tokens],
    }
    if request.want_logprob:
        details["prefill"] = [{"id": token.id, "text": token.text, "logprob": token.logprob} for token in prompt]
    if request.top_logprobs:
        details["top_tokens"] = [top_objects(token) for token in tokens]
    return details


def token_event(index: int, token: GeneratedToken, request: Request) -> JsonObject:
    """An event of the stream; `index` counts from 1."""
    event: JsonObject = {
        "index": index,
        "token": token_object(token, request.want_logprob),
        "generated_text": None,
        "details": None,
    }
    return {**event, "top_tokens": top_objects(token)} if request.top_logprobs else event


def last_token_event(
    token: GeneratedToken,
    text: str,
    reason: FinishReason,
    request: Request,
    *,
    prompt_tokens: int,
    generated_tokens: int,
    prompt_text: str = "",
) -> JsonObject:
    """The event of the last token, which also carries the whole text and the counts."""
    return {
        **token_event(generated_tokens, token, request),
        "generated_text": prompt_text + text,
        "details": _counts(reason, request, prompt_tokens, generated_tokens),
    }


def token_object(token: GeneratedToken, logprobs: bool) -> JsonObject:
    """One token as a client sees it; the log-probability only where it was asked for."""
    fields: JsonObject = {"id": token.id, "text": token.text, "special": token.special}
    return {**fields, "logprob": token.logprob} if logprobs else fields


def top_objects(token: GeneratedToken) -> list[JsonObject]:
    """The likeliest tokens at a token's place, likeliest first."""
    return [token_object(each, logprobs=True) for each in token.top]


def _counts(reason: FinishReason, request: Request, prompt_tokens: int, generated_tokens: int) -> JsonObject:
    return {
        "finish_reason": reason,
        "generated_tokens": generated_tokens,
        "prompt_tokens": prompt_tokens,
        "seed": request.seed,
    }
