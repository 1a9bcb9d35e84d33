"""Makes the OpenAPI document from the operations that each module of routes lists."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
from msgspec import Struct

from noodle import __version__
from services.coordinator.api.body import Body, JsonObject
from services.coordinator.api.sse import STREAM_END

COMPONENTS = "#/components/schemas/"
ERROR_TEXTS = {
    400: "The request is wrong; `param` names the field.",
    401: "The key or cluster token is missing or wrong.",
    404: "There is no such model, or no such request of this key.",
    408: "The body did not come in time.",
    409: "The Idempotency-Key came with another request before.",
    413: "The body is too large.",
    415: "The body is not declared as application/json.",
    422: "The request is well-formed, but this cluster cannot compute it.",
    429: "Too many requests are waiting, sending or in progress under this key; Retry-After says when to come again.",
    500: "The request could not be finished.",
    502: "Another service of the cluster could not be reached.",
    503: "The cluster is not ready; the message names what it waits for, Retry-After when to come again.",
    504: "The request was not finished in time.",
}
READY_ERRORS = (401, 503)
BODY_ERRORS = (400, 408, 413, 415, 429)
GENERATION_ERRORS = (*READY_ERRORS, *BODY_ERRORS, 409, 422, 500, 504)


class ErrorObject(Struct):
    message: str
    type: str
    param: str | None
    code: str


class Error(Struct):
    """What every error is answered with."""

    error: ErrorObject


ANY_OBJECT: JsonObject = {"type": "object"}
GUIDE_ERROR: JsonObject = {  # errors of the guide's routes, which say `success` beside whatever else they answer
    "type": "object",
    "properties": {"error": {"$ref": f"{COMPONENTS}ErrorObject"}, "success": {"const": False}},
    "required": ["error", "success"],
    "additionalProperties": False,
}


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One method of one path. Shapes are types that msgspec knows, or JSON Schemas.

    Of status 200, `answer` is a whole answer and `event` the data of a stream's events; a route has one of them, or
    both if the body asks for one or the other.
    """

    route: str = field(kw_only=False)  # as "GET /v1/models/{name}"
    summary: str
    description: str
    answer: Any = None
    errors: tuple[int, ...] = ()
    error_texts: Mapping[int, str] = field(default_factory=dict)  # instead of those in ERROR_TEXTS
    is_guide: bool = False  # whether errors also say `success`
    body: Any = None
    event: Any = None
    other_answers: Mapping[int, tuple[str, Any]] = field(default_factory=dict)
    media_type: str = "application/json"
    query: Mapping[str, Any] = field(default_factory=dict)
    items: tuple[Any, ...] = ()  # types that schemas name without using them

    @property
    def method(self) -> str:
        return self.route.partition(" ")[0].lower()

    @property
    def path(self) -> str:
        return self.route.partition(" ")[2]

    def shapes(self) -> Iterator[Any]:
        """All types and schemas of it."""
        others = (shape for _, shape in self.other_answers.values())
        named = (self.answer, self.body, self.event, *self.query.values(), *self.items, *others)
        yield from (shape for shape in named if shape is not None)


METRICS = Operation(
    "GET /metrics",
    summary="Metrics for Prometheus",
    description="The coordinator's metrics; requires the cluster token.",
    answer={"type": "string"},
    errors=(401,),
    media_type="text/plain",
)
OPENAPI = Operation(
    "GET /openapi.json",
    summary="This document",
    description="Describes every route of the coordinator.",
    answer=ANY_OBJECT,
    errors=(401,),
)


def describe(operations: Sequence[Operation]) -> JsonObject:
    """Make the document."""
    operations = tuple(operations)
    schemas = Schemas(operations)
    paths: JsonObject = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method] = _described(operation, schemas)
    return {
        "openapi": "3.1.0",
        "info": {"title": "noodle", "version": __version__, "description": "One language model over several machines."},
        "paths": paths,
        "security": [{"key": []}, {}],
        "components": {
            "schemas": schemas.components,
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer", "description": "An API key or the cluster token."}
            },
        },
    }


class Schemas:
    """The JSON Schemas of all types that operations use."""

    def __init__(self, operations: Sequence[Operation]) -> None:
        shapes = [shape for operation in operations for shape in operation.shapes() if not isinstance(shape, dict)]
        kinds = list(dict.fromkeys([*shapes, Error]))
        schemas, self.components = msgspec.json.schema_components(kinds, ref_template=f"{COMPONENTS}{{name}}")
        self._schemas = dict(zip(kinds, schemas, strict=True))
        _complete_components(self.components)
        self.components["GuideError"] = GUIDE_ERROR

    def of(self, shape: Any) -> JsonObject:
        return shape if isinstance(shape, dict) else self._schemas[shape]


def _complete_components(components: JsonObject) -> None:
    """Add what Structs do not say: that null means absent, which fields change nothing, and that no others exist."""
    bodies = {kind.__name__: kind for kind in _subclasses(Body)}
    for name, schema in components.items():
        properties, kind = schema["properties"], bodies.get(name)
        if kind is None:  # of an answer: all fields are there, except UNSET ones, which have no default here
            missing = object()
            schema["required"] += [
                field_name for field_name, each in properties.items() if each.pop("default", missing) is not missing
            ]
        else:
            for field_name in properties.keys() - set(schema["required"]):
                properties[field_name] = _nullable(properties[field_name])
            properties |= {label: {} for label in sorted(kind.HARMLESS)}
            properties |= {neutral: {"enum": [*values, None]} for neutral, values in kind.NEUTRAL.items()}
        schema["additionalProperties"] = False


def _nullable(schema: JsonObject) -> JsonObject:
    if {"type": "null"} in schema.get("anyOf", ()):
        return schema
    outer: JsonObject = {key: schema.pop(key) for key in ("description", "default") if key in schema}
    return {**outer, "anyOf": [schema, {"type": "null"}]}


def _subclasses(kind: type[Body]) -> Iterator[type[Body]]:
    for each in kind.__subclasses__():
        yield each
        yield from _subclasses(each)


def _described(operation: Operation, schemas: Schemas) -> JsonObject:
    described: JsonObject = {
        "summary": operation.summary,
        "description": operation.description,
        "operationId": re.sub(r"\W+", "_", f"{operation.method} {operation.path}").strip("_"),
        "responses": {str(status): answer for status, answer in sorted(_answers(operation, schemas).items())},
    }
    parameters: list[JsonObject] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in re.findall(r"{(\w+)}", operation.path)
    ]
    parameters += [
        {"name": name, "in": "query", "schema": schemas.of(shape)} for name, shape in operation.query.items()
    ]
    if parameters:
        described["parameters"] = parameters
    if operation.body is not None:
        described["requestBody"] = {"required": True, "content": _json(schemas.of(operation.body))}
    return described


def _answers(operation: Operation, schemas: Schemas) -> dict[int, JsonObject]:
    content: JsonObject = {}
    if operation.answer is not None:
        content[operation.media_type] = {"schema": schemas.of(operation.answer)}
    if operation.event is not None:
        content["text/event-stream"] = {"schema": _event(schemas.of(operation.event))}
    answers: dict[int, JsonObject] = {200: {"description": "Done.", "content": content}}
    error = {"$ref": COMPONENTS + ("GuideError" if operation.is_guide else "Error")}
    for status in operation.errors:
        text = operation.error_texts.get(status) or ERROR_TEXTS[status]
        answers[status] = {"description": text, "content": _json(error)}
    for status, (text, shape) in operation.other_answers.items():
        answers[status] = {"description": text, "content": _json(schemas.of(shape))}
    request_id = {"description": "The request's id, as in the log.", "schema": {"type": "string"}}
    return {status: {**answer, "headers": {"X-Request-Id": request_id}} for status, answer in answers.items()}


def _event(data: JsonObject) -> JsonObject:
    """One server-sent event: data, or an error after which the stream ends."""
    either = {"anyOf": [data, {"$ref": f"{COMPONENTS}Error"}]}
    text = {"type": "string", "contentMediaType": "application/json", "contentSchema": either}
    return {
        "type": "object",
        "description": "One event. The last one of a stream of /v1 has the text [DONE] as its data.",
        "properties": {
            "event": {"enum": ["message", "error"]},
            "data": {"if": {"const": STREAM_END}, "then": {"type": "string"}, "else": text},
        },
        "required": ["data"],
    }


def _json(schema: JsonObject) -> JsonObject:
    return {"application/json": {"schema": schema}}
