"""Reads JSON bodies into Structs and says in OpenAI's words what is wrong with one.

A Body declares the fields that noodle honours: their types and bounds check a request, word its refusal and describe
it in /openapi.json. Null means absent. Every refusal is InvalidRequest with `param` set to the field's name.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, NoReturn, TypeVar

import msgspec
from msgspec import inspect

from noodle.errors import InvalidRequest

MAXIMUM_SHOWN_CHARACTERS = 60  # of a client's name or value in a message
MAXIMUM_NAMED_FIELDS = 5  # unknown fields listed in one message

PLAIN_TYPES: tuple[tuple[inspect.Type, type], ...] = (  # all of whose values are taken
    (inspect.StrType(), str),
    (inspect.BoolType(), bool),
    (inspect.ListType(inspect.AnyType()), list),
)

JsonObject = dict[str, Any]
Neutral = Mapping[str, tuple[Any, ...]]
BodyT = TypeVar("BodyT", bound="Body")


class Body(msgspec.Struct, kw_only=True):
    """An object of a request. `Meta(extra=...)` words its refusals: `expected`, `bounds` and what an `item` is."""

    # known fields that are not honoured, with the values that change nothing; null is always one of them
    NEUTRAL: ClassVar[Neutral] = {}
    # labels and hints for a server's own use: no value of theirs can change an answer
    HARMLESS: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def refuse_first(cls, fields: JsonObject, where: str) -> None:
        """Raise for faults that would otherwise be reported as a less helpful one; called before any field is read."""


def neutral(names: str, *values: Any) -> Neutral:
    """Fields that are known but not honoured, for `Body.NEUTRAL`; they all change nothing at the same values."""
    return dict.fromkeys(names.split(), values)


@dataclass(frozen=True)
class _Field:
    name: str
    holder: type[msgspec.Struct]  # with the one field `value`: msgspec converts to Structs several times faster
    is_required: bool
    kinds: tuple[inspect.Type, ...]  # alternatives without null
    words: Mapping[str, str]
    plain_types: frozenset[type]  # of values that need no further check
    struct: type[Body] | None  # of an object
    item_struct: type[Body] | None  # of an array's items

    @property
    def expected(self) -> str:
        return self.words.get("expected") or " or ".join(_kind_name(kind) for kind in self.kinds)


def decode_object(body: bytes) -> JsonObject:
    """Decode a JSON object. The refusal of malformed JSON names the byte; NaN and 1e999 are malformed."""
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


def read(fields: JsonObject, kind: type[BodyT], where: str = "") -> BodyT:
    """Check an object in the order of the Struct's fields; `where` is its path in the body, as "messages[0]."."""
    kind.refuse_first(fields, where)
    refuse_unknown_fields(fields, kind, where)
    values = {}
    for field in _fields_of(kind):
        value = fields.get(field.name)
        if value is not None or field.is_required:
            # OpenAI names an option of an object alone, an item of a list by its path
            values[field.name] = _read_value(value, field, where + field.name if "[" in where else field.name)
    return kind(**values)


def read_items(values: Sequence[Any], kind: type[BodyT], path: str) -> list[BodyT]:
    """Check a list of objects."""
    items = []
    for index, value in enumerate(values):
        item_path = f"{path}[{index}]"
        if not isinstance(value, dict):
            wrong_type(item_path, "an object", value)
        items.append(read(value, kind, f"{item_path}."))
    return items


def _read_value(value: Any, field: _Field, path: str) -> Any:
    if isinstance(value, dict) and field.struct:
        return read(value, field.struct, f"{path}.")
    if isinstance(value, list) and field.item_struct:
        return read_items(value, field.item_struct, path)
    if type(value) in field.plain_types:
        return value
    try:
        return msgspec.convert({"value": value}, field.holder).value  # type: ignore[attr-defined]  # its one field
    except msgspec.ValidationError as error:
        if ", got `" in str(error):
            wrong_type(path, field.expected, value)
        _out_of_bounds(path, field, value, str(error))


def _out_of_bounds(path: str, field: _Field, value: Any, error: str) -> NoReturn:
    """Raise for a value of the right type; `error` is msgspec's own message."""
    if "of length" not in error:
        wrong_value(path, field.words.get("bounds") or _bounds_text(field.kinds[0]), value)
    limit, item = int(error.split("= ")[1].split()[0]), field.words.get("item", "string")
    if "`array`" in error:
        if not value:
            raise InvalidRequest(f"'{path}' is empty.", cure=f"Give at least one {item}.", param=path)
        problem = f"expected at most {limit} {item}s, but got {len(value)}"
    elif ">=" in error:
        problem = f"a {item} is empty"
    else:
        texts = value if isinstance(value, list) else [value]
        length = next(len(text) for text in texts if len(text) > limit)
        problem = f"expected at most {limit} characters, but got {length}"
    raise InvalidRequest(f"Invalid value for '{path}': {problem}.", param=path)


def refuse_unknown_fields(fields: JsonObject, kind: type[Body], where: str = "") -> None:
    """Raise for the first field that is unknown, or known but not honoured and with a value that asks for something."""
    honoured = _honoured(kind)
    if fields.keys() <= honoured:
        return
    if unknown := [name for name in fields if name not in honoured and name not in kind.NEUTRAL]:
        named = ", ".join(f"'{where}{name[:MAXIMUM_SHOWN_CHARACTERS]}'" for name in unknown[:MAXIMUM_NAMED_FIELDS])
        more = f" and {len(unknown) - MAXIMUM_NAMED_FIELDS} more" if len(unknown) > MAXIMUM_NAMED_FIELDS else ""
        near = difflib.get_close_matches(unknown[0][:MAXIMUM_SHOWN_CHARACTERS], honoured, n=1)
        raise InvalidRequest(
            f"Unrecognized request argument supplied: {named}{more}.",
            cure=f"Did you mean '{where}{near[0]}'?" if near else "Leave it out.",
            param=where + unknown[0][:MAXIMUM_SHOWN_CHARACTERS],
        )
    for name, neutral in kind.NEUTRAL.items():
        value = fields.get(name)
        if value is None or any(_is_same_json(value, allowed) for allowed in neutral):
            continue
        allowed_texts = " or ".join(json.dumps(allowed) for allowed in neutral) or "null"
        raise InvalidRequest(
            f"'{where}{name}' is not supported here (it is {shown(value)}).",
            cure=f"Leave it out, or give {allowed_texts}.",
            param=where + name,
        )


def read_prompt(prompt: str | list[Any], name: str, vocabulary_size: int) -> str | tuple[int, ...]:
    """A prompt that is a text or token ids, each in the vocabulary."""
    if not prompt:
        raise InvalidRequest(f"'{name}' is empty.", cure="Give at least one token.", param=name)
    if isinstance(prompt, str):
        return prompt
    if set(map(type, prompt)) == {int} and min(prompt) >= 0 and max(prompt) < vocabulary_size:
        return tuple(prompt)  # a body holds millions of them: no loop except to name the wrong one
    for index, value in enumerate(prompt):
        if isinstance(value, bool) or not isinstance(value, int):
            wrong_type(f"{name}[{index}]", "a token id", value)
        if not 0 <= value < vocabulary_size:
            wrong_value(f"{name}[{index}]", f"a token id from 0 to {vocabulary_size - 1}", value)
    return tuple(prompt)


def wrong_type(name: str, expected: str, value: Any) -> NoReturn:
    raise InvalidRequest(f"Invalid type for '{name}': expected {expected}, but got {json_type(value)}.", param=name)


def wrong_value(name: str, expected: str, value: Any) -> NoReturn:
    raise InvalidRequest(f"Invalid value for '{name}': expected {expected}, but got {shown(value)}.", param=name)


def json_type(value: Any) -> str:
    """What JSON calls a decoded value, with its article."""
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "an integer", float: "a decimal number", str: "a string", dict: "an object"}
    return names.get(type(value), "an array")


def shown(value: Any) -> str:
    """A client's value as a message shows it: never long."""
    if isinstance(value, dict | list):
        return json_type(value) if value else json.dumps(value)
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 128:
        return "a huge integer"
    if isinstance(value, str):
        value = value[: MAXIMUM_SHOWN_CHARACTERS + 1]
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MAXIMUM_SHOWN_CHARACTERS else text[:MAXIMUM_SHOWN_CHARACTERS] + "..."


def _is_same_json(left: Any, right: Any) -> bool:
    """Equality as JSON has it: 1 is 1.0, but not true."""
    return bool(left == right) and isinstance(left, bool) == isinstance(right, bool)


@cache
def _honoured(kind: type[Body]) -> frozenset[str]:
    return frozenset((*kind.__struct_fields__, *kind.HARMLESS))


@cache
def _fields_of(kind: type[Body]) -> tuple[_Field, ...]:
    info: Any = inspect.type_info(kind)
    fields = []
    for declared, described in zip(msgspec.structs.fields(kind), info.fields, strict=True):
        kinds, words = _kinds_and_words(described.type)
        items = [each.item_type for each in kinds if isinstance(each, inspect.ListType)]
        fields.append(
            _Field(
                name=declared.name,
                holder=msgspec.defstruct(declared.name, [("value", declared.type)]),
                is_required=declared.required,
                kinds=kinds,
                words=words,
                plain_types=frozenset(plain for kind, plain in PLAIN_TYPES if kind in kinds),
                struct=_struct_among(kinds),
                item_struct=_struct_among(items),
            )
        )
    return tuple(fields)


def _struct_among(kinds: Sequence[inspect.Type]) -> Any:
    return next((kind.cls for kind in kinds if isinstance(kind, inspect.StructType)), None)


def _kinds_and_words(info: inspect.Type) -> tuple[tuple[inspect.Type, ...], dict[str, str]]:
    """The alternatives of a type, without null, and the words of its annotations."""
    if isinstance(info, inspect.Metadata):
        kinds, words = _kinds_and_words(info.type)
        return kinds, words | (info.extra or {})
    if isinstance(info, inspect.UnionType):
        found = [_kinds_and_words(each) for each in info.types if not isinstance(each, inspect.NoneType)]
        words = {name: text for _, each in found for name, text in each.items()}
        return tuple(kind for kinds, _ in found for kind in kinds), words
    return (info,), {}


def _kind_name(kind: inspect.Type) -> str:
    names: dict[type[inspect.Type], str] = {
        inspect.IntType: "an integer",
        inspect.FloatType: "a number",
        inspect.BoolType: "a boolean",
        inspect.StrType: "a string",
        inspect.ListType: "an array",
    }
    return names.get(type(kind), "an object")


def _bounds_text(kind: Any) -> str:
    bounds = f"{kind.ge} to {kind.le}" if isinstance(kind, inspect.IntType) else f"{kind.ge:g} to {kind.le:g}"
    return f"{_kind_name(kind)} from {bounds}"
