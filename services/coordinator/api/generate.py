"""The routes of text-generation-inference's shape: /generate, /generate_stream and /tokenize."""

from __future__ import annotations

from flask import Blueprint, Response
from msgspec.structs import replace

from noodle.config.settings import CoordinatorConfig
from noodle.web.service import json_body, json_response
from services.coordinator.api import generate_format
from services.coordinator.api.answering import event_stream, whole
from services.coordinator.api.auth import Clients, sent_by
from services.coordinator.api.generate_schemas import (
    GENERATE_ANSWER,
    GENERATE_REQUEST,
    TOKEN_EVENT,
    TOKENIZE_ANSWER,
    TOKENIZE_REQUEST,
)
from services.coordinator.api.generate_stream import generate_answer, generate_events
from services.coordinator.api.openapi import BODY_ERRORS, GENERATION_ERRORS, READY_ERRORS, Operation
from services.coordinator.api.prompt_echo import prompt_text
from services.coordinator.api.tokenize_format import parse_tokenize, tokenize_answer
from services.coordinator.coordinator import Coordinator

TOKENIZE_BODY_BYTES = 1 << 20  # each token of it becomes an object of the answer

OPERATIONS = (
    Operation(
        "post",
        "/generate",
        "What follows a prompt, with details of each token.",
        GENERATE_ANSWER,
        GENERATION_ERRORS,
        body=GENERATE_REQUEST,
    ),
    Operation(
        "post",
        "/generate_stream",
        "The same as server-sent events, one a token; the last one has the whole text.",
        None,
        GENERATION_ERRORS,
        body=GENERATE_REQUEST,
        event=TOKEN_EVENT,
    ),
    Operation(
        "post",
        "/tokenize",
        "The tokens of a text, each with its id and its place in the text.",
        TOKENIZE_ANSWER,
        (*READY_ERRORS, *BODY_ERRORS),
        body=TOKENIZE_REQUEST,
    ),
)


def generate_routes(config: CoordinatorConfig, engine: Coordinator, clients: Clients) -> Blueprint:
    """Each wants an API key or the cluster token, or a loopback without keys."""
    routes = Blueprint("generate", __name__)

    @routes.post("/generate")
    def generate() -> Response:
        return generated(stream=False)

    @routes.post("/generate_stream")
    def generate_stream() -> Response:
        return generated(stream=True)

    def generated(*, stream: bool) -> Response:
        client = clients.require()
        model = engine.ready_model()
        body = json_body(config.maximum_body_bytes)
        asked = generate_format.parse_generate(body, vocabulary_size=model.served.vocabulary_size, stream=stream)
        before = prompt_text(asked.prompt, model.tokenizer) if asked.return_full_text else ""
        request = replace(asked.request, prompt_token_ids=engine.token_ids(asked.prompt))
        answer = engine.start(sent_by(client, request, body), client, prompt_name="inputs")
        if stream:
            return event_stream(generate_events(answer, before))
        return whole(answer, lambda: generate_answer(answer, before))

    @routes.post("/tokenize")
    def tokenize() -> Response:
        clients.require()
        model = engine.ready_model()
        asked = parse_tokenize(json_body(TOKENIZE_BODY_BYTES, "Send less text at once."))
        pieces = model.tokenizer.pieces(asked.text, asked.add_special_tokens)
        return json_response(tokenize_answer(asked.text, pieces, model.tokenizer.texts))

    return routes
