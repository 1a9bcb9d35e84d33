"""OpenAI's routes: /v1/chat/completions, /v1/completions and /v1/models."""

from __future__ import annotations

from flask import Blueprint, Response
from msgspec.structs import replace

from noodle.config.settings import CoordinatorConfig
from noodle.web.service import json_body, json_response
from services.coordinator.api import openai_format
from services.coordinator.api.answering import event_stream, whole
from services.coordinator.api.auth import Clients, sent_by
from services.coordinator.api.openai_request import parse_chat, parse_completion
from services.coordinator.api.openai_schemas import (
    CHAT_ANSWER,
    CHAT_CHUNK,
    CHAT_REQUEST,
    COMPLETION_ANSWER,
    COMPLETION_CHUNK,
    COMPLETION_REQUEST,
    MODEL,
    MODEL_LIST,
)
from services.coordinator.api.openai_stream import CHAT, COMPLETION, OpenAIAnswer
from services.coordinator.api.openapi import GENERATION_ERRORS, READY_ERRORS, Operation
from services.coordinator.api.prompt_echo import prompt_text
from services.coordinator.coordinator import Coordinator, LoadedModel
from services.coordinator.engine.request import Request
from services.coordinator.text.answer import Answer

OPERATIONS = (
    Operation("get", "/v1/models", "The models served here: one, under each of its names.", MODEL_LIST, READY_ERRORS),
    Operation("get", "/v1/models/{name}", "One model by its name.", MODEL, (*READY_ERRORS, 404)),
    Operation(
        "post",
        "/v1/chat/completions",
        "The next message of a conversation, whole or streamed.",
        CHAT_ANSWER,
        (*GENERATION_ERRORS, 404),
        body=CHAT_REQUEST,
        event=CHAT_CHUNK,
    ),
    Operation(
        "post",
        "/v1/completions",
        "What follows a prompt, whole or streamed; with echo and logprobs also the prompt's own log-probabilities.",
        COMPLETION_ANSWER,
        (*GENERATION_ERRORS, 404),
        body=COMPLETION_REQUEST,
        event=COMPLETION_CHUNK,
    ),
)


def openai_routes(config: CoordinatorConfig, engine: Coordinator, clients: Clients) -> Blueprint:
    """Each wants an API key or the cluster token, or a loopback without keys."""
    routes = Blueprint("openai", __name__)

    @routes.get("/v1/models")
    def models() -> Response:
        clients.require()
        return json_response(openai_format.model_list(engine.ready_model().served))

    @routes.get("/v1/models/<path:name>")
    def model(name: str) -> Response:
        clients.require()
        return json_response(openai_format.model_object(name, engine.ready_model().served))

    @routes.post("/v1/chat/completions")
    def chat() -> Response:
        client = clients.require()
        loaded = engine.ready_model()
        body = json_body(config.maximum_body_bytes)
        asked = parse_chat(body, loaded.served, engine.context_length)
        request = replace(
            asked.request,
            prompt_token_ids=engine.chat_token_ids(asked.messages, asked.request),
            continues_prompt=False,
            answer_id=openai_format.new_chat_id(),
        )
        answer = engine.start(sent_by(client, request, body), client, prompt_name="messages")
        return answered(OpenAIAnswer(CHAT, answer_head(answer, request, loaded), answer), request)

    @routes.post("/v1/completions")
    def completions() -> Response:
        client = clients.require()
        loaded = engine.ready_model()
        body = json_body(config.maximum_body_bytes)
        asked = parse_completion(body, loaded.served)
        echo = prompt_text(asked.prompt, loaded.tokenizer) if asked.echo else None
        token_ids, answer_id = engine.token_ids(asked.prompt), openai_format.new_completion_id()
        request = replace(asked.request, prompt_token_ids=token_ids, answer_id=answer_id)
        answer = engine.start(sent_by(client, request, body), client, prompt_name="prompt")
        return answered(OpenAIAnswer(COMPLETION, answer_head(answer, request, loaded), answer, echo), request)

    return routes


def answer_head(answer: Answer, asked: Request, loaded: LoadedModel) -> openai_format.AnswerHead:
    """What all parts of this answer share."""
    first = answer.request
    return openai_format.AnswerHead(
        id=first.answer_id,
        model=loaded.served.names[0],
        created_seconds=first.created_unix_seconds,
        seed=first.seed,
        include_usage=asked.include_usage,
    )


def answered(answer: OpenAIAnswer, asked: Request) -> Response:
    """Whole or streamed, as the request asked."""
    if asked.stream:
        return event_stream(answer.events())
    return whole(answer.answer, answer.whole)
