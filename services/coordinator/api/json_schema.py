"""Words for JSON Schema, to say in few lines what requests and answers look like; knows no route."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from services.coordinator.api.request_body import JsonObject

ANYTHING: JsonObject = {}
STRING: JsonObject = {"type": "string"}
BOOLEAN: JsonObject = {"type": "boolean"}
INTEGER: JsonObject = {"type": "integer"}
NUMBER: JsonObject = {"type": "number"}
NULL: JsonObject = {"type": "null"}
COUNT: JsonObject = {"type": "integer", "minimum": 0}


def integer(minimum: int, maximum: int) -> JsonObject:
    return {"type": "integer", "minimum": minimum, "maximum": maximum}


def number(minimum: float, maximum: float) -> JsonObject:
    return {"type": "number", "minimum": minimum, "maximum": maximum}


def one_of(*values: Any) -> JsonObject:
    return {"enum": list(values)}


def array(items: Mapping[str, Any], **bounds: int) -> JsonObject:
    return {"type": "array", "items": items, **bounds}


def either(*schemas: Mapping[str, Any]) -> JsonObject:
    return {"anyOf": list(schemas)}


def nullable(schema: Mapping[str, Any]) -> JsonObject:
    """The same, or null."""
    kind = schema.get("type")
    if "enum" in schema:
        return {**schema, "enum": [*schema["enum"], None]}
    return {**schema, "type": [kind, "null"]} if isinstance(kind, str) else either(schema, NULL)


def always(properties: Mapping[str, Any], optional: Mapping[str, Any] | None = None) -> JsonObject:
    """An object with all of these, perhaps the optional ones, and nothing else."""
    return {
        "type": "object",
        "properties": {**properties, **(optional or {})},
        "required": list(properties),
        "additionalProperties": False,
    }


def asked(required: Mapping[str, Any], honoured: Mapping[str, Any], neutral: Mapping[str, Iterable[Any]]) -> JsonObject:
    """A request's object: what must be there, what may be (or be null), and what is known but asks for nothing."""
    optional = {name: nullable(schema) for name, schema in honoured.items()}
    optional |= {name: one_of(*values, None) for name, values in neutral.items()}
    return always(required, optional)
