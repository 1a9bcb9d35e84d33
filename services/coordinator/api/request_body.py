"""Reading a JSON request body field by field; knows JSON types and OpenAI's words for them, not what a field means.

Everything raised here is InvalidRequest with `param` set to the field's name.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Mapping
from typing import Any, NoReturn

import msgspec

from noodle.errors import InvalidRequest

MAXIMUM_SHOWN_CHARACTERS = 60  # of a name or value of the client's in a message
MAXIMUM_NAMED_FIELDS = 5  # of those that are unknown

JsonObject = dict[str, Any]


def decode_object(body: bytes) -> JsonObject:
    """The body as a JSON object; the message of what is no JSON says at which byte, NaN and 1e999 are none."""
    try:
        value = msgspec.json.decode(body)
    except RecursionError as error:
        raise InvalidRequest("The body is nested too deeply.") from error
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"The body is not UTF-8: {error.reason} in a text.") from error
    except msgspec.MsgspecError as error:
        problem = str(error).removeprefix("JSON is malformed: ")
        raise InvalidRequest(
            f"The body is not valid JSON: {problem}.", cure=f"{len(body)} bytes came; send one JSON object."
        ) from error
    if not isinstance(value, dict):
        raise InvalidRequest(f"The body is {json_type(value)}, not a JSON object.")
    return value


def json_type(value: Any) -> str:
    """What JSON calls a decoded value, with its article."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, int):
        return "an integer"
    if isinstance(value, float):
        return "a decimal number"
    if isinstance(value, str):
        return "a string"
    return "an object" if isinstance(value, dict) else "an array"


def shown(value: Any) -> str:
    """A client's value as it may stand in a message: short, whatever it was."""
    if isinstance(value, dict | list):
        return json_type(value) if value else json.dumps(value)
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 128:
        return "a huge integer"
    if isinstance(value, str):
        value = value[: MAXIMUM_SHOWN_CHARACTERS + 1]
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MAXIMUM_SHOWN_CHARACTERS else text[:MAXIMUM_SHOWN_CHARACTERS] + "..."


def wrong_type(name: str, expected: str, value: Any) -> NoReturn:
    raise InvalidRequest(f"Invalid type for '{name}': expected {expected}, but got {json_type(value)}.", param=name)


def wrong_value(name: str, expected: str, value: Any) -> NoReturn:
    raise InvalidRequest(f"Invalid value for '{name}': expected {expected}, but got {shown(value)}.", param=name)


def read_number(fields: Mapping[str, Any], name: str, default: float, *, minimum: float, maximum: float) -> float:
    """A number from `minimum` to `maximum`; absent or null is the default."""
    value = fields.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        wrong_type(name, "a number", value)
    if not minimum <= value <= maximum:
        wrong_value(name, f"a number from {minimum:g} to {maximum:g}", value)
    return float(value)


def read_integer(fields: Mapping[str, Any], name: str, *, minimum: int, maximum: int) -> int | None:
    """An integer from `minimum` to `maximum`, None if absent or null."""
    value = fields.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        wrong_type(name, "an integer", value)
    if not minimum <= value <= maximum:
        wrong_value(name, f"an integer from {minimum} to {maximum}", value)
    return value


def read_boolean(fields: Mapping[str, Any], name: str, default: bool = False) -> bool:
    """A boolean; absent or null is the default."""
    value = fields.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        wrong_type(name, "a boolean", value)
    return value


def read_object(fields: Mapping[str, Any], name: str) -> JsonObject:
    """An object; absent or null is an empty one."""
    value = fields.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        wrong_type(name, "an object", value)
    return value


def read_token_ids(name: str, values: list[Any], vocabulary_size: int) -> tuple[int, ...]:
    """A list of token ids, each in the vocabulary."""
    if values and set(map(type, values)) == {int} and min(values) >= 0 and max(values) < vocabulary_size:
        return tuple(values)  # a body holds millions of them: no loop but to name the one that is wrong
    for index, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int):
            wrong_type(f"{name}[{index}]", "a token id", value)
        if not 0 <= value < vocabulary_size:
            wrong_value(f"{name}[{index}]", f"a token id from 0 to {vocabulary_size - 1}", value)
    return tuple(values)


def same_json(left: Any, right: Any) -> bool:
    """Equality as JSON has it: 1 is 1.0, but not true."""
    return bool(left == right) and isinstance(left, bool) == isinstance(right, bool)


def refuse_what_is_not_honoured(
    fields: Mapping[str, Any],
    honoured: Collection[str],
    neutral_values: Mapping[str, tuple[Any, ...]],
    *,
    where: str = "",
) -> None:
    """Raise for the first field that would change the answer but is not honoured, and for unknown ones.

    `neutral_values` maps a known field to the values that mean what happens anyway; null always does.
    `where` is the path of an object inside the body, as "parameters.".
    """
    unknown = [name for name in fields if name not in honoured and name not in neutral_values]
    if unknown:
        named = ", ".join(f"'{where}{name[:MAXIMUM_SHOWN_CHARACTERS]}'" for name in unknown[:MAXIMUM_NAMED_FIELDS])
        more = f" and {len(unknown) - MAXIMUM_NAMED_FIELDS} more" if len(unknown) > MAXIMUM_NAMED_FIELDS else ""
        near = difflib.get_close_matches(unknown[0][:MAXIMUM_SHOWN_CHARACTERS], honoured, n=1)
        raise InvalidRequest(
            f"Unrecognized request argument supplied: {named}{more}.",
            cure=f"Did you mean '{where}{near[0]}'?" if near else "Leave it out.",
            param=where + unknown[0][:MAXIMUM_SHOWN_CHARACTERS],
        )
    for name, neutral in neutral_values.items():
        value = fields.get(name)
        if value is None or any(same_json(value, allowed) for allowed in neutral):
            continue
        allowed_texts = " or ".join(json.dumps(allowed) for allowed in neutral) or "null"
        raise InvalidRequest(
            f"'{where}{name}' is not supported here (it is {shown(value)}).",
            cure=f"Leave it out, or give {allowed_texts}.",
            param=where + name,
        )
