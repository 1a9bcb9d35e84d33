"""What OpenAI's clients send to /v1, checked field by field; knows no HTTP, no tokenizer and no generation.

No field is accepted and ignored: one that noodle does not honour is refused by name unless its value asks for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from noodle.errors import InvalidRequest, UnknownModel
from services.coordinator.parameters import (
    MAXIMUM_NEW_TOKENS,
    GenerationParameters,
    ParameterLimits,
    read_generation_parameters,
    refuse_what_can_not_fit,
)
from services.coordinator.request_body import (
    JsonObject,
    decode_object,
    read_boolean,
    read_object,
    read_token_ids,
    refuse_what_is_not_honoured,
    shown,
    wrong_type,
)

MAXIMUM_STOP_STRINGS = 4
MAXIMUM_TEMPERATURE = 2.0
DEFAULT_TEMPERATURE = 1.0
DEFAULT_COMPLETION_TOKENS = 16

CHAT_LIMITS = ParameterLimits(MAXIMUM_TEMPERATURE, DEFAULT_TEMPERATURE, MAXIMUM_STOP_STRINGS, MAXIMUM_NEW_TOKENS)
COMPLETION_LIMITS = ParameterLimits(
    MAXIMUM_TEMPERATURE, DEFAULT_TEMPERATURE, MAXIMUM_STOP_STRINGS, DEFAULT_COMPLETION_TOKENS
)

HONOURED = frozenset(
    {"model", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "stream", "stream_options", "ignore_eos"}
)
CHAT_HONOURED = HONOURED | {"messages", "max_completion_tokens"}
COMPLETION_HONOURED = HONOURED | {"prompt"}

# Labels and hints for the server's own use: they can not change an answer, whatever their value.
HARMLESS = frozenset(
    {"user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "prompt_cache_options"}
)

# What OpenAI and the servers that speak its language know and noodle does not do, with the values that ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "min_p": (0,),
    "typical_p": (1,),
    "min_tokens": (0,),
    "use_beam_search": (False,),
    "early_stopping": (False,),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "echo": (False,),
    "stop_token_ids": ([],),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "truncate_prompt_tokens": (),
    "prompt_logprobs": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "priority": (0,),
}
CHAT_NEUTRAL: dict[str, tuple[Any, ...]] = {
    **NEUTRAL,
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),  # both mean the same where no tools are
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
    "moderation": (),
    "documents": ([],),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "add_special_tokens": (False,),
}
COMPLETION_NEUTRAL: dict[str, tuple[Any, ...]] = {
    **NEUTRAL,
    "logprobs": (),  # 0 asks for the log-probability of the chosen token
    "suffix": ("",),
    "add_special_tokens": (True,),
}
STREAM_OPTIONS_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "include_obfuscation": (False,),
    "continuous_usage_stats": (False,),
}
MESSAGE_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tool_calls": ([],),
    "tool_call_id": (),
    "function_call": (),
    "refusal": (),
    "audio": (),
    "annotations": ([],),
    "reasoning_content": (),
}
ROLES = ("system", "developer", "user", "assistant")


@dataclass(frozen=True)
class ServedModel:
    """What a request is checked against: the names this model answers to (the first is its own), and its size."""

    names: tuple[str, ...]
    vocabulary_size: int
    created_seconds: int  # Unix time, for OpenAI's `created`


@dataclass(frozen=True)
class ChatRequest:
    """A checked body of /v1/chat/completions; `messages` are ready for the chat template."""

    messages: tuple[dict[str, str], ...]
    parameters: GenerationParameters


@dataclass(frozen=True)
class CompletionRequest:
    """A checked body of /v1/completions; the prompt is a text or token ids."""

    prompt: str | tuple[int, ...]
    parameters: GenerationParameters


def parse_chat(body: bytes, served: ServedModel, context_length: int) -> ChatRequest:
    """Check a body of /v1/chat/completions; raises InvalidRequest naming the field, or UnknownModel.

    A conversation of more messages than `context_length` tokens is refused as ContextTooLong before each is read.
    """
    fields = decode_object(body)
    refuse_what_is_not_honoured(fields, CHAT_HONOURED | HARMLESS, CHAT_NEUTRAL)
    check_model(fields, served)
    parameters = _read_parameters(fields, CHAT_LIMITS, ("max_completion_tokens", "max_tokens"))
    refuse_more_messages_than_tokens(fields.get("messages"), parameters, context_length)
    return ChatRequest(messages=read_messages(fields), parameters=parameters)


def parse_completion(body: bytes, served: ServedModel) -> CompletionRequest:
    """Check a body of /v1/completions; raises InvalidRequest naming the field, or UnknownModel."""
    fields = decode_object(body)
    refuse_what_is_not_honoured(fields, COMPLETION_HONOURED | HARMLESS, COMPLETION_NEUTRAL)
    check_model(fields, served)
    return CompletionRequest(
        prompt=read_prompt(fields, served.vocabulary_size),
        parameters=_read_parameters(fields, COMPLETION_LIMITS, ("max_tokens",)),
    )


def _read_parameters(
    fields: JsonObject, limits: ParameterLimits, length_names: tuple[str, ...]
) -> GenerationParameters:
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


def refuse_more_messages_than_tokens(messages: Any, parameters: GenerationParameters, context_length: int) -> None:
    """Raise for a conversation that can not fit by its mere number of pieces: reading and rendering takes seconds."""
    if not isinstance(messages, list) or not messages:
        return
    refuse_what_can_not_fit(
        parameters, least_tokens=len(messages), context_length=context_length, prompt_name="messages"
    )
    contents = [message.get("content") for message in messages if isinstance(message, dict)]
    parts = sum(len(content) for content in contents if isinstance(content, list))
    if parts > context_length:
        raise InvalidRequest(
            f"The messages have {parts} text parts; as many are taken as the context has tokens, {context_length}.",
            cure="Join their texts.",
            param="messages",
        )


def read_messages(fields: JsonObject) -> tuple[dict[str, str], ...]:
    """The conversation as chat templates read it: role and content, and a name where one is given.

    A list of text parts becomes one text, a line each. `developer` is OpenAI's newer word for `system`, and
    templates know only that one.
    """
    messages = fields.get("messages")
    if not isinstance(messages, list):
        wrong_type("messages", "an array of messages", messages)
    if not messages:
        raise InvalidRequest("'messages' is empty.", cure="Give at least one message.", param="messages")
    return tuple(_read_message(message, f"messages[{index}]") for index, message in enumerate(messages))


def _read_message(message: Any, path: str) -> dict[str, str]:
    if not isinstance(message, dict):
        wrong_type(path, "an object", message)
    role = message.get("role")
    if role not in ROLES:
        reason = "Tools are not supported here" if role in ("tool", "function") else f"It is {shown(role)}"
        raise InvalidRequest(
            f"Invalid value for '{path}.role': {reason}.", cure=f"Use {', '.join(ROLES)}.", param=f"{path}.role"
        )
    refuse_what_is_not_honoured(message, {"role", "content", "name"}, MESSAGE_NEUTRAL, where=f"{path}.")
    checked = {
        "role": "system" if role == "developer" else role,
        "content": _read_content(message.get("content"), f"{path}.content"),
    }
    name = message.get("name")
    if name is not None:
        if not isinstance(name, str):
            wrong_type(f"{path}.name", "a string", name)
        checked["name"] = name
    return checked


def _read_content(content: Any, path: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        wrong_type(path, "a string or an array of text parts", content)
    texts = []
    for index, part in enumerate(content):
        part_path = f"{path}[{index}]"
        if not isinstance(part, dict):
            wrong_type(part_path, "an object", part)
        if part.get("type") != "text":
            raise InvalidRequest(
                f"Invalid value for '{part_path}.type': {shown(part.get('type'))} content is not supported here.",
                cure='Send {"type": "text", "text": ...}.',
                param=f"{part_path}.type",
            )
        refuse_what_is_not_honoured(part, {"type", "text"}, {}, where=f"{part_path}.")
        if not isinstance(part.get("text"), str):
            wrong_type(f"{part_path}.text", "a string", part.get("text"))
        texts.append(part["text"])
    return "\n".join(texts)


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
