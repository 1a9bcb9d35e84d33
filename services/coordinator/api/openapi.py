"""The OpenAPI document: made of the operations that each module of routes lists; knows JSON Schema, no route's work.

A module of routes has a tuple OPERATIONS, and app.py puts them together; a test holds them to the app's own map.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flask import Blueprint, Response

from noodle import __version__
from noodle.web.service import json_response
from services.coordinator.api.auth import Clients
from services.coordinator.api.openai_format import STREAM_END
from services.coordinator.api.request_body import JsonObject

Schema = Mapping[str, Any]

ERROR_TEXTS = {
    400: "The request is wrong; `param` names the field.",
    401: "The key or cluster token is missing or wrong.",
    404: "There is no such model, or no such request of this key.",
    408: "The body did not come in time.",
    409: "The Idempotency-Key came with another request before.",
    413: "The body is too large.",
    415: "The body is not declared as application/json.",
    422: "The request is well-formed, but this cluster can not compute it.",
    429: "As many as may be are waiting, sending or in progress under this key; Retry-After says when to come.",
    500: "The request could not be finished.",
    503: "The cluster is not ready; the message says what is waited for, Retry-After when to come again.",
    504: "The request was not finished within its timeout_seconds.",
}
READY_ERRORS = (401, 503)
BODY_ERRORS = (400, 408, 413, 415, 429)
GENERATION_ERRORS = (*READY_ERRORS, *BODY_ERRORS, 409, 422, 500, 504)
ERROR: Schema = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string", "minLength": 1},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
            "required": ["message", "type", "param", "code"],
            "additionalProperties": False,
        }
    },
    "required": ["error"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Operation:
    """One method of one path. Of status 200, `answer` is the schema of a whole answer, `event` that of the data of a
    stream's events; a route has one of them, or both where the body asks for one or the other."""

    method: str
    path: str  # parameters as {name}
    summary: str
    answer: Schema | None
    errors: tuple[int, ...]  # statuses that come with OpenAI's error object
    body: Schema | None = None
    event: Schema | None = None
    other_answers: Mapping[int, tuple[str, Schema]] = field(default_factory=dict)
    media_type: str = "application/json"
    query: Mapping[str, Schema] = field(default_factory=dict)

    @property
    def flask_rule(self) -> str:
        """The path as the app's map of URLs has it, but for the types of its parameters."""
        return re.sub(r"{(\w+)}", r"<\1>", self.path)


METRICS = Operation(
    "get",
    "/metrics",
    "For Prometheus; with the cluster token alone.",
    {"type": "string"},
    (401,),
    media_type="text/plain",
)


def document(operations: Iterable[Operation]) -> JsonObject:
    """The whole document."""
    paths: JsonObject = {}
    for operation in (*operations, OPENAPI):
        paths.setdefault(operation.path, {})[operation.method] = _described(operation)
    return {
        "openapi": "3.1.0",
        "info": {"title": "noodle", "version": __version__, "description": "One language model over several machines."},
        "paths": paths,
        "security": [{"key": []}, {}],
        "components": {
            "schemas": {"Error": ERROR},
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer", "description": "An API key or the cluster token."}
            },
        },
    }


def openapi_routes(described: JsonObject, clients: Clients) -> Blueprint:
    """`GET /openapi.json`."""
    routes = Blueprint("openapi", __name__)

    @routes.get("/openapi.json")
    def openapi() -> Response:
        clients.require()
        return json_response(described)

    return routes


OPENAPI = Operation("get", "/openapi.json", "This document.", {"type": "object"}, (401,))


def _described(operation: Operation) -> JsonObject:
    described: JsonObject = {
        "summary": operation.summary,
        "operationId": re.sub(r"\W+", "_", f"{operation.method} {operation.path}").strip("_"),
        "responses": {str(status): answer for status, answer in sorted(_answers(operation).items())},
    }
    parameters: list[JsonObject] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in re.findall(r"{(\w+)}", operation.path)
    ]
    parameters += [{"name": name, "in": "query", "schema": schema} for name, schema in operation.query.items()]
    if parameters:
        described["parameters"] = parameters
    if operation.body is not None:
        described["requestBody"] = {"required": True, "content": {"application/json": {"schema": operation.body}}}
    return described


def _event(data: Schema) -> JsonObject:
    """One server-sent event: data, or, after what could not be finished, an error."""
    either = {"anyOf": [data, {"$ref": "#/components/schemas/Error"}]}
    text = {"type": "string", "contentMediaType": "application/json", "contentSchema": either}
    return {
        "type": "object",
        "description": "One event. A stream of /v1 ends with the text [DONE] as the data of its last one.",
        "properties": {
            "event": {"enum": ["message", "error"]},
            "data": {"if": {"const": STREAM_END}, "then": {"type": "string"}, "else": text},
        },
        "required": ["data"],
    }


def _answers(operation: Operation) -> dict[int, JsonObject]:
    content: JsonObject = {}
    if operation.answer is not None:
        content[operation.media_type] = {"schema": operation.answer}
    if operation.event is not None:
        content["text/event-stream"] = {"schema": _event(operation.event)}
    answers: dict[int, JsonObject] = {200: {"description": "Done.", "content": content}}
    for status in operation.errors:
        schema = {"$ref": "#/components/schemas/Error"}
        answers[status] = {"description": ERROR_TEXTS[status], "content": {"application/json": {"schema": schema}}}
    for status, (text, schema_of_other) in operation.other_answers.items():
        answers[status] = {"description": text, "content": {"application/json": {"schema": schema_of_other}}}
    request_id = {"description": "The request's id, as in the log.", "schema": {"type": "string"}}
    return {status: {**answer, "headers": {"X-Request-Id": request_id}} for status, answer in answers.items()}
