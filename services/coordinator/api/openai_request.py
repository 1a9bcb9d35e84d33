"""What OpenAI's clients send to /v1, checked field by field; knows no HTTP, no tokenizer and no generation.

No field is accepted and ignored: one that noodle does not honour is refused by name unless its value asks for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from noodle.errors import InvalidRequest, UnknownModel
from noodle.wire.messages import MAXIMUM_TOP_LOGPROBS
from services.coordinator.api.openai_fields import (
    CHAT_HONOURED,
    CHAT_NEUTRAL,
    COMPLETION_HONOURED,
    COMPLETION_NEUTRAL,
    HARMLESS,
    STREAM_OPTIONS_NEUTRAL,
)
from services.coordinator.api.openai_messages import read_messages, refuse_more_messages_than_tokens
from services.coordinator.api.request_body import (
    JsonObject,
    decode_object,
    read_boolean,
    read_integer,
    read_object,
    read_token_ids,
    refuse_what_is_not_honoured,
    shown,
    wrong_type,
)
from services.coordinator.coordinator import ServedModel
from services.coordinator.engine.parameters import (
    MAXIMUM_NEW_TOKENS,
    ParameterLimits,
    Scores,
    read_generation_parameters,
)
from services.coordinator.engine.request import Request

MAXIMUM_STOP_STRINGS = 4
MAXIMUM_TEMPERATURE = 2.0
DEFAULT_TEMPERATURE = 1.0
DEFAULT_COMPLETION_TOKENS = 16

CHAT_LIMITS = ParameterLimits(MAXIMUM_TEMPERATURE, DEFAULT_TEMPERATURE, MAXIMUM_STOP_STRINGS, MAXIMUM_NEW_TOKENS)
COMPLETION_LIMITS = ParameterLimits(
    MAXIMUM_TEMPERATURE, DEFAULT_TEMPERATURE, MAXIMUM_STOP_STRINGS, DEFAULT_COMPLETION_TOKENS
)


@dataclass(frozen=True)
class ChatRequest:
    """A checked body of /v1/chat/completions; `messages` are ready for the chat template."""

    messages: tuple[dict[str, str], ...]
    request: Request


@dataclass(frozen=True)
class CompletionRequest:
    """A checked body of /v1/completions; the prompt is a text or token ids."""

    prompt: str | tuple[int, ...]
    request: Request
    echo: bool = False  # the prompt's text stands before the answer's


def parse_chat(body: bytes, served: ServedModel, context_length: int) -> ChatRequest:
    """Check a body of /v1/chat/completions; raises InvalidRequest naming the field, or UnknownModel.

    A conversation of more messages than `context_length` tokens is refused as ContextTooLong before each is read.
    """
    fields = decode_object(body)
    refuse_what_is_not_honoured(fields, CHAT_HONOURED | HARMLESS, CHAT_NEUTRAL)
    check_model(fields, served)
    request = _read_parameters(fields, CHAT_LIMITS, ("max_completion_tokens", "max_tokens"), read_chat_scores(fields))
    refuse_more_messages_than_tokens(fields.get("messages"), request, context_length)
    return ChatRequest(messages=read_messages(fields), request=request)


def parse_completion(body: bytes, served: ServedModel) -> CompletionRequest:
    """Check a body of /v1/completions; raises InvalidRequest naming the field, or UnknownModel."""
    fields = decode_object(body)
    refuse_what_is_not_honoured(fields, COMPLETION_HONOURED | HARMLESS, COMPLETION_NEUTRAL)
    check_model(fields, served)
    top_logprobs = read_integer(fields, "logprobs", minimum=0, maximum=MAXIMUM_TOP_LOGPROBS)
    echo = read_boolean(fields, "echo")
    scores = Scores(top_logprobs is not None, top_logprobs or 0, of_prompt=echo and top_logprobs is not None)
    if fields.get("max_tokens") == 0 and not echo:
        raise InvalidRequest(
            "'max_tokens' is 0 without 'echo', which asks for nothing.",
            cure="Ask for at least one token, or set 'echo'.",
            param="max_tokens",
        )
    return CompletionRequest(
        prompt=read_prompt(fields, served.vocabulary_size),
        echo=echo,
        request=_read_parameters(fields, COMPLETION_LIMITS, ("max_tokens",), scores, minimum_tokens=0),
    )


def read_chat_scores(fields: JsonObject) -> Scores:
    """`logprobs` and `top_logprobs` of a chat; the second alone is refused, as OpenAI does."""
    logprobs = read_boolean(fields, "logprobs")
    top_logprobs = read_integer(fields, "top_logprobs", minimum=0, maximum=MAXIMUM_TOP_LOGPROBS)
    if top_logprobs and not logprobs:
        raise InvalidRequest(
            "'top_logprobs' is given, but 'logprobs' is not true.", cure="Set 'logprobs'.", param="top_logprobs"
        )
    return Scores(logprobs, top_logprobs or 0)


def _read_parameters(
    fields: JsonObject,
    limits: ParameterLimits,
    length_names: tuple[str, ...],
    scores: Scores,
    minimum_tokens: int = 1,
) -> Request:
    stream = read_boolean(fields, "stream")
    options = read_object(fields, "stream_options")
    if options and not stream:
        raise InvalidRequest(
            "'stream_options' is given, but 'stream' is not true.", cure="Set 'stream'.", param="stream_options"
        )
    refuse_what_is_not_honoured(options, {"include_usage"}, STREAM_OPTIONS_NEUTRAL, where="stream_options.")
    return read_generation_parameters(
        fields,
        limits,
        length_names=length_names,
        stream=stream,
        include_usage=read_boolean(options, "include_usage"),
        scores=scores,
        minimum_tokens=minimum_tokens,
    )


def check_model(fields: JsonObject, served: ServedModel) -> None:
    """Raise UnknownModel for a name that is not served; a request without one means the one there is."""
    name = fields.get("model")
    if name is None:
        return
    if not isinstance(name, str):
        wrong_type("model", "a string", name)
    if name not in served.names:
        raise unknown_model(name, served)


def unknown_model(name: str, served: ServedModel) -> UnknownModel:
    """The error for a model name that is not served, naming those that are."""
    return UnknownModel(
        f"The model {shown(name)} does not exist here.",
        cure="Served: " + ", ".join(served.names) + ".",
        param="model",
    )


def read_prompt(fields: JsonObject, vocabulary_size: int) -> str | tuple[int, ...]:
    """One prompt: a text or token ids, or a list with one of them; several prompts are refused."""
    prompt = fields.get("prompt")
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        if len(prompt) > 1:
            raise InvalidRequest(
                f"Invalid value for 'prompt': expected one prompt, but got {len(prompt)}.",
                cure="Send one request for each; they are computed together.",
                param="prompt",
            )
        prompt = prompt[0]
    if not isinstance(prompt, str | list):
        wrong_type("prompt", "a string or an array of token ids", prompt)
    if not prompt:
        raise InvalidRequest("'prompt' is empty.", cure="Give at least one token.", param="prompt")
    return prompt if isinstance(prompt, str) else read_token_ids("prompt", prompt, vocabulary_size)
