"""The shapes of /generate and /generate_stream, as text-generation-inference has them; knows no HTTP, no generation.

A request that asks for no temperature, top_p, top_k or do_sample is greedy; with any of them it samples, at
temperature 1 unless told otherwise. `max_new_tokens` is 100 unless told otherwise, or what is left of the context if
that is less. `details` adds each token's log-probability, as the cluster computed it, to the details of every answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from noodle.errors import InvalidRequest
from services.coordinator.parameters import (
    FinishReason,
    GenerationParameters,
    ParameterLimits,
    read_generation_parameters,
    read_top_k,
    read_top_p,
)
from services.coordinator.request_body import (
    JsonObject,
    decode_object,
    read_boolean,
    read_object,
    read_token_ids,
    refuse_what_is_not_honoured,
    wrong_type,
)

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
        "details",
        "return_full_text",
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
    "decoder_input_details": (False,),
    "top_n_tokens": (0,),
}


@dataclass(frozen=True)
class GenerateRequest:
    """A checked body of /generate or /generate_stream; the prompt is a text or token ids."""

    prompt: str | tuple[int, ...]
    parameters: GenerationParameters
    return_full_text: bool


@dataclass(frozen=True)
class GeneratedToken:
    """One token of an answer. `text` is what it let out: held-back text comes with a later token."""

    id: int
    text: str
    special: bool
    logprob: float | None = None


def parse_generate(body: bytes, *, vocabulary_size: int, stream: bool) -> GenerateRequest:
    """Check a body; `stream` says which of the two routes it came to. Raises InvalidRequest naming the field."""
    fields = decode_object(body)
    refuse_what_is_not_honoured(fields, {"inputs", "parameters"}, {})
    asked = read_object(fields, "parameters")
    refuse_what_is_not_honoured(asked, HONOURED, NEUTRAL, where="parameters.")
    limits = ParameterLimits(MAXIMUM_TEMPERATURE, default_temperature(asked), MAXIMUM_STOP_STRINGS, DEFAULT_NEW_TOKENS)
    parameters = read_generation_parameters(
        asked,
        limits,
        length_names=("max_new_tokens",),
        stream=stream,
        logprobs=read_boolean(asked, "details"),
    )
    check_do_sample(asked, parameters)
    return GenerateRequest(
        prompt=read_inputs(fields, vocabulary_size),
        parameters=parameters,
        return_full_text=read_boolean(asked, "return_full_text"),
    )


def default_temperature(asked: Mapping[str, Any]) -> float:
    """What an absent temperature means: greedy, unless something else asks for sampling."""
    samples = read_boolean(asked, "do_sample") or read_top_p(asked) < 1 or read_top_k(asked) > 0
    return SAMPLING_TEMPERATURE if samples else 0.0


def check_do_sample(asked: Mapping[str, Any], parameters: GenerationParameters) -> None:
    """Raise InvalidRequest where `do_sample` says the contrary of the other parameters."""
    if asked.get("do_sample") is None:
        return
    do_sample = read_boolean(asked, "do_sample")
    if do_sample != (parameters.sampling.temperature > 0):
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
    reason: FinishReason, parameters: GenerationParameters, *, prompt_tokens: int, tokens: Sequence[GeneratedToken]
) -> JsonObject:
    """How a whole answer came about, with its tokens."""
    return {
        **_counts(reason, parameters, prompt_tokens, len(tokens)),
        "tokens": [token_object(token, parameters.logprobs) for token in tokens],
    }


def token_event(index: int, token: GeneratedToken, parameters: GenerationParameters) -> JsonObject:
    """An event of the stream; `index` counts from 1."""
    return {
        "index": index,
        "token": token_object(token, parameters.logprobs),
        "generated_text": None,
        "details": None,
    }


def last_token_event(
    token: GeneratedToken,
    text: str,
    reason: FinishReason,
    parameters: GenerationParameters,
    *,
    prompt_tokens: int,
    generated_tokens: int,
    prompt_text: str = "",
) -> JsonObject:
    """The event of the last token, which also carries the whole text and the counts."""
    return {
        **token_event(generated_tokens, token, parameters),
        "generated_text": prompt_text + text,
        "details": _counts(reason, parameters, prompt_tokens, generated_tokens),
    }


def token_object(token: GeneratedToken, logprobs: bool) -> JsonObject:
    """One token as a client sees it; the log-probability only where it was asked for."""
    fields: JsonObject = {"id": token.id, "text": token.text, "special": token.special}
    return {**fields, "logprob": token.logprob} if logprobs else fields


def _counts(
    reason: FinishReason, parameters: GenerationParameters, prompt_tokens: int, generated_tokens: int
) -> JsonObject:
    return {
        "finish_reason": reason,
        "generated_tokens": generated_tokens,
        "prompt_tokens": prompt_tokens,
        "seed": parameters.seed,
    }
