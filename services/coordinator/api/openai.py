"""OpenAI's routes: /v1/chat/completions, /v1/completions and /v1/models."""

from __future__ import annotations

import secrets
from typing import Any, NamedTuple

from flask import Blueprint, Response
from msgspec.structs import replace

from noodle.config.settings import CoordinatorConfig
from noodle.errors import InvalidRequest, UnknownModel
from noodle.web.service import json_body, json_response
from services.coordinator.api.auth import Clients, sent_by
from services.coordinator.api.body import (
    decode_object,
    read,
    read_items,
    read_prompt,
    refuse_unknown_fields,
    shown,
)
from services.coordinator.api.openai_stream import ChatWriter, CompletionWriter
from services.coordinator.api.openai_types import (
    ChatAnswer,
    ChatBody,
    ChatChunk,
    CompletionAnswer,
    CompletionBody,
    Message,
    Model,
    ModelList,
    OpenAIFields,
)
from services.coordinator.api.openapi import GENERATION_ERRORS, READY_ERRORS, Operation
from services.coordinator.api.parameters import MAXIMUM_NEW_TOKENS, stop_strings
from services.coordinator.api.sse import event_stream, prompt_text, whole
from services.coordinator.coordinator import Coordinator, ServedModel
from services.coordinator.engine.request import Request, refuse_what_cannot_fit

DEFAULT_COMPLETION_TOKENS = 16

OPERATIONS = (
    Operation(
        "GET /v1/models",
        summary="List the models served",
        description="One model, under each of its names.",
        answer=ModelList,
        errors=READY_ERRORS,
    ),
    Operation(
        "GET /v1/models/{name}",
        summary="Describe one model",
        description="The model of this name.",
        answer=Model,
        errors=(*READY_ERRORS, 404),
    ),
    Operation(
        "POST /v1/chat/completions",
        summary="Continue a conversation",
        description="Answers with the next message of a conversation, whole or with `stream` as server-sent events. "
        "A field that noodle does not honour is refused by name, unless its value changes nothing.",
        answer=ChatAnswer,
        errors=(*GENERATION_ERRORS, 404),
        body=ChatBody,
        event=ChatChunk,
        items=(Message,),
    ),
    Operation(
        "POST /v1/completions",
        summary="Continue a prompt",
        description="Answers with what follows a text or token ids, whole or with `stream` as server-sent events. With "
        "`echo` and `logprobs` the answer also has the log-probabilities of the prompt's own tokens.",
        answer=CompletionAnswer,
        errors=(*GENERATION_ERRORS, 404),
        body=CompletionBody,
        event=CompletionAnswer,
    ),
)


class ChatRequest(NamedTuple):
    messages: list[dict[str, str]]  # ready for the chat template
    request: Request


class CompletionRequest(NamedTuple):
    prompt: str | tuple[int, ...]
    echo: bool  # whether the prompt's text precedes the answer's
    request: Request


def openai_routes(config: CoordinatorConfig, coordinator: Coordinator, clients: Clients) -> Blueprint:
    """Routes for clients: they require an API key or the cluster token, or without keys this machine's own address."""
    routes = Blueprint("openai", __name__)

    @routes.get("/v1/models")
    def models() -> Response:
        clients.require()
        return json_response(model_list(coordinator.ready_model().served))

    @routes.get("/v1/models/<path:name>")
    def model(name: str) -> Response:
        clients.require()
        return json_response(model_object(name, coordinator.ready_model().served))

    @routes.post("/v1/chat/completions")
    def chat() -> Response:
        client = clients.require()
        loaded = coordinator.ready_model()
        body = json_body(config.maximum_body_bytes)
        messages, request = parse_chat(body, loaded.served, coordinator.plan.context_length)
        request = replace(
            request,
            prompt_token_ids=coordinator.chat_token_ids(messages, request),
            continues_prompt=False,
            answer_id=f"chatcmpl-{secrets.token_hex(16)}",
        )
        answer = coordinator.start(sent_by(client, request, body), client, prompt_name="messages")
        return answered(ChatWriter(answer, loaded.served.names[0]))

    @routes.post("/v1/completions")
    def completions() -> Response:
        client = clients.require()
        loaded = coordinator.ready_model()
        body = json_body(config.maximum_body_bytes)
        prompt, echo, request = parse_completion(body, loaded.served)
        before = prompt_text(prompt, loaded.tokenizer) if echo else None
        request = replace(
            request, prompt_token_ids=coordinator.token_ids(prompt), answer_id=f"cmpl-{secrets.token_hex(16)}"
        )
        answer = coordinator.start(sent_by(client, request, body), client, prompt_name="prompt")
        return answered(CompletionWriter(answer, loaded.served.names[0], before))

    return routes


def answered(writer: CompletionWriter) -> Response:
    """Send the answer whole or as a stream, as its request asked."""
    if writer.answer.request.stream:
        return event_stream(writer.events())
    return whole(writer.answer, writer.whole)


def parse_chat(body: bytes, served: ServedModel, context_length: int) -> ChatRequest:
    """Check a body of /v1/chat/completions; raises InvalidRequest naming the field, or UnknownModel.

    A conversation of more messages than `context_length` tokens is refused as ContextTooLong before each is read.
    """
    fields = decode_object(body)
    refuse_unknown_fields(fields, ChatBody)
    check_model(fields.get("model"), served)
    asked = read(fields, ChatBody)
    if asked.top_logprobs and not asked.logprobs:
        raise InvalidRequest(
            "'top_logprobs' is given, but 'logprobs' is not true.", cure="Set 'logprobs'.", param="top_logprobs"
        )
    length_name, length = read_chat_length(asked)
    request = Request(
        **openai_values(asked),
        max_new_tokens=length,
        length_name=length_name,
        want_logprob=asked.logprobs,
        top_logprobs=asked.top_logprobs or 0,
    )
    count = len(asked.messages)
    refuse_what_cannot_fit(request, least_tokens=count, context_length=context_length, prompt_name="messages")
    refuse_many_text_parts(asked.messages, context_length)
    messages = [template_message(message) for message in read_items(asked.messages, Message, "messages")]
    return ChatRequest(messages, request)


def read_chat_length(asked: ChatBody) -> tuple[str | None, int]:
    """The number of tokens to generate at most, and the field that gave it; two that differ are refused."""
    names = ("max_completion_tokens", "max_tokens")
    lengths = {name: length for name in names if (length := getattr(asked, name)) is not None}
    if len(set(lengths.values())) > 1:
        values = " and ".join(f"'{name}' is {length}" for name, length in lengths.items())
        raise InvalidRequest(f"{values}, but they mean the same.", cure="Give one of them.", param=names[0])
    return next(iter(lengths.items()), (None, MAXIMUM_NEW_TOKENS))


def parse_completion(body: bytes, served: ServedModel) -> CompletionRequest:
    """Check a body of /v1/completions; raises InvalidRequest naming the field, or UnknownModel."""
    fields = decode_object(body)
    refuse_unknown_fields(fields, CompletionBody)
    check_model(fields.get("model"), served)
    asked = read(fields, CompletionBody)
    if asked.max_tokens == 0 and not asked.echo:
        raise InvalidRequest(
            "'max_tokens' is 0 without 'echo', which asks for nothing.",
            cure="Ask for at least one token, or set 'echo'.",
            param="max_tokens",
        )
    is_scored = asked.logprobs is not None
    request = Request(
        **openai_values(asked),
        max_new_tokens=DEFAULT_COMPLETION_TOKENS if asked.max_tokens is None else asked.max_tokens,
        length_name=None if asked.max_tokens is None else "max_tokens",
        want_logprob=is_scored,
        top_logprobs=asked.logprobs or 0,
        score_prompt=asked.echo and is_scored,
    )
    prompt = read_prompt(_only_prompt(asked.prompt), "prompt", served.vocabulary_size)
    return CompletionRequest(prompt, asked.echo, request)


def openai_values(asked: OpenAIFields) -> dict[str, Any]:
    """The fields of a Request that both routes read in the same way."""
    options = asked.stream_options
    return {
        **asked.shared_values(),
        "temperature": asked.temperature,
        "stop": stop_strings(asked.stop),
        "stream": asked.stream,
        "include_usage": options is not None and options.include_usage,
    }


def _only_prompt(prompt: str | list[Any]) -> str | list[Any]:
    """The one prompt of a list; several are refused."""
    if isinstance(prompt, str) or not prompt or not isinstance(prompt[0], str | list):
        return prompt
    if len(prompt) > 1:
        raise InvalidRequest(
            f"Invalid value for 'prompt': expected one prompt, but got {len(prompt)}.",
            cure="Send one request for each; they are computed together.",
            param="prompt",
        )
    only: str | list[Any] = prompt[0]
    return only


def refuse_many_text_parts(messages: list[Any], context_length: int) -> None:
    """Raise for more text parts than the context has tokens: reading and rendering them takes seconds."""
    contents = [message.get("content") for message in messages if isinstance(message, dict)]
    parts = sum(len(content) for content in contents if isinstance(content, list))
    if parts > context_length:
        raise InvalidRequest(
            f"The messages have {parts} text parts, more than the context's {context_length} tokens.",
            cure="Join their texts.",
            param="messages",
        )


def template_message(message: Message) -> dict[str, str]:
    """A message as chat templates read it; they know OpenAI's `developer` by its older name, `system`."""
    content = message.content
    text = content if isinstance(content, str) else "\n".join(part.text for part in content)
    read = {"role": "system" if message.role == "developer" else message.role, "content": text}
    return read if message.name is None else {**read, "name": message.name}


def check_model(name: Any, served: ServedModel) -> None:
    """Raise UnknownModel for a name that is not served."""
    if isinstance(name, str) and name not in served.names:
        names = ", ".join(served.names)
        raise UnknownModel(f"The model {shown(name)} does not exist here.", cure=f"Served: {names}.", param="model")


def model_object(name: str, served: ServedModel) -> Model:
    """OpenAI's model object; raises UnknownModel."""
    check_model(name, served)
    return Model(id=name, created=served.created_seconds)


def model_list(served: ServedModel) -> ModelList:
    return ModelList(data=[model_object(name, served) for name in served.names])
